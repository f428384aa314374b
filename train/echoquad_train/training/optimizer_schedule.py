"""Schedules: which layers train when, and at what rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from echoquad_runtime.errors import RunError
from echoquad_train.networks.backbones import BACKBONES
from echoquad_train.recipe import Recipe

__all__ = ["MOMENTUM", "OptimizerSchedule", "Phase", "one_cycle", "phase_of", "progressive_epochs", "side_of"]

MOMENTUM: Final = 0.9
"""Of optimizer ``momentum``: the heavy ball, not Nesterov's."""

_SMALLEST: Final = 64
"""Pixels a side below which no quadrant is made smaller: less saves little time and leaves little of a heart.

No backbone asks for more."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Epochs that train the same layers: first and last, and a learning rate by layer."""

    name: str
    first: int
    last: int
    layers: Mapping[str, float]


def phase_of(recipe: Recipe, epoch: int) -> Phase:
    """Find an epoch's phase, epochs counted from 1: head warm-up, then the trained layers, then layer3 as well."""
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


def side_of(recipe: Recipe, epoch: int) -> int:
    """Give the side in pixels that an epoch, counted from 1, is trained at: progressive resizing.

    A convolutional network learns most of what it needs from smaller pictures, at a third of the cost; its last
    epochs then see the size that it will judge. M. Tan, Q. V. Le, "EfficientNetV2", arXiv:2104.00298, section 4. A
    network with an embedding for each place has one size alone.
    """
    size = recipe.input_size
    if BACKBONES[recipe.backbone].patch or epoch > int(recipe.progressive_fraction * recipe.epochs):
        return size
    return min(size, max(round(recipe.progressive_scale * size), _SMALLEST))


def progressive_epochs(recipe: Recipe) -> int:
    """Give how many epochs, the first, are trained below the input size; validated they are at it."""
    return sum(side_of(recipe, epoch) < recipe.input_size for epoch in range(1, recipe.epochs + 1))


def one_cycle(step: int, steps: int) -> float:
    """Give the share of the peak learning rate at a `step`, counted from 0, of `steps`.

    A cosine up over the first 30 % from 1/25, then a cosine down to 1/250000: torch's OneCycleLR with its defaults, but
    that the momentum stays as it is. L. N. Smith, N. Topin, "Super-Convergence", arXiv:1708.07120.
    """
    start, end, peak = 1 / 25, 1 / 250_000, 0.3 * steps - 1

    def between(a: float, b: float, share: float) -> float:
        return b + (a - b) / 2 * (1 + math.cos(math.pi * share))

    if step <= peak:
        return between(start, 1.0, step / peak)
    return between(1.0, end, (step - peak) / (steps - 1 - peak))


def _optimizer(recipe: Recipe, parameters: list[dict[str, Any]], capturable: bool) -> torch.optim.Optimizer:
    """Build the recipe's optimizer; what is not said here is torch's default."""
    optim = torch.optim
    # Fused, a step over resnet18 takes a third of the time: with small batches that is a tenth of an epoch.
    common: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    match recipe.optimizer:
        case "adamw":
            return optim.AdamW(parameters, fused=True, capturable=capturable, **common)
        case "adam":
            return optim.Adam(parameters, fused=True, capturable=capturable, **common)
        case "rmsprop":  # which torch has not fused
            return optim.RMSprop(parameters, capturable=capturable, **common)
        case "momentum":
            return optim.SGD(parameters, momentum=MOMENTUM, fused=True, **common)
        case "sgd":
            return optim.SGD(parameters, fused=True, **common)


class OptimizerSchedule:
    """A phase's optimizer and its learning rate.

    Parameters
    ----------
    groups
        Parameter groups with their rates, as `echoquad_train.networks.classifier.set_trained` gives them.
    recipe, phase
        What to do, and for which epochs.
    steps_per_epoch
        Batches in an epoch.
    capturable
        Keep the learning rates, and all of the optimizer's state, in tensors on the device, so that a recorded step
        reads their current values.
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
        """Set the learning rates of the next step; returns the highest."""
        if self._one_cycle:
            share = one_cycle(self._step, self._steps)
            self._set_rates([peak * share for peak in self._peaks])
        self._step += 1
        return max(self._rates)

    def descend(self, loss: Tensor, scaler: torch.amp.GradScaler) -> None:
        """Take the step down the gradient of `loss`. Without float16 it computes on the device alone."""
        self._optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(self._optimizer)
        scaler.update()

    def step(self, loss: Tensor, scaler: torch.amp.GradScaler) -> float:
        """Advance and descend; returns the highest learning rate of the step."""
        rate = self.advance()
        self.descend(loss, scaler)
        return rate

    def rate_tensors(self) -> list[Tensor]:
        """Return the learning rates' tensors, which a recorded step reads.

        Raises
        ------
        TypeError
            If the learning rates are numbers, which a recorded step would keep.
        """
        rates = [group["lr"] for group in self._optimizer.param_groups]
        if not all(isinstance(rate, Tensor) for rate in rates):
            raise TypeError(
                "the learning rates are numbers; expected tensors, from OptimizerSchedule(..., capturable=True)"
            )
        return rates

    def state_tensors(self) -> list[Tensor]:
        """Return the tensors of the optimizer's state, which a step changes; none before the first."""
        states = self._optimizer.state.values()
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]

    def _set_rates(self, rates: list[float]) -> None:
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._rates = rates

    def epoch_ended(self, accuracy: float) -> None:
        """Update the rates by the validation frame accuracy, for the plateau schedule."""
        if self._plateau is not None:
            self._plateau.step(accuracy)
            self._rates = [float(group["lr"]) for group in self._optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors and plain values, the same whether or not it is capturable."""
        plateau = None
        if self._plateau is not None:
            plateau = {**self._plateau.state_dict()}
            plateau["_last_lr"] = [float(rate) for rate in plateau["_last_lr"]]
        optimizer = self._optimizer.state_dict()
        groups = [{**group, "lr": float(group["lr"])} for group in optimizer["param_groups"]]
        return {"optimizer": {**optimizer, "param_groups": groups}, "step": self._step, "plateau": plateau}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises
        ------
        RunError
            If it is of a release whose ``sgd`` had the momentum that ``momentum`` has now.
        """
        before, now = (
            groups[0].get("momentum") for groups in (state["optimizer"]["param_groups"], self._optimizer.param_groups)
        )
        if before != now:
            raise RunError(
                f"the run was begun with an optimizer whose momentum is {before}; this release's has {now}; "
                "do: train into another folder, with --set optimizer=momentum for what sgd was before"
            )
        # How this device computes a step is not the run's: a run may continue on another device.
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
