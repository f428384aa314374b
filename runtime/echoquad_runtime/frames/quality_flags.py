"""Quality flags: warnings about a frame that affect the trust in its decision.

A network answers for any pixels, even those of a black frame. The flags are written beside the decision and do not
change it. ``docs/reference/flags.md`` explains how the thresholds were chosen.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from echoquad_runtime.contract import QUADRANTS
from echoquad_runtime.quadrants import Grey

__all__ = [
    "BLANK",
    "COLOUR",
    "COLOUR_SAMPLE",
    "NO_SIGNAL",
    "REGION_CLAMPED",
    "SATURATED",
    "SCREEN",
    "UNCROPPED",
    "has_toolbar",
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

SCREEN: Final = "screen"
"""The frame looks like a picture of a whole screen: a toolbar, a menu, a panel or a page margin is along an edge."""

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

MIN_SCREEN_SIDE: Final = 100
"""Pixels; a smaller frame is not examined for toolbars."""

MIN_FLAT: Final = 0.55
"""Share of a line along an edge that must have one grey level, give or take `FLATNESS`; buttons may cover the rest."""

FLATNESS: Final = 3
"""Grey levels by which JPEG and scaling change a flat toolbar."""

MIN_STEP: Final = 12
"""Grey levels by which a toolbar is brighter than the background of the frame, its darkest hundredth."""

MIN_FLAT_LINES: Final = 2
"""Flat lines along one edge that make a toolbar; one may be the outline of the picture."""

_LINES: Final = (1, 2, 3, 5, 7)  # distances of the examined lines from an edge, in pixels
_SHARES: Final = (0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06)  # and as shares of the side
_POINTS: Final = (np.arange(96) + 0.5) / 96  # of a line, as shares of its length
_BACKGROUND_SAMPLE: Final = 48  # rows and columns of the frame, at most

_QUADRANT_SAMPLE: Final = 64  # rows and columns of a quadrant, at most: enough to estimate shares


def quality_flags(quadrants: Grey, frame: Grey | None = None) -> tuple[str, ...]:
    """Return the flags that the network's input and its frame show.

    Parameters
    ----------
    quadrants
        uint8 [4, 1, S, S], grey levels of LA, RA, LV, RV.
    frame
        uint8 [H, W], the whole frame; None leaves out the flag that needs it.

    Returns
    -------
    tuple of str
        In this order: ``blank`` if no quadrant has a signal, else ``no-signal-LA`` and so on for each that has none;
        then ``saturated`` and ``screen``.
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
    if frame is not None and BLANK not in flags and has_toolbar(frame):
        flags.append(SCREEN)
    return tuple(flags)


def has_toolbar(frame: Grey) -> bool:
    """Return whether a flat band that is not background lies along an edge of a frame, uint8 [H, W].

    A scanner's picture has black or speckle at its edges. A toolbar, a menu or a page margin has one grey level along
    most of an edge. A black toolbar cannot be distinguished from the background.
    """
    height, width = frame.shape
    if min(height, width) < MIN_SCREEN_SIDE:
        return False
    rows, columns = _edge_lines(height), _edge_lines(width)
    across, down = (_POINTS * width).astype(int), (_POINTS * height).astype(int)
    lines = np.concatenate([frame[rows[:, None], across], frame[down, columns[:, None]]]).astype(np.int16)
    level = np.sort(lines, axis=1)[:, lines.shape[1] // 2]  # the median: that of the toolbar, if it fills half the line
    flat = np.count_nonzero(np.abs(lines - level[:, None]) <= FLATNESS, axis=1) >= MIN_FLAT * lines.shape[1]
    step = -(-max(height, width) // _BACKGROUND_SAMPLE)
    sample = frame[::step, ::step].ravel()
    background = int(np.partition(sample, sample.size // 100)[sample.size // 100])
    in_band = (flat & (level >= background + MIN_STEP)).reshape(4, -1)  # top, bottom, left, right
    return bool((np.count_nonzero(in_band, axis=1) >= MIN_FLAT_LINES).any())


def _edge_lines(side: int) -> npt.NDArray[np.int64]:
    """Return the indices of the examined lines: those near the first edge, then as many near the last."""
    near = np.array([*_LINES, *(int(share * side) for share in _SHARES)])
    return np.concatenate([near, side - 1 - near])


def is_coloured(pixels: Grey) -> bool:
    """Return whether a substantial part of RGB pixels, uint8 [..., 3], is coloured."""
    channels = np.ascontiguousarray(pixels.reshape(-1, 3).T)  # numpy is slow along an axis of three
    chroma = channels.max(axis=0) - channels.min(axis=0)
    return bool(np.count_nonzero(chroma >= MIN_CHROMA) >= MAX_COLOURED * chroma.size)
