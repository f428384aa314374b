"""Intensity augmentation: what differs from one ultrasound machine, setting and window to the next, and not the heart.

Each quadrant of a batch draws its own strengths, up to the recipe's; a recipe's 0 leaves that effect out, and its draws
with it. In the order of the list:

===============  =====================================================================================================
``gamma``        the grey map: ``g ** exp(u)``, u uniform within the strength either way, g in [0, 1]
``gain``         the receiver's: ``g * exp(u)``
``attenuation``  depth: ``g * exp(u * d)``, d from -1 to 1 across the image in any direction: a misset time gain
                 compensation; data sets are turned either way, so that depth is not always downwards
``shadow``       with this probability, a dark band across the image, at any place and in any direction, as behind a rib
``speckle``      multiplicative normal noise, its grains two pixels wide: ``g * (1 + s n)``, s uniform up to this
===============  =====================================================================================================

Black stays black: outside the sector there is nothing to amplify, and the warp's edge is as it was.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from echoquad_train.parallel.ranks import Share
from echoquad_train.recipe import Recipe

__all__ = ["vary"]

_WIDTH = (0.05, 0.25)  # of a shadow, its profile's standard deviation is this over sqrt(2); coordinates span 2
_DEPTH = (0.3, 0.9)  # of the light that it takes at its middle


def vary(images: Tensor, recipe: Recipe, generator: torch.Generator, share: Share | None = None) -> Tensor:
    """Vary a batch's intensities.

    Parameters
    ----------
    images
        float32 [B, 1, S, S], grey levels 0 to 255, on any device.
    recipe
        Says how strongly.
    generator
        A CPU generator: the same draws whatever the device.
    share
        Which rows of how large a batch the images are, as in `echoquad_train.augment.augment`; None is all of it.

    Returns
    -------
    float32 [B, 1, S, S]
        Grey levels 0 to 255 on the same device; `images` itself where the recipe varies nothing.
    """
    if not any((recipe.gamma, recipe.gain, recipe.attenuation, recipe.shadow, recipe.speckle)):
        return images
    rows, columns = images.shape[2:]
    count, own = (share.total, share.rows) if share else (len(images), slice(None))
    where = images.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count, 1, 1, 1).uniform_(low, high, generator=generator)[own]

    factor: Tensor | None = None

    def multiply(by: Tensor) -> None:
        nonlocal factor
        factor = by if factor is None else factor * by

    def across() -> Tensor:
        """Give coordinates along a direction, drawn for each image: 0 in its middle, 1 at the edge."""
        angle = uniform(-math.pi, math.pi)
        y = torch.linspace(-1, 1, rows).view(1, 1, rows, 1)
        x = torch.linspace(-1, 1, columns).view(1, 1, 1, columns)
        return x * angle.cos() + y * angle.sin()

    if recipe.gamma:
        images = 255 * (images / 255) ** torch.exp(uniform(-recipe.gamma, recipe.gamma)).to(where)
    if recipe.gain:
        multiply(torch.exp(uniform(-recipe.gain, recipe.gain)))
    if recipe.attenuation:
        multiply(torch.exp(uniform(0, recipe.attenuation) * across()))
    if recipe.shadow:
        chosen = (uniform(0, 1) < recipe.shadow).float()
        centre, width, depth = uniform(-1, 1), uniform(*_WIDTH), uniform(*_DEPTH)
        multiply(1 - chosen * depth * torch.exp(-(((across() - centre) / width) ** 2)))
    if recipe.speckle:
        grains = torch.randn(count, 1, (rows + 1) // 2, (columns + 1) // 2, generator=generator)[own]
        noise = F.interpolate(grains.to(where), size=(rows, columns), mode="bilinear", align_corners=False)
        strength = uniform(0, recipe.speckle).to(where)
        images = images * (1 + strength * noise)
    if factor is not None:
        images = images * factor.to(where)
    return images.clamp(0, 255)
