"""Decoding image files (PNG, JPEG, BMP, TIFF) to 8-bit grey, by one rule for each kind of pixel.

========================  ==========================================================================================
pixels                    grey level
========================  ==========================================================================================
8-bit grey                unchanged
1-bit                     0 or 255
colour, palette           ITU-R 601-2 luma, Pillow's ``L``; a JPEG's own luma channel is read straight from the file
with alpha                composited over black, the background of an ultrasound image; so is the transparent colour
                          of a PNG
9- to 16-bit grey         ``round(255 * value / (2^bits - 1))``: of 16 bits 65535 is white, whatever the frame's own
                          maximum
32-bit integers           as 16-bit grey if all are in 0..65535, else refused
float                     ``round(255 * value)`` if all are in [0, 1]; ``round(value)`` if all are in [0, 255];
                          else refused, as is NaN; a range may be left by a millionth of the largest value
========================  ==========================================================================================

The EXIF orientation is applied. A file is refused rather than guessed at: only known formats are accepted, the pixel
count in the header is checked before any pixel is decoded, and truncation is detected (see `image_integrity`), since
Pillow alone accepts files whose end is missing. ``docs/reference/frames.md`` has the details.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, cast

import numpy as np
from PIL import Image, ImageFile

from echoquad_runtime.errors import FrameDamagedError, FrameError, FrameFormatError, FrameTooLargeError
from echoquad_runtime.frames.decoded_frame import ROUNDING
from echoquad_runtime.frames.formats import MAX_PIXELS, TIFF_SIGNATURES
from echoquad_runtime.frames.images.bmp import decode_bit_masks, without_empty_alpha
from echoquad_runtime.frames.images.image_integrity import (
    PNG_SIGNATURE,
    PngLastRowCheck,
    check_jpeg_kind,
    check_jpeg_last_block,
    check_jpeg_markers,
    check_png_chunks,
    check_tiff_strips,
)
from echoquad_runtime.frames.images.png_transparency import blacken_transparent_colour
from echoquad_runtime.frames.images.signatures import SOUND, unsupported_format
from echoquad_runtime.frames.images.tiff_file import TiffFile
from echoquad_runtime.frames.images.tiff_samples import (
    TiffLayout,
    adjust_tiff,
    check_tiff_sign,
    decode_samples,
    read_layout,
)
from echoquad_runtime.frames.quality_flags import COLOUR, COLOUR_SAMPLE, is_coloured
from echoquad_runtime.quadrants import Grey

__all__ = [
    "composite_over_black",
    "decode_grey",
    "decode_grey_and_flags",
    "decode_image",
    "decode_layer",
    "to_grey",
]

_EXIF_ORIENTATION: Final = 0x0112
_TRANSPOSITIONS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG_SIGNATURE: Final = b"\xff\xd8\xff"
_EXPECTED: Final = "expected a PNG, JPEG, BMP or TIFF image"
_BAND_PIXELS: Final = 1 << 20  # converted to grey at a time

# Without a handler, Pillow's log records about damaged files go to stderr; the exception already reports the fault.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def decode_grey_and_flags(data: bytes) -> tuple[Grey, tuple[str, ...]]:
    """Decode an image file to grey, uint8 [H, W], with the quality flags that depend on its colours.

    Returns
    -------
    grey, flags
        ``("colour",)`` if a substantial part of the frame is coloured, else ``()``.

    Raises
    ------
    FrameError
        A subclass: the bytes are not a supported image, are damaged or too large, or no rule covers their pixels.
    """
    with _frame_errors(data):
        image = _decode(data, luma_only=True)
        grey = _upright_grey(image)
        sample = _colour_sample(image, data)
    return grey, (COLOUR,) if sample is not None and is_coloured(sample) else ()


def decode_grey(data: bytes) -> Grey:
    """Decode an image file to grey, uint8 [H, W].

    Raises
    ------
    FrameError
        As `decode_grey_and_flags`.
    """
    with _frame_errors(data):
        return _upright_grey(_decode(data, luma_only=True))


def decode_image(data: bytes, *, luma_only: bool = False) -> Image.Image:
    """Decode an image file, upright, in the mode in which it is stored.

    Parameters
    ----------
    data
        All bytes of the file.
    luma_only
        Skip the chroma of a colour JPEG: half the work if only grey is wanted.

    Raises
    ------
    FrameError
        As `decode_grey_and_flags`.
    """
    with _frame_errors(data):
        image = _decode(data, luma_only=luma_only)
        transposition = _transposition(image)
        return image if transposition is None else image.transpose(transposition)


def _decode(data: bytes, *, luma_only: bool) -> Image.Image:
    if data.startswith(TIFF_SIGNATURES):
        return _decode_tiff(data)
    if data.startswith(PNG_SIGNATURE):
        check_png_chunks(data)
    elif data.startswith(_JPEG_SIGNATURE):
        check_jpeg_kind(data)
        check_jpeg_markers(data)
    image = _open(data)
    if not isinstance(image, ImageFile.ImageFile):
        return image
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise FrameTooLargeError(
            f"the header states {width}x{height} pixels; expected at most {MAX_PIXELS // 1_000_000} million"
        )
    if image.format == "PNG":
        if (count := getattr(image, "n_frames", 1)) > 1:
            raise FrameFormatError(f"the file holds {count} images; expected one; name one, as in file.png#1")
        _load_png(image, data)
        blacken_transparent_colour(image, data)
    elif image.format in ("JPEG", "MPO"):  # MPO is a stereo camera's JPEG, whose first image is the frame
        _load_jpeg(image, luma_only)
        check_jpeg_last_block(image, data, lambda other: _load_jpeg(_open_image(other), luma_only))
    else:
        image.load()
        return without_empty_alpha(image)
    return image


def _open(data: bytes) -> Image.Image:
    """Read the header of an image; the first bytes decide its format, not the file's name."""
    stream = io.BytesIO(data)
    # Image.open would import every plugin to try one after the other, and emit its own warnings about sizes.
    try:
        if data.startswith(PNG_SIGNATURE):
            from PIL.PngImagePlugin import PngImageFile

            return PngImageFile(stream)
        if data.startswith(_JPEG_SIGNATURE):
            from PIL.JpegImagePlugin import jpeg_factory

            return jpeg_factory(stream)
        if data.startswith(b"BM"):
            from PIL.BmpImagePlugin import BmpImageFile

            try:
                return BmpImageFile(stream)
            except OSError as error:
                if not str(error).startswith("Unsupported BMP"):
                    raise
            return decode_bit_masks(data)
    except SyntaxError as error:  # Pillow raises it for an invalid header
        raise FrameFormatError(f"the image's header is damaged; {_EXPECTED}") from error
    if name := unsupported_format(data):
        remedy = "" if name == SOUND else "; convert it to PNG"
        raise FrameFormatError(f"not supported: {name}; {_EXPECTED}{remedy}")
    is_text = all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in data[:64])
    content = "text" if is_text else "an unknown format"
    raise FrameFormatError(f"the file holds {content}; {_EXPECTED}")


