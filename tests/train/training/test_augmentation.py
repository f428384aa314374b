"""Geometric augmentation: comparisons with torchvision, distributions, context padding, random erasing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import map_coordinates
from torch import Tensor
from torchvision.transforms import RandomErasing, RandomResizedCrop
from torchvision.transforms import functional as TF

from echoquad_runtime.contract import QUADRANTS
from echoquad_train.parallel.ranks import Share
from echoquad_train.recipe import Recipe
from echoquad_train.training.augmentation import (
    _draw_sides,
    apply_augmentation,
    draw_augmentation,
    draw_boxes,
    erase,
    resize,
    sample_warp,
)

SIZE = 32
STILL = Recipe(
    crop_scale=(1, 1),
    crop_ratio=(1, 1),
    horizontal_flip=0,
    rotate=0,
    translate=0,
    zoom=(1, 1),
    shear=0,
    erase=0,
    mean=0.25,
)
GREY_LEVELS = 0.02  # two computations of the same bilinear sample in float32 differ only by rounding


def augment(
    quadrants: Tensor,
    recipe: Recipe,
    generator: torch.Generator,
    share: Share | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Draw the augmentation of a batch and apply it to the rows of `share`, by default to all."""
    share = share or Share(0, len(quadrants), len(quadrants))
    draws = draw_augmentation(share.total, quadrants.shape[-1], recipe, generator)
    own = {name: values[share.rows] for name, values in draws.items()}
    return apply_augmentation(quadrants, recipe, own, positions)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def batch() -> Tensor:
    return torch.randint(0, 256, (6, 1, SIZE, SIZE), dtype=torch.uint8, generator=seeded(1))


def with_only(**values: object) -> Recipe:
    return STILL.replace(**values)


def test_disabled_augmentation_returns_input(batch: Tensor) -> None:
    out = augment(batch, STILL, seeded())
    assert out.dtype == torch.float32 and out.shape == batch.shape
    torch.testing.assert_close(out, batch.float(), atol=1e-3, rtol=0)


def test_horizontal_flip_flips_columns(batch: Tensor) -> None:
    out = augment(batch, with_only(horizontal_flip=1), seeded())
    torch.testing.assert_close(out, batch.flip(3).float(), atol=1e-3, rtol=0)


def test_flip_is_drawn_for_each_sample() -> None:
    flipped = sample_warp(4000, with_only(horizontal_flip=0.3), seeded())[:, 0, 0] < 0
    assert abs(flipped.float().mean() - 0.3) < 0.03


@pytest.mark.parametrize("field", ["rotate", "translate", "zoom", "shear", "all"])
def test_affine_map_equals_torchvision(batch: Tensor, field: str) -> None:
    """Extract the parameters from the drawn map and apply torchvision with the same."""
    values = {"rotate": 30, "translate": 0.2, "zoom": (0.7, 1.4), "shear": 15}
    recipe = with_only(**(values if field == "all" else {field: values[field]}))
    if field == "all":
        recipe = recipe.replace(rotate=0)  # torchvision rotates in a separate step before
    warps = sample_warp(len(batch), recipe, seeded()).double()
    out = augment(batch, recipe, seeded())
    for image, warp, found in zip(batch, warps, out, strict=True):
        linear, offset = warp[:, :2], warp[:, 2]
        scale = linear[1, 1] if field != "rotate" else torch.tensor(1.0)
        angle = -math.degrees(math.atan2(linear[1, 0], linear[0, 0]))
        shear = math.degrees(math.atan2(linear[0, 1], linear[0, 0])) if field != "rotate" else 0.0
        # The map goes from output to input, so torchvision's translation is its inverse.
        shift = -torch.linalg.solve(linear, offset) * SIZE / 2
        expected = TF.affine(
            image.float(), angle, shift.tolist(), 1 / float(scale), [shear, 0.0], TF.InterpolationMode.BILINEAR
        )
        torch.testing.assert_close(found, expected, atol=GREY_LEVELS, rtol=0)
        assert not torch.equal(found, image.float())


