"""Sampling: which quadrants make up a batch, what they count, and the seeds of an epoch's draws."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from echoquad_train.data.dataset import Store
from echoquad_train.recipe import Recipe

__all__ = ["class_weights", "draw_batches", "seed_of"]

MULTINOMIAL_LIMIT = 2**24
"""Categories that torch.multinomial takes at most."""


def draw_batches(store: Store, recipe: Recipe, generator: torch.Generator) -> Iterator[npt.NDArray[np.int64]]:
    """Draw an epoch's quadrants, as indices into [F * 4], a batch at a time."""
    count = 4 * len(store.labels)
    if recipe.balanced_sampler and count > MULTINOMIAL_LIMIT:
        order = _draw_balanced(store.labels, count, generator)
    elif recipe.balanced_sampler:
        per_class = np.bincount(store.labels)
        weights = torch.from_numpy(np.repeat(1.0 / per_class[store.labels], 4))
        order = torch.multinomial(weights, count, replacement=True, generator=generator)
    else:
        order = torch.randperm(count, generator=generator)
    for start in range(0, count, recipe.batch_size):
        chosen = order[start : start + recipe.batch_size].numpy()
        if len(chosen) > 1:  # batch normalisation cannot be computed over one sample of a 1x1 map
            yield chosen


def _draw_balanced(labels: npt.NDArray[np.int64], count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw quadrants with weights 1 / class count in two steps: a class, then one of its frames."""
    frames, per_class = np.argsort(labels, kind="stable"), np.bincount(labels)
    present = torch.from_numpy(np.flatnonzero(per_class))
    first = torch.from_numpy(np.cumsum(per_class) - per_class)
    size = torch.from_numpy(per_class)
    drawn = present[torch.randint(len(present), (count,), generator=generator)]
    place = (torch.rand(count, dtype=torch.float64, generator=generator) * size[drawn]).long()  # below 1, so below size
    corner = torch.randint(4, (count,), generator=generator)
    return 4 * torch.from_numpy(frames)[first[drawn] + place] + corner


def class_weights(labels: npt.NDArray[np.int64], classes: int) -> torch.Tensor:
    """Weigh each class by 1 / its count, with the mean 1."""
    weights = 1.0 / np.bincount(labels, minlength=classes)
    return torch.from_numpy(weights / weights.mean()).float()


def seed_of(seed: int, epoch: int, stream: int) -> int:
    """Give the seed of one of an epoch's streams of draws."""
    return int(np.random.SeedSequence([seed, epoch, stream]).generate_state(1, np.uint64)[0] >> 1)
