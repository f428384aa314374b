"""Batches on the device that trains: quadrants, labels and the random numbers of the augmentation.

On CUDA a store's quadrants lie on the device as uint8 while they fit, and the random numbers are drawn there for many
batches at once: a step then waits for no copy and launches few kernels. Elsewhere each batch is copied and drawn alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from echoquad_train.data.dataset import QuadrantStore, Store
from echoquad_train.parallel.ranks import ALONE, Ranks, Share
from echoquad_train.recipe import Recipe
from echoquad_train.training.augmentation import apply_augmentation, draw_augmentation

__all__ = ["BatchLoader", "DeviceFeed", "TrainingBatch", "epoch_generator"]

RESIDENT_SHARE: Final = 0.25
"""Of the device's free memory: a store that takes more is copied a batch at a time. The network needs the rest."""

DRAWN_AT_ONCE: Final = 4096
"""Quadrants whose random numbers are drawn at once on CUDA; speckle at 224 pixels takes 50 kB of memory each."""

_log = logging.getLogger(__name__)

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """A process's rows of a batch, on the device.

    Attributes
    ----------
    quadrants
        uint8 [B, 1, S, S], or [B, 4, S, S], all four of each one's frame, where the recipe sees context_padding.
    labels
        int64 [B].
    weight
        float32 scalar, what the loss's sum is divided by.
    draws
        From `echoquad_train.training.augmentation.draw_augmentation`, float32 [B, ...].
    share
        Which rows of the batch these are.
    places
        int64 [B], which of its frame's four each quadrant is; None where the recipe sees no context_padding.
    teacher_quadrants
        As `quadrants`, at the teacher's input size; None where that is the student's, or there is no teacher.
    """

    quadrants: Tensor
    labels: Tensor
    weight: Tensor
    draws: dict[str, Tensor]
    share: Share
    places: Tensor | None = None
    teacher_quadrants: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Return every tensor of the batch, in an order that batches of the same kind share."""
        optional = [value for value in (self.places, self.teacher_quadrants) if value is not None]
        return [self.quadrants, self.labels, self.weight, *self.draws.values(), *optional]

    def zeros(self) -> TrainingBatch:
        """Return a batch of the same shapes in memory of its own, filled with zeros."""
        return TrainingBatch(
            torch.zeros_like(self.quadrants),
            torch.zeros_like(self.labels),
            torch.zeros_like(self.weight),
            {name: torch.zeros_like(values) for name, values in self.draws.items()},
            self.share,
            None if self.places is None else torch.zeros_like(self.places),
            None if self.teacher_quadrants is None else torch.zeros_like(self.teacher_quadrants),
        )


class DeviceFeed:
    """Feeds a store's quadrants to a device.

    Parameters
    ----------
    store
        Where they are.
    where
        The device.

    Attributes
    ----------
    resident
        uint8 [F, 4, S, S] on the device, where it is CUDA, the store is decoded, and they fit; else None.
    """

    def __init__(self, store: Store, where: torch.device) -> None:
        self.store, self.where = store, where
        self.resident: Tensor | None = None
        if isinstance(store, QuadrantStore) and store.quadrants.nbytes <= RESIDENT_SHARE * _free_bytes(where):
            self.resident = _uploaded(store.quadrants, where)
            if not self._answers_as_the_store():
                _log.warning(
                    "quadrants kept on %s are not those of the data set; they are copied for each batch", where
                )
                self.resident = None

    def _answers_as_the_store(self) -> bool:
        """Whether the first and the last quadrant come back from the device as they are in the store."""
        ends = [np.array([0, 4 * len(self.store.labels) - 1])]
        return all(
            np.array_equal(next(self.feed(ends, whole=whole)).cpu().numpy(), next(self.store.feed(ends, whole=whole)))
            for whole in (False, True)
        )

    def feed(self, batches: Iterable[Indices], *, whole: bool = False) -> Iterator[Tensor]:
        """Yield the quadrants, uint8 [B, 1, S, S], of each batch of indices into [F * 4].

        With `whole`, all four of each one's frame, [B, 4, S, S].
        """
        if self.resident is None:
            return (self._copied(quadrants) for quadrants in self.store.feed(batches, whole=whole))
        chosen = list(batches)
        every = _to_device(np.concatenate(chosen) if chosen else np.empty(0, np.int64), self.where)
        each = torch.split(every, [len(rows) for rows in chosen])
        if whole:
            frames = self.resident
            return (frames.index_select(0, rows // 4) for rows in each)
        quadrants = self.resident.flatten(0, 1)[:, None]
        return (quadrants.index_select(0, rows) for rows in each)

    def _copied(self, quadrants: npt.NDArray[np.uint8]) -> Tensor:
        images = torch.from_numpy(quadrants)
        return images.pin_memory().to(self.where, non_blocking=True) if self.where.type == "cuda" else images


class BatchLoader:
    """Makes the batches of an epoch.

    Parameters
    ----------
    recipe
        Says how batches are augmented.
    store
        The training quadrants.
    where
        The device.
    class_weights
        Of the loss, float32 [C].
    ranks
        The processes that share each batch.
    teacher_store
        The training quadrants at the teacher's input size, where that is another.
    """

    def __init__(
        self,
        recipe: Recipe,
        store: Store,
        where: torch.device,
        class_weights: Tensor,
        ranks: Ranks = ALONE,
        teacher_store: Store | None = None,
    ) -> None:
        self._recipe, self._where, self._ranks = recipe, where, ranks
        self._labels, self._size = store.labels, store.size
        self._class_weights = class_weights.cpu()
        self._feed = DeviceFeed(store, where)
        self._teacher_feed = None if teacher_store is None else DeviceFeed(teacher_store, where)

    def epoch(
        self, batches: Sequence[Indices], generator: torch.Generator, side: int | None = None
    ) -> Iterator[TrainingBatch]:
        """Yield this process's rows of each batch.

        Parameters
        ----------
        batches
            Indices into [F * 4], a batch at a time.
        generator
            Of the augmentation's draws, from `epoch_generator`; the same on every rank.
        side
            Pixels a side that the quadrants will be brought down to before they are augmented; None is as they are.
        """
        whole, where = self._recipe.context_padding, self._where
        shares = [self._ranks.share(len(chosen)) for chosen in batches]
        own = [chosen[share.rows] for chosen, share in zip(batches, shares, strict=True)]
        sizes = [len(rows) for rows in own]
        rows = np.concatenate(own) if own else np.empty(0, np.int64)
        # Copied once for the epoch: a copy of each batch's own would be waited for.
        labels = torch.split(_to_device(self._labels[rows // 4], where), sizes)
        beside = iter(torch.split(_to_device(rows % 4, where), sizes)) if whole else repeat(None)
        weights = torch.tensor([self._weight(chosen) for chosen in batches], dtype=torch.float32, device=where)
        fed = self._feed.feed(own, whole=whole)
        taught = self._teacher_feed.feed(own, whole=whole) if self._teacher_feed else repeat(None)
        draws = self._draws(shares, min(side or self._size, self._size), generator)
        for index, share in enumerate(shares):
            yield TrainingBatch(
                next(fed), labels[index], weights[index], next(draws), share, next(beside), next(taught)
            )

    def preview(self, batches: Sequence[Indices], generator: torch.Generator) -> Tensor:
        """Return the first whole batch as `epoch` would have it augmented at full size, float32 [B, 1, S, S]."""
        shares = [Share(0, len(chosen), len(chosen)) for chosen in batches]
        draws = next(self._draws(shares, self._size, generator))
        quadrants = next(self._feed.feed(batches[:1], whole=self._recipe.context_padding))
        places = _to_device(batches[0] % 4, self._where) if self._recipe.context_padding else None
        return apply_augmentation(quadrants, self._recipe, draws, places)

    def _weight(self, chosen: Indices) -> float:
        """Return what a rank's sum over its rows of a batch is divided by.

        It is the rank's mean share of the batch's weight, since the ranks' gradients are averaged: so they are those of
        the whole batch's weighted mean.
        """
        return float(self._class_weights[self._labels[chosen // 4]].sum()) / self._ranks.count

    def _draws(self, shares: Sequence[Share], side: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """Yield each batch's draws; every rank draws for the whole batch and keeps its own rows."""
        for part in _parts([share.total for share in shares], _drawn_at_once(generator.device)):
            totals = [share.total for share in shares[part]]
            drawn = draw_augmentation(sum(totals), side, self._recipe, generator)
            each = {name: torch.split(values, totals) for name, values in drawn.items()}
            for index, share in enumerate(shares[part]):
                yield {name: values[index][share.rows] for name, values in each.items()}


