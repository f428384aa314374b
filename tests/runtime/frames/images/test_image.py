"""Image files: every kind of pixel to grey, orientation, limits, and detection of damage and truncation."""

from __future__ import annotations

import io
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
    FrameTooLargeError,
    FrameTooSmallError,
)
from echoquad_runtime.frames.formats import MAX_PIXELS
from echoquad_runtime.frames.images import image as image_files
from echoquad_runtime.frames.images import image_integrity
from echoquad_runtime.frames.images.image import decode_image, to_grey
from echoquad_runtime.frames.reader import decode_grey, read_grey
from echoquad_runtime.quadrants import split

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (23, 31), np.uint8)
COLOUR = RNG.integers(0, 256, (23, 31, 3), np.uint8)
ALPHA = RNG.integers(0, 256, (23, 31), np.uint8)
DEEP = RNG.integers(0, 65536, (23, 31), np.uint16)
LOSSLESS = ("PNG", "BMP", "TIFF")


def encode(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def smooth(height: int = 40, width: int = 56, depth: int = 3) -> np.ndarray:
    """Return a smooth picture, uint8 [height, width(, depth)], whose JPEG stays inside the gamut."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [128 + 70 * np.sin(x / (9 + i) + i) * np.cos(y / (7 + 2 * i)) for i in range(depth)]
    picture = np.stack(channels, axis=-1).round().astype(np.uint8)
    return picture if depth > 1 else picture[:, :, 0]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, rows: bytes = b"", depth: int = 8, colour: int = 0, interlaced: int = 0) -> bytes:
    """Return a PNG whose header may contradict its content."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# ---------------------------------------------------------------------------------------------- kinds of pixel


@pytest.mark.parametrize("kind", LOSSLESS)
def test_8_bit_grey_is_unchanged(kind: str) -> None:
    found = decode_grey(encode(GREY, kind))
    np.testing.assert_array_equal(found, GREY)
    assert found.dtype == np.uint8


@pytest.mark.parametrize("kind", LOSSLESS)
def test_1_bit_pixels_become_black_and_white(kind: str) -> None:
    image = Image.fromarray(GREY > 127)
    assert image.mode == "1"
    np.testing.assert_array_equal(decode_grey(encode(image, kind)), np.where(GREY > 127, 255, 0))


@pytest.mark.parametrize("kind", LOSSLESS)
def test_colour_becomes_itu_r_601_luma(kind: str) -> None:
    expected = np.asarray(Image.fromarray(COLOUR).convert("L"))
    np.testing.assert_array_equal(decode_grey(encode(COLOUR, kind)), expected)
    # ITU-R 601-2, computed without Pillow.
    luma = COLOUR @ np.array([0.299, 0.587, 0.114])
    assert np.abs(luma - expected).max() <= 0.51


@pytest.mark.parametrize("kind", LOSSLESS)
def test_palette_becomes_luma_of_its_colours(kind: str) -> None:
    image = Image.fromarray(COLOUR).quantize(16)
    expected = np.asarray(image.convert("RGB").convert("L"))
    np.testing.assert_array_equal(decode_grey(encode(image, kind)), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_colour_with_alpha_is_composited_over_black(kind: str) -> None:
    found = decode_grey(encode(np.dstack([COLOUR, ALPHA]), kind))
    # float64 instead of Pillow's integers: tolerance for its rounding of each channel and of the luma.
    expected = (COLOUR * (ALPHA[:, :, None] / 255.0)) @ np.array([0.299, 0.587, 0.114])
    assert np.abs(found - expected).max() <= 1.5
    assert (found[ALPHA == 0] == 0).all()
    opaque = encode(np.dstack([COLOUR, np.full_like(ALPHA, 255)]), kind)
    np.testing.assert_array_equal(decode_grey(opaque), np.asarray(Image.fromarray(COLOUR).convert("L")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_with_alpha_is_composited_over_black(kind: str) -> None:
    image = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
    found = decode_grey(encode(image, kind))
    assert np.abs(found - GREY * (ALPHA / 255.0)).max() <= 1


def test_transparent_palette_entry_is_black() -> None:
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P")
    image.putpalette([200, 200, 200, 90, 90, 90])
    np.testing.assert_array_equal(decode_grey(encode(image, "PNG", transparency=0)), [[0, 90], [90, 0]])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_divided_by_257(kind: str) -> None:
    deep = DEEP.copy()
    deep[0, :8] = [0, 128, 129, 385, 386, 65406, 65407, 65535]
    found = decode_grey(encode(deep, kind))
    np.testing.assert_array_equal(found, np.rint(deep / 257.0))  # no value is half-way between two levels: 257 is odd
    np.testing.assert_array_equal(found[0, :8], [0, 0, 1, 1, 2, 254, 255, 255])


def test_every_16_bit_value_is_rounded_to_nearest() -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(decode_grey(encode(every, "PNG")), np.rint(every / 257.0))


def test_dark_16_bit_frame_is_not_stretched() -> None:
    assert decode_grey(encode(np.full((4, 4), 1000, np.uint16), "PNG")).max() == 4


def test_big_endian_16_bit_tiff_is_read() -> None:
    image = Image.frombytes("I;16B", (31, 23), DEEP.astype(">u2").tobytes())
    np.testing.assert_array_equal(decode_grey(encode(image, "TIFF")), np.rint(DEEP / 257.0))


def test_32_bit_integers_within_16_bits_are_read() -> None:
    np.testing.assert_array_equal(decode_grey(encode(DEEP.astype(np.int32), "TIFF")), np.rint(DEEP / 257.0))


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1])
def test_32_bit_integers_beyond_16_bits_are_refused(value: int) -> None:
    wrong = DEEP.astype(np.int32)
    wrong[3, 4] = value
    with pytest.raises(FrameFormatError, match=r"0\.\.65535"):
        decode_grey(encode(wrong, "TIFF"))


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        ([0, 0.25, 0.5, 1], [0, 64, 128, 255]),
        ([0, 0.5, 1, 1.0001], [0, 1, 1, 1]),  # above 1, grey levels
        ([0, 0.5, 254.4, 254.5], [0, 1, 254, 255]),
        ([0, 0, 0, 255], [0, 0, 0, 255]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_floats_are_fractions_of_white_or_grey_levels(values: Sequence[float], levels: Sequence[int]) -> None:
    np.testing.assert_array_equal(decode_grey(encode(np.array([values], np.float32), "TIFF")), [levels])


@pytest.mark.parametrize("value", [-0.001, 255.5, 1e9, float("nan"), float("inf"), float("-inf")])
def test_floats_out_of_range_are_refused(value: float) -> None:
    wrong = np.zeros((4, 4), np.float32)
    wrong[1, 2] = value
    with pytest.raises(FrameFormatError, match=r"\[0, 1\] or in \[0, 255\]"):
        decode_grey(encode(wrong, "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_read(kind: str) -> None:
    image = Image.fromarray(smooth()).convert("CMYK")
    data = encode(image, kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    np.testing.assert_array_equal(decode_grey(data), expected)


def test_mode_that_pillow_cannot_convert_is_refused() -> None:
    with pytest.raises(FrameFormatError, match="LAB"):
        decode_grey(encode(Image.new("LAB", (9, 8)), "TIFF"))


@pytest.mark.parametrize("mode", ["1", "RGB", "RGBA", "LA", "P", "PA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_conversion_in_bands_equals_conversion_at_once(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    colour = Image.fromarray(np.dstack([COLOUR, ALPHA]))
    image = {
        "I;16": Image.fromarray(DEEP),
        "I": Image.fromarray(DEEP.astype(np.int32)),
        "F": Image.fromarray(DEEP.astype(np.float32) / 65535),
        "PA": colour.convert("RGB").quantize(16).convert("PA"),
    }.get(mode) or colour.convert(mode)
    expected = to_grey(image)
    for pixels in (1, 31, 100, 31 * 22, 31 * 23):
        monkeypatch.setattr(image_files, "_BAND_PIXELS", pixels)
        np.testing.assert_array_equal(to_grey(image), expected)


@pytest.mark.parametrize("value", [float("nan"), -1.0, 256.0])
def test_value_range_covers_all_bands(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "_BAND_PIXELS", 16)
    values = np.zeros((9, 8), np.float32)
    values[8, 7] = value
    with pytest.raises(FrameFormatError):
        decode_grey(encode(values, "TIFF"))
    values[8, 7] = 2  # above 1: grey levels, in all bands
    values[0, 0] = 0.7
    assert decode_grey(encode(values, "TIFF"))[0, 0] == 1


def test_to_grey_keeps_8_bit_grey() -> None:
    np.testing.assert_array_equal(to_grey(Image.fromarray(GREY)), GREY)


# ---------------------------------------------------------------------------------------------- JPEG


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("quality", [75, 95])
def test_colour_jpeg_luma_is_within_one_level_of_pillows(subsampling: str, progressive: bool, quality: int) -> None:
    data = encode(smooth(), "JPEG", subsampling=subsampling, progressive=progressive, quality=quality)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("L")).astype(int)
    assert np.abs(decode_grey(data) - expected).max() <= 1


@pytest.mark.parametrize("progressive", [False, True])
def test_grey_content_in_colour_jpeg_is_exact(progressive: bool) -> None:
    # Scanners save grey pixels in colour files. Skipping the chroma must not change them.
    data = encode(Image.fromarray(GREY).convert("RGB"), "JPEG", quality=90, progressive=progressive)
    image = Image.open(io.BytesIO(data))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(decode_grey(data), np.asarray(image.convert("L")))


def test_jpeg_stored_as_rgb_is_read() -> None:
    data = encode(smooth(), "JPEG", keep_rgb=True, quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("L")).astype(int)
    assert np.abs(decode_grey(data) - expected).max() <= 1


def test_decode_image_keeps_colours_unless_luma_only() -> None:
    data = encode(smooth(), "JPEG", quality=95)
    assert decode_image(data).mode == "RGB"
    assert decode_image(data, luma_only=True).mode == "L"
    assert decode_image(data).size == decode_image(data, luma_only=True).size == (56, 40)


def test_end_marker_of_exif_thumbnail_does_not_hide_truncation() -> None:
    # The thumbnail is a JPEG within the JPEG, with its own end marker.
    exif = b"Exif\x00\x00" + b"MM\x00*\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00" + encode(GREY[:8, :8], "JPEG")
    data = encode(GREY, "JPEG", exif=exif)
    assert data.count(b"\xff\xd9") == 2
    assert decode_grey(data).shape == GREY.shape
    for cut in range(1, len(data)):
        with pytest.raises(FrameError):
            decode_grey(data[:cut])
    with pytest.raises(FrameDamagedError, match="no end marker"):
        decode_grey(data[:-2])


# ---------------------------------------------------------------------------------------------- orientation

TRANSPOSED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
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
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = smooth(depth=1)
    options = {"subsampling": 0, "quality": 100} if kind == "JPEG" else {}
    data = encode(picture, kind, exif=exif, **options)
    plain = decode_grey(encode(picture, kind, **options))
    np.testing.assert_array_equal(decode_grey(data), TRANSPOSED[orientation](plain))
    np.testing.assert_array_equal(np.asarray(decode_image(data)), TRANSPOSED[orientation](plain))


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_invalid_exif_orientation_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode_grey(encode(GREY, "PNG", exif=exif)), GREY)


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF"])
def test_content_decides_format_not_extension(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "frame.xyz"
    path.write_bytes(encode(smooth(depth=1), kind))
    assert read_grey(path).shape == (40, 56)
    wrong = path.with_suffix(".png" if kind == "BMP" else ".bmp")
    path.rename(wrong)
    assert read_grey(wrong).shape == (40, 56)


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (b"", FrameDamagedError, "empty"),
        (b"case,label\n1,ASD\n", FrameFormatError, "text; expected a PNG, JPEG, BMP or TIFF"),
        (b"0.1 0.2\n0.3 0.4\n", FrameFormatError, "text"),
        (bytes(range(128, 200)), FrameFormatError, "unknown format"),
        (b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", FrameFormatError, "not supported: GIF"),
        (b"\x89PNG\r\n\x1a\n" + bytes(30), FrameError, "damaged"),
        (b"\xff\xd8\xff\xe0" + bytes(30), FrameError, "truncated"),
    ],
    ids=["empty", "table", "matrix", "bytes", "gif", "png", "jpeg"],
)
def test_file_without_image_is_refused(tmp_path: Path, content: bytes, error: type[FrameError], words: str) -> None:
    path = tmp_path / "frame.png"
    path.write_bytes(content)
    with pytest.raises(error, match=words) as caught:
        read_grey(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PPM", "ICO"])
def test_other_formats_of_pillow_are_refused(kind: str) -> None:
    with pytest.raises(FrameFormatError, match="PNG, JPEG, BMP or TIFF"):
        decode_grey(encode(GREY, kind))


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_tiny_image_is_decoded_and_refused_by_split(shape: tuple[int, int]) -> None:
    frame = decode_grey(encode(np.zeros(shape, np.uint8), "PNG"))
    assert frame.shape == shape
    with pytest.raises(FrameTooSmallError):
        split(frame, 0.9)


# ---------------------------------------------------------------------------------------------- too large


@pytest.mark.parametrize("size", [(6001, 6001), (30_000, 30_000), (2**31 - 1, 2**31 - 1), (1, MAX_PIXELS + 1)])
def test_png_header_above_pixel_limit_is_refused_without_memory(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.core, "new", lambda *_: pytest.fail("memory was allocated"))
    monkeypatch.setattr(Image.core, "fill", lambda *_: pytest.fail("memory was allocated"))
    with pytest.raises(FrameTooLargeError, match="at most 36 million"):
        decode_grey(png(*size))


def with_stated_size(kind: str, width: int, height: int) -> bytes:
    """Return a file of 400 x 300 pixels whose header states another size."""
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
def test_other_headers_above_pixel_limit_are_refused(kind: str) -> None:
    assert decode_grey(with_stated_size(kind, 400, 300)).shape == (300, 400)
    for size in ((6001, 6000), (30_000, 29_000)):
        with pytest.raises(FrameTooLargeError, match="at most 36 million"):
            decode_grey(with_stated_size(kind, *size))


def test_decompression_bomb_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    side = 6001
    data = png(side, side, bytes(side * (side + 1)))  # 36 MB of zeros in some 35 kB
    assert len(data) < 100_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(FrameTooLargeError, match="6001x6001"):
        decode_grey(data)


def test_frame_at_pixel_limit_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_PIXELS", GREY.size)
    np.testing.assert_array_equal(decode_grey(encode(GREY, "PNG")), GREY)
    monkeypatch.setattr(image_files, "MAX_PIXELS", GREY.size - 1)
    with pytest.raises(FrameTooLargeError):
        decode_grey(encode(GREY, "PNG"))


# ---------------------------------------------------------------------------------------------- many images


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_several_images_in_one_file_are_refused(kind: str) -> None:
    pages = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (0, 100, 200)]
    data = encode(pages[0], kind, save_all=True, append_images=pages[1:])
    with pytest.raises(FrameFormatError, match="3 images"):
        decode_grey(data)


@pytest.mark.parametrize(
    ("marker", "bits", "components", "name"),
    [
        (0xF7, 8, 3, "JPEG-LS"),
        (0xC5, 8, 3, "hierarchical"),
        (0xC1, 12, 3, "12 bits"),
        (0xC0, 8, 2, "2 components"),
    ],
)
def test_kinds_of_jpeg_that_are_not_read_are_named(marker: int, bits: int, components: int, name: str) -> None:
    data = bytearray(encode(COLOUR, "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 1], data[at + 4], data[at + 9] = marker, bits, components
    with pytest.raises(FrameFormatError, match=f"not supported: .*{name}"):
        decode_grey(bytes(data))


def test_first_image_of_stereo_jpeg_is_the_frame() -> None:
    first, second = smooth(depth=1), np.zeros((40, 56), np.uint8)
    data = encode(first, "MPO", save_all=True, append_images=[Image.fromarray(second)])
    assert np.abs(decode_grey(data).astype(int) - first).max() < 12


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
def test_truncated_file_never_yields_other_pixels(name: str) -> None:
    data = SMALL[name]
    expected = decode_grey(data)
    accepted = []
    for cut in range(len(data)):
        try:
            found = decode_grey(data[:cut])
        except FrameError as error:
            assert "\n" not in str(error)
            continue
        accepted.append(cut)
        np.testing.assert_array_equal(found, expected)
    # A PNG or JPEG must be complete; the other formats may lack padding and trailing tables.
    assert not accepted or not name.startswith(("png", "jpeg"))


@pytest.mark.parametrize("name", ["png", "png-colour"])
def test_png_with_changed_byte_never_yields_other_pixels(name: str) -> None:
    data = SMALL[name]
    expected = decode_grey(data)
    rng = random.Random(0)
    for position in range(len(data)):
        for flip in {1, 0x80, 0xFF, rng.randrange(1, 256)}:
            wrong = bytearray(data)
            wrong[position] ^= flip
            try:
                found = decode_grey(bytes(wrong))
            except FrameError:
                continue
            np.testing.assert_array_equal(found, expected)


def test_checksum_error_names_png_chunk() -> None:
    data = bytearray(SMALL["png"])
    data[data.index(b"IDAT") + 10] ^= 1
    with pytest.raises(FrameDamagedError, match="IDAT chunk"):
        decode_grey(bytes(data))
    with pytest.raises(FrameDamagedError, match="truncated"):
        decode_grey(SMALL["png"][:-12])


def test_checksum_error_of_unprintable_chunk_states_its_position() -> None:
    data = bytearray(SMALL["png"])
    at = data.index(b"IDAT")
    data[at : at + 4] = b"\nx\x1b\xff"
    with pytest.raises(FrameDamagedError, match=f"chunk at byte {at - 4} "):
        decode_grey(bytes(data))


PNG_FORMATS = [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2), (1, 3), (4, 3), (8, 3), (8, 4), (16, 4)]
PNG_FORMATS += [(8, 6), (16, 6)]


@pytest.mark.parametrize(("depth", "colour"), PNG_FORMATS)
@pytest.mark.parametrize("level", [0, 0xA5, 0xFF])
def test_png_with_missing_rows_is_refused(depth: int, colour: int, level: int) -> None:
    width, height = 16, 9
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = b"\0" + bytes([level]) * (width * bits // 8)
    palette = chunk(b"PLTE", bytes(range(3 * 2**depth)) if depth < 8 else bytes(768)) if colour == 3 else b""
    for rows in range(height + 1):
        data = png(width, height, row * rows, depth, colour)
        data = data[:33] + palette + data[33:]
        if rows == height:
            assert decode_grey(data).shape == (height, width)
        else:
            with pytest.raises(FrameDamagedError, match=r"\d+ of \d+ bytes|truncated"):
                decode_grey(data)


def test_black_png_is_complete() -> None:
    assert decode_grey(png(5, 4, bytes(24))).max() == 0


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (8, 8), (17, 23)])
def test_interlaced_png_with_missing_rows_is_refused(size: tuple[int, int]) -> None:
    width, height = size
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = []
    for x, y, dx, dy in passes:
        columns = len(range(x, width, dx))
        rows += [b"\0" + bytes([9]) * columns for _ in range(y, height, dy) if columns]
    for count in range(len(rows) + 1):
        data = png(width, height, b"".join(rows[:count]), interlaced=1)
        if count == len(rows):
            np.testing.assert_array_equal(decode_grey(data), np.full((height, width), 9))
        else:
            with pytest.raises(FrameDamagedError, match=r"\d+ of \d+ bytes|truncated"):
                decode_grey(data)


def test_complete_png_is_inflated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_integrity, "_inflated_size", lambda *_: pytest.fail("inflated twice"))
    for pixels in (GREY, COLOUR, DEEP, GREY > 127, np.zeros_like(GREY), np.full_like(COLOUR, 255)):
        decode_grey(encode(pixels, "PNG"))


def test_png_with_too_many_chunks_is_refused() -> None:
    data = SMALL["png"]
    with pytest.raises(FrameDamagedError, match="100000 chunks"):
        decode_grey(data[:33] + chunk(b"aaAa", b"") * 200_000 + data[33:])


def test_jpeg_without_end_marker_is_refused() -> None:
    with pytest.raises(FrameDamagedError, match="no end marker"):
        decode_grey(SMALL["jpeg"][:-2])


@pytest.mark.parametrize("luma_only", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"optimize": True}, {"subsampling": 0}, {"quality": 100}, {"keep_rgb": True}, {"restart_marker_blocks": 3}],
    ids=str,
)
@pytest.mark.parametrize("depth", [1, 3])
def test_cut_jpeg_with_end_marker_is_refused(depth: int, options: dict[str, Any], luma_only: bool) -> None:
    data = encode(np.squeeze(smooth(90, 130, depth)), "JPEG", **options)
    complete = np.asarray(decode_image(data, luma_only=luma_only))
    start = data.rindex(b"\xff\xda") + 20
    refused = 0
    cuts = range(start, len(data) - 2, 5)
    for cut in cuts:
        try:
            found = np.asarray(decode_image(data[:cut] + b"\xff\xd9", luma_only=luma_only))
        except FrameError:
            refused += 1
        else:  # the cut is within the last block
            np.testing.assert_array_equal(found[:80, :112], complete[:80, :112])
            assert cut > len(data) - 80
    assert refused > 0.9 * len(cuts)


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 2}, {"restart_marker_rows": 1}],
    ids=str,
)
@pytest.mark.parametrize("depth", [1, 3])
def test_jpeg_that_ends_in_mid_grey_is_complete(depth: int, options: dict[str, Any]) -> None:
    for level in (127, 128, 129):
        frame = np.full((30, 41), level, np.uint8)
        frame[:15] = smooth(15, 41, 1)
        picture = frame if depth == 1 else np.dstack([frame] * 3)
        decode_grey(encode(picture, "JPEG", **options))


