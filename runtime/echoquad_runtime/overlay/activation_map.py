"""Heat: class activation maps as colour over a frame, each place in the colour of the class that it speaks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor

from echoquad_runtime.engine.io_binding import FloatArray
from echoquad_runtime.quadrants import Box

__all__ = ["lay_heat"]

STRONGEST: Final = 0.5  # opacity of the frame's strongest evidence: what lies beneath stays to be seen


def lay_heat(frame: Image.Image, maps: FloatArray, boxes: Sequence[Box], colours: Sequence[str]) -> Image.Image:
    """Lay class activation maps over a frame.

    Parameters
    ----------
    frame
        RGB.
    maps
        float32 [4, C, h, w], of the quadrants in their order. A quadrant's map covers it from edge to edge.
    boxes
        Where the quadrants lie in `frame`: left, top, right, bottom in pixels.
    colours
        A colour a class, as Pillow understands them.

    Returns
    -------
    RGB image
        The frame; over every place the colour of the class with the highest map there, the more opaque the further the
        map is above the next class's. The scale is the frame's: where nothing is coloured nothing speaks for any class.
    """
    maps = maps - maps.mean(axis=1, keepdims=True)  # what all classes share decides nothing
    strongest = float(np.max(_leads(np.moveaxis(maps, 1, 0))))
    if strongest <= 0:
        return frame
    palette = np.array([ImageColor.getrgb(colour) for colour in colours], np.float32)
    pixels = np.asarray(frame, np.float32).copy()
    for quadrant, (left, top, right, bottom) in zip(maps, boxes, strict=True):
        size = (right - left, bottom - top)
        raised = np.stack([_enlarged(layer, size) for layer in quadrant])
        opacity = STRONGEST * np.clip(_leads(raised) / strongest, 0, 1)[..., None]
        beneath = pixels[top:bottom, left:right]
        pixels[top:bottom, left:right] = beneath + opacity * (palette[raised.argmax(axis=0)] - beneath)
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def _leads(maps: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Give how far the highest of the classes, float32 [C, ...], is above the next, everywhere."""
    highest = np.partition(maps, -2, axis=0)
    return np.asarray(highest[-1] - highest[-2])


def _enlarged(layer: npt.NDArray[np.float32], size: tuple[int, int]) -> npt.NDArray[np.float32]:
    image = Image.fromarray(np.ascontiguousarray(layer, np.float32))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32)
