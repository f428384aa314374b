"""Sanity: what a reader should know of a frame before trusting what was decided of it.

A network answers for any pixels, a black frame's included. These flags go into the row beside the decision; they change
no decision. ``docs/reference/flags.md`` has how the thresholds were chosen.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from echoquad_runtime.contract import QUADRANTS
from echoquad_runtime.quadrants import Grey

__all__ = ["BLANK", "COLOUR", "NO_SIGNAL", "SATURATED", "is_coloured", "quality_flags"]

BLANK: Final = "blank"
NO_SIGNAL: Final = tuple(f"no-signal-{name}" for name in QUADRANTS)
SATURATED: Final = "saturated"
COLOUR: Final = "colour"

MIN_CONTRAST: Final = 20
"""Grey levels that a quadrant's middle 96 % of pixels must span; noise of 8 levels spans 17, real quadrants 47 on."""

TAIL: Final = 0.02
"""Share of a quadrant's pixels left out at either end, so that a caption on black is no signal."""

WHITE: Final = 250
"""Grey level from which a pixel counts as white."""

MAX_WHITE: Final = 0.20
"""Share of white pixels, over the four quadrants, from which a frame is saturated."""

MIN_CHROMA: Final = 32
"""Levels between a pixel's strongest and weakest channel from which it is coloured; a JPEG's grey strays by a few."""

MAX_COLOURED: Final = 0.25
"""Share of coloured pixels from which a frame is coloured: more than a Doppler box of ordinary size fills."""

_GRID: Final = 64  # rows and columns of a quadrant that are looked at, at most: enough to estimate shares


def quality_flags(quadrants: Grey) -> tuple[str, ...]:
    """Look at what the network sees of a frame.

    Parameters
    ----------
    quadrants
        uint8 [4, 1, S, S], grey levels of LA, RA, LV, RV.

    Returns
    -------
    tuple of str
        In this order: ``blank`` where no quadrant has a signal, else ``no-signal-LA`` and so on for those that have
        none; ``saturated``.
    """
    step = -(-quadrants.shape[-1] // _GRID)
    seen = quadrants[:, 0, ::step, ::step].reshape(len(QUADRANTS), -1)
    low = int(seen.shape[1] * TAIL)
    high = seen.shape[1] - 1 - low
    ordered = np.partition(seen, (low, high), axis=1)  # of all percentiles only two are wanted: no sort
    contrast = ordered[:, high] - ordered[:, low]
    silent = [flag for flag, levels in zip(NO_SIGNAL, contrast, strict=True) if levels < MIN_CONTRAST]
    flags = [BLANK] if len(silent) == len(QUADRANTS) else silent
    if np.count_nonzero(seen >= WHITE) >= MAX_WHITE * seen.size:
        flags.append(SATURATED)
    return tuple(flags)


def is_coloured(pixels: Grey) -> bool:
    """Tell whether a substantial part of some pixels, uint8 [..., 3] in RGB, is coloured."""
    channels = np.ascontiguousarray(pixels.reshape(-1, 3).T)  # numpy is slow along an axis of three
    chroma = channels.max(axis=0) - channels.min(axis=0)
    return bool(np.count_nonzero(chroma >= MIN_CHROMA) >= MAX_COLOURED * chroma.size)