@pytest.mark.parametrize(
    ("recipe", "read", "low", "high"),
    [
        (with_only(rotate=10), lambda w: torch.rad2deg(torch.atan2(w[:, 1, 0], w[:, 0, 0])), -10, 10),
        (with_only(translate=0.05), lambda w: w[:, 0, 2] / 2, -0.05, 0.05),
        (with_only(translate=0.05), lambda w: w[:, 1, 2] / 2, -0.05, 0.05),
        # The translation applies to the zoomed image, as in torchvision.
        (with_only(translate=0.05, zoom=(0.5, 0.5)), lambda w: w[:, 0, 2] / w[:, 0, 0] / 2, -0.05, 0.05),
        (with_only(zoom=(0.9, 1.2)), lambda w: 1 / w[:, 0, 0], 0.9, 1.2),
        (with_only(shear=5), lambda w: torch.rad2deg(torch.atan(w[:, 0, 1])), -5, 5),
    ],
)
def test_draws_are_uniform_over_range(recipe: Recipe, read, low: float, high: float) -> None:
    drawn = read(sample_warp(4000, recipe, seeded()))
    assert low - 1e-4 <= drawn.min() and drawn.max() <= high + 1e-4
    for quantile in (0.02, 0.25, 0.5, 0.75, 0.98):
        expected = low + quantile * (high - low)
        assert abs(float(drawn.quantile(quantile)) - expected) < 0.04 * (high - low)


# Crops


@pytest.mark.parametrize(("scale", "ratio"), [((0.5, 1.0), (3 / 4, 4 / 3)), ((0.08, 1.0), (0.5, 2.0))])
def test_crop_distribution_equals_torchvision(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    warps = sample_warp(4000, with_only(crop_scale=scale, crop_ratio=ratio), seeded())
    width, height, x, y = warps[:, 0, 0], warps[:, 1, 1], warps[:, 0, 2], warps[:, 1, 2]
    assert (warps[:, 0, 1] == 0).all() and (warps[:, 1, 0] == 0).all()
    assert (x.abs() + width <= 1 + 1e-5).all() and (y.abs() + height <= 1 + 1e-5).all()  # inside the image
    area = width * height
    assert scale[0] - 1e-4 <= area.min() and area.max() <= scale[1] + 1e-4
    assert ratio[0] - 1e-4 <= (width / height).min() and (width / height).max() <= ratio[1] + 1e-4

    torch.manual_seed(0)
    side = 1000
    blank = torch.empty(1, side, side)
    theirs = torch.tensor([RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(4000)]) / side
    their_y, their_x, their_height, their_width = theirs.T
    ours = {
        "area": area,
        "ratio": (width / height).log(),
        "left": (x - width + 1) / 2,
        "top": (y - height + 1) / 2,
    }
    expected = {
        "area": their_width * their_height,
        "ratio": (their_width / their_height).log(),
        "left": their_x,
        "top": their_y,
    }
    for name, drawn in ours.items():
        for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
            # Three standard errors of a quantile of 4000 draws are below 0.025 of these ranges.
            assert abs(drawn.quantile(quantile) - expected[name].quantile(quantile)) < 0.03, (name, quantile)


def test_box_that_never_fits_is_clamped() -> None:
    warps = sample_warp(50, with_only(crop_scale=(1, 1), crop_ratio=(3, 4)), seeded())
    assert (warps[:, 0, 0] == 1).all() and (warps[:, 1, 1] < 0.6).all()
    assert (warps[:, 1, 2].abs() + warps[:, 1, 1] <= 1 + 1e-5).all()


def test_crop_shows_its_window() -> None:
    """Bilinear sampling is exact on a ramp, so every output pixel encodes its source coordinate."""
    ramp = torch.arange(SIZE).float().expand(1, 1, SIZE, SIZE)
    recipe = with_only(crop_scale=(0.3, 0.5))
    warp = sample_warp(2, recipe, seeded())
    rows = augment(torch.cat([ramp, ramp.mT]).to(torch.uint8), recipe, seeded())
    centres = (torch.arange(SIZE) + 0.5) * 2 / SIZE - 1
    for taken, scale, offset in (
        (rows[0, 0, 16], warp[0, 0, 0], warp[0, 0, 2]),
        (rows[1, 0, :, 16], warp[1, 1, 1], warp[1, 1, 2]),
    ):
        expected = (scale * centres + offset + 1) * SIZE / 2 - 0.5
        torch.testing.assert_close(taken, expected, atol=1e-2, rtol=0)


def test_crop_comes_before_rotation() -> None:
    """An anisotropic crop before the rotation keeps the map's rows orthogonal; after it, the columns."""
    recipe = with_only(crop_scale=(0.4, 0.6), crop_ratio=(1.5, 1.6), rotate=40)
    linear = sample_warp(100, recipe, seeded())[:, :, :2]
    assert (linear[:, 0] * linear[:, 1]).sum(dim=1).abs().max() < 1e-5
    assert (linear[:, :, 0] * linear[:, :, 1]).sum(dim=1).abs().mean() > 0.05


def test_outside_of_quadrant_is_black() -> None:
    white = torch.full((20, 1, SIZE, SIZE), 255, dtype=torch.uint8)
    out = augment(white, with_only(translate=0.3), seeded())
    assert out.min() == 0 and out.max() == pytest.approx(255, abs=1e-3)


# Comparison with torchvision's transforms


def flat_field(seed: int, side: int = 96) -> Tensor:
    """Draw a smooth image, float [1, side, side], which another bilinear lookup hardly changes."""
    coarse = torch.rand(1, 1, 5, 5, generator=seeded(seed))
    return 255 * F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=True)[0].clamp(0, 1)


