"""The transparent colour of a grey or RGB PNG: its pixels are laid over black, as those of an alpha channel are."""

from __future__ import annotations

import io
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import ImageFile
from PIL.PngImagePlugin import PngImageFile

__all__ = ["blacken_transparent_colour"]

_DEPTH_OFFSET: Final = 24  # of the bits per sample, in the header chunk


def blacken_transparent_colour(image: ImageFile.ImageFile, data: bytes) -> None:
    """Set the pixels of a decoded PNG that have its transparent colour to black.

    Parameters
    ----------
    image
        The decoded file; changed in place. A palette's transparency is left as it is.
    data
        All bytes of the file. The colour is stated with as many bits as the samples (PNG, 11.3.2.1), of which Pillow
        keeps 8 for RGB: the lower ones are decoded from here.
    """
    key = image.info.get("transparency")
    if key is None or image.mode not in ("1", "L", "I;16", "RGB"):
        return
    del image.info["transparency"]
    depth = data[_DEPTH_OFFSET]
    used = (1 << depth) - 1  # the lower bits of the stated colour count
    if image.mode == "1":
        if key & used:
            image.paste(0, (0, 0, *image.size))
        return
    levels = np.array(image)
    if image.mode == "RGB":
        colour = np.asarray(key, np.uint16) & used
        found = (levels == (colour >> (depth - 8))).all(axis=2)
        if depth == 16 and found.any():
            found &= (_lower_bytes(data) == (colour & 255)).all(axis=2)
    else:  # Pillow scales the samples of 2 and 4 bits to 8, but not the colour
        found = levels == ((key & used) * 255 // used if depth < 8 else key & used)
    levels[found] = 0
    image.frombytes(levels.tobytes())


def _lower_bytes(data: bytes) -> npt.NDArray[np.uint8]:
    """Return the lower bytes of the samples of a 16-bit RGB PNG, uint8 [H, W, 3]."""
    image = PngImageFile(io.BytesIO(data))
    image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]  # as if the lower byte were the upper one
    image.load()
    return np.asarray(image)
