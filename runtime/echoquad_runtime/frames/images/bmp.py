"""BMP files with bit masks that Pillow does not know, and those whose alpha channel is empty."""

from __future__ import annotations

import struct
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from echoquad_runtime.errors import FrameDamagedError, FrameFormatError, FrameTooLargeError
from echoquad_runtime.frames.formats import MAX_PIXELS

__all__ = ["decode_bit_masks", "without_empty_alpha"]

_BIT_FIELDS: Final = (3, 6)  # compressions: masks of red, green and blue; and of alpha
_UNSUPPORTED: Final = {4: "JPEG", 5: "PNG"}


def decode_bit_masks(data: bytes) -> Image.Image:
    """Decode a BMP of 16 or 32 bits per pixel by its bit masks, to RGB or RGBA.

    A channel of n bits is scaled by ``round(255 * value / (2^n - 1))``.

    Raises
    ------
    FrameError
        If the file is of another kind, or its masks or pixels are damaged.
    """
    if len(data) < 66:
        raise FrameDamagedError("the BMP ends within its header: the file is truncated; copy it again")
    (begin, header, width, height) = struct.unpack_from("<IIii", data, 10)
    bits, compression = struct.unpack_from("<HI", data, 28)
    if header < 40 or compression not in _BIT_FIELDS or bits not in (16, 32):
        kind = _UNSUPPORTED.get(compression, f"{bits} bits per pixel, compression {compression}")
        raise FrameFormatError(f"not supported: a BMP of {kind}; save it as PNG")
    masks = list(struct.unpack_from("<4I", data, 54))  # in larger headers, and behind one of 40 bytes
    if header < 56 and compression == _BIT_FIELDS[0]:
        masks[3] = 0
    rows = abs(height)
    if width < 1 or not rows:
        raise FrameDamagedError("the BMP states no size: it is damaged; save it again")
    if width * rows > MAX_PIXELS:
        raise FrameTooLargeError(
            f"the header states {width}x{rows} pixels; expected at most {MAX_PIXELS // 1_000_000} million"
        )
    stride = (width * bits + 31) // 32 * 4
    if begin + rows * stride > len(data):
        raise FrameDamagedError("the BMP ends before its last row: the file is truncated; copy it again")
    packed = np.frombuffer(data, np.uint8, rows * stride, begin).reshape(rows, stride)
    pixels = packed[:, : width * bits // 8].copy().view("<u2" if bits == 16 else "<u4").astype(np.uint32)
    if height > 0:
        pixels = pixels[::-1]
    channels = [Image.fromarray(_channel(pixels, mask)) for mask in (masks if masks[3] else masks[:3])]
    return Image.merge("RGBA" if masks[3] else "RGB", channels)


def _channel(pixels: npt.NDArray[np.uint32], mask: int) -> npt.NDArray[np.uint8]:
    if not mask:
        return np.zeros(pixels.shape, np.uint8)
    shift = (mask & -mask).bit_length() - 1
    white = mask >> shift
    if white & (white + 1):
        raise FrameDamagedError("the bits of one of the BMP's masks are not adjacent; save it as PNG")
    values = ((pixels & np.uint32(mask)) >> np.uint32(shift)).astype(np.uint64)
    return ((values * 510 + white) // (2 * white)).astype(np.uint8)


def without_empty_alpha(image: Image.Image) -> Image.Image:
    """Return an image without its alpha if that is 0 everywhere, as writers leave it that do not use it."""
    if image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB")
    return image
