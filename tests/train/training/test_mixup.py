"""Mixup: shares, blended images and losses, and training with it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from echoquad_runtime.errors import ConfigError
from echoquad_train.fitting.loop import fit
from echoquad_train.recipe import Recipe
from echoquad_train.training.augmentation import apply_augmentation, draw_augmentation
from echoquad_train.training.mixup import SHARE, blend, blend_losses, draw_mixup


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shares_are_uniform_with_the_probability_of_the_recipe() -> None:
    share = draw_mixup(20_000, 0.3, seeded())[SHARE]
    blended = share[share < 1]
    assert abs(len(blended) / len(share) - 0.3) < 0.02
    quantiles = torch.quantile(blended, torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quantiles, torch.tensor([0.25, 0.5, 0.75]), atol=0.02, rtol=0)


def test_recipe_without_mixup_draws_and_changes_nothing() -> None:
    """The generator's later numbers are those of releases before mixup."""
    generator, images = seeded(), torch.rand(4, 1, 8, 8)
    assert draw_mixup(4, 0.0, generator) == {} and torch.equal(generator.get_state(), seeded().get_state())
    assert blend(images, {}) is images
    assert SHARE not in draw_augmentation(4, 8, Recipe(), seeded())


def test_image_is_blended_with_its_partner() -> None:
    images = torch.arange(3.0)[:, None, None, None].expand(3, 1, 2, 2)
    blended = blend(images, {SHARE: torch.tensor([1.0, 0.5, 0.25])})
    assert blended[:, 0, 0, 0].tolist() == [0.0, 1.0, 0.5]  # 0; half of 1 and 1; a quarter of 2 and the rest of 0


def test_loss_equals_cross_entropy_of_blended_labels() -> None:
    """Against torch's cross-entropy with probabilities as targets."""
    generator = seeded()
    logits, labels = torch.randn(6, 3, generator=generator), torch.tensor([0, 1, 2, 0, 1, 1])
    share = torch.rand(6, generator=generator)
    hot = F.one_hot(labels, 3).float()
    target = share[:, None] * hot + (1 - share[:, None]) * hot.flip(0)
    found = blend_losses(partial(F.cross_entropy, logits, reduction="none"), labels, {SHARE: share})
    torch.testing.assert_close(found, F.cross_entropy(logits, target, reduction="sum"))


def test_augmentation_blends_after_all_other_effects() -> None:
    recipe = Recipe(mixup=1.0)
    images = torch.randint(0, 256, (6, 1, 16, 16), generator=seeded(), dtype=torch.uint8)
    draws = draw_augmentation(6, 16, recipe, seeded())
    plain = apply_augmentation(images, recipe, {name: value for name, value in draws.items() if name != SHARE})
    torch.testing.assert_close(apply_augmentation(images, recipe, draws), blend(plain, draws))


def test_probability_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"mixup is 1\.5; expected a probability from 0 to 1"):
        Recipe(mixup=1.5)


def test_training_with_mixup_differs_and_repeats(
    tmp_path: Path, flat_data: Path, tiny: Recipe, quiet: Any, thin: None
) -> None:
    def trained(name: str, mixup: float) -> list[float]:
        recipe = replace(tiny, mixup=mixup, epochs=2)
        run = fit(flat_data, tmp_path / name, recipe, device="cpu", resume=False, reporter=quiet())
        return [epoch.train_loss for epoch in run.history]

    blended = trained("a", 0.5)
    assert trained("b", 0.5) == blended and trained("c", 0.0) != blended
