"""The trainer: an epoch's batches through augmentation, network, loss and optimizer."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from echoquad_train.augment import augment, shrink
from echoquad_train.data.dataset import Store
from echoquad_train.distill import Teacher, distillation_loss
from echoquad_train.networks.model import QuadrantClassifier, set_trained
from echoquad_train.parallel.ranks import ALONE, Ranks, Share
from echoquad_train.parallel.shared import Batch, share_layers
from echoquad_train.recipe import Recipe
from echoquad_train.sampling import to_device
from echoquad_train.schedule import Course
from echoquad_train.training.ema_weights import EmaWeights

__all__ = ["Steps", "Teaching", "Trainer"]


@dataclass(frozen=True, slots=True)
class Steps:
    """What an epoch's steps came to: mean loss in nats, share of quadrants judged right, the last learning rate."""

    loss: float
    accuracy: float
    rate: float


@dataclass(frozen=True, slots=True)
class Teaching:
    """A teacher, the training quadrants at its input size, and its type of mixed precision."""

    master: Teacher
    store: Store
    dtype: torch.dtype | None


@dataclass(slots=True)
class Trainer:
    """Takes an epoch's steps.

    Attributes
    ----------
    model
        What is trained, on the device.
    recipe
        How.
    store
        The training quadrants.
    where
        The device.
    dtype
        Of mixed precision; None is float32.
    scaler
        Of float16's gradients.
    weights
        Of the classes in the loss, float32 [C].
    teaching
        Whom to distil from, if anybody.
    average
        What follows the weights, if anything.
    ranks
        The processes that share each batch.
    """

    model: QuadrantClassifier
    recipe: Recipe
    store: Store
    where: torch.device
    dtype: torch.dtype | None
    scaler: torch.amp.GradScaler
    weights: torch.Tensor
    teaching: Teaching | None = None
    average: EmaWeights | None = None
    ranks: Ranks = ALONE
    _network: nn.Module = field(init=False)
    _layers: dict[str, float] = field(init=False, default_factory=dict)
    _batch: Batch | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._network = self.model
        if self.ranks.count > 1:
            self._batch = share_layers(self.model, self.where)

    def train_layers(self, layers: Mapping[str, float]) -> list[dict[str, object]]:
        """Have only the named layers learn; gives the optimizer's parameter groups. See `set_trained`."""
        groups = set_trained(self.model, layers)
        if self.ranks.count > 1 and layers != self._layers:
            # It looks once at which weights learn, and its hooks on them have to be gone before the next one's.
            self._network = self.model
            gc.collect()
            # Batch statistics are the same on every rank as it is.
            self._network = DistributedDataParallel(self.model, forward_sync_buffers=False)
        self._layers = dict(layers)
        return groups

    def epoch(
        self,
        batches: Sequence[npt.NDArray[np.int64]],
        generator: torch.Generator,
        course: Course,
        progress: Callable[[int, int], None],
        side: int | None = None,
    ) -> Steps:
        """Go through the batches once.

        Parameters
        ----------
        batches
            Indices into [F * 4], a batch at a time; of each, the ranks take their shares.
        generator
            Of the augmentation's draws; the same on every rank.
        course
            The phase's optimizer and learning rate.
        progress
            Called with the number of batches done and of all.
        side
            Pixels a side that the quadrants are brought down to before they are augmented; None is as they are.
        """
        shares = [self.ranks.share(len(chosen)) for chosen in batches]
        own = [chosen[share.rows] for chosen, share in zip(batches, shares, strict=True)]
        whole = self.recipe.neighbours
        fed = self.store.feed(own, whole=whole)
        apart = self.teaching is not None and self.teaching.store is not self.store
        taught = self.teaching.store.feed(own, whole=whole) if self.teaching and apart else repeat(None)
        # Summed on the device: to ask it for a figure after each batch is to wait for it.
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.where)
        correct = torch.zeros((), dtype=torch.float64, device=self.where)
        counts, rate = self.weights.cpu(), 0.0
        for done, (chosen, share, mine) in enumerate(zip(batches, shares, own, strict=True), 1):
            quadrants, labels = to_device(next(fed), self.store.labels[mine // 4], self.where)
            # What this rank's sum is divided by: its mean share of the batch's weight, since the ranks' gradients are
            # averaged. So they are those of the whole batch's weighted mean.
            weight = float(counts[self.store.labels[chosen // 4]].sum()) / self.ranks.count
            places = torch.from_numpy(mine % 4) if whole else None
            loss, logits = self._loss(quadrants, labels, weight, share, places, next(taught), generator, side)
            rate = course.step(loss, self.scaler)
            if self.average is not None:
                self.average.advance()
                self.average.mix()
            loss_sum += loss.detach().double() * share.total / self.ranks.count
            correct += (logits.detach().argmax(dim=1) == labels).sum()
            progress(done, len(batches))
        seen = sum(share.total for share in shares)
        total, right = self.ranks.sum(torch.stack([loss_sum, correct])).tolist()
        return Steps(total / seen, right / seen, rate)

    def _loss(
        self,
        quadrants: torch.Tensor,
        labels: torch.Tensor,
        weight: float,
        share: Share,
        places: torch.Tensor | None,
        larger: npt.NDArray[np.uint8] | None,
        generator: torch.Generator,
        side: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give a share's loss and its logits, float32 [B, C]; `larger` are the quadrants at the teacher's own size."""
        recipe, teaching = self.recipe, self.teaching
        twin = generator.clone_state()  # draws what `generator` will: the same view at another size
        size = quadrants.shape[-1]
        target = min(side or size, size) if len(quadrants) else size  # a share may be empty
        images = augment(shrink(quadrants, target) if target < size else quadrants, recipe, generator, share, places)
        if self._batch is not None:
            self._batch.share = share
        with torch.autocast(self.where.type, self.dtype, enabled=self.dtype is not None):
            logits = self._network(images)
        logits = logits.float()
        summed = F.cross_entropy(logits, labels, self.weights, label_smoothing=recipe.label_smoothing, reduction="sum")
        loss = summed / weight
        if teaching is not None:
            view = images
            if larger is not None or target < size:
                own = quadrants if larger is None else torch.from_numpy(larger).to(self.where)
                view = augment(own, recipe, twin, share, places)
            answers = teaching.master(view, teaching.dtype)
            rows = share.total / self.ranks.count
            loss = distillation_loss(loss, logits, answers, recipe.distill_weight, recipe.distill_temperature, rows)
        return loss, logits
