"""Trainer: the training step (augmentation, network, loss, optimizer) and its loop over the batches of an epoch."""

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
from echoquad_train.networks.classifier import QuadrantClassifier, set_trainable
from echoquad_train.parallel.gradient_sharing import BatchShare, share_layers
from echoquad_train.parallel.ranks import ALONE, Ranks
from echoquad_train.recipe import Recipe
from echoquad_train.training.augmentation import apply_augmentation, resize
from echoquad_train.training.batches import BatchLoader, TrainingBatch
from echoquad_train.training.captured_step import (
    CapturedStep,
    CudaGraphRecorder,
    capture,
    cuda_graphs_enabled,
)
from echoquad_train.training.distillation import Teacher, distillation_loss
from echoquad_train.training.ema_weights import EmaWeights
from echoquad_train.training.mixup import blend_losses
from echoquad_train.training.optimizer_schedule import OptimizerSchedule

__all__ = ["Distillation", "TrainMetrics", "Trainer", "step_recorder"]


def step_recorder(
    device: torch.device, ranks: Ranks, scaler: torch.amp.GradScaler
) -> Callable[[], CudaGraphRecorder] | None:
    """Return the factory of recorders that capture training steps on a device; None if steps run eagerly.

    Only CUDA has graphs. Steps of several processes are not captured, because they exchange gradients and batch
    statistics, nor steps in float16, because the gradient scaler decides on the host whether to skip one.
    """
    captured = device.type == "cuda" and ranks.world_size == 1 and not scaler.is_enabled() and cuda_graphs_enabled()
    return partial(CudaGraphRecorder, device) if captured else None


@dataclass(frozen=True, slots=True)
class TrainMetrics:
    """An epoch's training metrics: mean loss in nats, quadrant accuracy, the last learning rate."""

    loss: float
    quadrant_accuracy: float
    learning_rate: float


@dataclass(frozen=True, slots=True)
class Distillation:
    """A teacher, the training quadrants at its input size, and its dtype of mixed precision."""

    teacher: Teacher
    store: Store
    dtype: torch.dtype | None


