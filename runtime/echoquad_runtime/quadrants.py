"""Quadrants: where a frame is split, and how a quadrant becomes the network's input.

Training, export and inference share this implementation; there is no other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from echoquad_runtime.contract import QUADRANTS, Contract
from echoquad_runtime.errors import FrameTooSmallError

__all__ = ["Box", "Grey", "crop_box", "frame_quadrants", "quadrant_boxes", "resize", "split", "stitch"]

Grey = npt.NDArray[np.uint8]
"""A grey image: uint8 [H, W], from 0, black, to 255, white."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are the first column and row outside the box."""

MIN_SIDE: Final = 2  # pixels; a quadrant of a smaller frame would be empty


def crop_box(width: int, height: int, keep: float) -> Box:
    """Return the centred box that keeps the fraction `keep` of the width and of the height.

    A kept side has ``floor(side * keep + 0.5)`` pixels, at least 2; an odd border pixel is at the right or bottom.

    Raises
    ------
    FrameTooSmallError
        If the frame is less than 2 pixels wide or high.
    """
    if width < MIN_SIDE or height < MIN_SIDE:
        raise FrameTooSmallError(
            f"the frame is {width}x{height} pixels; expected at least {MIN_SIDE}x{MIN_SIDE} for four quadrants"
        )
    kept_width = max(MIN_SIDE, math.floor(width * keep + 0.5))
    kept_height = max(MIN_SIDE, math.floor(height * keep + 0.5))
    left, top = (width - kept_width) // 2, (height - kept_height) // 2
    return left, top, left + kept_width, top + kept_height


def quadrant_boxes(
    width: int, height: int, keep: float, layout: Sequence[str] = QUADRANTS
) -> tuple[Box, Box, Box, Box]:
    """Return the boxes of LA, RA, LV, RV in pixels of the uncropped frame.

    The crop is split at half its width and height, rounded down: the right and lower quadrants get an odd pixel.
    `layout` is the contract's field ``quadrants``: the names of the top left, top right, bottom left and bottom right
    quadrant. This is the only place that turns positions into names; all that follows is in the order LA, RA, LV, RV.

    Raises
    ------
    FrameTooSmallError
        As `crop_box`.
    """
    left, top, right, bottom = crop_box(width, height, keep)
    x, y = left + (right - left) // 2, top + (bottom - top) // 2
    boxes = (left, top, x, y), (x, top, right, y), (left, y, x, bottom), (x, y, right, bottom)
    la, ra, lv, rv = (boxes[layout.index(name)] for name in QUADRANTS)
    return la, ra, lv, rv


def split(frame: Grey, keep: float, layout: Sequence[str] = QUADRANTS) -> tuple[Grey, Grey, Grey, Grey]:
    """Split a frame, uint8 [H, W], into views of its quadrants LA, RA, LV, RV; `layout` is as in `quadrant_boxes`.

    Raises
    ------
    FrameTooSmallError
        As `crop_box`.
    """
    height, width = frame.shape
    la, ra, lv, rv = quadrant_boxes(width, height, keep, layout)
    return _cut(frame, la), _cut(frame, ra), _cut(frame, lv), _cut(frame, rv)


def stitch(la: Grey, ra: Grey, lv: Grey, rv: Grey, *, layout: Sequence[str] = QUADRANTS) -> Grey:
    """Return the cropped frame that four quadrants, uint8 [h, w] each, came from, pixel for pixel.

    `layout` is as in `quadrant_boxes`.
    """
    named = dict(zip(QUADRANTS, (la, ra, lv, rv), strict=True))
    top_left, top_right, bottom_left, bottom_right = (named[name] for name in layout)
    return np.block([[top_left, top_right], [bottom_left, bottom_right]])


def resize(quadrant: Grey, size: int) -> Grey:
    """Resize a quadrant, uint8 [h, w], to uint8 [size, size] with Pillow's antialiased bilinear filter.

    Columns are filtered first, then rows, and each pass is rounded to 8 bits. The filter reads nothing beyond the edge
    of the quadrant.
    """
    if quadrant.shape == (size, size):
        return quadrant
    return np.asarray(_filter(_to_image(quadrant), size))


def frame_quadrants(frame: Grey, contract: Contract, out: npt.NDArray[np.uint8] | None = None) -> Grey:
    """Return the network's input for a frame.

    Parameters
    ----------
    frame
        uint8 [H, W], grey levels 0 to 255.
    contract
        Defines the kept fraction, the quadrant layout and the input size S.
    out
        uint8 [4, 1, S, S] to write into; allocated if None.

    Returns
    -------
    uint8 [4, 1, S, S]
        The quadrants LA, RA, LV, RV as grey levels; the graph normalises them.

    Raises
    ------
    FrameTooSmallError
        As `crop_box`.
    """
    size = contract.input_size
    if out is None:
        out = np.empty((4, 1, size, size), np.uint8)
    quadrants = split(frame, contract.keep, contract.quadrants)
    shapes = {quadrant.shape for quadrant in quadrants}
    if len(shapes) == 1 and shapes != {(size, size)}:
        # Resizing four channels at once takes three quarters of the time. CMYK has four channels without alpha, which
        # would weight the others.
        merged = _filter(Image.merge("CMYK", [_to_image(quadrant) for quadrant in quadrants]), size)
        for index in range(len(quadrants)):
            out[index, 0] = np.asarray(merged.getchannel(index))
    else:
        for index, quadrant in enumerate(quadrants):
            out[index, 0] = resize(quadrant, size)
    return out


def _to_image(quadrant: Grey) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(quadrant))


def _filter(image: Image.Image, size: int) -> Image.Image:
    # Two calls fix the order of the passes: from 12.2 on, Pillow filters the rows of tall images first.
    image = image.resize((size, image.height), Image.Resampling.BILINEAR)
    return image.resize((size, size), Image.Resampling.BILINEAR)


def _cut(frame: Grey, box: Box) -> Grey:
    left, top, right, bottom = box
    return frame[top:bottom, left:right]
