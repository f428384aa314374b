"""Geometric augmentation of a whole batch, on the training device, as one warp.

A random resized crop, a flip, a rotation and an affine map are linear maps of coordinates, so their product is sampled
once: a batch costs one bilinear lookup for each pixel and needs no worker process. The distributions are those of
torchvision's RandomResizedCrop, RandomHorizontalFlip, RandomRotation, RandomAffine and RandomErasing, applied in that
order. The module `intensity_augmentation` changes the grey levels before the erasing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from echoquad_runtime.contract import QUADRANTS, parse_layout
from echoquad_train.recipe import Recipe
from echoquad_train.training.intensity_augmentation import apply_intensity, draw_intensity
from echoquad_train.training.mixup import blend, draw_mixup

__all__ = ["apply_augmentation", "draw_augmentation", "draw_boxes", "erase", "resize", "sample_warp"]

# Defaults of torchvision's RandomErasing: fraction of the area, and height over width.
_ERASE_SCALE = (0.02, 0.33)
_ERASE_RATIO = (0.3, 3.3)
_TRIES = 10


def draw_augmentation(count: int, side: int, recipe: Recipe, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw the random numbers of a batch's augmentation.

    Parameters
    ----------
    count
        Number of quadrants, B.
    side
        Side of the augmented quadrants in pixels, on which the speckle's grains depend.
    recipe
        The strength of each effect.
    generator
        On any device.

    Returns
    -------
    dict of float32 [B, ...]
        On the generator's device, one row for each quadrant. A rank augments its part of a batch by its rows.
    """
    return {
        "warp": sample_warp(count, recipe, generator),
        **draw_intensity(count, side, recipe, generator),
        **draw_boxes(count, generator),
        **draw_mixup(count, recipe.mixup, generator),
    }


def apply_augmentation(
    quadrants: Tensor, recipe: Recipe, draws: Mapping[str, Tensor], positions: Tensor | None = None
) -> Tensor:
    """Augment a batch with given random numbers, without synchronising with the host.

    Parameters
    ----------
    quadrants
        Grey levels 0 to 255, uint8 or float [B, 1, S, S], on any device. With `positions`, all four quadrants of each
        one's frame, [B, 4, S, S].
    recipe
        The enabled effects.
    draws
        From `draw_augmentation`, on the device of the quadrants. The same draws give the same view at any size S.
    positions
        int64 [B], the position of each quadrant in its frame: 0 to 3 for top left, top right, bottom left and bottom
        right. With it, a warp that leaves the quadrant at an inner edge samples the rest of the frame. None pads with
        black.

    Returns
    -------
    float32 [B, 1, S, S]
        Grey levels 0 to 255 on the same device; black outside the image, the contract's mean where erased; with mixup,
        blended with another quadrant of the batch.
    """
    warp = draws["warp"]
    size = [len(quadrants), 1, *quadrants.shape[2:]]
    images = quadrants.float()
    if positions is not None:
        images, warp = _stitch(images, parse_layout(recipe.quadrant_layout)), _to_frame_coordinates(warp, positions)
    # A rank's part of a batch may be empty, which affine_grid does not accept.
    warped = _sample(images, warp, size) if len(quadrants) else images.reshape(size)
    erased = erase(apply_intensity(warped, recipe, draws), recipe.erase, 255.0 * recipe.mean, draws)
    return blend(erased, draws)


def resize(quadrants: Tensor, side: int) -> Tensor:
    """Resize quadrants, uint8 [B, Q, S, S], to float32 [B, Q, side, side], with an antialiased bilinear filter."""
    return F.interpolate(quadrants.float(), (side, side), mode="bilinear", antialias=True, align_corners=False)


