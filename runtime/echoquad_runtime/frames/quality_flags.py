"""Quality flags: warnings about a frame that affect the trust in its decision.

A network answers for any pixels, even those of a black frame. The flags are written beside the decision and do not
change it. ``docs/reference/flags.md`` explains how the thresholds were chosen.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from echoquad_runtime.contract import QUADRANTS
from echoquad_runtime.quadrants import Grey

__all__ = [
    "BLANK",
    "COLOUR",
    "COLOUR_SAMPLE",
    "NO_SIGNAL",
    "REGION_CLAMPED",
    "SATURATED",
    "UNCROPPED",
    "is_coloured",
    "quality_flags",
]

BLANK: Final = "blank"
NO_SIGNAL: Final = tuple(f"no-signal-{name}" for name in QUADRANTS)
SATURATED: Final = "saturated"
COLOUR: Final = "colour"

UNCROPPED: Final = "uncropped"
"""The frame may be a whole screen: nothing says where its image is, so captions and toolbars count as image."""

REGION_CLAMPED: Final = "region-clamped"
"""The ultrasound region in the DICOM header leaves the frame by a few pixels, and was cut at the frame's edge."""

MIN_CONTRAST: Final = 20
"""Grey levels that the middle 96 % of a quadrant's pixels must span; noise of 8 levels spans 17, real quadrants 47."""

TAIL: Final = 0.02
"""Share of a quadrant's pixels ignored at either end, so that a caption on black is not a signal."""

WHITE: Final = 250
"""Grey level from which a pixel is white."""

MAX_WHITE: Final = 0.20
"""Share of white pixels in the four quadrants from which a frame is saturated."""

MIN_CHROMA: Final = 32
"""Difference between a pixel's strongest and weakest channel from which it is coloured; JPEG's grey varies by a few."""

MAX_COLOURED: Final = 0.25
"""Share of coloured pixels from which a frame is coloured: more than a Doppler box of ordinary size covers."""

COLOUR_SAMPLE: Final = 64
"""Side, in pixels, of the largest sample of a frame in which colour is looked for."""

_QUADRANT_SAMPLE: Final = 64  # rows and columns of a quadrant, at most: enough to estimate shares


def quality_flags(quadrants: Grey) -> tuple[str, ...]:
    """Return the flags that the network's input shows.

    Parameters
    ----------
    quadrants
        uint8 [4, 1, S, S], grey levels of LA, RA, LV, RV.

    Returns
    -------
    tuple of str
        In this order: ``blank`` if no quadrant has a signal, else ``no-signal-LA`` and so on for each that has none;
        then ``saturated``.
    """
    step = -(-quadrants.shape[-1] // _QUADRANT_SAMPLE)
    sample = quadrants[:, 0, ::step, ::step].reshape(len(QUADRANTS), -1)
    low = int(sample.shape[1] * TAIL)
    high = sample.shape[1] - 1 - low
    ordered = np.partition(sample, (low, high), axis=1)  # two percentiles need no complete sort
    contrast = ordered[:, high] - ordered[:, low]
    silent = [flag for flag, levels in zip(NO_SIGNAL, contrast, strict=True) if levels < MIN_CONTRAST]
    flags = [BLANK] if len(silent) == len(QUADRANTS) else silent
    if np.count_nonzero(sample >= WHITE) >= MAX_WHITE * sample.size:
        flags.append(SATURATED)
    return tuple(flags)


def is_coloured(pixels: Grey) -> bool:
    """Return whether a substantial part of RGB pixels, uint8 [..., 3], is coloured."""
    channels = np.ascontiguousarray(pixels.reshape(-1, 3).T)  # numpy is slow along an axis of three
    chroma = channels.max(axis=0) - channels.min(axis=0)
    return bool(np.count_nonzero(chroma >= MIN_CHROMA) >= MAX_COLOURED * chroma.size)
