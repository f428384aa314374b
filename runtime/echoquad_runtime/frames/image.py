"""Reading frames: from a file's bytes to an 8-bit grey image, by one stated rule for each kind of pixel.

========================  ==========================================================================================
found                     grey level
========================  ==========================================================================================
8-bit grey                as it is
1-bit                     0 or 255
colour, palette           ITU-R 601-2 luma, Pillow's ``L``; a JPEG's own luma channel is read straight from the file
with alpha                laid over black, as the background of an ultrasound image is
16-bit grey               ``round(value / 257)``: 65535 is white, whatever the frame's own maximum
32-bit integers           as 16-bit grey where all lie in 0..65535, else refused
float                     ``round(255 * value)`` where all lie in [0, 1]; ``round(value)`` where all lie in [0, 255];
                          else refused, as is NaN
========================  ==========================================================================================

An EXIF orientation is applied. A file is refused rather than guessed at: its kind is restricted, its pixels are counted
from the header before any is decoded, and whether it is whole is looked at (see `image_integrity`), since Pillow
alone accepts files whose tail is missing. ``docs/reference/frames.md`` tells it all.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import numpy as np
from PIL import Image, ImageFile

from echoquad_runtime.errors import (
    FrameDamagedError,
    FrameError,
    FrameFormatError,
    FrameReadError,
    FrameTooLargeError,
)
from echoquad_runtime.frames.formats import MAX_FILE_BYTES, MAX_PIXELS
from echoquad_runtime.frames.image_integrity import (
    PNG_SIGNATURE,
    Unwritten,
    check_jpeg,
    check_jpeg_pixels,
    check_png,
    check_tiff,
)
from echoquad_runtime.frames.quality_flags import COLOUR, is_coloured
from echoquad_runtime.quadrants import Grey
from echoquad_runtime.storage.atomic import open_regular

if TYPE_CHECKING:
    from PIL.TiffImagePlugin import TiffImageFile

__all__ = [
    "decode_grey",
    "decode_grey_and_flags",
    "decode_image",
    "over_black",
    "read_bytes",
    "to_grey",
]

_ORIENTATION: Final = 0x0112
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG_SIGNATURE: Final = b"\xff\xd8\xff"
_TIFF_SIGNATURES: Final = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_EXPECTED: Final = "expected a PNG, JPEG, BMP or TIFF image"
_SAMPLE: Final = 64  # pixels a side, of a frame whose colours are looked at
_BAND: Final = 1 << 20  # pixels that are brought to grey at a time

# Without a handler, what Pillow logs of a damaged file goes to stderr; here an error's own line says it.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def read_bytes(path: Path) -> bytes:
    """Read a regular file whole.

    It is opened once, without waiting, and what was opened is what is asked: a pipe that takes the file's place is
    refused and not waited for. A file that grows or shrinks meanwhile is refused.

    Raises
    ------
    FrameReadError
        If it cannot be opened or read, is no regular file (a pipe would never end), or changes.
    FrameTooLargeError
        If it holds more than `MAX_FILE_BYTES`.
    """
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise FrameTooLargeError(
                    f"the file holds {size} bytes; expected at most {MAX_FILE_BYTES}; convert it to 8-bit PNG"
                )
            data = stream.read(size + 1)
    except FrameError:
        raise
    except (OSError, ValueError, MemoryError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or _one_line(error)
        raise FrameReadError(f"it cannot be read ({reason}); expected an image file") from error
    if len(data) != size:
        raise FrameReadError(f"it changed while it was read, from {size} bytes on; wait until it is written")
    return data


def decode_grey_and_flags(data: bytes) -> tuple[Grey, tuple[str, ...]]:
    """Decode an image file's bytes to grey, uint8 [H, W], with the quality flags that only its colours can tell.

    Returns
    -------
    grey, flags
        ``("colour",)`` where a substantial part of the frame is coloured, else ``()``.

    Raises
    ------
    FrameError
        One of its kinds: the bytes are no supported image, are damaged, too large, or of pixels no rule covers.
    """
    with _frame_errors(data):
        image = _decode(data, luma_only=True)
        grey = _upright_grey(image)
        sample = _colour_sample(image, data)
    return grey, (COLOUR,) if sample is not None and is_coloured(sample) else ()


def decode_grey(data: bytes) -> Grey:
    """Decode an image file's bytes to grey, uint8 [H, W].

    Raises
    ------
    FrameError
        As `decode_grey_and_flags`.
    """
    with _frame_errors(data):
        return _upright_grey(_decode(data, luma_only=True))


def decode_image(data: bytes, *, luma_only: bool = False) -> Image.Image:
    """Decode an image file's bytes, upright, in the mode it is stored in.

    Parameters
    ----------
    data
        The whole file.
    luma_only
        Skip a colour JPEG's chroma: half the work where only grey is wanted.

    Raises
    ------
    FrameError
        As `decode_grey_and_flags`.
    """
    with _frame_errors(data):
        image = _decode(data, luma_only=luma_only)
        turn = _turn(image)
        return image if turn is None else image.transpose(turn)


def _decode(data: bytes, *, luma_only: bool) -> ImageFile.ImageFile:
    if data.startswith(PNG_SIGNATURE):
        check_png(data)
    elif data.startswith(_JPEG_SIGNATURE):
        check_jpeg(data)
    image = _open(data)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise FrameTooLargeError(
            f"the header announces {width}x{height} pixels; expected at most {MAX_PIXELS // 1_000_000} million"
        )
    _check_still(image)
    if image.format == "PNG":
        unwritten = Unwritten(image)
        image.load()
        unwritten.check(image, data)
    elif image.format in ("JPEG", "MPO"):
        _load_jpeg(image, luma_only)
        check_jpeg_pixels(image, data, lambda other: _load_jpeg(_open(other), luma_only))
    else:
        if image.format == "TIFF":
            check_tiff(cast("TiffImageFile", image))
        image.load()
    return image


def _open(data: bytes) -> ImageFile.ImageFile:
    """Read an image's header, by the first bytes and not by the name."""
    stream = io.BytesIO(data)
    # Each kind's own class: Image.open imports them all to try one after the other, and warns of size by itself.
    try:
        if data.startswith(PNG_SIGNATURE):
            from PIL.PngImagePlugin import PngImageFile

            return PngImageFile(stream)
        if data.startswith(_JPEG_SIGNATURE):
            from PIL.JpegImagePlugin import jpeg_factory

            return jpeg_factory(stream)
        if data.startswith(b"BM"):
            from PIL.BmpImagePlugin import BmpImageFile

            return BmpImageFile(stream)
        if data.startswith(_TIFF_SIGNATURES):
            from PIL.TiffImagePlugin import TiffImageFile

            return TiffImageFile(stream)
    except SyntaxError as error:  # Pillow's word for a header it cannot make sense of
        raise FrameFormatError(f"the image's header is damaged; {_EXPECTED}") from error
    head = data[:64]
    printable = sum(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head)
    what = "text" if printable == len(head) else "no image of a known kind"
    raise FrameFormatError(f"the file holds {what}; {_EXPECTED}")


