from __future__ import annotations

import io
import os
import random
import re
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from echoquad_runtime.errors import (
    FrameDamagedError,
    FrameError,
    FrameFormatError,
    FrameReadError,
    FrameTooLargeError,
    FrameTooSmallError,
)
from echoquad_runtime.frames import image as frames
from echoquad_runtime.frames import image_integrity as whole
from echoquad_runtime.frames.formats import MAX_PIXELS
from echoquad_runtime.frames.image import decode_image, read_bytes, to_grey
from echoquad_runtime.frames.reader import decode_frame, read_frame
from echoquad_runtime.quadrants import split

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (23, 31), np.uint8)
COLOUR = RNG.integers(0, 256, (23, 31, 3), np.uint8)
ALPHA = RNG.integers(0, 256, (23, 31), np.uint8)
DEEP = RNG.integers(0, 65536, (23, 31), np.uint16)
LOSSLESS = ("PNG", "BMP", "TIFF")
posix_only = pytest.mark.skipif(os.name == "nt", reason="POSIX only")


def encode(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def smooth(height: int = 40, width: int = 56, depth: int = 3) -> np.ndarray:
    """Make a smooth picture, which a JPEG keeps inside the gamut."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [128 + 70 * np.sin(x / (9 + i) + i) * np.cos(y / (7 + 2 * i)) for i in range(depth)]
    picture = np.stack(channels, axis=-1).round().astype(np.uint8)
    return picture if depth > 1 else picture[:, :, 0]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, rows: bytes = b"", depth: int = 8, colour: int = 0, interlaced: int = 0) -> bytes:
    """Write a PNG by hand, which may announce what it does not hold."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# ---------------------------------------------------------------------------------------------- kinds of pixels


@pytest.mark.parametrize("kind", LOSSLESS)
def test_grey_is_as_it_is(kind: str) -> None:
    found = decode_frame(encode(GREY, kind))
    np.testing.assert_array_equal(found, GREY)
    assert found.dtype == np.uint8


@pytest.mark.parametrize("kind", LOSSLESS)
def test_one_bit_is_black_and_white(kind: str) -> None:
    image = Image.fromarray(GREY > 127)
    assert image.mode == "1"
    np.testing.assert_array_equal(decode_frame(encode(image, kind)), np.where(GREY > 127, 255, 0))


@pytest.mark.parametrize("kind", LOSSLESS)
def test_colour_is_pillows_luma(kind: str) -> None:
    expected = np.asarray(Image.fromarray(COLOUR).convert("L"))
    np.testing.assert_array_equal(decode_frame(encode(COLOUR, kind)), expected)
    # ITU-R 601-2, stated apart from Pillow.
    luma = COLOUR @ np.array([0.299, 0.587, 0.114])
    assert np.abs(luma - expected).max() <= 0.51


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_palette_is_looked_up(kind: str) -> None:
    image = Image.fromarray(COLOUR).quantize(16)
    expected = np.asarray(image.convert("RGB").convert("L"))
    np.testing.assert_array_equal(decode_frame(encode(image, kind)), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_alpha_lies_over_black(kind: str) -> None:
    found = decode_frame(encode(np.dstack([COLOUR, ALPHA]), kind))
    # float64 in place of Pillow's integers: one level for its rounding of each channel and of the luma.
    expected = (COLOUR * (ALPHA[:, :, None] / 255.0)) @ np.array([0.299, 0.587, 0.114])
    assert np.abs(found - expected).max() <= 1.5
    assert (found[ALPHA == 0] == 0).all()
    opaque = encode(np.dstack([COLOUR, np.full_like(ALPHA, 255)]), kind)
    np.testing.assert_array_equal(decode_frame(opaque), np.asarray(Image.fromarray(COLOUR).convert("L")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_with_alpha_lies_over_black(kind: str) -> None:
    image = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
    found = decode_frame(encode(image, kind))
    assert np.abs(found - GREY * (ALPHA / 255.0)).max() <= 1


def test_a_transparent_palette_entry_is_black() -> None:
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P")
    image.putpalette([200, 200, 200, 90, 90, 90])
    np.testing.assert_array_equal(decode_frame(encode(image, "PNG", transparency=0)), [[0, 90], [90, 0]])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_divided_by_257(kind: str) -> None:
    deep = DEEP.copy()
    deep[0, :8] = [0, 128, 129, 385, 386, 65406, 65407, 65535]
    found = decode_frame(encode(deep, kind))
    np.testing.assert_array_equal(found, np.rint(deep / 257.0))  # no value lies half-way: 257 is odd
    np.testing.assert_array_equal(found[0, :8], [0, 0, 1, 1, 2, 254, 255, 255])


def test_every_sixteen_bit_value() -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(decode_frame(encode(every, "PNG")), np.rint(every / 257.0))


def test_a_dark_sixteen_bit_frame_is_not_stretched() -> None:
    assert decode_frame(encode(np.full((4, 4), 1000, np.uint16), "PNG")).max() == 4


def test_big_endian_sixteen_bits() -> None:
    image = Image.frombytes("I;16B", (31, 23), DEEP.astype(">u2").tobytes())
    np.testing.assert_array_equal(decode_frame(encode(image, "TIFF")), np.rint(DEEP / 257.0))


def test_integers_within_sixteen_bits() -> None:
    np.testing.assert_array_equal(decode_frame(encode(DEEP.astype(np.int32), "TIFF")), np.rint(DEEP / 257.0))


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1])
def test_integers_beyond_sixteen_bits(value: int) -> None:
    wrong = DEEP.astype(np.int32)
    wrong[3, 4] = value
    with pytest.raises(FrameFormatError, match=r"expected integers in 0\.\.65535"):
        decode_frame(encode(wrong, "TIFF"))


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        ([0, 0.25, 0.5, 1], [0, 64, 128, 255]),
        ([0, 0.5, 1, 1.0001], [0, 1, 1, 1]),  # above 1 they are grey levels
        ([0, 0.5, 254.4, 254.5], [0, 1, 254, 255]),
        ([0, 0, 0, 255], [0, 0, 0, 255]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_floats(values: Sequence[float], levels: Sequence[int]) -> None:
    np.testing.assert_array_equal(decode_frame(encode(np.array([values], np.float32), "TIFF")), [levels])


@pytest.mark.parametrize("value", [-0.001, 255.5, 1e9, float("nan"), float("inf"), float("-inf")])
def test_floats_that_no_rule_covers(value: float) -> None:
    wrong = np.zeros((4, 4), np.float32)
    wrong[1, 2] = value
    with pytest.raises(FrameFormatError, match=r"expected floats in \[0, 1\] or in \[0, 255\]"):
        decode_frame(encode(wrong, "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_print_colours_are_read(kind: str) -> None:
    image = Image.fromarray(smooth()).convert("CMYK")
    data = encode(image, kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    np.testing.assert_array_equal(decode_frame(data), expected)


def test_pixels_that_pillow_cannot_turn_grey_are_a_frame_error() -> None:
    with pytest.raises(FrameFormatError, match="of the kind LAB; expected grey, palette or RGB"):
        decode_frame(encode(Image.new("LAB", (9, 8)), "TIFF"))


@pytest.mark.parametrize("mode", ["1", "RGB", "RGBA", "LA", "P", "PA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_a_large_image_is_brought_to_grey_in_bands(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    colour = Image.fromarray(np.dstack([COLOUR, ALPHA]))
    image = {
        "I;16": Image.fromarray(DEEP),
        "I": Image.fromarray(DEEP.astype(np.int32)),
        "F": Image.fromarray(DEEP.astype(np.float32) / 65535),
        "PA": colour.convert("RGB").quantize(16).convert("PA"),
    }.get(mode) or colour.convert(mode)
    expected = to_grey(image)
    for pixels in (1, 31, 100, 31 * 22, 31 * 23):
        monkeypatch.setattr(frames, "_BAND", pixels)
        np.testing.assert_array_equal(to_grey(image), expected)


@pytest.mark.parametrize("value", [float("nan"), -1.0, 256.0])
def test_a_value_in_the_last_band_counts(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "_BAND", 16)
    values = np.zeros((9, 8), np.float32)
    values[8, 7] = value
    with pytest.raises(FrameFormatError):
        decode_frame(encode(values, "TIFF"))
    values[8, 7] = 2  # more than 1: grey levels, in all bands
    values[0, 0] = 0.7
    assert decode_frame(encode(values, "TIFF"))[0, 0] == 1


def test_to_grey_keeps_what_is_grey() -> None:
    np.testing.assert_array_equal(to_grey(Image.fromarray(GREY)), GREY)


# ---------------------------------------------------------------------------------------------- JPEG


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("quality", [75, 95])
def test_a_colour_jpegs_own_luma_is_pillows_within_a_level(subsampling: str, progressive: bool, quality: int) -> None:
    data = encode(smooth(), "JPEG", subsampling=subsampling, progressive=progressive, quality=quality)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("L")).astype(int)
    assert np.abs(decode_frame(data) - expected).max() <= 1


@pytest.mark.parametrize("progressive", [False, True])
def test_grey_content_in_a_colour_jpeg_is_exact(progressive: bool) -> None:
    # What a scanner saves: grey pixels in a colour file. It must not matter that the chroma is skipped.
    data = encode(Image.fromarray(GREY).convert("RGB"), "JPEG", quality=90, progressive=progressive)
    image = Image.open(io.BytesIO(data))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(decode_frame(data), np.asarray(image.convert("L")))


def test_a_jpeg_stored_as_rgb() -> None:
    data = encode(smooth(), "JPEG", keep_rgb=True, quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("L")).astype(int)
    assert np.abs(decode_frame(data) - expected).max() <= 1


def test_an_image_for_looking_at_keeps_its_colours() -> None:
    data = encode(smooth(), "JPEG", quality=95)
    assert decode_image(data).mode == "RGB"
    assert decode_image(data, luma_only=True).mode == "L"
    assert decode_image(data).size == decode_image(data, luma_only=True).size == (56, 40)


def test_a_thumbnail_does_not_stand_in_for_the_end() -> None:
    # An EXIF thumbnail is a JPEG within the JPEG, with an end marker of its own.
    exif = b"Exif\x00\x00" + b"MM\x00*\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00" + encode(GREY[:8, :8], "JPEG")
    data = encode(GREY, "JPEG", exif=exif)
    assert data.count(b"\xff\xd9") == 2
    assert decode_frame(data).shape == GREY.shape
    for cut in range(1, len(data)):
        with pytest.raises(FrameError):
            decode_frame(data[:cut])
    with pytest.raises(FrameDamagedError, match="the JPEG has no end marker"):
        decode_frame(data[:-2])


# ---------------------------------------------------------------------------------------------- orientation

TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = smooth(depth=1)
    options = {"subsampling": 0, "quality": 100} if kind == "JPEG" else {}
    data = encode(picture, kind, exif=exif, **options)
    plain = decode_frame(encode(picture, kind, **options))
    np.testing.assert_array_equal(decode_frame(data), TURNED[orientation](plain))
    np.testing.assert_array_equal(np.asarray(decode_image(data)), TURNED[orientation](plain))


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_that_means_nothing_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode_frame(encode(GREY, "PNG", exif=exif)), GREY)


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF"])
def test_the_content_counts_and_not_the_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "frame.xyz"
    path.write_bytes(encode(smooth(depth=1), kind))
    assert read_frame(path).shape == (40, 56)
    wrong = path.with_suffix(".png" if kind == "BMP" else ".bmp")
    path.rename(wrong)
    assert read_frame(wrong).shape == (40, 56)


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (b"", FrameDamagedError, "the file is empty"),
        (b"case,label\n1,ASD\n", FrameFormatError, "the file holds text; expected a PNG, JPEG, BMP or TIFF"),
        (b"0.1 0.2\n0.3 0.4\n", FrameFormatError, "the file holds text"),
        (bytes(range(128, 200)), FrameFormatError, "no image of a known kind"),
        (b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", FrameFormatError, "no image of a known kind"),
        (b"\x89PNG\r\n\x1a\n" + bytes(30), FrameError, "damaged"),
        (b"\xff\xd8\xff\xe0" + bytes(30), FrameError, "truncated"),
    ],
    ids=["empty", "table", "matrix", "bytes", "gif", "png", "jpeg"],
)
def test_files_that_are_no_image(tmp_path: Path, content: bytes, error: type[FrameError], words: str) -> None:
    path = tmp_path / "frame.png"
    path.write_bytes(content)
    with pytest.raises(error, match=words) as caught:
        read_frame(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PPM", "ICO"])
def test_kinds_that_pillow_knows_but_a_frame_is_not(kind: str) -> None:
    with pytest.raises(FrameFormatError, match="expected a PNG, JPEG, BMP or TIFF"):
        decode_frame(encode(GREY, kind))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.png", tmp_path, Path("a\0b.png"), tmp_path / ("x" * 300)):
        with pytest.raises(FrameReadError) as caught:
            read_frame(path)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, OSError)


@posix_only
@pytest.mark.timeout(10)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "frame.png")
    with pytest.raises(FrameReadError, match="it is no regular file"):
        read_frame(tmp_path / "frame.png")


@posix_only
@pytest.mark.timeout(10)
def test_a_pipe_that_takes_the_files_place_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "frame.png"
    path.write_bytes(encode(GREY, "PNG"))
    opened = os.open

    def open_late(name: Any, *options: Any) -> int:
        path.unlink()
        os.mkfifo(path)
        return opened(name, *options)

    monkeypatch.setattr(os, "open", open_late)
    with pytest.raises(FrameReadError, match="it is no regular file"):
        read_frame(path)


@pytest.mark.parametrize("change", [-1, -40, 1, 5000])
def test_a_file_that_changes_while_it_is_read(change: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "frame.png"
    path.write_bytes(data := encode(GREY, "PNG"))
    asked, status = os.fstat, path.stat()

    def ask_early(descriptor: int) -> os.stat_result:
        asked(descriptor)
        path.write_bytes((data + bytes(5000))[: len(data) + change])
        return status

    monkeypatch.setattr(os, "fstat", ask_early)
    with pytest.raises(FrameReadError, match="it changed while it was read"):
        read_frame(path)


@posix_only
def test_a_file_that_vanishes_once_it_is_open_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "frame.png"
    path.write_bytes(encode(GREY, "PNG"))
    asked = os.fstat

    def vanish(descriptor: int) -> os.stat_result:
        path.unlink(missing_ok=True)
        return asked(descriptor)

    monkeypatch.setattr(os, "fstat", vanish)
    np.testing.assert_array_equal(read_frame(path), GREY)
    with pytest.raises(FrameReadError, match="No such file"):
        read_frame(path)


@posix_only
def test_a_link_that_leads_to_itself(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("a.png")
    with pytest.raises(FrameReadError, match="cannot be read"):
        read_frame(tmp_path / "a.png")


def test_a_file_that_is_too_big_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "frame.png"
    path.write_bytes(encode(GREY, "PNG"))
    size = path.stat().st_size
    monkeypatch.setattr(frames, "MAX_FILE_BYTES", size)
    assert read_bytes(path) == path.read_bytes()
    monkeypatch.setattr(frames, "MAX_FILE_BYTES", size - 1)
    with pytest.raises(FrameTooLargeError, match=f"holds {size} bytes; expected at most {size - 1}"):
        read_bytes(path)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_too_few_pixels_are_the_quadrants_affair(shape: tuple[int, int]) -> None:
    frame = decode_frame(encode(np.zeros(shape, np.uint8), "PNG"))
    assert frame.shape == shape
    with pytest.raises(FrameTooSmallError):
        split(frame, 0.9)


# ---------------------------------------------------------------------------------------------- too large


@pytest.mark.parametrize("size", [(6001, 6001), (30_000, 30_000), (2**31 - 1, 2**31 - 1), (1, MAX_PIXELS + 1)])
def test_a_header_is_enough_to_refuse(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.core, "new", lambda *_: pytest.fail("memory was taken"))
    monkeypatch.setattr(Image.core, "fill", lambda *_: pytest.fail("memory was taken"))
    with pytest.raises(FrameTooLargeError, match="at most 36 million"):
        decode_frame(png(*size))


def announcing(kind: str, width: int, height: int) -> bytes:
    """Encode 400 x 300 pixels, then let the header say otherwise."""
    data = bytearray(encode(np.zeros((300, 400), np.uint8), kind))
    if kind == "JPEG":
        where, field = data.index(b"\xff\xc0") + 5, struct.pack(">HH", height, width)
    elif kind == "BMP":
        where, field = 18, struct.pack("<ii", width, height)
    else:  # width and height are the TIFF's first two tags, twelve bytes each
        where = struct.unpack_from("<I", data, 4)[0] + 2
        field = struct.pack("<HHIIHHII", 256, 4, 1, width, 257, 4, 1, height)
    data[where : where + len(field)] = field
    return bytes(data)


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "JPEG"])
def test_a_header_of_another_kind_is_enough_too(kind: str) -> None:
    assert decode_frame(announcing(kind, 400, 300)).shape == (300, 400)
    for size in ((6001, 6000), (30_000, 29_000)):
        with pytest.raises(FrameTooLargeError, match="at most 36 million"):
            decode_frame(announcing(kind, *size))


def test_a_real_bomb_just_over_the_cap_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    side = 6001
    data = png(side, side, bytes(side * (side + 1)))  # 36 MB of zeros in some 35 kB
    assert len(data) < 100_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(FrameTooLargeError, match="announces 6001x6001 pixels"):
        decode_frame(data)


def test_a_frame_at_the_cap_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_PIXELS", GREY.size)
    np.testing.assert_array_equal(decode_frame(encode(GREY, "PNG")), GREY)
    monkeypatch.setattr(frames, "MAX_PIXELS", GREY.size - 1)
    with pytest.raises(FrameTooLargeError):
        decode_frame(encode(GREY, "PNG"))


# ---------------------------------------------------------------------------------------------- many images


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_several_images_are_not_a_still_frame(kind: str) -> None:
    pages = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (0, 100, 200)]
    data = encode(pages[0], kind, save_all=True, append_images=pages[1:])
    count = "3" if kind == "PNG" else "several"
    with pytest.raises(FrameFormatError, match=f"the file holds {count} images; expected one still frame"):
        decode_frame(data)


def test_a_stereo_jpegs_first_image_is_the_frame() -> None:
    first, second = smooth(depth=1), np.zeros((40, 56), np.uint8)
    data = encode(first, "MPO", save_all=True, append_images=[Image.fromarray(second)])
    assert np.abs(decode_frame(data).astype(int) - first).max() < 12


# ---------------------------------------------------------------------------------------------- damage


def small_files() -> dict[str, bytes]:
    grey, colour = smooth(14, 17, 1), smooth(14, 17)
    return {
        "png": encode(grey, "PNG"),
        "png-colour": encode(colour, "PNG"),
        "jpeg": encode(grey, "JPEG"),
        "jpeg-colour": encode(colour, "JPEG"),
        "jpeg-progressive": encode(colour, "JPEG", progressive=True),
        "bmp": encode(colour, "BMP"),
        "tiff": encode(grey, "TIFF"),
        "tiff-lzw": encode(grey, "TIFF", compression="tiff_lzw"),
    }


SMALL = small_files()


@pytest.mark.parametrize("name", SMALL)
def test_a_truncated_file_never_shows_other_pixels(name: str) -> None:
    data = SMALL[name]
    whole = decode_frame(data)
    accepted = []
    for cut in range(len(data)):
        try:
            found = decode_frame(data[:cut])
        except FrameError as error:
            assert "\n" not in str(error)
            continue
        accepted.append(cut)
        np.testing.assert_array_equal(found, whole)
    # What may be missing: nothing of a PNG or JPEG, padding and trailing tables of the others.
    assert not accepted or not name.startswith(("png", "jpeg"))


@pytest.mark.parametrize("name", ["png", "png-colour"])
def test_a_flipped_byte_of_a_png_never_shows_other_pixels(name: str) -> None:
    data = SMALL[name]
    whole = decode_frame(data)
    rng = random.Random(0)
    for position in range(len(data)):
        for flip in {1, 0x80, 0xFF, rng.randrange(1, 256)}:
            wrong = bytearray(data)
            wrong[position] ^= flip
            try:
                found = decode_frame(bytes(wrong))
            except FrameError:
                continue
            np.testing.assert_array_equal(found, whole)


def test_a_damaged_png_names_the_chunk() -> None:
    data = bytearray(SMALL["png"])
    data[data.index(b"IDAT") + 10] ^= 1
    with pytest.raises(FrameDamagedError, match="the PNG's IDAT chunk fails its checksum"):
        decode_frame(bytes(data))
    with pytest.raises(FrameDamagedError, match="the PNG ends before its last chunk"):
        decode_frame(SMALL["png"][:-12])


def test_a_damaged_chunk_without_a_name_is_told_in_one_line() -> None:
    data = bytearray(SMALL["png"])
    at = data.index(b"IDAT")
    data[at : at + 4] = b"\nx\x1b\xff"
    with pytest.raises(FrameDamagedError, match=f"the PNG's chunk at byte {at - 4} fails its checksum"):
        decode_frame(bytes(data))


KINDS_OF_PNG = [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2), (1, 3), (4, 3), (8, 3), (8, 4), (16, 4)]
KINDS_OF_PNG += [(8, 6), (16, 6)]


@pytest.mark.parametrize(("depth", "colour"), KINDS_OF_PNG)
@pytest.mark.parametrize("level", [0, 0xA5, 0xFF])
def test_a_png_with_too_few_rows_is_refused(depth: int, colour: int, level: int) -> None:
    width, height = 16, 9
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = b"\0" + bytes([level]) * (width * bits // 8)
    palette = chunk(b"PLTE", bytes(range(3 * 2**depth)) if depth < 8 else bytes(768)) if colour == 3 else b""
    for rows in range(height + 1):
        data = png(width, height, row * rows, depth, colour)
        data = data[:33] + palette + data[33:]
        if rows == height:
            assert decode_frame(data).shape == (height, width)
        else:
            with pytest.raises(FrameDamagedError, match=r"pixels come to \d+ of \d+ bytes|truncated"):
                decode_frame(data)


def test_a_black_png_is_whole() -> None:
    assert decode_frame(png(5, 4, bytes(24))).max() == 0


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (8, 8), (17, 23)])
def test_an_interlaced_png_with_too_few_rows_is_refused(size: tuple[int, int]) -> None:
    width, height = size
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = []
    for x, y, dx, dy in passes:
        columns = len(range(x, width, dx))
        rows += [b"\0" + bytes([9]) * columns for _ in range(y, height, dy) if columns]
    for count in range(len(rows) + 1):
        data = png(width, height, b"".join(rows[:count]), interlaced=1)
        if count == len(rows):
            np.testing.assert_array_equal(decode_frame(data), np.full((height, width), 9))
        else:
            with pytest.raises(FrameDamagedError, match=r"pixels come to \d+ of \d+ bytes|truncated"):
                decode_frame(data)


def test_rows_are_counted_only_where_the_last_seems_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "_inflated_size", lambda *_: pytest.fail("it was inflated twice"))
    for kind in (GREY, COLOUR, DEEP, GREY > 127, np.zeros_like(GREY), np.full_like(COLOUR, 255)):
        decode_frame(encode(kind, "PNG"))


