"""Video files: order and levels of frames, colour range, threads, damage, and refusals."""

from __future__ import annotations

import io
import random
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.errors import FrameDamagedError, FrameExtraError, FrameFormatError
from echoquad_runtime.frames.discovery import find_frames
from echoquad_runtime.frames.formats import ReadOptions
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.frames.reader import clear_file_cache, load_grey, load_grey_and_flags, load_image

av = pytest.importorskip("av")

from echoquad_runtime.frames.video import stretch_limited_range  # noqa: E402


def level(number: int) -> int:
    return 20 + 9 * number


def video(
    container: str, codec: str, pixels: str, frames: int = 24, *, colour: bool = False, times: list[int] | None = None
) -> bytes:
    """Return a clip whose frames have one level each, brighter in the left half; in red with `colour`."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as out:
        track = out.add_stream(codec, rate=25)
        track.width, track.height, track.pix_fmt = 64, 48, pixels
        for number in range(1, frames + 1):
            levels = np.full((48, 64, 3), level(number), np.uint8)
            levels[:, :32] += 10
            if colour:
                levels[..., 1:] = 0
            frame = av.VideoFrame.from_ndarray(levels, "rgb24")
            frame.pts = number - 1 if times is None else times[number - 1]
            out.mux(track.encode(frame))
        out.mux(track.encode())
    return stream.getvalue()


ENCODINGS = [
    ("avi", "mjpeg", "yuvj420p"),
    ("avi", "mpeg4", "yuv420p"),
    ("avi", "rawvideo", "bgr24"),
    ("avi", "rawvideo", "gray"),
    ("avi", "rawvideo", "yuyv422"),
    ("mp4", "mpeg4", "yuv420p"),
    ("mp4", "h264", "yuv420p"),
    ("matroska", "ffv1", "yuv444p"),
    ("matroska", "ffv1", "bgr0"),
]


def find_in_file(path: Path, options: ReadOptions | None = None) -> list[FrameFile]:
    frames = list(find_frames([path], options or ReadOptions()))
    assert all(isinstance(frame, FrameFile) for frame in frames), frames
    return [frame for frame in frames if isinstance(frame, FrameFile)]


@pytest.mark.parametrize(("container", "codec", "pixels"), ENCODINGS, ids=["-".join(kind) for kind in ENCODINGS])
def test_frames_are_decoded_in_order_at_their_levels(container: str, codec: str, pixels: str, tmp_path: Path) -> None:
    if codec not in av.codecs_available:
        pytest.skip("not supported by this FFmpeg")
    path = tmp_path / f"clip.{ {'matroska': 'mkv'}.get(container, container) }"
    path.write_bytes(video(container, codec, pixels))
    frames = find_in_file(path)
    assert [frame.name for frame in frames] == [f"{path.name}#{number}" for number in range(1, 25)]
    for number, frame in enumerate(frames, 1):
        grey, flags = load_grey_and_flags(frame)
        assert grey.shape == (48, 64) and flags == ()
        assert abs(float(np.median(grey[:, 40:])) - level(number)) <= 3, number
        assert abs(float(np.median(grey[:, :24])) - level(number) - 10) <= 3, number
        shown = np.asarray(load_image(frame).convert("L"))
        assert np.abs(shown.astype(int) - grey).max() <= 3


def test_limited_range_luma_is_stretched() -> None:
    luma = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(
        stretch_limited_range(luma), np.floor(np.clip((luma - 16.0) * 255 / 219, 0, 255) + 0.5)
    )


@pytest.mark.parametrize(("container", "codec", "pixels"), [ENCODINGS[0], ENCODINGS[2], ENCODINGS[5]])
def test_coloured_clip_is_flagged_and_keeps_its_colours(
    container: str, codec: str, pixels: str, tmp_path: Path
) -> None:
    path = tmp_path / f"clip.{container}"
    path.write_bytes(video(container, codec, pixels, colour=True))
    last = find_in_file(path)[-1]
    assert load_grey_and_flags(last)[1] == ("colour",)
    red, green, _ = np.asarray(load_image(last)).reshape(-1, 3).mean(axis=0)
    assert red > 150 > 40 > green


def test_variable_frame_rate_does_not_change_frame_numbers(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(video("mp4", "mpeg4", "yuv420p", 6, times=[0, 1, 5, 6, 30, 31]))
    greys = [load_grey(frame) for frame in find_in_file(path)]
    assert [round(float(np.median(grey[:, 40:])) / 9 - 20 / 9) for grey in greys] == [1, 2, 3, 4, 5, 6]


def test_frames_are_equal_in_any_order_and_from_threads(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(video("mp4", "mpeg4", "yuv420p"))
    frames = find_in_file(path)
    expected = [load_grey(frame).tobytes() for frame in frames]
    assert len(set(expected)) == 24
    clear_file_cache()
    order = list(range(24)) * 2
    random.Random(3).shuffle(order)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda index: load_grey(frames[index]).tobytes(), order))
    assert found == [expected[index] for index in order]
    clear_file_cache()


@pytest.mark.usefixtures("without_isolation")
def test_each_frame_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from echoquad_runtime.frames import video as clips

    opened = []
    keep = clips.VideoFile._open_container
    monkeypatch.setattr(clips.VideoFile, "_open_container", lambda self, stack: opened.append(1) or keep(self, stack))
    path = tmp_path / "clip.avi"
    path.write_bytes(video("avi", "mjpeg", "yuvj420p"))
    for frame in find_in_file(path):
        load_grey(frame)
        load_image(frame)
    assert len(opened) == 2  # once to count the frames, once to decode them


def test_every_nth_frame_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "clip.avi"
    path.write_bytes(video("avi", "mjpeg", "yuvj420p"))
    assert [frame.frame for frame in find_in_file(path, ReadOptions(every=10))] == [1, 11, 21]


def test_truncated_clip_yields_its_frames_and_one_failure(tmp_path: Path) -> None:
    valid = video("avi", "rawvideo", "bgr24")
    path = tmp_path / "clip.avi"
    path.write_bytes(valid[: 5 * 9216 + 6000])
    *frames, last = find_frames([path])
    assert 3 <= len(frames) <= 5
    for number, frame in enumerate(frames, 1):
        assert isinstance(frame, FrameFile)
        assert abs(int(load_grey(frame)[0, 40]) - level(number)) <= 1
    assert isinstance(last, Failure)
    assert str(last.error).startswith(f"frames {len(frames) + 1} to 24 of 24 ")


def test_undecodable_frame_does_not_shift_frame_numbers(tmp_path: Path) -> None:
    valid = video("avi", "mjpeg", "yuvj420p", 6)
    third = [at for at in range(valid.index(b"movi"), len(valid)) if valid.startswith(b"00dc", at)][2]
    (length,) = struct.unpack_from("<I", valid, third + 4)
    path = tmp_path / "clip.avi"
    path.write_bytes(valid[: third + 8] + bytes(length) + valid[third + 8 + length :])
    for number, frame in enumerate(find_in_file(path), 1):
        if number == 3:
            with pytest.raises(FrameDamagedError):
                load_grey(frame)
        else:
            assert abs(float(np.median(load_grey(frame)[:, 40:])) - level(number)) <= 3


def test_rotation_in_header_is_applied(tmp_path: Path) -> None:
    valid = video("mp4", "mpeg4", "yuv420p", 2)
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)  # clockwise by 90 degrees
    at = valid.index(upright, valid.index(b"tkhd"))
    path = tmp_path / "clip.mp4"
    path.write_bytes(valid[:at] + turned + valid[at + 36 :])
    frame = find_in_file(path)[0]
    grey = load_grey(frame)
    assert grey.shape == (64, 48)
    assert grey[:24].mean() - grey[40:].mean() > 5  # the left half is on top now
    assert load_image(frame).size == (48, 64)


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("a.avi", b"no clip at all", FrameFormatError),
        ("a.mp4", b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:1,\n/etc/passwd\n", FrameFormatError),
        ("a.mkv", b"ffconcat version 1.0\nfile /etc/passwd\n", FrameFormatError),
        ("a.avi", b"RIFF\x10\x00\x00\x00AVI " + bytes(200), FrameDamagedError),
        ("a.mp4", b"\x00\x00\x00\x18ftypisom" + bytes(40), FrameDamagedError),
        ("a.mkv", b"\x1aE\xdf\xa3" + bytes(60), FrameDamagedError),
        ("a.mp4", b"", FrameFormatError),
    ],
)
def test_file_without_video_is_refused_in_one_line(
    name: str, data: bytes, kind: type[Exception], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(data)
    (failure,) = find_frames([tmp_path / name])
    assert isinstance(failure, Failure) and type(failure.error) is kind
    assert str(failure.error).isprintable()
    assert capfd.readouterr() == ("", "")


def test_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    path.write_bytes(video("matroska", "ffv1", "yuv420p10le", 2))
    with pytest.raises(FrameFormatError, match="8 bits"):
        load_grey(find_in_file(path)[0])


def test_clip_with_image_extension_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(video("avi", "mjpeg", "yuvj420p", 2))
    (frame,) = find_frames([tmp_path / "a.png"])
    assert isinstance(frame, FrameFile)
    with pytest.raises(FrameFormatError):
        load_grey(frame)


@pytest.mark.usefixtures("without_isolation")
@pytest.mark.parametrize(("version", "options"), [("14.0.0", {"metadata_errors"}), ("19.0.2", set())])
def test_metadata_option_is_omitted_for_pyav_19(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, options: set[str]
) -> None:
    path, opened, given = tmp_path / "clip.avi", av.open, set[str]()
    path.write_bytes(video("avi", "mpeg4", "yuv420p", 3))

    def record(source: Any, *, format: str, **more: Any) -> Any:
        given.update(more)
        return opened(source, format=format)

    monkeypatch.setattr(av, "__version__", version)
    monkeypatch.setattr(av, "open", record)
    assert len(find_in_file(path)) == 3
    assert given == options


@pytest.mark.usefixtures("without_isolation")
def test_missing_pyav_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    path = tmp_path / "clip.avi"
    path.write_bytes(video("avi", "mjpeg", "yuvj420p", 2))
    Image.new("L", (8, 8)).save(tmp_path / "other.png")
    clear_file_cache()
    monkeypatch.setitem(sys.modules, "av", None)
    failure, frame = find_frames([tmp_path])
    assert isinstance(failure, Failure) and isinstance(failure.error, FrameExtraError)
    assert 'pip install "echoquad[video]"' in str(failure.error)
    assert isinstance(frame, FrameFile)
