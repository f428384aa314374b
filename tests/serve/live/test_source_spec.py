"""Names of live sources: what they mean, which are refused, and what of them may be shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from echoquad_runtime.errors import ConfigError
from echoquad_serve.live.source_spec import parse_source


@pytest.mark.parametrize(
    ("spec", "kind", "address", "options"),
    [
        ("v4l2:/dev/video0", "v4l2", "/dev/video0", {}),
        (
            "v4l2:/dev/video1?video_size=1280x720&framerate=30",
            "v4l2",
            "/dev/video1",
            {"video_size": "1280x720", "framerate": "30"},
        ),
        ("rtsp://cart:secret@10.0.0.7:554/main", "rtsp", "rtsp://cart:secret@10.0.0.7:554/main", {}),
        ("rtsps://10.0.0.7/main", "rtsp", "rtsps://10.0.0.7/main", {}),
        ("lavfi:testsrc=size=80x60:rate=10", "lavfi", "testsrc=size=80x60:rate=10", {}),
        ("clip.avi", "file", str(Path("clip.avi").absolute()), {}),
        ("/clips/a:b.mp4", "file", str(Path("/clips/a:b.mp4").absolute()), {}),
    ],
)
def test_names_of_sources(spec: str, kind: str, address: str, options: dict[str, str]) -> None:
    source = parse_source(spec)
    assert (source.kind, source.address, source.options) == (kind, address, options)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "v4l2:",
        "lavfi:",
        "rtsp://",
        "rtsp:///main",
        "rtsp://host:99999/",
        "http://host/live",
        "udp://@:1234",
        "v4l2:/dev/video0?protocol_whitelist=file",
        "a\0b",
    ],
)
def test_other_names_are_refused_in_one_line(spec: str) -> None:
    with pytest.raises(ConfigError, match="live source") as caught:
        parse_source(spec)
    assert "\n" not in str(caught.value)


def test_title_and_representation_hold_no_password_and_no_file_name() -> None:
    source = parse_source("rtsp://cart:secret@10.0.0.7:554/main?key=secret")
    assert source.title == "rtsp://10.0.0.7:554"
    assert "secret" not in repr(source)
    assert parse_source("/clips/Jane_Doe.avi").title == "file"
    assert parse_source("lavfi:movie=/clips/Jane_Doe.avi,fps=30").title == "lavfi:movie"
    assert parse_source("v4l2:/dev/video0").title == "v4l2:/dev/video0"