def test_a_png_of_a_million_chunks_is_not_walked() -> None:
    data = SMALL["png"]
    with pytest.raises(FrameDamagedError, match="more than 100000 chunks"):
        decode_frame(data[:33] + chunk(b"aaAa", b"") * 200_000 + data[33:])


def test_a_truncated_jpeg_is_named() -> None:
    with pytest.raises(FrameDamagedError, match="the JPEG has no end marker"):
        decode_frame(SMALL["jpeg"][:-2])


@pytest.mark.parametrize("luma_only", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"optimize": True}, {"subsampling": 0}, {"quality": 100}, {"keep_rgb": True}, {"restart_marker_blocks": 3}],
    ids=str,
)
@pytest.mark.parametrize("depth", [1, 3])
def test_a_jpeg_that_was_cut_and_given_an_end(depth: int, options: dict[str, Any], luma_only: bool) -> None:
    data = encode(np.squeeze(smooth(90, 130, depth)), "JPEG", **options)
    whole_frame = np.asarray(decode_image(data, luma_only=luma_only))
    start = data.rindex(b"\xff\xda") + 20
    refused = 0
    cuts = range(start, len(data) - 2, 5)
    for cut in cuts:
        try:
            found = np.asarray(decode_image(data[:cut] + b"\xff\xd9", luma_only=luma_only))
        except FrameError:
            refused += 1
        else:  # what is left is within the last block
            np.testing.assert_array_equal(found[:80, :112], whole_frame[:80, :112])
            assert cut > len(data) - 80
    assert refused > 0.9 * len(cuts)


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 2}, {"restart_marker_rows": 1}],
    ids=str,
)
@pytest.mark.parametrize("depth", [1, 3])
def test_a_jpeg_that_ends_in_mid_grey_is_whole(depth: int, options: dict[str, Any]) -> None:
    for level in (127, 128, 129):
        frame = np.full((30, 41), level, np.uint8)
        frame[:15] = smooth(15, 41, 1)
        picture = frame if depth == 1 else np.dstack([frame] * 3)
        decode_frame(encode(picture, "JPEG", **options))