def _open_image(data: bytes) -> ImageFile.ImageFile:
    return cast("ImageFile.ImageFile", _open(data))


# ---------------------------------------------------------------------------------------------- TIFF


def _decode_tiff(data: bytes) -> Image.Image:
    file = TiffFile(io.BytesIO(data))
    pages = list(file.pages())
    if len(pages) > 1:
        raise FrameFormatError(f"the file holds {len(pages)} images; expected one; name one, as in file.tif#1")
    if not pages:
        raise FrameFormatError("not supported: a TIFF of thumbnails or masks alone; expected an image")
    page = pages[0]
    layout = read_layout(file, page)
    if layout.is_misread:
        image = decode_samples(file, page, layout, lambda plane: _decode_by_pillow(plane, None))
        image.getexif()[_EXIF_ORIENTATION] = layout.orientation
        return image
    return _decode_by_pillow(data if file.is_first(page) else file.extract(page), layout)


def _decode_by_pillow(data: bytes, layout: TiffLayout | None) -> Image.Image:
    """Decode the first page of a TIFF."""
    from PIL.TiffImagePlugin import TiffImageFile

    try:
        image = TiffImageFile(io.BytesIO(data))
    except SyntaxError as error:
        if layout and str(error) == "unknown pixel mode":  # a combination of tags that Pillow does not know
            raise FrameFormatError(f"not supported: a TIFF of {layout.description}; save it as PNG") from error
        raise FrameFormatError(f"the image's header is damaged; {_EXPECTED}") from error
    check_tiff_strips(image)
    if layout:
        adjust_tiff(image, layout)
    image.load()
    if layout:
        check_tiff_sign(image, layout)
    return image


def decode_layer(data: bytes) -> Image.Image:
    """Decode a PNG file that is drawn over others, to RGBA.

    Raises
    ------
    FrameError
        As `decode_grey_and_flags`.
    """
    with _frame_errors(data):
        image = _open_image(data)
        _load_png(image, data)
        if image.mode != "I;16":
            return image.convert("RGBA")
        key = image.info.get("transparency")
        layer = Image.fromarray(to_grey(image)).convert("RGBA")
        if key is not None:
            layer.putalpha(Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8)))
        return layer


def _load_png(image: ImageFile.ImageFile, data: bytes) -> None:
    last_row = PngLastRowCheck(image)
    image.load()
    last_row.check(image, data)


