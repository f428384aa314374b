"""Optimizer schedule: which layers train in which epochs, and the learning rates (plateau, one-cycle)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from echoquad_runtime.errors import RunError
from echoquad_train.networks.backbones import backbone_parts
from echoquad_train.recipe import Recipe

__all__ = ["MOMENTUM", "OptimizerSchedule", "Phase", "one_cycle", "phase_of", "progressive_epochs", "training_size"]

MOMENTUM: Final = 0.9
"""Of the optimizer ``momentum``: classical momentum, not Nesterov's."""

_MIN_TRAINING_SIZE: Final = 64
"""Smallest side in pixels of progressive resizing: less saves little time and shows little of a heart."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Consecutive epochs that train the same layers: the first and the last, and the learning rate of each layer."""

    name: str
    first: int
    last: int
    layers: Mapping[str, float]


def phase_of(recipe: Recipe, epoch: int) -> Phase:
    """Return the phase of an epoch, counted from 1: head warm-up, then the trained layers, then layer3 as well."""
    warmup = min(recipe.warmup_epochs, recipe.epochs)
    if epoch <= warmup:
        return Phase("head", 1, warmup, {"head": recipe.warmup_lr})
    layers = {
        "head": {"head": recipe.lr},
        "layer4": {"head": recipe.lr, "layer4": recipe.lr},
        "all": {"all": recipe.lr},
    }
    third = max(recipe.layer3_epoch, warmup + 1) if recipe.layer3_epoch and recipe.trained_layers == "layer4" else 0
    if third and epoch >= third:
        return Phase("layer3", third, recipe.epochs, {**layers["layer4"], "layer3": recipe.layer3_lr})
    last = third - 1 if third else recipe.epochs
    return Phase(recipe.trained_layers, warmup + 1, last, layers[recipe.trained_layers])


def training_size(recipe: Recipe, epoch: int) -> int:
    """Return the side in pixels of the training quadrants in an epoch, counted from 1: progressive resizing.

    A convolutional network learns most from smaller images, at a third of the cost; the last epochs use the full input
    size. M. Tan, Q. V. Le, "EfficientNetV2", arXiv:2104.00298, section 4. Vision transformers accept one input size.
    """
    size = recipe.input_size
    if backbone_parts(recipe.backbone).patch_size or epoch > int(recipe.progressive_fraction * recipe.epochs):
        return size
    return min(size, max(round(recipe.progressive_scale * size), _MIN_TRAINING_SIZE))


def progressive_epochs(recipe: Recipe) -> int:
    """Return the number of epochs, the first ones, that train below the input size; validation always uses it."""
    return sum(training_size(recipe, epoch) < recipe.input_size for epoch in range(1, recipe.epochs + 1))


def one_cycle(step: int, steps: int) -> float:
    """Return the learning rate at a `step` of `steps`, counted from 0, as a fraction of the peak.

    A cosine from 1/25 up over the first 30 %, then a cosine down to 1/250000: the defaults of torch's OneCycleLR, with
    constant momentum. L. N. Smith, N. Topin, "Super-Convergence", arXiv:1708.07120.
    """
    start, end, peak = 1 / 25, 1 / 250_000, 0.3 * steps - 1

    def anneal(a: float, b: float, progress: float) -> float:
        return b + (a - b) / 2 * (1 + math.cos(math.pi * progress))

    if step <= peak:
        return anneal(start, 1.0, step / peak)
    return anneal(1.0, end, (step - peak) / (steps - 1 - peak))


def _optimizer(recipe: Recipe, parameters: list[dict[str, Any]], capturable: bool) -> torch.optim.Optimizer:
    """Build the recipe's optimizer, with torch's defaults for all other options."""
    optim = torch.optim
    # A fused step over resnet18 takes a third of the time: a tenth of an epoch with small batches.
    common: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    match recipe.optimizer:
        case "adamw":
            return optim.AdamW(parameters, fused=True, capturable=capturable, **common)
        case "adam":
            return optim.Adam(parameters, fused=True, capturable=capturable, **common)
        case "rmsprop":  # torch has no fused implementation
            return optim.RMSprop(parameters, capturable=capturable, **common)
        case "momentum":
            return optim.SGD(parameters, momentum=MOMENTUM, fused=True, **common)
        case "sgd":
            return optim.SGD(parameters, fused=True, **common)