@pytest.mark.parametrize("depth", [1, 3])
def test_a_progressive_jpeg_without_its_last_scans(depth: int) -> None:
    data = encode(np.squeeze(smooth(90, 130, depth)), "JPEG", progressive=True)
    scans = [found.start() for found in re.finditer(b"\xff\xda", data)]
    assert len(scans) > 4
    for start in scans[1:]:
        with pytest.raises(FrameDamagedError, match="the JPEG lacks some of its scans"):
            decode_frame(data[:start] + b"\xff\xd9")


def test_a_jpeg_of_many_scans_or_segments_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("it was decoded"))
    data = SMALL["jpeg-progressive"]
    last = data.rindex(b"\xff\xda")
    with pytest.raises(FrameDamagedError, match="more than 100 scans"):
        decode_frame(data[:last] + data[last:-2] * 120 + b"\xff\xd9")
    for junk in (b"\xff\xfe\0\x02" * 3000, b"\xff" * 100_000, b"\0" * 100_000):
        with pytest.raises(FrameDamagedError, match="beyond all bounds"):
            decode_frame(data[:20] + junk + data[20:])  # behind the first segment


def test_a_tiff_without_its_last_strips() -> None:
    data = bytearray(encode(smooth(60, 56, 1), "TIFF", tiffinfo={278: 8}))  # rows a strip
    assert decode_frame(bytes(data)).shape == (60, 56)
    at = struct.unpack_from("<I", data, 4)[0]
    for entry in range(struct.unpack_from("<H", data, at)[0]):
        tag, _, count = struct.unpack_from("<HHI", data, at + 2 + 12 * entry)
        if tag in (273, 279):  # the strips' offsets and sizes
            struct.pack_into("<I", data, at + 2 + 12 * entry + 4, count - 2)
    with pytest.raises(FrameDamagedError, match="the TIFF lacks some of its strips"):
        decode_frame(bytes(data))


