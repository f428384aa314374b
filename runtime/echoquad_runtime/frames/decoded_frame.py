"""A decoded frame of any file format: its grey levels, its colours as a picture, and its quality flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from echoquad_runtime.errors import FrameFormatError
from echoquad_runtime.frames.quality_flags import COLOUR_SAMPLE, is_coloured
from echoquad_runtime.quadrants import Box, Grey

__all__ = ["ROUNDING", "ColourFrame", "DecodedFrame", "GreyFrame", "crop", "grey_scale_factor", "value_range"]

ROUNDING: Final = 1e-6
"""Share of the largest value by which values may leave a range: programs write -5.6e-17 for 0 and 1 + 2.2e-16 for 1."""

_BAND_VALUES: Final = 1 << 20


class DecodedFrame(Protocol):
    """A decoded frame.

    Attributes
    ----------
    flags
        Quality flags that only the decoder can set.
    """

    @property
    def flags(self) -> tuple[str, ...]:
        """See the class."""
        ...

    def grey(self) -> Grey:
        """Return the grey levels, uint8 [H, W]."""
        ...

    def is_coloured(self) -> bool:
        """Return whether a substantial part is coloured; see `echoquad_runtime.frames.quality_flags`."""
        ...

    def image(self) -> Image.Image:
        """Return a picture in the frame's own colours, grey or RGB."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class GreyFrame:
    """A grey frame: levels, uint8 [H, W]."""

    levels: Grey
    flags: tuple[str, ...] = ()

    def grey(self) -> Grey:
        """Return the grey levels, uint8 [H, W]."""
        return self.levels

    def is_coloured(self) -> bool:
        """Return False."""
        return False

    def image(self) -> Image.Image:
        """Return a grey picture."""
        return Image.fromarray(self.levels)


@dataclass(frozen=True, slots=True, eq=False)
class ColourFrame:
    """A colour frame: levels, uint8 [H, W, 3].

    The grey level of RGB is ITU-R 601-2 luma, Pillow's ``L``; that of YCbCr is Y itself, as in a JPEG file.
    """

    levels: npt.NDArray[np.uint8]
    mode: Literal["RGB", "YCbCr"] = "RGB"
    flags: tuple[str, ...] = ()

    def grey(self) -> Grey:
        """Return the luma, uint8 [H, W]."""
        if self.mode == "YCbCr":
            return np.ascontiguousarray(self.levels[..., 0])
        return np.asarray(self.image().convert("L"))

    def is_coloured(self) -> bool:
        """Return whether a substantial part of evenly spread pixels is coloured."""
        rows, columns = (-(-side // COLOUR_SAMPLE) for side in self.levels.shape[:2])
        return is_coloured(np.asarray(_to_rgb(self.levels[::rows, ::columns], self.mode)))

    def image(self) -> Image.Image:
        """Return an RGB picture."""
        return _to_rgb(self.levels, self.mode)


def _to_rgb(levels: npt.NDArray[np.uint8], mode: str) -> Image.Image:
    # Not Image.fromarray: its mode parameter is deprecated in some releases of Pillow.
    return Image.frombuffer(mode, levels.shape[1::-1], np.ascontiguousarray(levels), "raw", mode, 0, 1).convert("RGB")


def crop(levels: npt.NDArray[np.uint8], box: Box | None) -> npt.NDArray[np.uint8]:
    """Return a view of the box of [H, W, ...]; all of it if `box` is None."""
    if box is None:
        return levels
    left, top, right, bottom = box
    return levels[top:bottom, left:right]


def value_range(values: npt.NDArray[Any]) -> tuple[float, float, bool]:
    """Return minimum and maximum, ignoring NaN, and whether all values are integers; 0, 0, True if there are none.

    Raises
    ------
    FrameFormatError
        If a value is infinite.
    """
    if values.dtype.kind != "f":
        return (float(values.min()), float(values.max()), True) if values.size else (0.0, 0.0, True)
    # fmin and fmax ignore NaN. In bands, because a copy of the largest matrix takes 288 MB.
    low, high = float(np.fmin.reduce(values, axis=None)), float(np.fmax.reduce(values, axis=None))
    if np.isnan(low):
        return 0.0, 0.0, True
    if not np.isfinite([low, high]).all():
        raise FrameFormatError("the numbers include infinity; expected values in [0, 1], [0, 255] or [0, 65535]")
    rows = max(1, _BAND_VALUES // max(1, values[0].size))
    bands = (values[top : top + rows] for top in range(0, len(values), rows))
    return low, high, all(bool(((band == np.floor(band)) | np.isnan(band)).all()) for band in bands)


def grey_scale_factor(low: float, high: float, integers: bool) -> float:
    """Return the factor that maps the values of a file to grey levels in [0, 255].

    Values up to 1 are fractions of white. Values up to 255 are grey levels. Integers up to 65535 are 16-bit grey
    levels: 65535 is white, whatever the frame's own maximum. A limit may be exceeded by `ROUNDING`.

    Raises
    ------
    FrameFormatError
        If no rule covers the range.
    """
    if low >= -ROUNDING * max(high, 0):
        if high <= 1 + ROUNDING:
            return 255.0
        if high <= 255 * (1 + ROUNDING):
            return 1.0
        if high <= 65535 and integers:
            return 1 / 257
    raise FrameFormatError(
        f"the values range from {low:g} to {high:g}; expected [0, 1], [0, 255], or integers in [0, 65535]"
    )