@dataclass(slots=True)
class Trainer:
    """Trains a model, one epoch at a time.

    Attributes
    ----------
    model
        The model, on the device.
    recipe
        How to train it.
    store
        The training quadrants.
    device
        The training device.
    dtype
        Of mixed precision; None is float32.
    scaler
        Gradient scaler of float16.
    weights
        Class weights of the loss, float32 [C].
    distillation
        The teacher to distil from, if any.
    ema
        The exponential moving average of the weights, if any.
    ranks
        The processes that share each batch.
    recorder
        Captures a step, which is then replayed for every batch of full size; None runs every step eagerly. The
        optimizer schedule and the EMA weights must be capturable.
    """

    model: QuadrantClassifier
    recipe: Recipe
    store: Store
    device: torch.device
    dtype: torch.dtype | None
    scaler: torch.amp.GradScaler
    weights: torch.Tensor
    distillation: Distillation | None = None
    ema: EmaWeights | None = None
    ranks: Ranks = ALONE
    recorder: Callable[[], CudaGraphRecorder] | None = None
    loader: BatchLoader = field(init=False)
    _network: nn.Module = field(init=False)
    _layers: dict[str, float] = field(init=False, default_factory=dict)
    _batch_share: BatchShare | None = field(init=False, default=None)
    _captured: CapturedStep | None = field(init=False, default=None)
    _captured_for: tuple[OptimizerSchedule, int | None] | None = field(init=False, default=None)
    _loss_sum: torch.Tensor = field(init=False)
    _correct: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._network = self.model
        if self.ranks.world_size > 1:
            self._batch_share = share_layers(self.model, self.device)
        own_store = self.distillation is not None and self.distillation.store is not self.store
        teacher_store = self.distillation.store if self.distillation and own_store else None
        self.loader = BatchLoader(self.recipe, self.store, self.device, self.weights, self.ranks, teacher_store)
        # Summed on the device: reading a value after each batch would synchronise.
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._correct = torch.zeros((), dtype=torch.float64, device=self.device)

    def train_layers(self, layers: Mapping[str, float]) -> list[dict[str, object]]:
        """Freeze all but the named layers and return the optimizer's parameter groups; see `set_trainable`."""
        groups = set_trainable(self.model, layers)
        if self.ranks.world_size > 1 and layers != self._layers:
            # DistributedDataParallel registers hooks on the trainable weights once. Free the old hooks first.
            self._network = self.model
            gc.collect()
            # Buffers need no synchronisation: batch statistics are equal on every rank.
            self._network = DistributedDataParallel(self.model, forward_sync_buffers=False)
        self._layers = dict(layers)
        return groups

    def epoch(
        self,
        batches: Sequence[npt.NDArray[np.int64]],
        generator: torch.Generator,
        schedule: OptimizerSchedule,
        progress: Callable[[int, int], None],
        size: int | None = None,
    ) -> TrainMetrics:
        """Train on each batch once.

        Parameters
        ----------
        batches
            Indices into [F * 4], one array for each batch. Each rank takes its share.
        generator
            Of the augmentation, from `echoquad_train.training.batches.epoch_generator`; the same on every rank.
        schedule
            The optimizer and learning rates of the phase.
        progress
            Called with the number of finished batches and of all batches.
        size
            Side in pixels that the quadrants are resized to before they are augmented; None keeps their size.
        """
        self._loss_sum.zero_()
        self._correct.zero_()
        rate = 0.0
        for done, batch in enumerate(self.loader.epoch(batches, generator, size), 1):
            rate = schedule.advance()
            if self.ema is not None:
                self.ema.advance()
            captured = self._captured_step(batch, schedule, size)
            if captured is not None:
                captured(batch)
            else:
                self._step(batch, schedule, size)
            progress(done, len(batches))
        count = sum(len(chosen) for chosen in batches)
        total, correct = self.ranks.sum(torch.stack([self._loss_sum, self._correct])).tolist()
        return TrainMetrics(total / count, correct / count, rate)

    def _captured_step(
        self, batch: TrainingBatch, schedule: OptimizerSchedule, size: int | None
    ) -> CapturedStep | None:
        """Return the captured step for a batch of full size, capturing it if necessary; None to run eagerly."""
        if self.recorder is None or batch.share.total != self.recipe.batch_size:
            return None
        if self._captured_for != (schedule, size):
            self._captured = None  # free its memory before the next capture
            step = partial(self._step, schedule=schedule, size=size)
            self._captured = capture(
                step, batch, partial(self._state, schedule), partial(self._scalars, schedule), self.recorder
            )
            self._captured_for = schedule, size
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
            "count of correct quadrants": [self._correct],
            "optimizer's state": schedule.state_tensors(),
        }

    def _scalars(self, schedule: OptimizerSchedule) -> list[torch.Tensor]:
        """Return the tensors that are set before each step."""
        factor = self.ema.factor if self.ema else None
        return schedule.rate_tensors() + ([] if factor is None else [factor])

    def _step(self, batch: TrainingBatch, schedule: OptimizerSchedule, size: int | None) -> None:
        """Train on a batch, without synchronising with the host or using Python numbers that change between batches."""
        loss, logits = self._loss(batch, size)
        schedule.apply_gradient(loss, self.scaler)
        if self.ema is not None:
            self.ema.update()
        self._loss_sum += loss.detach().double() * batch.share.total / self.ranks.world_size
        self._correct += (logits.detach().argmax(dim=1) == batch.labels).sum()

    def _loss(self, batch: TrainingBatch, size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of this rank's rows and their logits, float32 [B, C]."""
        recipe, distillation, quadrants = self.recipe, self.distillation, batch.quadrants
        full_size = quadrants.shape[-1]
        smaller = size is not None and size < full_size and len(quadrants) > 0  # a share may be empty
        resized = resize(quadrants, size) if size is not None and smaller else quadrants
        images = apply_augmentation(resized, recipe, batch.draws, batch.positions)
        if self._batch_share is not None:
            self._batch_share.share = batch.share
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self._network(images)
        logits = logits.float()
        losses = partial(
            F.cross_entropy, logits, weight=self.weights, label_smoothing=recipe.label_smoothing, reduction="none"
        )
        loss = blend_losses(losses, batch.labels, batch.draws) / batch.weight
        if distillation is not None:
            view = images
            if batch.teacher_quadrants is not None or smaller:
                own = quadrants if batch.teacher_quadrants is None else batch.teacher_quadrants
                view = apply_augmentation(own, recipe, batch.draws, batch.positions)
            teacher_logits = distillation.teacher(view, distillation.dtype)
            rows = batch.share.total / self.ranks.world_size
            loss = distillation_loss(
                loss, logits, teacher_logits, recipe.distill_weight, recipe.distill_temperature, rows
            )
        return loss, logits