@pytest.mark.parametrize("strips", [6, 5, 4, 2])
def test_a_tiff_whose_colours_lie_apart(strips: int) -> None:
    planes = RNG.integers(0, 256, (3, 4, 8), np.uint8)  # each in two strips of two rows
    values = struct.pack("<3H", 8, 8, 8) + struct.pack("<6I", *range(200, 296, 16)) + struct.pack("<6I", *[16] * 6)
    entries = [(256, 4, 1, 8), (257, 4, 1, 4), (258, 3, 3, 140), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, strips, 146)]
    entries += [(277, 3, 1, 3), (278, 4, 1, 2), (279, 4, strips, 170), (284, 3, 1, 2)]
    table = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    data = (b"II*\0\x08\0\0\0" + table).ljust(140, b"\0") + values
    data = data.ljust(200, b"\0") + planes.tobytes()
    if strips == 6:
        expected = np.asarray(Image.fromarray(np.moveaxis(planes, 0, -1).copy()).convert("L"))
        np.testing.assert_array_equal(decode_frame(data), expected)
    else:
        with pytest.raises(FrameDamagedError, match="the TIFF lacks some of its strips"):
            decode_frame(data)


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
def test_a_fax_is_no_frame(compression: str) -> None:
    with pytest.raises(FrameFormatError, match=f"compressed as {compression}; expected none, LZW"):
        decode_frame(encode(Image.fromarray(GREY > 127), "TIFF", compression=compression))


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "lzma"])
def test_a_compressed_tiff_is_read(compression: str) -> None:
    if compression in ("zstd", "lzma"):
        try:
            encode(GREY, "TIFF", compression=compression)
        except OSError:
            pytest.skip("this Pillow's libtiff does not have it")
    np.testing.assert_array_equal(decode_frame(encode(GREY, "TIFF", compression=compression)), GREY)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Pillow's wheel has libtiff as a file of its own")
