"""The process that captures a source: frames as those of clips, and what happens when either side ends."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.errors import ConfigError, MissingExtraError
from echoquad_runtime.frames.discovery import find_frames
from echoquad_runtime.frames.frame_file import FrameFile
from echoquad_runtime.frames.reader import load_grey_and_flags
from echoquad_serve.errors import LiveSourceError
from echoquad_serve.live import capture as capture_module
from echoquad_serve.live.capture import Capture, CapturedFrame, Picture, open_source

av = pytest.importorskip("av")


@contextmanager
def capturing(spec: str, max_fps: float = 1000.0) -> Iterator[Capture]:
    capture = open_source(spec, max_fps)
    try:
        yield capture
    finally:
        capture.end()


def read_frames(capture: Capture, count: int) -> list[CapturedFrame]:
    frames = [capture.read() for _ in range(count)]
    assert all(isinstance(frame, CapturedFrame) for frame in frames)
    return [frame for frame in frames if isinstance(frame, CapturedFrame)]


ENCODINGS = [
    ("clip.avi", "mjpeg", "yuvj420p", False),
    ("clip.avi", "rawvideo", "bgr24", False),
    ("clip.avi", "rawvideo", "gray", False),
    ("clip.avi", "rawvideo", "yuyv422", False),
    ("clip.mp4", "mpeg4", "yuv420p", False),
    ("clip.mp4", "libx264", "yuv420p", True),
    ("clip.mkv", "libx264", "yuv420p10le", False),
    ("clip.mkv", "ffv1", "yuv420p10le", True),
    ("clip.mkv", "ffv1", "gray16le", False),
    ("clip.mkv", "ffv1", "bgr0", False),
]


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "full_range"), ENCODINGS, ids=[f"{codec}-{pixels}" for _, codec, pixels, _ in ENCODINGS]
)
def test_live_frames_equal_those_of_the_clip(
    name: str,
    codec: str,
    pixels: str,
    full_range: bool,
    tmp_path: Path,
    write_clip: Callable[..., Path],
    make_frame: Callable[..., np.ndarray],
) -> None:
    if codec not in av.codecs_available:
        pytest.skip("not supported by this FFmpeg")
    pictures = [np.repeat(make_frame(seed)[..., None], 3, axis=2) for seed in range(6)]
    for picture in pictures[3:]:
        picture[..., 0] //= 2
    path = write_clip(tmp_path / name, pictures, codec, pixels, rate=100, full_range=full_range)
    files = [file for file in find_frames([path]) if isinstance(file, FrameFile)]
    with capturing(str(path)) as capture:
        live = read_frames(capture, 8)
    assert len(files) == 6
    for index, frame in enumerate(live):
        grey, flags = load_grey_and_flags(files[index % 6])
        assert np.array_equal(frame.grey, grey)
        assert frame.flags == flags
        assert frame.part == 1 + index // 6  # at its end a file begins again


def test_rotated_clip_is_upright(
    tmp_path: Path, write_clip: Callable[..., Path], make_frame: Callable[..., np.ndarray]
) -> None:
    pictures = [np.repeat(make_frame(seed)[..., None], 3, axis=2) for seed in range(3)]
    path = write_clip(tmp_path / "clip.mp4", pictures, "mpeg4", "yuv420p")
    data = path.read_bytes()
    unity = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    quarter = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    at = data.index(unity, data.index(b"tkhd"))
    path.write_bytes(data[:at] + quarter + data[at + len(quarter) :])
    (file, *_) = (file for file in find_frames([path]) if isinstance(file, FrameFile))
    with capturing(str(path)) as capture:
        (frame,) = read_frames(capture, 1)
    assert frame.grey.shape == (80, 60)
    assert np.array_equal(frame.grey, load_grey_and_flags(file)[0])


def test_graph_plays_at_its_own_rate_with_times_of_capture() -> None:
    with capturing("lavfi:testsrc=size=80x60:rate=50") as capture:
        frames = read_frames(capture, 30)
        now = time.monotonic()
    times = np.array([frame.captured for frame in frames])
    assert np.diff(times) == pytest.approx(0.02, abs=1e-6)
    assert times[-1] <= now < times[-1] + 1
    assert frames[0].grey.shape == (60, 80)


def test_frames_beyond_the_largest_rate_are_left_out_and_counted() -> None:
    with capturing("lavfi:testsrc=size=80x60:rate=100", 25) as capture:
        frames = read_frames(capture, 10)
    times = np.array([frame.captured for frame in frames])
    assert np.diff(times) == pytest.approx(0.04, abs=0.011)
    assert np.diff(times).mean() == pytest.approx(0.04, abs=0.002)
    assert 26 <= frames[-1].skipped <= 28


def test_pictures_in_colour_come_only_while_they_are_wanted() -> None:
    with capturing("lavfi:color=red:size=2400x1800:rate=20") as capture:
        read_frames(capture, 3)
        capture.watch(True)
        pictures = [message for message in (capture.read() for _ in range(20)) if isinstance(message, Picture)]
        image = Image.open(io.BytesIO(pictures[-1].jpeg))
        assert (image.size, image.mode) == ((1200, 900), "RGB")
        assert np.asarray(image).reshape(-1, 3).mean(axis=0) == pytest.approx([254, 0, 0], abs=3)
        capture.watch(False)
        late = [capture.read() for _ in range(25)][15:]
        assert all(isinstance(message, CapturedFrame) for message in late)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("lavfi:nosuchfilter", "cannot be opened"),
        ("lavfi:anullsrc", "no video"),
        ("v4l2:/dev/video-none", "cannot be opened"),
        ("rtsp://127.0.0.1:1/main", "cannot be opened"),
        ("{folder}/missing.avi", "cannot be opened"),
        ("{folder}", "cannot be opened"),
        ("{folder}/text.avi", "cannot be opened"),
        ("{folder}/list.m3u8", "cannot be opened"),
        ("lavfi:color=size=8000x6000", "pixels"),
    ],
)
def test_source_that_cannot_be_captured_says_why_in_one_line(spec: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "text.avi").write_text("no clip")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
    with capturing(spec.format(folder=tmp_path)) as capture, pytest.raises(LiveSourceError, match=expected) as caught:
        capture.read()
    text = str(caught.value)
    assert "\n" not in text
    assert str(tmp_path) not in text
    assert "127.0.0.1" not in text


def test_killed_process_ends_the_read() -> None:
    with capturing("lavfi:testsrc=size=80x60:rate=50") as capture:
        read_frames(capture, 1)
        os.kill(capture.pid, signal.SIGABRT)
        with pytest.raises(LiveSourceError, match="ended"):
            read_frames(capture, 1000)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("spec", ["lavfi:testsrc=size=80x60:rate=50", "{folder}/fifo.avi"], ids=["busy", "blocked"])
def test_process_ends_with_its_parent(spec: str, tmp_path: Path, wait_until: Callable[..., float]) -> None:
    os.mkfifo(tmp_path / "fifo.avi")
    program = textwrap.dedent("""
        import sys, time
        from echoquad_serve.live.capture import open_source
        capture = open_source(sys.argv[1])
        print(capture.pid, flush=True)
        time.sleep(1000)
    """)
    command = [sys.executable, "-c", program, spec.format(folder=tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.2)
        assert is_running(pid)
        parent.kill()
    wait_until(lambda: not is_running(pid))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_missing_package_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r'pip install "echoquad\[video\]"') as caught:
        open_source("lavfi:testsrc")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("max_fps", [0, -1, float("inf"), float("nan")])
def test_rate_must_be_a_number_above_zero(max_fps: float) -> None:
    with pytest.raises(ConfigError, match="max_fps"):
        open_source("lavfi:testsrc", max_fps)


GOOD: dict[str, Any] = {"frame": [2, 3], "captured": 1.0, "part": 1, "skipped": 0, "flags": ["uncropped"]}


@pytest.mark.parametrize(
    "output",
    [
        b"no JSON\n",
        b"[" * 100_000 + b"\n",
        b"x" * 200_000,
        json.dumps({**GOOD, "frame": [0, 3]}).encode() + b"\n",
        json.dumps({**GOOD, "frame": [2, -3]}).encode() + b"\n",
        json.dumps({**GOOD, "frame": [60_000, 60_000]}).encode() + b"\n",
        json.dumps({**GOOD, "flags": ["a\nb"]}).encode() + b"\n",
        json.dumps({**GOOD, "captured": "now"}).encode() + b"\n",
        json.dumps({"picture": 1 << 40}).encode() + b"\n",
        json.dumps({"error": "two\nlines"}).encode() + b"\n",
        json.dumps(GOOD).encode() + b"\n12345",
        b"",
    ],
)
def test_messages_of_another_form_end_the_capture(output: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    program = f"import sys; sys.stdin.readline(); sys.stdout.buffer.write({output!r})"
    if len(output) > 50_000:
        program = (
            f"import sys; sys.stdin.readline(); sys.stdout.buffer.write({output[:1]!r} * {len(output) - 1} + b'\\n')"
        )
    monkeypatch.setattr(capture_module, "_PROGRAM", program)
    with capturing("lavfi:testsrc") as capture, pytest.raises(LiveSourceError):
        capture.read()


def test_time_of_capture_is_not_in_the_future(monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps({**GOOD, "captured": 1e12}).encode() + b"\n123456"
    program = f"import sys; sys.stdin.readline(); sys.stdout.buffer.write({line!r})"
    monkeypatch.setattr(capture_module, "_PROGRAM", program)
    with capturing("lavfi:testsrc") as capture:
        (frame,) = read_frames(capture, 1)
    assert frame.captured <= time.monotonic()
    assert frame.grey.tobytes() == b"123456"