class OptimizerSchedule:
    """The optimizer of a phase and its learning rate schedule.

    Parameters
    ----------
    groups
        Parameter groups with their learning rates, from `echoquad_train.networks.classifier.set_trainable`.
    recipe, phase
        The optimizer and the schedule, and the epochs.
    steps_per_epoch
        Batches in an epoch.
    capturable
        Keep the learning rates and the optimizer's state in tensors on the device, so that a captured step reads their
        current values.
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        recipe: Recipe,
        phase: Phase,
        steps_per_epoch: int,
        *,
        capturable: bool = False,
    ) -> None:
        parameters = [dict(group) for group in groups]
        self._peaks = [float(group["lr"]) for group in parameters]
        if capturable:
            for group in parameters:
                group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
        self._optimizer = _optimizer(recipe, parameters, capturable)
        self._rates = list(self._peaks)
        self._one_cycle = recipe.schedule == "onecycle"
        self._steps = steps_per_epoch * (phase.last - phase.first + 1)
        self._step = 0
        self._plateau = (
            torch.optim.lr_scheduler.ReduceLROnPlateau(
                self._optimizer, "max", factor=recipe.plateau_factor, patience=recipe.plateau_patience
            )
            if recipe.schedule == "plateau"
            else None
        )

    def advance(self) -> float:
        """Set the learning rates of the next step and return the highest."""
        if self._one_cycle:
            fraction = one_cycle(self._step, self._steps)
            self._set_rates([peak * fraction for peak in self._peaks])
        self._step += 1
        return max(self._rates)

    def apply_gradient(self, loss: Tensor, scaler: torch.amp.GradScaler) -> None:
        """Compute the gradient of `loss` and update the weights. Only float16 synchronises with the host."""
        self._optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(self._optimizer)
        scaler.update()

    def step(self, loss: Tensor, scaler: torch.amp.GradScaler) -> float:
        """Call `advance` and `apply_gradient`; return the highest learning rate of the step."""
        rate = self.advance()
        self.apply_gradient(loss, scaler)
        return rate

    def rate_tensors(self) -> list[Tensor]:
        """Return the tensors of the learning rates, which a captured step reads.

        Raises
        ------
        TypeError
            If the learning rates are numbers, which are constants in a captured step.
        """
        rates = [group["lr"] for group in self._optimizer.param_groups]
        if not all(isinstance(rate, Tensor) for rate in rates):
            raise TypeError(
                "the learning rates are numbers; expected tensors, from OptimizerSchedule(..., capturable=True)"
            )
        return rates

    def state_tensors(self) -> list[Tensor]:
        """Return the tensors of the optimizer's state, which a step changes; empty before the first step."""
        states = self._optimizer.state.values()
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]

    def _set_rates(self, rates: list[float]) -> None:
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._rates = rates

    def end_epoch(self, accuracy: float) -> None:
        """Update the learning rates of the plateau schedule by the validation frame accuracy."""
        if self._plateau is not None:
            self._plateau.step(accuracy)
            self._rates = [float(group["lr"]) for group in self._optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run, as tensors and plain values; it does not depend on `capturable`."""
        plateau = None
        if self._plateau is not None:
            plateau = {**self._plateau.state_dict()}
            plateau["_last_lr"] = [float(rate) for rate in plateau["_last_lr"]]
        optimizer = self._optimizer.state_dict()
        groups = [{**group, "lr": float(group["lr"])} for group in optimizer["param_groups"]]
        return {"optimizer": {**optimizer, "param_groups": groups}, "step": self._step, "plateau": plateau}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state that `state_dict` returned.

        Raises
        ------
        RunError
            If the state is that of an earlier release, whose ``sgd`` is ``momentum`` now.
        """
        saved_momentum, momentum = (
            groups[0].get("momentum") for groups in (state["optimizer"]["param_groups"], self._optimizer.param_groups)
        )
        if saved_momentum != momentum:
            raise RunError(
                f"the run began with an optimizer whose momentum is {saved_momentum}; this release uses {momentum}; "
                "train into another folder, with --set optimizer=momentum for the former sgd"
            )
        # Options of the device, not of the run: a run may continue on another device.
        own = [
            {name: group[name] for name in ("lr", "capturable", "foreach", "fused") if name in group}
            for group in self._optimizer.param_groups
        ]
        saved = state["optimizer"]["param_groups"]
        groups = [{**group, **kept} for group, kept in zip(saved, own, strict=True)]
        self._optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        self._set_rates([float(group["lr"]) for group in saved])
        self._step = state["step"]
        if self._plateau is not None:
            self._plateau.load_state_dict(state["plateau"])