def test_libtiff_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(encode(GREY, "TIFF", compression="tiff_adobe_deflate"))
    data[12:60] = bytes(48)
    with pytest.raises(FrameDamagedError):
        decode_frame(bytes(data))
    assert capfd.readouterr().err == ""


def test_what_pillow_logs_is_not_printed() -> None:
    # In a process of its own: pytest handles what is logged.
    data = bytearray(encode(COLOUR, "TIFF"))
    at = struct.unpack_from("<I", data, 4)[0]
    for entry in range(struct.unpack_from("<H", data, at)[0]):
        if struct.unpack_from("<H", data, at + 2 + 12 * entry)[0] == 277:  # samples a pixel
            struct.pack_into("<H", data, at + 2 + 12 * entry + 8, 99)
    program = "import sys; from echoquad_runtime.frames.reader import *; decode_frame(sys.stdin.buffer.read())"
    ended = subprocess.run([sys.executable, "-c", program], input=bytes(data), check=False, capture_output=True)
    assert b"FrameFormatError: the image's header is damaged" in ended.stderr
    assert b"More samples" not in ended.stderr


def test_what_follows_the_image_is_ignored() -> None:
    for name in ("png", "jpeg"):
        np.testing.assert_array_equal(decode_frame(SMALL[name] + b"\0" * 9), decode_frame(SMALL[name]))