def sample_warp(count: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Draw affine maps from output to input coordinates, both in [-1, 1]: float32 [count, 2, 3].

    They are on the generator's device.
    """
    uniform = partial(_uniform, count, generator)

    width, height = _draw_sides(count, recipe.crop_scale, recipe.crop_ratio, generator)
    crop = _affine(width, 0, 0, height, uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height))

    flip = _affine(1 - 2 * (uniform(0, 1) < recipe.horizontal_flip).float(), 0, 0, 1, 0, 0)

    degrees = math.pi / 180
    angle = uniform(-recipe.rotate, recipe.rotate) * degrees
    rotation = _affine(angle.cos(), -angle.sin(), angle.sin(), angle.cos(), 0, 0)

    scale = 1 / uniform(*recipe.zoom)
    shear = torch.tan(uniform(-recipe.shear, recipe.shear) * degrees)
    # Coordinates span 2, so a fraction of the side counts twice.
    shift_x, shift_y = (2 * uniform(-recipe.translate, recipe.translate) for _ in range(2))
    affine = _affine(scale, scale * shear, 0, scale, 0, 0) @ _affine(1, 0, 0, 1, shift_x, shift_y)
    return (crop @ flip @ rotation @ affine)[:, :2]


def _sample(images: Tensor, warp: Tensor, size: list[int]) -> Tensor:
    grid = F.affine_grid(warp, size, align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _stitch(quadrants: Tensor, layout: Sequence[str]) -> Tensor:
    """Stitch the quadrants of frames, [B, 4, S, S], to [B, 1, 2 S, 2 S]."""
    placed = [quadrants[:, QUADRANTS.index(name)] for name in layout]
    rows = [torch.cat(placed[left : left + 2], dim=2) for left in (0, 2)]
    return torch.cat(rows, dim=1)[:, None]


def _to_frame_coordinates(warp: Tensor, positions: Tensor) -> Tensor:
    """Convert affine maps, [B, 2, 3], from a quadrant's coordinates to those of its frame, which is twice as wide."""
    centres = torch.stack([positions % 2, positions // 2], dim=1).to(warp.dtype) - 0.5
    return torch.cat([warp[:, :, :2] / 2, warp[:, :, 2:] / 2 + centres[:, :, None]], dim=2)


def draw_boxes(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw the boxes of `erase`: float32 [count] each, on the generator's device, as fractions of the image's sides."""
    uniform = partial(_uniform, count, generator)

    chance = uniform(0, 1)
    height, width = _draw_sides(count, _ERASE_SCALE, _ERASE_RATIO, generator)
    top, left = uniform(0, 1) * (1 - height), uniform(0, 1) * (1 - width)
    return {
        "erase_chance": chance,
        "erase_height": height,
        "erase_width": width,
        "erase_top": top,
        "erase_left": left,
    }


def erase(images: Tensor, probability: float, value: float, draws: Mapping[str, Tensor]) -> Tensor:
    """Fill a box from `draw_boxes` with `value` in each image, [B, 1, H, W], with a probability (random erasing)."""
    rows, columns = images.shape[2:]
    chosen = draws["erase_chance"] < probability
    top, left = draws["erase_top"], draws["erase_left"]
    y = (torch.arange(rows, device=images.device) + 0.5) / rows
    x = (torch.arange(columns, device=images.device) + 0.5) / columns
    inside_y = (y >= top[:, None]) & (y < (top + draws["erase_height"])[:, None]) & chosen[:, None]
    inside_x = (x >= left[:, None]) & (x < (left + draws["erase_width"])[:, None])
    return images.masked_fill(inside_y[:, None, :, None] & inside_x[:, None, None, :], value)


def _uniform(count: int, generator: torch.Generator, low: float, high: float) -> Tensor:
    """Draw from [low, high), float32 [count] on the generator's device."""
    return torch.empty(count, device=generator.device).uniform_(low, high, generator=generator)


def _draw_sides(
    count: int, scale: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw the sides of boxes, as fractions of the image's: uniform in area and in the logarithm of the aspect ratio.

    A box larger than the image is drawn again, at most nine times, and then clamped.
    """
    device = generator.device
    areas = torch.empty(count, _TRIES, device=device).uniform_(*scale, generator=generator)
    logarithms = torch.empty(count, _TRIES, device=device)
    logarithms.uniform_(math.log(ratio[0]), math.log(ratio[1]), generator=generator)
    first, second = (areas * logarithms.exp()).sqrt(), (areas / logarithms.exp()).sqrt()
    chosen = ((first <= 1) & (second <= 1)).int().argmax(dim=1, keepdim=True)  # the first that fits
    return first.gather(1, chosen)[:, 0].clamp(max=1), second.gather(1, chosen)[:, 0].clamp(max=1)


def _affine(
    xx: Tensor | float,
    xy: Tensor | float,
    yx: Tensor | float,
    yy: Tensor | float,
    x: Tensor | float,
    y: Tensor | float,
) -> Tensor:
    rows = [xx, xy, x, yx, yy, y, 0.0, 0.0, 1.0]
    count = max((len(value) for value in rows if isinstance(value, Tensor)), default=1)
    device = next((value.device for value in rows if isinstance(value, Tensor)), None)
    cells = [
        value if isinstance(value, Tensor) else torch.full((count,), float(value), device=device) for value in rows
    ]
    return torch.stack(cells, dim=1).reshape(count, 3, 3)
