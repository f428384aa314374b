"""Sampling: the quadrants of each batch (balanced or shuffled), class weights, and the seeds of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from echoquad_train.data.dataset import Store
from echoquad_train.recipe import Recipe

__all__ = ["class_weights", "draw_batches", "epoch_seed"]

MULTINOMIAL_LIMIT: Final = 2**24
"""Largest number of categories that torch.multinomial accepts."""


def draw_batches(store: Store, recipe: Recipe, generator: torch.Generator) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the batches of an epoch as indices into the quadrants, [F * 4]."""
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
        if len(chosen) > 1:  # batch normalisation needs two samples of a 1x1 map
            yield chosen


def _draw_balanced(labels: npt.NDArray[np.int64], count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw quadrants with weights 1 / class count: first a class, then one of its frames, then a quadrant."""
    frames, per_class = np.argsort(labels, kind="stable"), np.bincount(labels)
    present = torch.from_numpy(np.flatnonzero(per_class))
    first = torch.from_numpy(np.cumsum(per_class) - per_class)
    size = torch.from_numpy(per_class)
    drawn = present[torch.randint(len(present), (count,), generator=generator)]
    offset = (torch.rand(count, dtype=torch.float64, generator=generator) * size[drawn]).long()  # rand is below 1
    position = torch.randint(4, (count,), generator=generator)
    return 4 * torch.from_numpy(frames)[first[drawn] + offset] + position


def class_weights(labels: npt.NDArray[np.int64], classes: int) -> torch.Tensor:
    """Return weights of 1 / class count, normalised to mean 1: float32 [classes]."""
    weights = 1.0 / np.bincount(labels, minlength=classes)
    return torch.from_numpy(weights / weights.mean()).float()


def epoch_seed(seed: int, epoch: int, stream: int) -> int:
    """Return the seed of one of an epoch's random streams."""
    return int(np.random.SeedSequence([seed, epoch, stream]).generate_state(1, np.uint64)[0] >> 1)