def _check_still(image: ImageFile.ImageFile) -> None:
    count = 1
    if image.format == "TIFF":  # to count them would be to read each one's header
        with contextlib.suppress(EOFError):
            image.seek(1)
            raise FrameFormatError("the file holds several images; expected one still frame; split it first")
        image.seek(0)
    elif image.format != "MPO":  # a stereo camera's JPEG, whose first image is the frame
        count = getattr(image, "n_frames", 1)
    if count > 1:
        raise FrameFormatError(f"the file holds {count} images; expected one still frame; split it first")


def _load_jpeg(image: ImageFile.ImageFile, luma_only: bool) -> ImageFile.ImageFile:
    if luma_only and image.mode == "RGB":
        image.draft("L", image.size)
    image.load()
    return image


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Give what makes an image upright, by its EXIF block; None where nothing need be done."""
    return _TURNS.get(image.getexif().get(_ORIENTATION, 1))


def _upright_grey(image: Image.Image) -> Grey:
    grey, turn = to_grey(image), _turn(image)
    return grey if turn is None else np.asarray(Image.fromarray(grey).transpose(turn))


def _colour_sample(image: ImageFile.ImageFile, data: bytes) -> Grey | None:
    """Give pixels of a decoded image in RGB, uint8 [h, w, 3], 64 x 64 at most; None where it has no colour."""
    small: Image.Image = image
    if getattr(image, "layers", 0) == 3 and image.mode == "L":  # a JPEG's luma alone
        other = _open(data)
        # An eighth: only each block's mean is computed, for three quarters of the luma's time.
        other.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
        other.load()
        small = other
    elif image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I"):
        return None
    small = small.resize((min(_SAMPLE, small.width), min(_SAMPLE, small.height)), Image.Resampling.NEAREST)
    return np.asarray(over_black(small).convert("RGB"))


@contextmanager
def _frame_errors(data: bytes) -> Iterator[None]:
    """Turn whatever Pillow raises over `data` into one clear line."""
    if not data:
        raise FrameDamagedError(f"the file is empty; {_EXPECTED}")
    try:
        yield
    except FrameError:
        raise
    except MemoryError as error:
        raise FrameTooLargeError("there is no memory for so many pixels; expected a smaller frame") from error
    # Pillow's decoders have no common error class: SyntaxError for a broken PNG, struct.error and KeyError
    # for TIFF tags, OSError for truncation. Whatever it is, one bad file must not end a run over a thousand.
    except Exception as error:
        raise FrameDamagedError(f"the image is damaged or truncated ({_one_line(error)})") from error


def to_grey(image: Image.Image) -> Grey:
    """Bring a decoded image to grey, uint8 [H, W], by the module's table.

    A large image is done a band of rows at a time, so that it is not in memory several times over.

    Raises
    ------
    FrameFormatError
        If it holds numbers that no rule covers.
    """
    if image.mode == "L":
        return np.asarray(image)
    rule = _rule_of_numbers(image) if image.mode.startswith("I") or image.mode == "F" else _pixels_to_grey
    if image.width * image.height <= _BAND:
        return rule(image)
    grey = np.empty((image.height, image.width), np.uint8)
    for top, band in _bands(image):
        grey[top : top + band.height] = rule(band)
    return grey


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _pixels_to_grey(image: Image.Image) -> Grey:
    try:
        return np.asarray(over_black(image).convert("L"))
    except ValueError as error:  # Pillow reads CIELAB from TIFF but has no way to grey
        raise FrameFormatError(
            f"the pixels are of the kind {image.mode}; expected grey, palette or RGB; save it as PNG"
        ) from error


def over_black(image: Image.Image) -> Image.Image:
    """Lay an image with alpha over black, as RGB; any other is given back as it is."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image).convert("RGB")
    return image


def _rule_of_numbers(image: Image.Image) -> Callable[[Image.Image], Grey]:
    """Choose how an image of integers or floats is brought to grey, by all of its pixels."""
    extremes = [(values.min(), values.max()) for values in (np.asarray(band) for _, band in _bands(image))]
    low, high = (np.asarray(side) for side in zip(*extremes, strict=True))
    low, high = low.min(), high.max()  # numpy's, which let a NaN through
    if np.issubdtype(low.dtype, np.integer):
        if low < 0 or high > 65535:
            raise FrameFormatError(f"the pixels go from {low} to {high}; expected integers in 0..65535")
        return lambda band: np.asarray((np.asarray(band).astype(np.uint32) + 128) // 257, np.uint8)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise FrameFormatError("the pixels hold NaN or infinity; expected floats in [0, 1] or in [0, 255]")
    if low < 0 or high > 255:
        raise FrameFormatError(f"the pixels go from {low:g} to {high:g}; expected floats in [0, 1] or in [0, 255]")
    scale = 255.0 if high <= 1 else 1.0
    return lambda band: np.asarray(np.floor(np.asarray(band).astype(np.float64) * scale + 0.5), np.uint8)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(sign if sign.isprintable() else "?" for sign in text[:200])
