"""The trainer: an epoch's batches through augmentation, network, loss and optimizer."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from echoquad_train.data.dataset import Store
from echoquad_train.networks.classifier import QuadrantClassifier, set_trained
from echoquad_train.parallel.gradient_sharing import Batch, share_layers
from echoquad_train.parallel.ranks import ALONE, Ranks
from echoquad_train.recipe import Recipe
from echoquad_train.training.augmentation import apply_augmentation, shrink
from echoquad_train.training.batches import BatchLoader, TrainingBatch
from echoquad_train.training.captured_step import CapturedStep, CudaGraphRecorder, Recorder, capture, graphs_wanted
from echoquad_train.training.distillation import Teacher, distillation_loss
from echoquad_train.training.ema_weights import EmaWeights
from echoquad_train.training.optimizer_schedule import OptimizerSchedule

__all__ = ["Distillation", "Steps", "Trainer", "recorder_of"]


def recorder_of(where: torch.device, ranks: Ranks, scaler: torch.amp.GradScaler) -> Callable[[], Recorder] | None:
    """Return what records training steps on a device; None where they run one kernel at a time.

    Only CUDA has graphs. Several processes exchange gradients and batch statistics within a step, and float16 decides
    on the host whether a step is taken: neither is recorded.
    """
    recorded = where.type == "cuda" and ranks.count == 1 and not scaler.is_enabled() and graphs_wanted()
    return partial(CudaGraphRecorder, where) if recorded else None


@dataclass(frozen=True, slots=True)
class Steps:
    """An epoch's training figures: mean loss in nats, share of quadrants judged right, the last learning rate."""

    loss: float
    accuracy: float
    rate: float


@dataclass(frozen=True, slots=True)
class Distillation:
    """A teacher, the training quadrants at its input size, and its type of mixed precision."""

    teacher: Teacher
    store: Store
    dtype: torch.dtype | None


