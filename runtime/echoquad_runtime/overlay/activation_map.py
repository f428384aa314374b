"""Class activation maps (CAM) as a heat map over a frame, in the colours of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor

from echoquad_runtime.engine.io_binding import FloatArray
from echoquad_runtime.quadrants import Box

__all__ = ["draw_activation_maps"]

MAX_OPACITY: Final = 0.5  # of the strongest evidence in a frame: the image below stays visible


def draw_activation_maps(
    frame: Image.Image, maps: FloatArray, boxes: Sequence[Box], colours: Sequence[str]
) -> Image.Image:
    """Draw class activation maps over a frame.

    Parameters
    ----------
    frame
        RGB.
    maps
        float32 [4, C, h, w], of LA, RA, LV, RV. A map covers its quadrant from edge to edge.
    boxes
        Boxes of the quadrants in `frame`: left, top, right, bottom in pixels.
    colours
        One colour per class, in a form that Pillow accepts.

    Returns
    -------
    RGB image
        The frame. Every pixel gets the colour of the class with the highest map, with an opacity proportional to its
        margin over the next class. The largest margin in the frame has `MAX_OPACITY`.
    """
    maps = maps - maps.mean(axis=1, keepdims=True)  # evidence that all classes share does not affect the decision
    largest = float(np.max(_margins(np.moveaxis(maps, 1, 0))))
    if largest <= 0:
        return frame
    palette = np.array([ImageColor.getrgb(colour) for colour in colours], np.float32)
    pixels = np.asarray(frame, np.float32).copy()
    for quadrant, (left, top, right, bottom) in zip(maps, boxes, strict=True):
        size = (right - left, bottom - top)
        resized = np.stack([_resize(layer, size) for layer in quadrant])
        opacity = MAX_OPACITY * np.clip(_margins(resized) / largest, 0, 1)[..., None]
        below = pixels[top:bottom, left:right]
        pixels[top:bottom, left:right] = below + opacity * (palette[resized.argmax(axis=0)] - below)
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def _margins(maps: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the margin of the highest class over the next, [...], of maps, float32 [C, ...]."""
    highest = np.partition(maps, -2, axis=0)
    return np.asarray(highest[-1] - highest[-2])


def _resize(layer: npt.NDArray[np.float32], size: tuple[int, int]) -> npt.NDArray[np.float32]:
    image = Image.fromarray(np.ascontiguousarray(layer, np.float32))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32)
