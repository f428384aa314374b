"""Batches on the training device: quadrants, labels and the random numbers of the augmentation.

On CUDA a store's quadrants stay on the device as uint8 while they fit, and random numbers are drawn there for many
batches at once, so that a step waits for no copy and launches few kernels. On the CPU each batch is drawn alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, repeat
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from echoquad_runtime.contract import QUADRANTS, parse_layout
from echoquad_train.data.dataset import QuadrantStore, Store
from echoquad_train.parallel.ranks import ALONE, Ranks, Share
from echoquad_train.recipe import Recipe
from echoquad_train.training.augmentation import apply_augmentation, draw_augmentation

__all__ = ["BatchLoader", "DeviceFeed", "TrainingBatch", "epoch_generator"]

RESIDENT_FRACTION: Final = 0.25
"""Of the device's free memory: a larger store is copied batch by batch, because the network needs the rest."""

DRAWN_AT_ONCE: Final = 4096
"""Quadrants whose random numbers are drawn at once on CUDA; speckle at 224 pixels takes 50 kB of memory each."""

logger = logging.getLogger(__name__)

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """A rank's rows of a batch, on the device.

    Attributes
    ----------
    quadrants
        uint8 [B, 1, S, S]; with context padding, all four quadrants of each one's frame, [B, 4, S, S].
    labels
        int64 [B].
    weight
        float32 scalar that divides the sum of the loss.
    draws
        From `echoquad_train.training.augmentation.draw_augmentation`, float32 [B, ...].
    share
        Which rows of the batch these are.
    positions
        int64 [B], the position of each quadrant in its frame, 0 to 3, as `apply_augmentation` takes it; None without
        context padding.
    teacher_quadrants
        As `quadrants`, at the teacher's input size; None if it equals the student's, or there is no teacher.
    """

    quadrants: Tensor
    labels: Tensor
    weight: Tensor
    draws: dict[str, Tensor]
    share: Share
    positions: Tensor | None = None
    teacher_quadrants: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Return every tensor of the batch, in a fixed order."""
        optional = [value for value in (self.positions, self.teacher_quadrants) if value is not None]
        return [self.quadrants, self.labels, self.weight, *self.draws.values(), *optional]

    def zeros(self) -> TrainingBatch:
        """Return a batch of the same shapes, filled with zeros."""
        return replace(
            self,
            quadrants=torch.zeros_like(self.quadrants),
            labels=torch.zeros_like(self.labels),
            weight=torch.zeros_like(self.weight),
            draws={name: torch.zeros_like(values) for name, values in self.draws.items()},
            positions=None if self.positions is None else torch.zeros_like(self.positions),
            teacher_quadrants=None if self.teacher_quadrants is None else torch.zeros_like(self.teacher_quadrants),
        )


class DeviceFeed:
    """Copies a store's quadrants to a device.

    Parameters
    ----------
    store
        The quadrants.
    device
        The device.

    Attributes
    ----------
    resident
        uint8 [F, 4, S, S] on the device if it is CUDA, the store is decoded, and the quadrants fit; else None.
    """

    def __init__(self, store: Store, device: torch.device) -> None:
        self.store, self.device = store, device
        self.resident: Tensor | None = None
        if isinstance(store, QuadrantStore) and store.quadrants.nbytes <= RESIDENT_FRACTION * _free_bytes(device):
            self.resident = _upload(store.quadrants, device)
            if not self._matches_store():
                logger.warning(
                    "quadrants on %s differ from those of the data set; copying them for each batch instead", device
                )
                self.resident = None

    def _matches_store(self) -> bool:
        """Return whether the first and the last quadrant on the device equal those in the store."""
        ends = [np.array([0, 4 * len(self.store.labels) - 1])]
        return all(
            np.array_equal(next(self.feed(ends, whole=whole)).cpu().numpy(), next(self.store.feed(ends, whole=whole)))
            for whole in (False, True)
        )

    def feed(self, batches: Iterable[Indices], *, whole: bool = False) -> Iterator[Tensor]:
        """Yield the quadrants, uint8 [B, 1, S, S], of each batch of indices into [F * 4].

        With `whole`, yield all four quadrants of each one's frame, [B, 4, S, S].
        """
        if self.resident is None:
            return (self._copy(quadrants) for quadrants in self.store.feed(batches, whole=whole))
        chosen = list(batches)
        rows = _to_device(np.concatenate(chosen) if chosen else np.empty(0, np.int64), self.device)
        by_batch = torch.split(rows, [len(indices) for indices in chosen])
        if whole:
            frames = self.resident
            return (frames.index_select(0, indices // 4) for indices in by_batch)
        quadrants = self.resident.flatten(0, 1)[:, None]
        return (quadrants.index_select(0, indices) for indices in by_batch)

    def _copy(self, quadrants: npt.NDArray[np.uint8]) -> Tensor:
        images = torch.from_numpy(quadrants)
        return images.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else images


class BatchLoader:
    """Makes the batches of an epoch.

    Parameters
    ----------
    recipe
        Defines the augmentation.
    store
        The training quadrants.
    device
        The training device.
    class_weights
        Of the loss, float32 [C].
    ranks
        The processes that share each batch.
    teacher_store
        The training quadrants at the teacher's input size, if it differs from the student's.
    """

    def __init__(
        self,
        recipe: Recipe,
        store: Store,
        device: torch.device,
        class_weights: Tensor,
        ranks: Ranks = ALONE,
        teacher_store: Store | None = None,
    ) -> None:
        self._recipe, self._device, self._ranks = recipe, device, ranks
        self._labels, self._size = store.labels, store.size
        self._class_weights = class_weights.cpu()
        self._feed = DeviceFeed(store, device)
        self._teacher_feed = None if teacher_store is None else DeviceFeed(teacher_store, device)

    def epoch(
        self, batches: Sequence[Indices], generator: torch.Generator, size: int | None = None
    ) -> Iterator[TrainingBatch]:
        """Yield this rank's rows of each batch.

        Parameters
        ----------
        batches
            Indices into [F * 4], one array for each batch.
        generator
            Of the augmentation, from `epoch_generator`; the same on every rank.
        size
            Side in pixels that the quadrants are resized to before they are augmented; None keeps their size.
        """
        whole, device = self._recipe.context_padding, self._device
        shares = [self._ranks.share(len(chosen)) for chosen in batches]
        own = [chosen[share.rows] for chosen, share in zip(batches, shares, strict=True)]
        sizes = [len(rows) for rows in own]
        rows = np.concatenate(own) if own else np.empty(0, np.int64)
        # One copy for the whole epoch: a copy for each batch would block.
        labels = torch.split(_to_device(self._labels[rows // 4], device), sizes)
        positions = iter(torch.split(_to_device(self._positions(rows), device), sizes)) if whole else repeat(None)
        weights = torch.tensor([self._weight(chosen) for chosen in batches], dtype=torch.float32, device=device)
        quadrants = self._feed.feed(own, whole=whole)
        teacher_quadrants = self._teacher_feed.feed(own, whole=whole) if self._teacher_feed else repeat(None)
        draws = self._draws(shares, min(size or self._size, self._size), generator)
        for index, share in enumerate(shares):
            yield TrainingBatch(
                next(quadrants),
                labels[index],
                weights[index],
                next(draws),
                share,
                next(positions),
                next(teacher_quadrants),
            )

    def preview(self, batches: Sequence[Indices], generator: torch.Generator) -> Tensor:
        """Return the first whole batch, augmented as by training at full size, float32 [B, 1, S, S]."""
        shares = [Share(0, len(chosen), len(chosen)) for chosen in batches]
        draws = next(self._draws(shares, self._size, generator))
        quadrants = next(self._feed.feed(batches[:1], whole=self._recipe.context_padding))
        positions = _to_device(self._positions(batches[0]), self._device) if self._recipe.context_padding else None
        return apply_augmentation(quadrants, self._recipe, draws, positions)

    def _positions(self, rows: Indices) -> Indices:
        """Return the position in its frame, 0 to 3, of each quadrant of indices into [F * 4]."""
        layout = parse_layout(self._recipe.quadrant_layout)
        return np.array([layout.index(name) for name in QUADRANTS])[rows % len(QUADRANTS)]

    def _weight(self, chosen: Indices) -> float:
        """Return what divides a rank's sum of the loss: its mean share of the batch's class weights.

        The ranks' gradients are averaged, so together they are those of the weighted mean over the whole batch.
        """
        return float(self._class_weights[self._labels[chosen // 4]].sum()) / self._ranks.world_size

    def _draws(self, shares: Sequence[Share], side: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """Yield the draws of each batch. Every rank draws for the whole batch and keeps its own rows."""
        for part in _chunks([share.total for share in shares], _drawn_at_once(generator.device)):
            totals = [share.total for share in shares[part]]
            drawn = draw_augmentation(sum(totals), side, self._recipe, generator)
            by_batch = {name: torch.split(values, totals) for name, values in drawn.items()}
            for index, share in enumerate(shares[part]):
                yield {name: values[index][share.rows] for name, values in by_batch.items()}


def _chunks(sizes: Sequence[int], limit: int) -> list[slice]:
    """Return slices of consecutive batches whose sizes sum to at most `limit`, or that hold a single batch."""
    starts, total = [0], 0
    for index, size in enumerate(sizes):
        if index > starts[-1] and total + size > limit:
            starts.append(index)
            total = 0
        total += size
    return [slice(first, last) for first, last in pairwise([*starts, len(sizes)])] if sizes else []


def epoch_generator(device: torch.device, batches: torch.Generator, seed: int) -> torch.Generator:
    """Return the random generator of an epoch's augmentation.

    On CUDA it is a generator of the device, seeded with `seed`; on the CPU it is `batches`, which drew the batches.
    """
    return torch.Generator(device).manual_seed(seed) if device.type == "cuda" else batches


def _to_device(values: Indices, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


def _upload(quadrants: npt.NDArray[np.uint8], device: torch.device) -> Tensor:
    return torch.from_numpy(quadrants).to(device)


def _drawn_at_once(device: torch.device) -> int:
    """Return how many quadrants' random numbers to draw at once; 0 draws for each batch alone."""
    return DRAWN_AT_ONCE if device.type == "cuda" else 0


def _free_bytes(device: torch.device) -> int:
    """Return the free memory of a CUDA device; 0 for a CPU, where quadrants need no second copy."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
