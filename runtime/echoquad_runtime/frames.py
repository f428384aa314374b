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
from the header before any is decoded, a PNG's checksums and a JPEG's end are looked at, since Pillow alone
accepts files whose tail is missing.
"""

from __future__ import annotations

import io
import stat
import struct
import zlib
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from echoquad_runtime.errors import (
    FrameDamagedError,
    FrameError,
    FrameFormatError,
    FrameReadError,
    FrameTooLargeError,
)
from echoquad_runtime.quadrants import Grey

__all__ = [
    "EXTENSIONS",
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "decode_frame",
    "decode_image",
    "over_black",
    "read_bytes",
    "read_frame",
    "to_grey",
]

FORMATS: Final = ("PNG", "JPEG", "BMP", "TIFF")
EXTENSIONS: Final = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
"""Endings, in lower case, by which a folder's files count as frames. A file named outright may end in anything."""

MAX_PIXELS: Final = 36_000_000  # 6000 x 6000; an 8K screen has 33 million
MAX_FILE_BYTES: Final = 256 * 1024 * 1024  # MAX_PIXELS of uncompressed 16-bit RGB come to 216 million

_ORIENTATION: Final = 0x0112
_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"


def read_bytes(path: Path) -> bytes:
    """Read a regular file whole.

    Raises
    ------
    FrameReadError
        If it cannot be opened or read, or is no regular file (a pipe would never end).
    FrameTooLargeError
        If it holds more than `MAX_FILE_BYTES`.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise FrameReadError("it is not a regular file; expected an image file")
        if status.st_size > MAX_FILE_BYTES:
            raise FrameTooLargeError(
                f"the file holds {status.st_size} bytes; expected at most {MAX_FILE_BYTES}; convert it to 8-bit PNG"
            )
        return path.read_bytes()
    except FrameError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise FrameReadError(f"it cannot be read ({getattr(error, 'strerror', None) or error})") from error


def read_frame(path: Path) -> Grey:
    """Read an image file as grey, uint8 [H, W].

    Raises
    ------
    FrameError
        One of its kinds: the file cannot be read, is no supported image, is damaged, too large, or of pixels no
        rule covers.
    """
    return decode_frame(read_bytes(path))


def decode_frame(data: bytes) -> Grey:
    """Decode an image file's bytes to grey, uint8 [H, W].

    Raises
    ------
    FrameError
        As `read_frame`.
    """
    return to_grey(decode_image(data, luma_only=True))


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
        As `read_frame`.
    """
    if not data:
        raise FrameDamagedError("the file is empty; expected a PNG, JPEG, BMP or TIFF image")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise FrameTooLargeError(
                f"the header announces {width}x{height} pixels; expected at most {MAX_PIXELS // 1_000_000} million"
            )
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise FrameFormatError(
                f"the file holds {getattr(image, 'n_frames', 1)} images; expected one still frame; split it first"
            )
        _check_whole(data, image.format or "")
        if luma_only and image.format in ("JPEG", "MPO") and image.mode == "RGB":
            image.draft("L", image.size)
        image.load()
        # Not every file has an EXIF block, and transposing copies: look before.
        if image.getexif().get(_ORIENTATION, 1) != 1:
            return ImageOps.exif_transpose(image)
        return image
    except FrameError:
        raise
    except UnidentifiedImageError:
        raise FrameFormatError(f"{_looks_like(data)}; expected a PNG, JPEG, BMP or TIFF image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise FrameTooLargeError(
            f"the header announces too many pixels; expected at most {MAX_PIXELS // 1_000_000} million"
        ) from error
    # Pillow's decoders have no common error class: SyntaxError for a broken PNG, struct.error and KeyError
    # for TIFF tags, OSError for truncation. Whatever it is, one bad file must not end a run over a thousand.
    except Exception as error:
        raise FrameDamagedError(f"the image is damaged or truncated ({_one_line(error)})") from error


def to_grey(image: Image.Image) -> Grey:
    """Bring a decoded image to grey, uint8 [H, W], by the module's table.

    Raises
    ------
    FrameFormatError
        If it holds numbers that no rule covers.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _numbers_to_grey(np.asarray(image))
    try:
        image = over_black(image)
        return np.asarray(image if image.mode == "L" else image.convert("L"))
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


def _numbers_to_grey(values: np.ndarray) -> Grey:
    low, high = values.min(), values.max()
    if np.issubdtype(values.dtype, np.integer):
        if low < 0 or high > 65535:
            raise FrameFormatError(f"the pixels go from {low} to {high}; expected integers in 0..65535")
        return np.asarray((values.astype(np.uint32) + 128) // 257, np.uint8)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise FrameFormatError("the pixels hold NaN or infinity; expected floats in [0, 1] or in [0, 255]")
    if low < 0 or high > 255:
        raise FrameFormatError(f"the pixels go from {low:g} to {high:g}; expected floats in [0, 1] or in [0, 255]")
    scale = 255.0 if high <= 1 else 1.0
    return np.asarray(np.floor(values.astype(np.float64) * scale + 0.5), np.uint8)


def _check_whole(data: bytes, kind: str) -> None:
    if kind == "PNG":
        _check_png(data)
    # A scan's own 0xFF bytes are escaped, so the end marker behind the last start-of-scan is the real one.
    elif kind in ("JPEG", "MPO") and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise FrameDamagedError("the JPEG has no end marker: the file is truncated; copy it again")


def _check_png(data: bytes) -> None:
    """Walk the chunks: Pillow skips the pixel chunks' checksums and does not miss a lost tail."""
    position = len(_PNG_SIGNATURE)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(memoryview(data)[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            name = kind.decode("ascii", "replace")
            raise FrameDamagedError(f"the PNG's {name} chunk fails its checksum: the file is damaged; copy it again")
        if kind == b"IEND":
            return
        position = end + 4
    raise FrameDamagedError("the PNG ends before its last chunk: the file is truncated; copy it again")


def _looks_like(data: bytes) -> str:
    head = data[:64]
    if head.startswith(_PNG_SIGNATURE) or head.startswith((b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")):
        return "the image's header is damaged"
    printable = sum(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head)
    return "the file holds text" if printable == len(head) else "the file holds no image of a known kind"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
