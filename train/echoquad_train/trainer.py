"""The trainer: an epoch's batches through augmentation, network, loss and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from echoquad_train.augment import augment
from echoquad_train.averaging import Average
from echoquad_train.dataset import QuadrantStore
from echoquad_train.distill import Teacher, distillation_loss
from echoquad_train.model import QuadrantClassifier
from echoquad_train.recipe import Recipe
from echoquad_train.sampling import take
from echoquad_train.schedule import Course

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
    store: QuadrantStore
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
        Of the classes in the loss, float32 [C]; None is all alike.
    teaching
        Whom to distil from, if anybody.
    average
        What follows the weights, if anything.
    """

    model: QuadrantClassifier
    recipe: Recipe
    store: QuadrantStore
    where: torch.device
    dtype: torch.dtype | None
    scaler: torch.amp.GradScaler
    weights: torch.Tensor | None
    teaching: Teaching | None = None
    average: Average | None = None

    def epoch(
        self,
        batches: Sequence[npt.NDArray[np.int64]],
        generator: torch.Generator,
        course: Course,
        progress: Callable[[int, int], None],
    ) -> Steps:
        """Go through the batches once.

        Parameters
        ----------
        batches
            Indices into [F * 4], a batch at a time.
        generator
            Of the augmentation's draws.
        course
            The phase's optimizer and learning rate.
        progress
            Called with the number of batches done and of all.
        """
        # Summed on the device: to ask it for a figure after each batch is to wait for it.
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.where)
        correct = torch.zeros((), dtype=torch.int64, device=self.where)
        seen, rate = 0, 0.0
        for done, chosen in enumerate(batches, 1):
            quadrants, labels = take(self.store, chosen, self.where)
            loss, logits = self._loss(quadrants, labels, chosen, generator)
            rate = course.step(loss, self.scaler)
            if self.average is not None:
                self.average.follow(self.model)
            loss_sum += loss.detach().double() * len(labels)
            correct += (logits.detach().argmax(dim=1) == labels).sum()
            seen += len(labels)
            progress(done, len(batches))
        return Steps(float(loss_sum) / seen, int(correct) / seen, rate)

    def _loss(
        self, quadrants: torch.Tensor, labels: torch.Tensor, chosen: npt.NDArray[np.int64], generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give a batch's loss and its logits, float32 [B, C]."""
        recipe, teaching = self.recipe, self.teaching
        twin = generator.clone_state()  # draws what `generator` will: the same view at another size
        images = augment(quadrants, recipe, generator)
        with torch.autocast(self.where.type, self.dtype, enabled=self.dtype is not None):
            logits = self.model(images)
        logits = logits.float()
        loss = F.cross_entropy(logits, labels, self.weights, label_smoothing=recipe.label_smoothing)
        if teaching is not None:
            same = teaching.store is self.store
            view = images if same else augment(take(teaching.store, chosen, self.where)[0], recipe, twin)
            answers = teaching.master(view, teaching.dtype)
            loss = distillation_loss(loss, logits, answers, recipe.distill_weight, recipe.distill_temperature)
        return loss, logits