def apply_torchvision(image: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Apply the draws of `sample_warp` for a batch of one with torchvision, step by step.

    It repeats the draws in the same order. Erasing is compared separately.
    """

    def uniform(low: float, high: float) -> float:
        return float(torch.empty(1).uniform_(low, high, generator=generator))

    side = image.shape[-1]
    width, height = (float(value) for value in _draw_sides(1, recipe.crop_scale, recipe.crop_ratio, generator))
    x, y = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    # torchvision crops integer pixels: cut the image out of a larger one whose grid contains the box's edges.
    fine = 8 * side
    large = F.interpolate(image[None], size=(fine, fine), mode="bilinear", align_corners=False)[0]
    box = [round(v * fine) for v in ((y - height + 1) / 2, (x - width + 1) / 2, height, width)]
    image = TF.resized_crop(large, *box, [side, side], TF.InterpolationMode.BILINEAR, antialias=True)
    if uniform(0, 1) < recipe.horizontal_flip:
        image = TF.hflip(image)
    image = TF.rotate(image, uniform(-recipe.rotate, recipe.rotate), TF.InterpolationMode.BILINEAR)
    zoom, shear = uniform(*recipe.zoom), uniform(-recipe.shear, recipe.shear)
    shift = [-uniform(-recipe.translate, recipe.translate) * side for _ in range(2)]
    return TF.affine(image, 0, shift, zoom, [shear, 0.0], TF.InterpolationMode.BILINEAR)


@pytest.mark.parametrize("recipe", [Recipe(erase=0), Recipe.load("scratch").replace(erase=0, horizontal_flip=0.5)])
def test_single_warp_equals_four_torchvision_transforms(recipe: Recipe) -> None:
    """RandomResizedCrop, flip, RandomRotation and RandomAffine in this order, with the same draws.

    Compares only pixels that no transform samples from outside the image, where it is black.
    """
    disagreed, compared = [], 0.0
    for seed in range(24):
        image = flat_field(seed)
        found = augment(image[None].round().to(torch.uint8), recipe, seeded(seed))[0]
        expected = apply_torchvision(image.round(), recipe, seeded(seed))
        inside = apply_torchvision(torch.full_like(image, 255.0), recipe, seeded(seed)) > 254.5
        inside &= augment(torch.full((1, 1, 96, 96), 255, dtype=torch.uint8), recipe, seeded(seed))[0] > 254.5
        inside = F.max_pool2d((~inside).float()[None], 5, 1, 2)[0] == 0  # and at a distance from such an edge
        compared += float(inside.float().mean()) / 24
        disagreed.append((found - expected).abs()[inside])
    difference = torch.cat(disagreed)
    assert compared > 0.5
    assert difference.max() < 3 and difference.mean() < 0.4, (difference.max(), difference.mean())


def test_comparison_detects_wrong_order_of_transforms() -> None:
    """With a flip after the rotation, the comparison above fails by a wide margin."""
    recipe = Recipe(erase=0, horizontal_flip=1)
    image = flat_field(2)
    right = apply_torchvision(image, recipe, seeded(2))
    other = TF.hflip(apply_torchvision(image, recipe.replace(horizontal_flip=0), seeded(2)))
    assert (right - other).abs().mean() > 4


# Context padding


def noisy_frames(count: int, side: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the quadrants of `count` noisy frames, uint8 [count, 4, side, side], and the position of one in each."""
    frames = torch.randint(0, 256, (count, 4, side, side), dtype=torch.uint8, generator=seeded(seed))
    return frames, torch.arange(count) % 4


def test_context_padding_shows_rest_of_frame() -> None:
    """Compared with scipy's interpolation in the complete frame, at the coordinates of the drawn maps."""
    side, recipe = 16, with_only(translate=0.4, zoom=(0.6, 1.2), rotate=40, horizontal_flip=0.5)
    frames, positions = noisy_frames(12, side)
    found = augment(frames, recipe, seeded(5), positions=positions)
    maps = sample_warp(12, recipe, seeded(5)).double().numpy()
    steps = (2 * np.arange(side) + 1) / side - 1  # pixel centres, in [-1, 1]
    x, y = np.meshgrid(steps, steps)
    for row, (frame, place) in enumerate(zip(frames.double().numpy(), positions.tolist(), strict=True)):
        whole = np.block([[frame[0], frame[1]], [frame[2], frame[3]]])
        at = maps[row] @ np.stack([x.ravel(), y.ravel(), np.ones(side * side)])
        columns, rows = ((at + 1) * side - 1) / 2 + np.array([[place % 2], [place // 2]]) * side
        expected = map_coordinates(np.pad(whole, 1), [rows + 1, columns + 1], order=1, mode="constant")
        np.testing.assert_allclose(found[row, 0].numpy(), expected.reshape(side, side), atol=GREY_LEVELS)


def test_context_padding_follows_the_quadrant_layout() -> None:
    """With its quadrants and positions in the order of another layout, a frame has the same views."""
    recipe = with_only(translate=0.4, rotate=40)
    frames, positions = noisy_frames(12, SIZE)
    layout = ("RV", "LV", "RA", "LA")
    named = frames[:, [layout.index(name) for name in QUADRANTS]]
    found = augment(named, recipe.replace(quadrant_layout="apex-up"), seeded(5), positions=positions)
    torch.testing.assert_close(found, augment(frames, recipe, seeded(5), positions=positions), atol=0, rtol=0)


def test_context_padding_changes_only_black_pixels() -> None:
    recipe = with_only(translate=0.3, zoom=(0.8, 1.2), rotate=20)
    frames, positions = noisy_frames(8, SIZE)
    own = frames[torch.arange(8), positions][:, None]
    alone, beside = augment(own, recipe, seeded(2)), augment(frames, recipe, seeded(2), positions=positions)
    inside = augment(torch.full_like(own, 255), recipe, seeded(2)) > 254.9
    torch.testing.assert_close(alone[inside], beside[inside], atol=GREY_LEVELS, rtol=0)
    beyond = augment(torch.full_like(own, 255), recipe, seeded(2)) == 0
    assert (alone[beyond] == 0).all() and (beside[beyond] > 0).float().mean() > 0.1


def test_context_padding_without_augmentation_returns_quadrant() -> None:
    frames, positions = noisy_frames(4, SIZE)
    out = augment(frames, STILL, seeded(), positions=positions)
    torch.testing.assert_close(out[:, 0], frames[torch.arange(4), positions].float(), atol=1e-3, rtol=0)


def test_share_with_context_padding_is_augmented_as_in_batch() -> None:
    recipe = with_only(translate=0.3, rotate=20, erase=0.5)
    frames, positions = noisy_frames(7, SIZE)
    whole = augment(frames, recipe, seeded(4), positions=positions)
    parts = [
        augment(frames[a:b], recipe, seeded(4), Share(a, b, 7), positions[a:b]) for a, b in ((0, 3), (3, 7), (7, 7))
    ]
    assert parts[2].shape == (0, 1, SIZE, SIZE)
    torch.testing.assert_close(torch.cat(parts), whole)


# Erasing


def test_erasing_fills_one_box_with_mean() -> None:
    white = torch.full((3000, 1, SIZE, SIZE), 255, dtype=torch.uint8)
    out = augment(white, with_only(erase=0.4), seeded())
    filled = (out == 255 * 0.25)[:, 0]
    assert ((out == 255 * 0.25) | (out > 254.9)).all()
    hit = filled.flatten(1).any(dim=1)
    assert abs(hit.float().mean() - 0.4) < 0.03
    for box in filled[hit][:200]:
        rows, columns = box.any(dim=1), box.any(dim=0)
        assert torch.equal(box, rows[:, None] & columns[None, :])  # a single rectangle
        assert rows.int().diff().abs().sum() <= 2 and columns.int().diff().abs().sum() <= 2


def test_erased_box_distribution_equals_torchvision() -> None:
    side = 100
    blank = torch.zeros(2500, 1, side, side)
    filled = (erase(blank, 1.0, 7.0, draw_boxes(2500, seeded())) == 7)[:, 0]
    area = filled.flatten(1).float().mean(dim=1)
    rows, columns = filled.any(dim=2).int(), filled.any(dim=1).int()
    height, width = rows.sum(dim=1) / side, columns.sum(dim=1) / side
    top, left = rows.argmax(dim=1) / side, columns.argmax(dim=1) / side
    torch.manual_seed(0)
    theirs = [RandomErasing.get_params(blank[0], (0.02, 0.33), (0.3, 3.3), [7.0])[:4] for _ in range(2500)]
    their_top, their_left, their_height, their_width = torch.tensor(theirs).T / side
    for ours, expected in (
        (area, their_height * their_width),
        (height, their_height),
        (width, their_width),
        (top, their_top),
        (left, their_left),
    ):
        for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
            assert abs(ours.quantile(quantile) - expected.quantile(quantile)) < 0.035


def test_zero_probability_erases_nothing(batch: Tensor) -> None:
    assert torch.equal(erase(batch.float(), 0.0, 7.0, draw_boxes(len(batch), seeded())), batch.float())


# Draws


def test_seed_determines_batch_and_input_is_unchanged(batch: Tensor) -> None:
    recipe, before = Recipe(), batch.clone()
    first = augment(batch, recipe, seeded(4))
    torch.manual_seed(99)  # the global generator has no influence
    assert torch.equal(first, augment(batch, recipe, seeded(4)))
    assert not torch.equal(first, augment(batch, recipe, seeded(5)))
    assert torch.equal(batch, before)


def test_every_sample_has_its_own_draws(batch: Tensor) -> None:
    same = batch[:1].expand(6, -1, -1, -1)
    out = augment(same, Recipe(), seeded())
    assert len({image.numpy().tobytes() for image in out}) == 6


def test_samples_do_not_influence_each_other() -> None:
    black = torch.zeros(4, 1, SIZE, SIZE, dtype=torch.uint8)
    mixed = black.clone()
    mixed[2] = 255
    recipe = Recipe(erase=0)
    out = augment(mixed, recipe, seeded())
    assert (out[[0, 1, 3]] == 0).all() and out[2].mean() > 50


def test_values_stay_in_0_to_255(batch: Tensor) -> None:
    out = augment(batch, Recipe(), seeded())
    assert out.min() >= 0 and out.max() <= 255.001 and np.isfinite(out.numpy()).all()
    grid = F.affine_grid(sample_warp(6, Recipe(), seeded()), list(batch.shape), align_corners=False)
    assert grid.shape == (6, SIZE, SIZE, 2)


def test_resize_equals_pillow_up_to_rounding() -> None:
    """On smooth images: noise would only show that Pillow rounds between its two passes."""
    x = np.linspace(0, 3, 112)
    picture = (127 + 60 * np.sin(x)[:, None] + 60 * np.cos(2 * x)[None]).astype(np.uint8)
    found = resize(torch.from_numpy(picture)[None, None], 64)[0, 0].numpy()
    expected = np.asarray(Image.fromarray(picture).resize((64, 64), Image.Resampling.BILINEAR), np.float64)
    assert found.shape == (64, 64) and np.abs(found - expected).max() < 1.1