@pytest.mark.parametrize("depth", [1, 3])
def test_progressive_jpeg_without_last_scans_is_refused(depth: int) -> None:
    data = encode(np.squeeze(smooth(90, 130, depth)), "JPEG", progressive=True)
    scans = [found.start() for found in re.finditer(b"\xff\xda", data)]
    assert len(scans) > 4
    for start in scans[1:]:
        with pytest.raises(FrameDamagedError, match="scans"):
            decode_grey(data[:start] + b"\xff\xd9")


def test_jpeg_with_too_many_scans_or_segments_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    data = SMALL["jpeg-progressive"]
    last = data.rindex(b"\xff\xda")
    with pytest.raises(FrameDamagedError, match="100 scans"):
        decode_grey(data[:last] + data[last:-2] * 120 + b"\xff\xd9")
    for junk in (b"\xff\xfe\0\x02" * 3000, b"\xff" * 100_000, b"\0" * 100_000):
        with pytest.raises(FrameDamagedError, match="too many segments"):
            decode_grey(data[:20] + junk + data[20:])  # after the first segment


def test_tiff_without_last_strips_is_refused() -> None:
    data = bytearray(encode(smooth(60, 56, 1), "TIFF", tiffinfo={278: 8}))  # rows per strip
    assert decode_grey(bytes(data)).shape == (60, 56)
    at = struct.unpack_from("<I", data, 4)[0]
    for entry in range(struct.unpack_from("<H", data, at)[0]):
        tag, _, count = struct.unpack_from("<HHI", data, at + 2 + 12 * entry)
        if tag in (273, 279):  # offsets and sizes of the strips
            struct.pack_into("<I", data, at + 2 + 12 * entry + 4, count - 2)
    with pytest.raises(FrameDamagedError, match="strips"):
        decode_grey(bytes(data))


