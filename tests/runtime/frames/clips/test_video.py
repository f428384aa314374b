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

from echoquad_runtime.frames.clips.video_frame import stretch_limited_range  # noqa: E402


def level(number: int) -> int:
    return 20 + 9 * number


def video(
    container: str,
    codec: str,
    pixels: str,
    frames: int = 24,
    *,
    colour: bool = False,
    times: list[int] | None = None,
    options: dict[str, str] | None = None,
) -> bytes:
    """Return a clip whose frames have one level each, brighter in the left half; in red with `colour`."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as out:
        track = out.add_stream(codec, rate=25, options=options or {})
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
        assert grey.shape == (48, 64) and flags == ("uncropped",)
        assert abs(float(np.median(grey[:, 40:])) - level(number)) <= 3, number
        assert abs(float(np.median(grey[:, :24])) - level(number) - 10) <= 3, number
        shown = np.asarray(load_image(frame).convert("L"))
        assert np.abs(shown.astype(int) - grey).max() <= 3


def levels_of(path: Path) -> list[int]:
    """Return the numbers that `level` gives the frames of a clip, in the order of the frames."""
    greys = [load_grey(frame) for frame in find_in_file(path)]
    return [round((float(np.median(grey[:, 40:])) - 20) / 9) for grey in greys]


def test_frames_hidden_by_an_edit_list_are_no_frames(tmp_path: Path) -> None:
    valid = bytearray(video("mp4", "mpeg4", "yuv420p", options={"g": "12"}))
    (tick,) = struct.unpack_from(">I", valid, valid.index(b"stts") + 16)
    struct.pack_into(">I", valid, valid.index(b"elst") + 16, 5 * tick)  # the time at which the track begins to play
    path = tmp_path / "clip.mp4"
    path.write_bytes(valid)
    assert levels_of(path) == list(range(6, 25))


@pytest.mark.parametrize(("container", "codec"), [("avi", "mpeg4"), ("avi", "h264"), ("mp4", "mpeg4"), ("mp4", "h264")])
def test_frames_out_of_storage_order_are_shown_in_order(container: str, codec: str, tmp_path: Path) -> None:
    if codec not in av.codecs_available:
        pytest.skip("not supported by this FFmpeg")
    path = tmp_path / f"clip.{container}"
    path.write_bytes(video(container, codec, "yuv420p", options={"bf": "2"}))
    assert levels_of(path) == list(range(1, 25))


def test_packets_that_are_not_shown_are_no_frames(tmp_path: Path) -> None:
    if "libvpx" not in av.codecs_available:
        pytest.skip("not supported by this FFmpeg")
    path = tmp_path / "clip.webm"
    options = {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "400k"}
    path.write_bytes(video("webm", "libvpx", "yuv420p", options=options))
    assert levels_of(path) == list(range(1, 25))


def test_repeated_frames_of_avi_are_not_missing_frames(tmp_path: Path) -> None:
    times = [0, 1, 3, 4, 8, 9]  # FFmpeg writes a chunk of zero length for each time between
    valid = video("avi", "mpeg4", "yuv420p", 6, times=times)
    assert valid.count(b"00dc\0\0\0\0", valid.index(b"movi"), valid.index(b"idx1")) == 4
    path = tmp_path / "clip.avi"
    path.write_bytes(valid)
    assert levels_of(path) == [1, 2, 3, 4, 5, 6]
    path.write_bytes(valid[: valid.rindex(b"00dc", 0, valid.index(b"idx1"))])
    clear_file_cache()
    *frames, last = find_frames([path])
    assert len(frames) == 5 and isinstance(last, Failure)
    assert isinstance(last.error, FrameDamagedError) and str(last.error).startswith("the last frame of 6 ")


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_truncation_is_reported_by_what_the_container_states(container: str, tmp_path: Path) -> None:
    options = {"movflags": "faststart"} if container == "mp4" else {}
    path = tmp_path / "clip"
    with av.open(path, "w", format=container, options=options) as out:
        track = out.add_stream("mpeg4", rate=25)
        track.width, track.height, track.pix_fmt = 64, 48, "yuv420p"
        for number in range(24):
            levels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
            out.mux(track.encode(av.VideoFrame.from_ndarray(levels, "rgb24")))
        out.mux(track.encode())
    valid = path.read_bytes()
    assert len(find_in_file(path)) == 24
    path.write_bytes(valid[: len(valid) * 6 // 10])
    *frames, last = find_frames([path])
    assert 8 <= len(frames) <= 15 and isinstance(last, Failure) and isinstance(last.error, FrameDamagedError)
    count = 24 if container == "mp4" else len(frames) + 1  # Matroska states no number
    assert f" of {count} " in str(last.error)


def test_damaged_clip_gives_the_same_frames_in_any_order(tmp_path: Path) -> None:
    valid = bytearray(video("avi", "mpeg4", "yuv420p", options={"bf": "2", "g": "6"}))
    begin, end = valid.index(b"movi"), valid.index(b"idx1")
    chunks = [at for at in range(begin, end) if valid.startswith(b"00dc", at)]
    for at in chunks[7], chunks[15]:
        valid[at + 8 : at + 14] = bytes(6)
    path = tmp_path / "clip.avi"
    path.write_bytes(valid)

    def read(frame: FrameFile) -> bytes:
        try:
            return load_grey(frame).tobytes()
        except FrameDamagedError:
            return b""

    frames = find_in_file(path)
    expected = [read(frame) for frame in frames]
    assert 20 <= len([grey for grey in expected if grey]) < len(frames) <= 24
    for seed in range(3):
        clear_file_cache()
        assert [frame.name for frame in find_in_file(path)] == [frame.name for frame in frames]
        order = list(range(len(frames)))
        random.Random(seed).shuffle(order)
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(lambda index: read(frames[index]), order)) == [expected[index] for index in order]


def test_lack_of_memory_is_not_taken_for_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    from echoquad_runtime.frames.clips import video as clips

    data = video("avi", "mpeg4", "yuv420p", 6)
    clip = clips.VideoFile(lambda: io.BytesIO(data))
    clip._cache.clear()
    found = clips._until_damaged

    def fail(packets: Any) -> Any:
        yield next(packets)
        raise MemoryError

    monkeypatch.setattr(clips, "_until_damaged", lambda packets: found(fail(packets)))
    with pytest.raises(MemoryError):
        clip.decode(3, "none")
    with pytest.raises(MemoryError):
        clips.VideoFile(lambda: io.BytesIO(data))
    monkeypatch.undo()
    assert clip.decode(3, "none").grey().shape == (48, 64)


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
    assert load_grey_and_flags(last)[1] == ("uncropped", "colour")
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
    from echoquad_runtime.frames.clips import video as clips

    opened = []
    keep = clips.VideoFile._open_container
    monkeypatch.setattr(clips.VideoFile, "_open_container", lambda self, stack: opened.append(1) or keep(self, stack))
    path = tmp_path / "clip.avi"
    path.write_bytes(video("avi", "mjpeg", "yuvj420p"))
    for frame in find_in_file(path):
        load_grey(frame)
        load_image(frame)
    assert len(opened) == 2  # once to count the frames, once to decode them
    path.write_bytes(video("avi", "mpeg4", "yuv420p"))
    opened.clear()
    for frame in find_in_file(path):
        load_grey(frame)
    assert len(opened) == 2  # once to count the packets, once to decode and count the frames


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


# What the matrix of each EXIF orientation (a, b, c, d) does to a frame.
ORIENTATIONS = {
    1: ((1, 0, 0, 1), lambda grey: grey),
    2: ((-1, 0, 0, 1), np.fliplr),
    3: ((-1, 0, 0, -1), lambda grey: np.rot90(grey, 2)),
    4: ((1, 0, 0, -1), np.flipud),
    5: ((0, 1, 1, 0), np.transpose),
    6: ((0, 1, -1, 0), lambda grey: np.rot90(grey, -1)),
    7: ((0, -1, -1, 0), lambda grey: np.rot90(np.transpose(grey), 2)),
    8: ((0, -1, 1, 0), np.rot90),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_display_matrix_is_applied(orientation: int, tmp_path: Path) -> None:
    (a, b, c, d), expected = ORIENTATIONS[orientation]
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as out:
        track = out.add_stream("mpeg4", rate=25)
        track.width, track.height, track.pix_fmt = 64, 48, "yuv420p"
        levels = np.add.outer(np.arange(48) * 3, np.arange(64)).astype(np.uint8)
        out.mux(track.encode(av.VideoFrame.from_ndarray(np.stack([levels] * 3, -1), "rgb24")))
        out.mux(track.encode())
    valid = stream.getvalue()
    one = 1 << 16
    upright = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    at = valid.index(upright, valid.index(b"tkhd"))
    path = tmp_path / "clip.mp4"
    path.write_bytes(valid)
    plain = load_grey(find_in_file(path)[0])
    path.write_bytes(
        valid[:at] + struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30) + valid[at + 36 :]
    )
    clear_file_cache()
    frame = find_in_file(path)[0]
    np.testing.assert_array_equal(load_grey(frame), expected(plain))
    assert np.abs(np.asarray(load_image(frame).convert("L")).astype(int) - expected(plain)).max() <= 3


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


@pytest.mark.parametrize(
    ("pixels", "bits", "limited"),
    [("yuv420p10le", 10, True), ("yuv444p12le", 12, True), ("gray10le", 10, False), ("gray16le", 16, False)],
)
def test_more_than_8_bits_are_scaled(pixels: str, bits: int, limited: bool, tmp_path: Path) -> None:
    values = np.linspace(0, (1 << bits) - 1, 64 * 48).round().astype("<u2").reshape(48, 64)
    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as out:
        track = out.add_stream("ffv1", rate=25)
        track.width, track.height, track.pix_fmt = 64, 48, pixels
        frame = av.VideoFrame(64, 48, pixels)
        for plane in frame.planes:
            plane.update(np.full((plane.height, plane.line_size // 2), 1 << bits - 1, "<u2").tobytes())
        rows = np.zeros((48, frame.planes[0].line_size // 2), "<u2")
        rows[:, :64] = values
        frame.planes[0].update(rows.tobytes())
        out.mux(track.encode(frame))
        out.mux(track.encode())
    path = tmp_path / "clip.mkv"
    path.write_bytes(stream.getvalue())
    grey = load_grey(find_in_file(path)[0])
    black, white = (16 << bits - 8, 235 << bits - 8) if limited else (0, (1 << bits) - 1)
    exact = np.clip((values.astype(float) - black) * 255 / (white - black), 0, 255)
    np.testing.assert_array_equal(grey, np.floor(exact + 0.5))


def test_deep_rgb_is_scaled(tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    path.write_bytes(video("matroska", "ffv1", "gbrp10le", 6))
    assert levels_of(path) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_sound_alone_is_not_supported(container: str, tmp_path: Path) -> None:
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as out:
        track = out.add_stream("aac", rate=48000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        samples.sample_rate = 48000
        out.mux(track.encode(samples))
        out.mux(track.encode())
    path = tmp_path / "sound"
    path.write_bytes(stream.getvalue())
    (failure,) = find_frames([path])
    assert isinstance(failure, Failure) and type(failure.error) is FrameFormatError
    assert str(failure.error).startswith("not supported: ")


@pytest.mark.parametrize(
    ("container", "old", "new"),
    [("matroska", b"V_FFV1", b"V_NONE"), ("avi", b"MJPG", b"ZZZZ"), ("matroska", b"V_FFV1", b"A_FLAC")],
)
def test_codec_without_decoder_is_not_supported(container: str, old: bytes, new: bytes, tmp_path: Path) -> None:
    codec, pixels = ("mjpeg", "yuvj420p") if container == "avi" else ("ffv1", "yuv420p")
    (tmp_path / "clip").write_bytes(video(container, codec, pixels, 3).replace(old, new))
    (failure,) = find_frames([tmp_path / "clip"])
    assert isinstance(failure, Failure) and type(failure.error) is FrameFormatError
    assert str(failure.error).startswith("not supported: ")


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
    assert given == options | {"options"}


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
