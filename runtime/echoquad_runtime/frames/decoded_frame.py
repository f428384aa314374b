"""Pixels: one decoded frame of whatever kind of file, asked for its grey levels, its colours, or a picture of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from echoquad_runtime.errors import FrameFormatError
from echoquad_runtime.frames.quality_flags import is_coloured
from echoquad_runtime.quadrants import Box, Grey

__all__ = ["ColourPixels", "GreyPixels", "Pixels", "cut", "extremes", "grey_of_numbers", "thin"]

_SAMPLE: Final = 64  # pixels a side that are looked at for colour, at most


class Pixels(Protocol):
    """A decoded frame.

    Attributes
    ----------
    flags
        What the decoder found that a reader of its row should know.
    """

    @property
    def flags(self) -> tuple[str, ...]:
        """See above."""
        ...

    def grey(self) -> Grey:
        """Give grey levels, uint8 [H, W]."""
        ...

    def is_coloured(self) -> bool:
        """Say whether a substantial part is coloured; see `echoquad_runtime.frames.quality_flags`."""
        ...

    def image(self) -> Image.Image:
        """Give a picture in the frame's own colours, grey or RGB."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class GreyPixels:
    """Grey levels, uint8 [H, W]."""

    levels: Grey
    flags: tuple[str, ...] = ()

    def grey(self) -> Grey:
        """Give them."""
        return self.levels

    def is_coloured(self) -> bool:
        """Say no."""
        return False

    def image(self) -> Image.Image:
        """Give a grey picture."""
        return Image.fromarray(self.levels)


@dataclass(frozen=True, slots=True, eq=False)
class ColourPixels:
    """Colours, uint8 [H, W, 3].

    Of RGB the grey level is ITU-R 601-2 luma, Pillow's ``L``; of YCbCr it is Y itself, as of a JPEG.
    """

    levels: npt.NDArray[np.uint8]
    mode: Literal["RGB", "YCbCr"] = "RGB"
    flags: tuple[str, ...] = ()

    def grey(self) -> Grey:
        """Give the luma."""
        if self.mode == "YCbCr":
            return np.ascontiguousarray(self.levels[..., 0])
        return np.asarray(self.image().convert("L"))

    def is_coloured(self) -> bool:
        """Look at 64 x 64 pixels at most."""
        return is_coloured(np.asarray(_picture(thin(self.levels), self.mode)))

    def image(self) -> Image.Image:
        """Give a picture in RGB."""
        return _picture(self.levels, self.mode)


def _picture(levels: npt.NDArray[np.uint8], mode: str) -> Image.Image:
    """Make a picture in RGB; `Image.fromarray` with a mode is deprecated in some releases."""
    return Image.frombuffer(mode, levels.shape[1::-1], np.ascontiguousarray(levels), "raw", mode, 0, 1).convert("RGB")


def thin(levels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Give evenly spread pixels of [H, W, ...], 64 x 64 at most."""
    rows, columns = (-(-side // _SAMPLE) for side in levels.shape[:2])
    return levels[::rows, ::columns]


def cut(levels: npt.NDArray[np.uint8], box: Box | None) -> npt.NDArray[np.uint8]:
    """Cut a box out of [H, W, ...]; all of it where there is none."""
    if box is None:
        return levels
    left, top, right, bottom = box
    return levels[top:bottom, left:right]


def extremes(values: npt.NDArray[Any]) -> tuple[float, float, bool]:
    """Give the least and the greatest of some numbers, NaN left out, and whether all are whole; 0 and 0 of none.

    Raises
    ------
    FrameFormatError
        If one is infinite.
    """
    if values.dtype.kind == "f":
        values = values[~np.isnan(values)]
    if not values.size:
        return 0.0, 0.0, True
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise FrameFormatError("the numbers hold infinity; expected grey levels in [0, 1], [0, 255] or [0, 65535]")
    return low, high, values.dtype.kind != "f" or bool((values == np.floor(values)).all())


def grey_of_numbers(low: float, high: float, whole: bool) -> float:
    """Choose what numbers are multiplied by to be grey levels from 0 to 255, by all of a file's.

    Up to 1, they are fractions of white; up to 255, grey levels; whole ones up to 65535, 16-bit grey levels, of which
    65535 is white, whatever the frame's own maximum.

    Raises
    ------
    FrameFormatError
        If no rule covers them.
    """
    if low >= 0:
        if high <= 1:
            return 255.0
        if high <= 255:
            return 1.0
        if high <= 65535 and whole:
            return 1 / 257
    raise FrameFormatError(
        f"the numbers go from {low:g} to {high:g}; expected [0, 1], [0, 255], or whole ones in [0, 65535]"
    )