def _parts(sizes: Sequence[int], limit: int) -> list[slice]:
    """Return consecutive slices of batches whose sizes add up to `limit` at most, or hold a single batch."""
    starts, total = [0], 0
    for index, size in enumerate(sizes):
        if index > starts[-1] and total + size > limit:
            starts.append(index)
            total = 0
        total += size
    return [slice(first, last) for first, last in pairwise([*starts, len(sizes)])] if sizes else []


def epoch_generator(where: torch.device, batches: torch.Generator, seed: int) -> torch.Generator:
    """Return the generator of an epoch's augmentation.

    On CUDA it is one of the device, seeded with `seed`; on the CPU `batches`, which has drawn the epoch's batches.
    """
    return torch.Generator(where).manual_seed(seed) if where.type == "cuda" else batches


def _to_device(values: Indices, where: torch.device) -> Tensor:
    """Copy an array of int64 to the device."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(where)


def _uploaded(quadrants: npt.NDArray[np.uint8], where: torch.device) -> Tensor:
    return torch.from_numpy(quadrants).to(where)


def _drawn_at_once(where: torch.device) -> int:
    """Return how many quadrants' random numbers are drawn at once; 0 draws for each batch alone."""
    return DRAWN_AT_ONCE if where.type == "cuda" else 0


def _free_bytes(where: torch.device) -> int:
    """Return the free memory of a CUDA device; 0 of any other, where quadrants need no second copy."""
    return torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else 0
