"""Intensity augmentation: each effect, its range, and its draws."""

import dataclasses
import math

import pytest
import torch

from echoquad_runtime.errors import ConfigError
from echoquad_train.recipe import Recipe
from echoquad_train.training.augmentation import apply_augmentation, draw_augmentation
from echoquad_train.training.intensity_augmentation import apply_intensity, draw_intensity

STILL = Recipe(
    weights="none", input_size=32, horizontal_flip=0, rotate=0, translate=0, shear=0, erase=0, crop_scale=(1, 1)
)
STILL = dataclasses.replace(STILL, crop_ratio=(1, 1), zoom=(1, 1))
STRENGTHS = {"gamma": 0.3, "gain": 0.3, "attenuation": 0.4, "shadow": 1.0, "speckle": 0.2}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def flat(level=100.0, count=64, size=32):
    return torch.full((count, 1, size, size), level)


def vary_by(images, seed=0, **strengths):
    recipe = STILL.replace(**strengths)
    return apply_intensity(images, recipe, draw_intensity(len(images), images.shape[-1], recipe, generator(seed)))


def test_disabled_intensity_augmentation_returns_batch_and_draws_nothing():
    images, source = flat(), generator()
    before = source.get_state()
    assert apply_intensity(images, STILL, draw_intensity(64, 32, STILL, source)) is images
    assert torch.equal(source.get_state(), before)


@pytest.mark.parametrize("name", STRENGTHS)
def test_each_effect_keeps_range_and_black(name):
    images = torch.rand(32, 1, 32, 32, generator=generator(1)) * 255
    images[:, :, :5] = 0
    varied = vary_by(images, **{name: STRENGTHS[name]})
    assert varied.shape == images.shape
    assert varied.dtype == torch.float32
    assert varied.min() >= 0
    assert varied.max() <= 255
    assert (varied[:, :, :5] == 0).all()
    assert ((varied - images).abs().amax(dim=(1, 2, 3)) > 0.5).float().mean() > 0.8
    assert torch.equal(varied, vary_by(images, **{name: STRENGTHS[name]}))
    assert not torch.equal(varied, vary_by(images, seed=1, **{name: STRENGTHS[name]}))


def test_gain_is_one_bounded_factor_for_each_image():
    factors = vary_by(flat(count=2000), gain=0.3)[:, 0] / 100
    assert torch.allclose(factors.amin(dim=(1, 2)), factors.amax(dim=(1, 2)))
    logs = factors[:, 0, 0].log()
    assert logs.abs().max() <= 0.3 + 1e-6
    assert abs(float(logs.mean())) < 0.02
    assert float(logs.std()) == pytest.approx(0.3 / math.sqrt(3), rel=0.05)  # of a uniform distribution


def test_gamma_keeps_black_and_white():
    levels = torch.tensor([0.0, 64.0, 255.0]).view(1, 1, 1, 3).expand(100, 1, 2, 3)
    varied = vary_by(levels, gamma=0.3)
    assert (varied[..., 0] == 0).all()
    assert torch.allclose(varied[..., 2], torch.tensor(255.0))
    low, high = (255 * (64 / 255) ** math.exp(side) for side in (0.3, -0.3))
    assert varied[..., 1].min() >= low - 1e-3
    assert varied[..., 1].max() <= high + 1e-3


def test_attenuation_is_exponential_in_depth_and_neutral_at_centre():
    logs = (vary_by(flat(size=33), attenuation=0.4)[:, 0] / 100).log()
    assert torch.allclose(logs[:, 16, 16], torch.zeros(64), atol=1e-5)
    downwards, sideways = logs.diff(dim=1), logs.diff(dim=2)
    for steps in (downwards, sideways):
        assert torch.allclose(steps, steps[:, :1, :1].expand_as(steps), atol=1e-5)
        assert (steps[:, 0, 0] > 0).any()
        assert (steps[:, 0, 0] < 0).any()
    slopes = 16 * torch.hypot(downwards[:, 0, 0], sideways[:, 0, 0])
    assert 0.3 < float(slopes.max()) <= 0.4 + 1e-5


def test_shadow_is_a_band_with_given_probability():
    dark = vary_by(flat(count=2000), shadow=0.25) / 100
    hit = dark.amin(dim=(1, 2, 3)) < 0.75
    assert 0.2 < float(hit.float().mean()) < 0.27  # a band may lie outside the image
    assert dark.max() <= 1
    assert dark.min() >= 0.1 - 1e-6
    shares = (dark[hit] < 0.9).float().mean(dim=(1, 2, 3))
    assert shares.max() < 0.6


def test_speckle_keeps_the_mean_and_has_grains():
    noisy = vary_by(flat(count=500), speckle=0.2)
    assert float(noisy.mean()) == pytest.approx(100, rel=0.01)
    deviation = noisy - noisy.mean(dim=(2, 3), keepdim=True)
    neighbours = (deviation[..., 1:] * deviation[..., :-1]).mean() / deviation.square().mean()
    assert 0.3 < float(neighbours) < 0.9


def test_intensity_changes_before_erasing():
    recipe = STILL.replace(erase=1.0, gain=0.3)
    images = torch.full((64, 1, 32, 32), 100, dtype=torch.uint8)
    done = apply_augmentation(images, recipe, draw_augmentation(len(images), images.shape[-1], recipe, generator()))
    erased = done == 255.0 * recipe.mean
    assert erased.flatten(1).any(dim=1).all()
    assert len(done[~erased].unique()) >= 60


@pytest.mark.parametrize(("name", "value"), [("shadow", 1.5), ("gain", -0.1), ("speckle", -1.0)])
def test_invalid_strengths_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"recipe: {name} is"):
        STILL.replace(**{name: value})