def _load_jpeg(image: ImageFile.ImageFile, luma_only: bool) -> ImageFile.ImageFile:
    if luma_only and image.mode == "RGB":
        image.draft("L", image.size)
    image.load()
    return image


def _transposition(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that makes an image upright, from its EXIF orientation; None if it is upright."""
    return _TRANSPOSITIONS.get(image.getexif().get(_EXIF_ORIENTATION, 1))


def _upright_grey(image: Image.Image) -> Grey:
    grey, transposition = to_grey(image), _transposition(image)
    return grey if transposition is None else np.asarray(Image.fromarray(grey).transpose(transposition))


def _colour_sample(image: Image.Image, data: bytes) -> Grey | None:
    """Return RGB pixels of a decoded image, uint8 [h, w, 3], at most 64 x 64; None if its mode has no colour."""
    small: Image.Image = image
    if getattr(image, "layers", 0) == 3 and image.mode == "L":  # a JPEG of which only the luma was decoded
        other = _open_image(data)
        # At an eighth of the size only the mean of each block is computed, in three quarters of the luma's time.
        other.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
        other.load()
        small = other
    elif image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I"):
        return None
    size = (min(COLOUR_SAMPLE, small.width), min(COLOUR_SAMPLE, small.height))
    return np.asarray(composite_over_black(small.resize(size, Image.Resampling.NEAREST)).convert("RGB"))


@contextmanager
def _frame_errors(data: bytes) -> Iterator[None]:
    """Replace whatever Pillow raises for `data` by a FrameError of one line."""
    if not data:
        raise FrameDamagedError(f"the file is empty; {_EXPECTED}")
    try:
        yield
    except FrameError:
        raise
    except MemoryError as error:
        raise FrameTooLargeError("not enough memory for the frame's pixels; expected a smaller frame") from error
    # Pillow's decoders have no common error class: SyntaxError for a broken PNG, struct.error and KeyError for TIFF
    # tags, OSError for truncation. One bad file must not end a run over a thousand.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        printable = "".join(character if character.isprintable() else "?" for character in reason)
        raise FrameDamagedError(f"the image is damaged or truncated ({printable})") from error


def to_grey(image: Image.Image) -> Grey:
    """Convert a decoded image to grey, uint8 [H, W], by the module's table.

    A large image is converted in bands of rows, so that memory does not hold several copies of it.

    Raises
    ------
    FrameFormatError
        If no rule covers its values.
    """
    if image.mode == "L":
        return np.asarray(image)
    convert = _numeric_conversion(image) if image.mode.startswith("I") or image.mode == "F" else _pixels_to_grey
    if image.width * image.height <= _BAND_PIXELS:
        return convert(image)
    grey = np.empty((image.height, image.width), np.uint8)
    for top, band in _bands(image):
        grey[top : top + band.height] = convert(band)
    return grey


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _pixels_to_grey(image: Image.Image) -> Grey:
    try:
        return np.asarray(composite_over_black(image).convert("L"))
    except ValueError as error:  # Pillow reads CIELAB from TIFF but cannot convert it to grey
        raise FrameFormatError(
            f"the pixels have the mode {image.mode}; expected grey, palette or RGB; save it as PNG"
        ) from error


def composite_over_black(image: Image.Image) -> Image.Image:
    """Composite an image with alpha over black, to RGB; return any other image unchanged."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image).convert("RGB")
    return image


def _numeric_conversion(image: Image.Image) -> Callable[[Image.Image], Grey]:
    """Choose the conversion of integers or floats to grey, by the range of all pixels."""
    ranges = [(values.min(), values.max()) for values in (np.asarray(band) for _, band in _bands(image))]
    low, high = (np.asarray(side) for side in zip(*ranges, strict=True))
    low, high = low.min(), high.max()  # numpy's, which propagate NaN
    if np.issubdtype(low.dtype, np.integer):
        if low < 0 or high > 65535:
            raise FrameFormatError(f"the pixels range from {low} to {high}; expected integers in 0..65535")
        return lambda band: np.asarray((np.asarray(band).astype(np.uint32) + 128) // 257, np.uint8)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise FrameFormatError("the pixels include NaN or infinity; expected floats in [0, 1] or in [0, 255]")
    if low < -ROUNDING * max(high, 0) or high > 255 * (1 + ROUNDING):
        raise FrameFormatError(f"the pixels range from {low:g} to {high:g}; expected floats in [0, 1] or in [0, 255]")
    scale = 255.0 if high <= 1 + ROUNDING else 1.0
    return lambda band: np.asarray(np.floor(np.asarray(band).astype(np.float64) * scale + 0.5), np.uint8)