@pytest.mark.parametrize("strips", [6, 5, 4, 2])
def test_planar_tiff_needs_all_strips(strips: int) -> None:
    planes = RNG.integers(0, 256, (3, 4, 8), np.uint8)  # two strips of two rows for each plane
    values = struct.pack("<3H", 8, 8, 8) + struct.pack("<6I", *range(200, 296, 16)) + struct.pack("<6I", *[16] * 6)
    entries = [(256, 4, 1, 8), (257, 4, 1, 4), (258, 3, 3, 140), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, strips, 146)]
    entries += [(277, 3, 1, 3), (278, 4, 1, 2), (279, 4, strips, 170), (284, 3, 1, 2)]
    table = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    data = (b"II*\0\x08\0\0\0" + table).ljust(140, b"\0") + values
    data = data.ljust(200, b"\0") + planes.tobytes()
    if strips == 6:
        expected = np.asarray(Image.fromarray(np.moveaxis(planes, 0, -1).copy()).convert("L"))
        np.testing.assert_array_equal(decode_grey(data), expected)
    else:
        with pytest.raises(FrameDamagedError, match="strips"):
            decode_grey(data)


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
def test_fax_compression_is_refused(compression: str) -> None:
    with pytest.raises(FrameFormatError, match=compression):
        decode_grey(encode(Image.fromarray(GREY > 127), "TIFF", compression=compression))


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "lzma"])
def test_compressed_tiff_is_read(compression: str) -> None:
    if compression in ("zstd", "lzma"):
        try:
            encode(GREY, "TIFF", compression=compression)
        except OSError:
            pytest.skip("not supported by the libtiff of this Pillow")
    np.testing.assert_array_equal(decode_grey(encode(GREY, "TIFF", compression=compression)), GREY)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux wheels of Pillow ship libtiff as a separate library"
)
def test_libtiff_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(encode(GREY, "TIFF", compression="tiff_adobe_deflate"))
    data[12:60] = bytes(48)
    with pytest.raises(FrameDamagedError):
        decode_grey(bytes(data))
    assert capfd.readouterr().err == ""


