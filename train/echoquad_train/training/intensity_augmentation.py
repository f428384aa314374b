"""Intensity augmentation: variation between ultrasound machines, settings and acoustic windows.

Each quadrant of a batch draws its own strengths, up to those of the recipe. A strength of 0 disables an effect and its
draws. The effects are applied in this order:

===============  =====================================================================================================
``gamma``        the grey map: ``g ** exp(u)``, u uniform within the strength either way, g in [0, 1]
``gain``         receiver gain: ``g * exp(u)``
``attenuation``  wrong time gain compensation: ``g * exp(u * d)``, d from -1 to 1 across the image; in any direction,
                 because some data sets have the depth axis upwards
``shadow``       with this probability, a dark band across the image in any direction, like an acoustic shadow of a rib
``speckle``      multiplicative normal noise with grains of two pixels: ``g * (1 + s n)``, s uniform up to the strength
===============  =====================================================================================================

Black stays black: outside the sector there is nothing to amplify.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from echoquad_train.recipe import Recipe

__all__ = ["apply_intensity", "draw_intensity"]

_SHADOW_WIDTH = (0.05, 0.25)  # sqrt(2) times the standard deviation of the profile, in coordinates that span 2
_SHADOW_DEPTH = (0.3, 0.9)  # fraction of the intensity that is lost at the centre


def draw_intensity(count: int, side: int, recipe: Recipe, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw the random numbers of `apply_intensity` for a batch.

    Parameters
    ----------
    count
        Number of quadrants, B.
    side
        Side of the quadrants in pixels, on which only the speckle's grains depend.
    recipe
        The strength of each effect.
    generator
        On any device.

    Returns
    -------
    dict of float32 [B, 1, H, W]
        On the generator's device; H = W = 1 except for ``grains``. Empty if the recipe has no intensity augmentation.
    """
    device = generator.device
    draws: dict[str, Tensor] = {}

    def uniform(name: str, low: float, high: float) -> None:
        draws[name] = torch.empty(count, 1, 1, 1, device=device).uniform_(low, high, generator=generator)

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
        uniform("shadow_width", *_SHADOW_WIDTH)
        uniform("shadow_depth", *_SHADOW_DEPTH)
        uniform("shadow_angle", -math.pi, math.pi)
    if recipe.speckle:
        half = (side + 1) // 2
        draws["grains"] = torch.randn(count, 1, half, half, device=device, generator=generator)
        uniform("speckle", 0, recipe.speckle)
    return draws


def apply_intensity(images: Tensor, recipe: Recipe, draws: Mapping[str, Tensor]) -> Tensor:
    """Apply the intensity augmentation to a batch.

    Parameters
    ----------
    images
        float32 [B, 1, S, S], grey levels 0 to 255, on any device.
    recipe
        The enabled effects.
    draws
        From `draw_intensity`, on the device of the images.

    Returns
    -------
    float32 [B, 1, S, S]
        Grey levels 0 to 255 on the same device; `images` itself if the recipe has no intensity augmentation.
    """
    if not any((recipe.gamma, recipe.gain, recipe.attenuation, recipe.shadow, recipe.speckle)):
        return images
    rows, columns = images.shape[2:]
    factor: Tensor | None = None

    def multiply(by: Tensor) -> None:
        nonlocal factor
        factor = by if factor is None else factor * by

    def across(angle: Tensor) -> Tensor:
        """Return coordinates along each image's direction: 0 at the centre, 1 at the edge."""
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
