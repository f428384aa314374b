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

__all__ = ["MOMENTUM", "Course", "Phase", "one_cycle", "phase_of", "side_of", "small_epochs"]

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
    if BACKBONES[recipe.backbone].patch or epoch > int(recipe.small_share * recipe.epochs):
        return size
    return min(size, max(round(recipe.small_scale * size), _SMALLEST))


def small_epochs(recipe: Recipe) -> int:
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


def _optimizer(recipe: Recipe, parameters: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Make the recipe's optimizer; what is not said here is torch's default."""
    optim = torch.optim
    # Fused, a step over resnet18 takes a third of the time: with small batches that is a tenth of an epoch.
    common: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    match recipe.optimizer:
        case "adamw":
            return optim.AdamW(parameters, fused=True, **common)
        case "adam":
            return optim.Adam(parameters, fused=True, **common)
        case "rmsprop":  # which torch has not fused
            return optim.RMSprop(parameters, **common)
        case "momentum":
            return optim.SGD(parameters, momentum=MOMENTUM, fused=True, **common)
        case "sgd":
            return optim.SGD(parameters, fused=True, **common)


class Course:
    """A phase's optimizer and its learning rate.

    Parameters
    ----------
    groups
        Parameter groups with their rates, as `echoquad_train.networks.model.set_trained` gives them.
    recipe, phase
        What to do, and for which epochs.
    steps_per_epoch
        Batches in an epoch.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]], recipe: Recipe, phase: Phase, steps_per_epoch: int) -> None:
        parameters = [dict(group) for group in groups]
        self._optimizer = _optimizer(recipe, parameters)
        self._peaks = [group["lr"] for group in self._optimizer.param_groups]
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

    def step(self, loss: Tensor, scaler: torch.amp.GradScaler) -> float:
        """Take one step down the gradient of `loss`; gives the highest learning rate it was taken with."""
        if self._one_cycle:
            share = one_cycle(self._step, self._steps)
            for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
                group["lr"] = peak * share
        self._optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(self._optimizer)
        scaler.update()
        self._step += 1
        return max(float(group["lr"]) for group in self._optimizer.param_groups)

    def epoch_ended(self, accuracy: float) -> None:
        """Hear the validation frame accuracy that a plateau is judged by."""
        if self._plateau is not None:
            self._plateau.step(accuracy)

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed run needs: tensors and plain values."""
        plateau = None if self._plateau is None else self._plateau.state_dict()
        return {"optimizer": self._optimizer.state_dict(), "step": self._step, "plateau": plateau}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

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
        self._optimizer.load_state_dict(state["optimizer"])
        self._step = state["step"]
        if self._plateau is not None:
            self._plateau.load_state_dict(state["plateau"])