@dataclass(slots=True)
class Trainer:
    """Train a model, an epoch at a time.

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
    distillation
        The teacher to distil from, if there is one.
    ema
        The moving average of the weights, if the recipe has one.
    ranks
        The processes that share each batch.
    recorder
        Records a step, which is then replayed for every batch of full size; None takes each step anew. The optimizer
        schedule and the EMA weights must be capturable.
    """

    model: QuadrantClassifier
    recipe: Recipe
    store: Store
    where: torch.device
    dtype: torch.dtype | None
    scaler: torch.amp.GradScaler
    weights: torch.Tensor
    distillation: Distillation | None = None
    ema: EmaWeights | None = None
    ranks: Ranks = ALONE
    recorder: Callable[[], Recorder] | None = None
    loader: BatchLoader = field(init=False)
    _network: nn.Module = field(init=False)
    _layers: dict[str, float] = field(init=False, default_factory=dict)
    _batch: Batch | None = field(init=False, default=None)
    _captured: CapturedStep | None = field(init=False, default=None)
    _captured_for: tuple[OptimizerSchedule, int | None] | None = field(init=False, default=None)
    _loss_sum: torch.Tensor = field(init=False)
    _correct: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._network = self.model
        if self.ranks.count > 1:
            self._batch = share_layers(self.model, self.where)
        apart = self.distillation is not None and self.distillation.store is not self.store
        teacher_store = self.distillation.store if self.distillation and apart else None
        self.loader = BatchLoader(self.recipe, self.store, self.where, self.weights, self.ranks, teacher_store)
        # Summed on the device: to ask it for a figure after each batch is to wait for it.
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.where)
        self._correct = torch.zeros((), dtype=torch.float64, device=self.where)

    def train_layers(self, layers: Mapping[str, float]) -> list[dict[str, object]]:
        """Freeze all but the named layers; returns the optimizer's parameter groups. See `set_trained`."""
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
        schedule: OptimizerSchedule,
        progress: Callable[[int, int], None],
        side: int | None = None,
    ) -> Steps:
        """Train on each batch once.

        Parameters
        ----------
        batches
            Indices into [F * 4], a batch at a time; of each, the ranks take their shares.
        generator
            Of the augmentation's draws, from `echoquad_train.training.batches.epoch_generator`; the same on every rank.
        schedule
            The phase's optimizer and its learning rates.
        progress
            Called with the number of batches done and of all.
        side
            Pixels a side that the quadrants are brought down to before they are augmented; None is as they are.
        """
        self._loss_sum.zero_()
        self._correct.zero_()
        rate = 0.0
        for done, batch in enumerate(self.loader.epoch(batches, generator, side), 1):
            rate = schedule.advance()
            if self.ema is not None:
                self.ema.advance()
            captured = self._captured_step(batch, schedule, side)
            if captured is not None:
                captured(batch)
            else:
                self._step(batch, schedule, side)
            progress(done, len(batches))
        seen = sum(len(chosen) for chosen in batches)
        total, right = self.ranks.sum(torch.stack([self._loss_sum, self._correct])).tolist()
        return Steps(total / seen, right / seen, rate)

    def _captured_step(
        self, batch: TrainingBatch, schedule: OptimizerSchedule, side: int | None
    ) -> CapturedStep | None:
        """Return the recorded step for a batch of full size, and record it where there is none; else None."""
        if self.recorder is None or batch.share.total != self.recipe.batch_size:
            return None
        if self._captured_for != (schedule, side):
            self._captured = None  # first, so that its memory is free for the next
            step = partial(self._step, schedule=schedule, side=side)
            self._captured = capture(
                step, batch, partial(self._state, schedule), partial(self._scalars, schedule), self.recorder
            )
            self._captured_for = schedule, side
            if self._captured is None:
                self.recorder = None
        return self._captured

    def _state(self, schedule: OptimizerSchedule) -> dict[str, list[torch.Tensor]]:
        """Return the tensors that a step changes."""
        return {
            "weights": [weight.detach() for weight in self.model.parameters()],
            "batch statistics": list(self.model.buffers()),
            "averaged weights": self.ema.tensors() if self.ema else [],
            "sum of the losses": [self._loss_sum],
            "count of right answers": [self._correct],
            "optimizer's state": schedule.state_tensors(),
        }

    def _scalars(self, schedule: OptimizerSchedule) -> list[torch.Tensor]:
        """Return what is set before each step."""
        share = self.ema.share if self.ema else None
        return schedule.rate_tensors() + ([] if share is None else [share])

    def _step(self, batch: TrainingBatch, schedule: OptimizerSchedule, side: int | None) -> None:
        """Take a step. Computes on the device alone, and reads no number that changes between batches of full size."""
        loss, logits = self._loss(batch, side)
        schedule.descend(loss, self.scaler)
        if self.ema is not None:
            self.ema.mix()
        self._loss_sum += loss.detach().double() * batch.share.total / self.ranks.count
        self._correct += (logits.detach().argmax(dim=1) == batch.labels).sum()

    def _loss(self, batch: TrainingBatch, side: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of a process's rows and their logits, float32 [B, C]."""
        recipe, distillation, quadrants = self.recipe, self.distillation, batch.quadrants
        size = quadrants.shape[-1]
        target = min(side or size, size) if len(quadrants) else size  # a share may be empty
        small = shrink(quadrants, target) if target < size else quadrants
        images = apply_augmentation(small, recipe, batch.draws, batch.places)
        if self._batch is not None:
            self._batch.share = batch.share
        with torch.autocast(self.where.type, self.dtype, enabled=self.dtype is not None):
            logits = self._network(images)
        logits = logits.float()
        summed = F.cross_entropy(
            logits, batch.labels, self.weights, label_smoothing=recipe.label_smoothing, reduction="sum"
        )
        loss = summed / batch.weight
        if distillation is not None:
            view = images
            if batch.teacher_quadrants is not None or target < size:
                own = quadrants if batch.teacher_quadrants is None else batch.teacher_quadrants
                view = apply_augmentation(own, recipe, batch.draws, batch.places)
            answers = distillation.teacher(view, distillation.dtype)
            rows = batch.share.total / self.ranks.count
            loss = distillation_loss(loss, logits, answers, recipe.distill_weight, recipe.distill_temperature, rows)
        return loss, logits
