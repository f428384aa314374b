"""A decoded frame of any file format: its grey levels, its colours as a picture, and its quality flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from echoquad_runtime.errors import FrameFormatError
from echoquad_runtime.frames.quality_flags import COLOUR_SAMPLE, is_coloured
from echoquad_runtime.quadrants import Box, Grey

__all__ = ["ColourFrame", "DecodedFrame", "GreyFrame", "crop", "grey_scale_factor", "value_range"]


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
    if values.dtype.kind == "f":
        values = values[~np.isnan(values)]
    if not values.size:
        return 0.0, 0.0, True
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise FrameFormatError("the numbers include infinity; expected values in [0, 1], [0, 255] or [0, 65535]")
    return low, high, values.dtype.kind != "f" or bool((values == np.floor(values)).all())


def grey_scale_factor(low: float, high: float, integers: bool) -> float:
    """Return the factor that maps the values of a file to grey levels in [0, 255].

    Values up to 1 are fractions of white. Values up to 255 are grey levels. Integers up to 65535 are 16-bit grey
    levels: 65535 is white, whatever the frame's own maximum.

    Raises
    ------
    FrameFormatError
        If no rule covers the range.
    """
    if low >= 0:
        if high <= 1:
            return 255.0
        if high <= 255:
            return 1.0
        if high <= 65535 and integers:
            return 1 / 257
    raise FrameFormatError(
        f"the values range from {low:g} to {high:g}; expected [0, 1], [0, 255], or integers in [0, 65535]"
    )
