"""Augmentation: the whole batch at once, on the device that trains, as one warp.

A random resized crop, a flip, a rotation and an affine map are each a linear map of coordinates; their product is
sampled once. So a batch costs one bilinear lookup a pixel, on the CPU as on CUDA, and needs no worker process.
The distributions are those of torchvision's RandomResizedCrop, RandomHorizontalFlip, RandomRotation, RandomAffine
and RandomErasing, applied in that order; intensity_augmentation varies the grey levels before the erasing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from echoquad_train.parallel.ranks import Share
from echoquad_train.recipe import Recipe
from echoquad_train.training.intensity_augmentation import draw_intensity, vary

__all__ = ["apply_augmentation", "augment", "draw_augmentation", "draw_boxes", "erase", "sample_warp", "shrink"]

# torchvision's defaults for RandomErasing: share of the area, and height over width.
_ERASE_SCALE = (0.02, 0.33)
_ERASE_RATIO = (0.3, 3.3)
_TRIES = 10


def draw_augmentation(count: int, side: int, recipe: Recipe, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw the random numbers of a batch's augmentation.

    Parameters
    ----------
    count
        Quadrants, B.
    side
        Pixels a side of what is augmented; see `echoquad_train.training.intensity_augmentation.draw_intensity`.
    recipe
        Says how strongly.
    generator
        Of any device.

    Returns
    -------
    dict of float32 [B, ...]
        On the generator's device, a row for each quadrant: a part of a batch is augmented by its rows of them.
    """
    return {
        "warp": sample_warp(count, recipe, generator),
        **draw_intensity(count, side, recipe, generator),
        **draw_boxes(count, generator),
    }


def apply_augmentation(
    quadrants: Tensor, recipe: Recipe, draws: Mapping[str, Tensor], places: Tensor | None = None
) -> Tensor:
    """Augment a batch by what was drawn for it. Computes on the device alone.

    Parameters
    ----------
    quadrants
        Grey levels 0 to 255, uint8 or float [B, 1, S, S], on any device; with `places` [B, 4, S, S], all four of each
        one's frame.
    recipe
        Says which effects there are.
    draws
        From `draw_augmentation`, on the device of the quadrants. The same draws give the same view at any size S.
    places
        int64 [B], which of its frame's four each quadrant is. Where a warp leaves it at an inner edge, there is then
        what lies beside it in the frame. None knows of no other quadrants.

    Returns
    -------
    float32 [B, 1, S, S]
        Grey levels 0 to 255 on the same device; black where the warp leaves what there is, the contract's mean where
        erased.
    """
    warp = draws["warp"]
    size = [len(quadrants), 1, *quadrants.shape[2:]]
    seen = quadrants.float()
    if places is not None:
        seen, warp = _joined(seen), _within(warp, places)
    # A rank's part of a batch may be empty, which torch's grid cannot be.
    warped = _sampled(seen, warp, size) if len(quadrants) else seen.reshape(size)
    return erase(vary(warped, recipe, draws), recipe.erase, 255.0 * recipe.mean, draws)


def augment(
    quadrants: Tensor,
    recipe: Recipe,
    generator: torch.Generator,
    share: Share | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Draw a batch's augmentation and apply it; see `apply_augmentation`.

    With `share`, `quadrants` is that part of a batch. The draws are those of the whole batch all the same, so that a
    part is augmented as it is in the whole.
    """
    share = share or Share(0, len(quadrants), len(quadrants))
    draws = draw_augmentation(share.total, quadrants.shape[-1], recipe, generator)
    own = {name: values[share.rows].to(quadrants.device) for name, values in draws.items()}
    return apply_augmentation(quadrants, recipe, own, None if places is None else places.to(quadrants.device))


def shrink(quadrants: Tensor, side: int) -> Tensor:
    """Bring quadrants, uint8 [B, Q, S, S], down to float32 [B, Q, side, side], with an antialiased bilinear filter."""
    return F.interpolate(quadrants.float(), (side, side), mode="bilinear", antialias=True, align_corners=False)


def sample_warp(count: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Draw the maps from output to input coordinates, float32 [count, 2, 3], both axes in [-1, 1].

    They are on the generator's device.
    """
    uniform = partial(_uniform, count, generator)

    width, height = _sides(count, recipe.crop_scale, recipe.crop_ratio, generator)
    crop = _affine(width, 0, 0, height, uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height))

    flip = _affine(1 - 2 * (uniform(0, 1) < recipe.horizontal_flip).float(), 0, 0, 1, 0, 0)

    degrees = math.pi / 180
    angle = uniform(-recipe.rotate, recipe.rotate) * degrees
    rotation = _affine(angle.cos(), -angle.sin(), angle.sin(), angle.cos(), 0, 0)

    scale = 1 / uniform(*recipe.zoom)
    shear = torch.tan(uniform(-recipe.shear, recipe.shear) * degrees)
    # Coordinates span 2, so a share of the side counts twice.
    shift_x, shift_y = (2 * uniform(-recipe.translate, recipe.translate) for _ in range(2))
    affine = _affine(scale, scale * shear, 0, scale, 0, 0) @ _affine(1, 0, 0, 1, shift_x, shift_y)
    return (crop @ flip @ rotation @ affine)[:, :2]


def _sampled(images: Tensor, warp: Tensor, size: list[int]) -> Tensor:
    grid = F.affine_grid(warp, size, align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _joined(quadrants: Tensor) -> Tensor:
    """Lay the quadrants of frames, [B, 4, S, S], together again, [B, 1, 2 S, 2 S]."""
    rows = [torch.cat([quadrants[:, left], quadrants[:, left + 1]], dim=2) for left in (0, 2)]
    return torch.cat(rows, dim=1)[:, None]


def _within(warp: Tensor, places: Tensor) -> Tensor:
    """Bring maps into a quadrant's coordinates, [B, 2, 3], to those of its frame, where it has half of each side."""
    centres = torch.stack([places % 2, places // 2], dim=1).to(warp.dtype) - 0.5
    return torch.cat([warp[:, :, :2] / 2, warp[:, :, 2:] / 2 + centres[:, :, None]], dim=2)


def draw_boxes(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw the boxes of `erase`: float32 [count] each, on the generator's device, as shares of the image's sides."""
    uniform = partial(_uniform, count, generator)

    chance = uniform(0, 1)
    height, width = _sides(count, _ERASE_SCALE, _ERASE_RATIO, generator)
    top, left = uniform(0, 1) * (1 - height), uniform(0, 1) * (1 - width)
    return {
        "erase_chance": chance,
        "erase_height": height,
        "erase_width": width,
        "erase_top": top,
        "erase_left": left,
    }


def erase(images: Tensor, probability: float, value: float, draws: Mapping[str, Tensor]) -> Tensor:
    """Fill one box, from `draw_boxes`, in each of a part of the images, [B, 1, H, W], with `value`."""
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


def _sides(
    count: int, scale: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw the sides of boxes, as shares of the image's: uniform in area and in the logarithm of first over second.

    A box that the image cannot hold is drawn again, nine times at most, and then cut to fit.
    """
    where = generator.device
    areas = torch.empty(count, _TRIES, device=where).uniform_(*scale, generator=generator)
    logarithms = torch.empty(count, _TRIES, device=where)
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
    where = next((value.device for value in rows if isinstance(value, Tensor)), None)
    cells = [value if isinstance(value, Tensor) else torch.full((count,), float(value), device=where) for value in rows]
    return torch.stack(cells, dim=1).reshape(count, 3, 3)
