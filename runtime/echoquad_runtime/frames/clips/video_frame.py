"""Frames of clips as decoded by PyAV: grey levels, colours and orientation. `video` states the rules."""

from __future__ import annotations

import functools
import struct
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from echoquad_runtime.errors import FrameError, FrameFormatError, FrameTooLargeError
from echoquad_runtime.frames.decoded_frame import DecodedFrame
from echoquad_runtime.frames.formats import MAX_PIXELS
from echoquad_runtime.frames.quality_flags import COLOUR_SAMPLE, UNCROPPED, is_coloured
from echoquad_runtime.quadrants import Grey

__all__ = ["UPRIGHT", "Matrix", "display_matrix", "stretch_limited_range", "to_frame"]

Matrix = tuple[int, int, int, int]
"""How a frame is shown: a point (p, q) of it is at (a p + c q, b p + d q) on the display; the order is a, b, c, d."""

UPRIGHT: Final[Matrix] = (1, 0, 0, 1)

_FULL_RANGE, _UNSPECIFIED_RANGE = 2, 0  # of AVColorRange
_FULL_RANGE_FORMATS: Final = ("yuvj", "gray")  # of full range unless they state otherwise
_HIGH_BIT_FORMATS: Final = ("p0", "p2", "p4")  # P010 and its like hold samples in the upper bits of 16
_MAX_SAMPLE_BITS: Final = 16


def to_frame(frame: Any, matrix: Matrix) -> DecodedFrame:
    """Return a frame of PyAV as it is shown.

    Raises
    ------
    FrameError
        If it is too large or its pixel format is not supported.
    """
    if frame.width * frame.height > MAX_PIXELS:
        raise FrameTooLargeError(
            f"the frame is {frame.width}x{frame.height} pixels; expected at most {MAX_PIXELS // 1_000_000} million"
        )
    try:
        return _convert(frame, matrix)
    except (FrameError, MemoryError):
        raise
    except Exception as error:
        fault = type(error).__name__
    raise FrameFormatError(f"the frame's pixels cannot be converted ({fault}); convert the clip")


def _convert(frame: Any, matrix: Matrix) -> DecodedFrame:
    pixel_format = frame.format
    bits = max(component.bits for component in pixel_format.components)
    if bits > _MAX_SAMPLE_BITS:
        raise FrameFormatError(f"not supported: clips of {bits} bits per sample; convert the clip to 8")
    if pixel_format.is_rgb or pixel_format.has_palette or pixel_format.name in ("monow", "monob"):
        return _VideoFrame(frame, np.asarray(Image.fromarray(_to_rgb(frame)).convert("L")), matrix)
    if len(pixel_format.components) > 1 and not pixel_format.is_planar:  # YUYV and the like
        frame, bits = (_reformat(frame, "yuv422p"), 8) if bits <= 8 else (_reformat(frame, "yuv444p16le"), 16)
    limited = frame.color_range != _FULL_RANGE and not (
        frame.color_range == _UNSPECIFIED_RANGE and pixel_format.name.startswith(_FULL_RANGE_FORMATS)
    )
    luma = frame.planes[0]
    rows = np.frombuffer(luma, np.uint8)[: luma.line_size * luma.height].reshape(luma.height, luma.line_size)
    if bits <= 8:
        levels = rows[:, : luma.width]
        return _VideoFrame(frame, stretch_limited_range(levels) if limited else levels, matrix)
    samples = rows[:, : 2 * luma.width].view(">u2" if frame.format.name.endswith("be") else "<u2")
    if frame.format.name.startswith(_HIGH_BIT_FORMATS):
        samples = samples >> (16 - bits)
    return _VideoFrame(frame, _deep_levels(bits, limited)[np.minimum(samples, (1 << bits) - 1)], matrix)


def _to_rgb(frame: Any) -> npt.NDArray[np.uint8]:
    """Return a frame in colour, uint8 [H, W, 3]."""
    if frame.format.is_rgb and max(component.bits for component in frame.format.components) > 8:
        deep = _reformat(frame, "rgb48le").to_ndarray().astype(np.uint32)
        return np.asarray((deep + 128) // 257, np.uint8)
    return np.asarray(_reformat(frame, "rgb24").to_ndarray())


def _reformat(frame: Any, pixel_format: str, **size: Any) -> Any:
    """Convert a frame, in this thread: FFmpeg would keep threads for each frame that is cached."""
    try:
        return frame.reformat(format=pixel_format, threads=1, **size)
    except TypeError:  # PyAV before 15 starts no threads
        return frame.reformat(format=pixel_format, **size)


def stretch_limited_range(luma: Grey) -> Grey:
    """Stretch limited-range luma to grey levels: 16 is black, 235 is white (ITU-R BT.601, 2.5.3)."""
    return np.asarray(_deep_levels(8, True)[luma])


@functools.cache
def _deep_levels(bits: int, limited: bool) -> npt.NDArray[np.uint8]:
    """Return the grey level of each value of samples of `bits` bits, uint8 [2^bits]."""
    values = np.arange(1 << bits, dtype=np.int64)
    black, white = (16 << bits - 8, 235 << bits - 8) if limited else (0, (1 << bits) - 1)
    span = white - black
    return np.clip(((values - black) * 510 + span) // (2 * span), 0, 255).astype(np.uint8)


def display_matrix(frame: Any) -> Matrix:
    """Return how a frame is shown, from its container: a, b, c, d of ISO/IEC 14496-12, 6.2.2."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return UPRIGHT
    a, b, _, c, d = struct.unpack_from("=5i", bytes(data))
    return a, b, c, d


def _upright(pixels: npt.NDArray[np.uint8], matrix: Matrix) -> npt.NDArray[np.uint8]:
    """Apply a display matrix to [H, W] or [H, W, 3]; an angle between is taken as the nearest right angle."""
    a, b, c, d = matrix
    if abs(a) + abs(d) >= abs(b) + abs(c):
        x, y = a, d
    else:
        pixels, x, y = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if y < 0 else 1, :: -1 if x < 0 else 1])


class _VideoFrame:
    """A decoded video frame: its grey levels, and PyAV's frame for its colours.

    No header states where in the frame the ultrasound image is.
    """

    flags: tuple[str, ...] = (UNCROPPED,)

    def __init__(self, frame: Any, levels: Grey, matrix: Matrix) -> None:
        self._frame, self._matrix = frame, matrix
        self._levels = _upright(levels, matrix)

    def grey(self) -> Grey:
        """Return the grey levels, uint8 [H, W]."""
        return self._levels

    def is_coloured(self) -> bool:
        """Return whether a substantial part of a small sample is coloured."""
        frame = self._frame
        if len(frame.format.components) == 1 and not frame.format.has_palette:
            return False
        width, height = min(COLOUR_SAMPLE, frame.width), min(COLOUR_SAMPLE, frame.height)
        sample = _reformat(frame, "rgb24", width=width, height=height, interpolation="POINT")
        return is_coloured(sample.to_ndarray())

    def image(self) -> Image.Image:
        """Return an RGB picture."""
        return Image.fromarray(_upright(_to_rgb(self._frame), self._matrix))
