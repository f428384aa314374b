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
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from echoquad_train.recipe import Recipe

__all__ = ["draw_intensity", "vary"]

_WIDTH = (0.05, 0.25)  # of a shadow, its profile's standard deviation is this over sqrt(2); coordinates span 2
_DEPTH = (0.3, 0.9)  # of the light that it takes at its middle


def draw_intensity(count: int, side: int, recipe: Recipe, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw what `vary` does to a batch.

    Parameters
    ----------
    count
        Quadrants, B.
    side
        Pixels a side, which the grains of the speckle depend on; everything else is independent of it.
    recipe
        Says how strongly.
    generator
        Of any device.

    Returns
    -------
    dict of float32 [B, 1, H, W]
        On the generator's device: scalars, H = W = 1, but for ``grains``. Empty where the recipe varies nothing.
    """
    where = generator.device
    draws: dict[str, Tensor] = {}

    def uniform(name: str, low: float, high: float) -> None:
        draws[name] = torch.empty(count, 1, 1, 1, device=where).uniform_(low, high, generator=generator)

    if recipe.gamma:
        uniform("gamma", -recipe.gamma, recipe.gamma)
    if recipe.gain:
        uniform("gain", -recipe.gain, recipe.gain)
    if recipe.attenuation:
        uniform("attenuation", 0, recipe.attenuation)
        uniform("attenuation_angle", -math.pi, math.pi)
    if recipe.shadow:
        uniform("shadow", 0, 1)
        uniform("shadow_centre", -1, 1)
        uniform("shadow_width", *_WIDTH)
        uniform("shadow_depth", *_DEPTH)
        uniform("shadow_angle", -math.pi, math.pi)
    if recipe.speckle:
        half = (side + 1) // 2
        draws["grains"] = torch.randn(count, 1, half, half, device=where, generator=generator)
        uniform("speckle", 0, recipe.speckle)
    return draws


def vary(images: Tensor, recipe: Recipe, draws: Mapping[str, Tensor]) -> Tensor:
    """Vary a batch's intensities.

    Parameters
    ----------
    images
        float32 [B, 1, S, S], grey levels 0 to 255, on any device.
    recipe
        Says which effects there are.
    draws
        From `draw_intensity`, on the device of the images.

    Returns
    -------
    float32 [B, 1, S, S]
        Grey levels 0 to 255 on the same device; `images` itself where the recipe varies nothing.
    """
    if not any((recipe.gamma, recipe.gain, recipe.attenuation, recipe.shadow, recipe.speckle)):
        return images
    rows, columns = images.shape[2:]
    factor: Tensor | None = None

    def multiply(by: Tensor) -> None:
        nonlocal factor
        factor = by if factor is None else factor * by

    def across(angle: Tensor) -> Tensor:
        """Return coordinates along each image's direction: 0 in its middle, 1 at the edge."""
        y = torch.linspace(-1, 1, rows, device=images.device).view(1, 1, rows, 1)
        x = torch.linspace(-1, 1, columns, device=images.device).view(1, 1, 1, columns)
        return x * angle.cos() + y * angle.sin()

    if recipe.gamma:
        images = 255 * (images / 255) ** torch.exp(draws["gamma"])
    if recipe.gain:
        multiply(torch.exp(draws["gain"]))
    if recipe.attenuation:
        multiply(torch.exp(draws["attenuation"] * across(draws["attenuation_angle"])))
    if recipe.shadow:
        chosen = (draws["shadow"] < recipe.shadow).float()
        profile = (across(draws["shadow_angle"]) - draws["shadow_centre"]) / draws["shadow_width"]
        multiply(1 - chosen * draws["shadow_depth"] * torch.exp(-(profile**2)))
    if recipe.speckle:
        noise = F.interpolate(draws["grains"], size=(rows, columns), mode="bilinear", align_corners=False)
        images = images * (1 + draws["speckle"] * noise)
    if factor is not None:
        images = images * factor
    return images.clamp(0, 255)