def test_pillows_log_records_are_not_printed() -> None:
    # In a separate process, since pytest installs log handlers.
    data = bytearray(encode(COLOUR, "TIFF"))
    at = struct.unpack_from("<I", data, 4)[0]
    for entry in range(struct.unpack_from("<H", data, at)[0]):
        if struct.unpack_from("<H", data, at + 2 + 12 * entry)[0] == 277:  # samples per pixel
            struct.pack_into("<H", data, at + 2 + 12 * entry + 8, 99)
    program = "import sys; from echoquad_runtime.frames.reader import *; decode_grey(sys.stdin.buffer.read())"
    ended = subprocess.run([sys.executable, "-c", program], input=bytes(data), check=False, capture_output=True)
    assert b"FrameFormatError" in ended.stderr
    assert b"More samples" not in ended.stderr


def test_bytes_after_image_are_ignored() -> None:
    for name in ("png", "jpeg"):
        np.testing.assert_array_equal(decode_grey(SMALL[name] + b"\0" * 9), decode_grey(SMALL[name]))


@settings(max_examples=60)
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"BM", b"II*\0", b"MM\0*"]),
)
def test_random_bytes_raise_nothing_but_frame_errors(tail: bytes, head: bytes) -> None:
    check_only_frame_errors(head + tail)


@settings(max_examples=60)
@given(st.data())
def test_mutated_pngs_with_right_checksums_raise_nothing_but_frame_errors(data: st.DataObject) -> None:
    # With right checksums the mutations reach the decoder itself.
    fields = data.draw(st.tuples(*[st.integers(0, 300)] * 2, *[st.sampled_from([0, 1, 2, 3, 4, 6, 8, 16, 17])] * 2))
    rows = data.draw(st.binary(max_size=400))
    check_only_frame_errors(png(fields[0], fields[1], rows, fields[2], fields[3]))


def check_only_frame_errors(data: bytes) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # outside pytest a warning does not stop decoding
            frame = decode_grey(data)
    except FrameError as error:
        assert str(error)
        assert "\n" not in str(error)
    else:
        assert frame.dtype == np.uint8
        assert frame.ndim == 2
