"""Image files of several frames: pages of TIFF, thumbnails and masks, animated PNG, truncation and bounds."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.errors import FrameDamagedError, FrameError, FrameFormatError, FrameTooLargeError
from echoquad_runtime.frames.discovery import find_frames
from echoquad_runtime.frames.formats import ReadOptions
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.frames.images.image import decode_grey, decode_image
from echoquad_runtime.frames.images.image_stack import ImageStack
from echoquad_runtime.frames.images.several_images import may_be_stack
from echoquad_runtime.frames.reader import load_grey, load_image

RNG = np.random.default_rng(0)
GREYS = [RNG.integers(0, 256, (23, 31), np.uint8) for _ in range(4)]


def stack(data: bytes) -> ImageStack:
    return ImageStack(lambda: io.BytesIO(data))


def save(pages: list[np.ndarray], kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    first, *others = [Image.fromarray(page) for page in pages]
    first.save(stream, kind, save_all=True, append_images=others, **options)
    return stream.getvalue()


# ---------------------------------------------------------------------------------------------- TIFF


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg"])
@pytest.mark.parametrize("depth", [8, 16, 24])
def test_pages_of_tiff_are_frames_like_files_of_their_own(depth: int, compression: str | None, big: bool) -> None:
    if depth == 16 and compression == "jpeg":
        pytest.skip("JPEG has 8 bits")
    pages = {
        8: GREYS,
        16: [grey.astype(np.uint16) * 257 for grey in GREYS],
        24: [np.stack([grey, grey // 2, grey // 3], -1) for grey in GREYS],
    }[depth]
    found = stack(save(pages, "TIFF", compression=compression, big_tiff=big))
    assert (found.frame_count, found.stated_frame_count, found.multi_frame) == (4, 4, True)
    for number, page in enumerate(pages, 1):
        alone = save([page], "TIFF", compression=compression)
        frame = found.decode(number, "none")
        np.testing.assert_array_equal(frame.grey(), decode_grey(alone))
        np.testing.assert_array_equal(np.asarray(frame.image()), np.asarray(decode_image(alone)))
        assert frame.is_coloured() == (depth == 24)
    for number in (0, 5):
        with pytest.raises(FrameDamagedError):
            found.decode(number, "none")


def tiff(pages: list[tuple[np.ndarray, int]], order: str = "<") -> bytes:
    """Return a TIFF of 8-bit grey pages, each with its NewSubfileType."""
    data = bytearray((b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 0))
    link = 4
    for grey, kind in pages:
        begin = len(data)
        data += grey.tobytes() + b"\0" * (grey.size % 2)
        struct.pack_into(order + "I", data, link, len(data))
        height, width = grey.shape
        tags = {254: kind, 256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: begin, 277: 1, 278: height}
        tags |= {279: grey.size}
        data += struct.pack(order + "H", len(tags))
        for tag, value in sorted(tags.items()):
            data += struct.pack(order + "HHII", tag, 4, 1, value)
        link = len(data)
        data += bytes(4)
    return bytes(data)


SMALL = GREYS[3][:5, :6].copy()


@pytest.mark.parametrize("order", "<>")
def test_thumbnails_and_masks_are_no_frames(order: str) -> None:
    several = stack(tiff([(SMALL, 1), (GREYS[0], 0), (SMALL, 4), (GREYS[1], 2), (SMALL, 5)], order))
    assert several.frame_count == 2 and several.multi_frame
    np.testing.assert_array_equal(several.decode(1, "none").grey(), GREYS[0])
    np.testing.assert_array_equal(several.decode(2, "none").grey(), GREYS[1])
    for pages in ([(GREYS[0], 0), (SMALL, 1)], [(SMALL, 1), (GREYS[0], 0)]):
        alone = tiff(pages, order)
        assert may_be_stack(io.BytesIO(alone)) and not stack(alone).multi_frame
        np.testing.assert_array_equal(decode_grey(alone), GREYS[0])
    for read in (stack, decode_grey):
        with pytest.raises(FrameFormatError, match="not supported"):
            read(tiff([(SMALL, 1), (SMALL, 4)], order))


def test_single_images_are_no_stacks() -> None:
    for kind in ("PNG", "TIFF", "BMP", "JPEG"):
        assert not may_be_stack(io.BytesIO(save(GREYS[:1], kind) if kind in ("PNG", "TIFF") else b"BM"))
    for data in (b"", b"II*\0", b"II*\0\xff\xff\xff\xff", b"\x89PNG\r\n\x1a\n"):
        assert not may_be_stack(io.BytesIO(data))
    with pytest.raises(FrameFormatError):
        stack(b"BM" + bytes(100))


def test_truncated_tiff_yields_its_pages_and_states_more() -> None:
    data = tiff([(grey, 0) for grey in GREYS])
    found = stack(data[: len(data) * 6 // 10])
    assert (found.frame_count, found.stated_frame_count) == (2, 3)
    np.testing.assert_array_equal(found.decode(1, "none").grey(), GREYS[0])


def test_loop_of_pages_ends() -> None:
    data = bytearray(tiff([(grey, 0) for grey in GREYS[:2]]))
    struct.pack_into("<I", data, len(data) - 4, struct.unpack_from("<I", data, 4)[0])
    found = stack(bytes(data))
    assert (found.frame_count, found.stated_frame_count) == (2, 2)
    alone = bytearray(tiff([(GREYS[0], 0)]))
    struct.pack_into("<I", alone, len(alone) - 4, struct.unpack_from("<I", alone, 4)[0])
    np.testing.assert_array_equal(decode_grey(bytes(alone)), GREYS[0])


def big_tiff(entries: int, kind: int, values: int) -> bytes:
    row = struct.pack("<HHQQ", 700, kind, values, 0)
    return b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, entries) + row * min(entries, 1_000_000) + bytes(8)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (big_tiff(1_000_000, 1, 10_000_000), FrameDamagedError),
        (big_tiff(2**63, 1, 1), FrameDamagedError),
        (big_tiff(1, 3, 2**40), FrameTooLargeError),
        (big_tiff(1, 12, 4_000_000), FrameTooLargeError),
    ],
)
def test_directories_that_announce_too_much_are_refused(data: bytes, error: type[FrameError]) -> None:
    tracemalloc.start()
    for read in (stack, decode_grey):
        with pytest.raises(error):
            read(data)
    assert tracemalloc.get_traced_memory()[1] < 80 << 20
    tracemalloc.stop()


# ---------------------------------------------------------------------------------------------- animated PNG


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def animation(
    frames: list[tuple[np.ndarray, int, int, int, int]],
    size: tuple[int, int],
    *,
    stated: int | None = None,
    hidden: bool = False,
) -> bytes:
    """Return an animated PNG of frames of RGBA: pixels, left, top, dispose, blend."""
    colour = 6
    count = len(frames) if stated is None else stated
    chunks = [
        chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, colour, 0, 0, 0)),
        chunk(b"acTL", struct.pack(">II", count, 0)),
    ]
    sequence = 0

    def pack(pixels: np.ndarray) -> bytes:
        return zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))

    if hidden:
        chunks.append(chunk(b"IDAT", pack(np.zeros((*size[::-1], 4), np.uint8))))
    for number, (pixels, left, top, dispose, blend) in enumerate(frames):
        height, width = pixels.shape[:2]
        control = struct.pack(">IIIIIHHBB", sequence, width, height, left, top, 1, 10, dispose, blend)
        chunks.append(chunk(b"fcTL", control))
        sequence += 1
        if number or hidden:
            chunks.append(chunk(b"fdAT", struct.pack(">I", sequence) + pack(pixels)))
            sequence += 1
        else:
            chunks.append(chunk(b"IDAT", pack(pixels)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def plain(level: int, width: int, height: int, alpha: int = 255) -> np.ndarray:
    return np.full((height, width, 4), (level, level, level, alpha), np.uint8)


def test_grey_animation_is_read_as_its_frames() -> None:
    found = stack(save(GREYS, "PNG"))
    assert (found.frame_count, found.stated_frame_count, found.multi_frame) == (4, 4, True)
    for number, grey in enumerate(GREYS, 1):
        frame = found.decode(number, "none")
        np.testing.assert_array_equal(frame.grey(), grey)
        assert not frame.is_coloured() and frame.flags == ()


def test_frames_are_composed_as_players_do() -> None:
    frames = [
        (plain(100, 6, 4), 0, 0, 0, 0),
        (plain(200, 2, 2), 1, 1, 1, 0),  # then its region is cleared
        (plain(50, 2, 1), 4, 3, 2, 0),  # then its region is restored
        (plain(250, 1, 1, 128), 0, 0, 0, 1),  # drawn over
        (plain(0, 3, 1, 0), 3, 0, 0, 0),  # replaces, with transparency
    ]
    first = np.full((4, 6), 100)
    second = first.copy()
    second[1:3, 1:3] = 200
    cleared = first.copy()
    cleared[1:3, 1:3] = 0
    third = cleared.copy()
    third[3, 4:6] = 50
    fourth = cleared.copy()
    fourth[0, 0] = round((250 * 128 + 100 * 127) / 255)
    fifth = fourth.copy()
    fifth[0, 3:6] = 0
    found = stack(animation(frames, (6, 4)))
    for number, expected in enumerate([first, second, third, fourth, fifth], 1):
        np.testing.assert_allclose(found.decode(number, "none").grey(), expected, atol=1)


def test_default_image_outside_of_the_animation_is_no_frame() -> None:
    data = animation([(plain(100, 6, 4), 0, 0, 0, 0)], (6, 4), hidden=True)
    found = stack(data)
    assert (found.frame_count, found.multi_frame) == (1, True)
    assert (found.decode(1, "none").grey() == 100).all()


def test_animation_of_one_frame_is_a_single_image() -> None:
    data = animation([(plain(100, 6, 4), 0, 0, 0, 0)], (6, 4))
    assert not stack(data).multi_frame
    assert (decode_grey(data) == 100).all()


def test_frames_of_an_animation_are_equal_in_any_order_and_from_threads() -> None:
    found = stack(save(GREYS * 5, "PNG"))
    order = list(range(found.frame_count)) * 2
    random.Random(0).shuffle(order)
    with ThreadPoolExecutor(4) as threads:
        greys = list(threads.map(lambda index: found.decode(index + 1, "none").grey(), order))
    for index, grey in zip(order, greys, strict=True):
        np.testing.assert_array_equal(grey, GREYS[index % 4])


def test_truncated_animation_yields_its_complete_frames() -> None:
    data = save(GREYS, "PNG")
    third = [at for at in range(len(data)) if data.startswith(b"fdAT", at)][1]
    for damaged in (data[: third + 40], data[: third + 40] + b"?" + data[third + 41 :]):
        found = stack(damaged)
        assert (found.frame_count, found.stated_frame_count) == (2, 4)
        np.testing.assert_array_equal(found.decode(2, "none").grey(), GREYS[1])


def test_animations_that_announce_too_much_are_refused() -> None:
    frames = [(plain(1, 6, 4), 0, 0, 0, 0), (plain(2, 6, 4), 1, 0, 0, 0)]
    found = stack(animation(frames, (6, 4)))
    with pytest.raises(FrameDamagedError, match="canvas"):
        found.decode(2, "none")
    with pytest.raises(FrameTooLargeError):
        stack(animation(frames[:1], (6, 4), stated=1 << 30))
    assert not may_be_stack(io.BytesIO(animation(frames[:1], (6, 4), stated=1 << 31)))
    with pytest.raises(FrameTooLargeError):
        stack(animation(frames[:1], (60_000, 60_000)))


# ---------------------------------------------------------------------------------------------- names and inputs


@pytest.mark.parametrize("kind", ["TIFF", "PNG"])
def test_frames_are_named_and_read_like_those_of_clips(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(save(GREYS, kind))
    frames = list(find_frames([tmp_path]))
    assert [frame.name for frame in frames if isinstance(frame, FrameFile)] == [f"{path.name}#{n}" for n in range(1, 5)]
    for frame, grey in zip(frames, GREYS, strict=True):
        assert isinstance(frame, FrameFile)
        np.testing.assert_array_equal(load_grey(frame), grey)
        np.testing.assert_array_equal(np.asarray(load_image(frame).convert("L")), grey)
    (third,) = find_frames([f"{path}#3"])
    assert isinstance(third, FrameFile)
    np.testing.assert_array_equal(load_grey(third), GREYS[2])
    assert len(list(find_frames([path], ReadOptions(every=3)))) == 2
    with pytest.raises(FrameFormatError, match="name one"):
        load_grey(FrameFile(path, path.name))


@pytest.mark.parametrize("kind", ["TIFF", "PNG"])
def test_single_images_keep_their_plain_names(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind.lower()}"
    data = save(GREYS[:1], kind) if kind == "PNG" else tiff([(SMALL, 1), (GREYS[0], 0)])
    path.write_bytes(data)
    (frame,) = find_frames([path])
    assert isinstance(frame, FrameFile) and (frame.name, frame.frame) == (path.name, None)
    np.testing.assert_array_equal(load_grey(frame), GREYS[0])
    with pytest.raises(FrameFormatError, match="single image"):
        load_grey(FrameFile(path, f"{path.name}#1", 1))


def test_missing_pages_are_one_failure(tmp_path: Path) -> None:
    data = tiff([(grey, 0) for grey in GREYS])
    (tmp_path / "a.tif").write_bytes(data[: len(data) * 6 // 10])
    *frames, last = find_frames([tmp_path / "a.tif"])
    assert len(frames) == 2 and isinstance(last, Failure) and isinstance(last.error, FrameDamagedError)