@settings(max_examples=150)
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"BM", b"II*\0", b"MM\0*"]),
)
def test_random_bytes_raise_nothing_but_frame_errors(tail: bytes, head: bytes) -> None:
    check_only_frame_errors(head + tail)


@settings(max_examples=400)
@given(st.sampled_from(sorted(SMALL)), st.data())
def test_mutated_images_raise_nothing_but_frame_errors(name: str, data: st.DataObject) -> None:
    content = bytearray(SMALL[name])
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position : position + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        content = content or bytearray(b"x")
    check_only_frame_errors(bytes(content))


@settings(max_examples=200)
@given(st.data())
def test_mutated_pngs_with_right_checksums_raise_nothing_but_frame_errors(data: st.DataObject) -> None:
    # Past the checksums, the decoder itself sees what was mutated.
    fields = data.draw(st.tuples(*[st.integers(0, 300)] * 2, *[st.sampled_from([0, 1, 2, 3, 4, 6, 8, 16, 17])] * 2))
    rows = data.draw(st.binary(max_size=400))
    check_only_frame_errors(png(fields[0], fields[1], rows, fields[2], fields[3]))


def check_only_frame_errors(data: bytes) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in the field, where a warning ends no decoding
            frame = decode_frame(data)
    except FrameError as error:
        assert str(error)
        assert "\n" not in str(error)
    else:
        assert frame.dtype == np.uint8
        assert frame.ndim == 2
