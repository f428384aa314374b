"""Optimizer schedule: one-cycle, plateau, phases, optimizers, state, early stopping, progressive resizing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import RunError
from echoquad_train.networks.backbones import BACKBONES
from echoquad_train.networks.classifier import QuadrantClassifier, set_trainable
from echoquad_train.recipe import Recipe
from echoquad_train.runs.history import Epoch, model_epoch, should_stop_early
from echoquad_train.training.optimizer_schedule import (
    _MIN_TRAINING_SIZE,
    OptimizerSchedule,
    Phase,
    one_cycle,
    phase_of,
    progressive_epochs,
    training_size,
)

TRANSFER = Recipe.load("transfer")
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


# One cycle


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 33, 200])
def test_one_cycle_equals_torch(steps: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=steps, cycle_momentum=False)
    for step in range(steps):
        assert one_cycle(step, steps) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if step < steps - 1:
            theirs.step()


def test_one_cycle_start_peak_and_end() -> None:
    shares = [one_cycle(step, 1000) for step in range(1000)]
    assert shares[0] == pytest.approx(1 / 25) and shares[-1] == pytest.approx(1 / 250_000)
    assert max(shares) == pytest.approx(1) and shares.index(max(shares)) == 299
    assert shares[:300] == sorted(shares[:300]) and shares[299:] == sorted(shares[299:], reverse=True)


def optimizer_schedule(
    recipe: Recipe, phase: Phase, steps_per_epoch: int = 1
) -> tuple[OptimizerSchedule, list[nn.Parameter]]:
    parameters = [nn.Parameter(torch.ones(2)) for _ in phase.layers]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, phase.layers.values(), strict=True)]
    return OptimizerSchedule(groups, recipe, phase, steps_per_epoch), parameters


def test_one_cycle_spans_phase_and_scales_rate_of_each_layer() -> None:
    recipe = Recipe(schedule="onecycle", epochs=4, warmup_epochs=1, layer3_epoch=3, lr=1e-2, layer3_lr=1e-3)
    phase = phase_of(recipe, 3)
    under_test, parameters = optimizer_schedule(recipe, phase, steps_per_epoch=5)
    rates = []
    for _ in range(10):  # epochs 3 and 4
        rates.append(under_test.step(sum((p * p).sum() for p in parameters), NO_SCALER))
        groups = under_test.state_dict()["optimizer"]["param_groups"]
        assert groups[0]["lr"] == groups[1]["lr"] == pytest.approx(10 * groups[2]["lr"])
    assert rates == pytest.approx([1e-2 * one_cycle(step, 10) for step in range(10)])


# Phases


def test_phases_of_reference_pipeline() -> None:
    phases = {epoch: phase_of(TRANSFER, epoch) for epoch in range(1, 21)}
    assert {phases[epoch].name for epoch in (1, 2, 3)} == {"head"}
    assert dict(phases[3].layers) == {"head": 3e-4} and (phases[3].first, phases[3].last) == (1, 3)
    assert {phases[epoch].name for epoch in range(4, 21)} == {"layer4"}
    assert dict(phases[4].layers) == {"head": 1e-4, "layer4": 1e-4} and (phases[4].first, phases[4].last) == (4, 20)


@pytest.mark.parametrize(("asked", "first"), [(8, 8), (4, 4), (2, 4), (20, 20)])
def test_layer3_joins_later_at_its_own_rate(asked: int, first: int) -> None:
    recipe = replace(TRANSFER, layer3_epoch=asked)
    phase = phase_of(recipe, first)
    assert dict(phase.layers) == {"head": 1e-4, "layer4": 1e-4, "layer3": 5e-5}
    assert (phase.name, phase.first, phase.last) == ("layer3", first, 20)
    before = phase_of(recipe, first - 1)
    assert before.name in ("layer4", "head") and before.last == first - 1


@pytest.mark.parametrize("layers", ["head", "layer4", "all"])
@pytest.mark.parametrize("warmup", [0, 2, 5, 9])
@pytest.mark.parametrize("third", [0, 1, 4])
def test_phases_cover_every_epoch_once(layers: str, warmup: int, third: int) -> None:
    recipe = Recipe(epochs=5, warmup_epochs=warmup, trained_layers=layers, layer3_epoch=third)  # type: ignore[arg-type]
    for epoch in range(1, 6):
        phase = phase_of(recipe, epoch)
        assert phase.first <= epoch <= phase.last <= 5
        assert all(phase_of(recipe, other) == phase for other in range(phase.first, phase.last + 1))


@pytest.fixture
def model(thin: None) -> QuadrantClassifier:
    torch.manual_seed(0)
    return QuadrantClassifier("resnet18", Contract(("a", "b"), input_size=32), dropout=0.5)


@pytest.mark.parametrize(
    ("layers", "moving"),
    [
        ({"head": 0.1}, ("head.",)),
        ({"head": 0.1, "layer4": 0.1}, ("head.", "backbone.layer4.")),
        ({"head": 0.1, "layer4": 0.1, "layer3": 0.01}, ("head.", "backbone.layer4.", "backbone.layer3.")),
        ({"all": 0.1}, ("head.", "backbone.")),
    ],
)
def test_frozen_layers_do_not_change(
    model: QuadrantClassifier, layers: dict[str, float], moving: tuple[str, ...]
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    phase = Phase("x", 1, 1, layers)
    under_test = OptimizerSchedule(set_trainable(model, layers), Recipe(optimizer="sgd"), phase, 1)
    for seed in range(2):
        batch = torch.randint(0, 256, (8, 1, 32, 32), generator=torch.Generator().manual_seed(seed))
        under_test.step(model(batch).square().sum(), NO_SCALER)
    for name, value in model.state_dict().items():  # including running means and variances and their counts
        assert torch.equal(value, before[name]) != name.startswith(moving), name


def test_layers_train_at_their_own_rates(model: QuadrantClassifier) -> None:
    groups = set_trainable(model, {"head": 0.3, "layer4": 0.2, "layer3": 0.1})
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}  # type: ignore[attr-defined]
    for name, parameter in model.named_parameters():
        wanted = {"head": 0.3, "backbone.layer4": 0.2, "backbone.layer3": 0.1}
        expected = next((rate for prefix, rate in wanted.items() if name.startswith(prefix)), None)
        assert rates.get(id(parameter)) == expected and parameter.requires_grad == (expected is not None)


def test_frozen_backbone_is_in_evaluation_mode_until_trained(model: QuadrantClassifier) -> None:
    set_trainable(model, {"head": 0.1})
    assert model.head.training and not any(module.training for module in model.backbone.modules())
    set_trainable(model, {"all": 0.1})
    assert all(module.training for module in model.modules())


# Optimizer schedules


def test_plateau_halves_rates() -> None:
    recipe = replace(TRANSFER, epochs=9)
    under_test, (head, body) = optimizer_schedule(recipe, phase_of(recipe, 4))

    def rate() -> float:
        return under_test.step((head * head).sum() + (body * body).sum(), NO_SCALER)

    rates = []
    for accuracy in (0.6, 0.7, 0.7, 0.69, 0.7, 0.7, 0.7, 0.7, 0.9):
        rates.append(rate())
        under_test.end_epoch(accuracy)
    # Patience 2: the third epoch without improvement halves the rate.
    assert rates == pytest.approx([1e-4] * 5 + [5e-5] * 3 + [2.5e-5])


def test_constant_schedule_keeps_rate() -> None:
    recipe = replace(TRANSFER, schedule="constant")
    under_test, (head, body) = optimizer_schedule(recipe, phase_of(recipe, 4))
    for _ in range(6):
        under_test.end_epoch(0.5)
        assert under_test.step((head * body).sum(), NO_SCALER) == 1e-4


OPTIMIZERS = ["adamw", "adam", "rmsprop", "momentum", "sgd"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", ["plateau", "onecycle", "constant"])
def test_optimizer_schedule_resumes_from_state(optimizer: Any, schedule: Any) -> None:
    recipe = replace(TRANSFER, optimizer=optimizer, schedule=schedule, plateau_patience=0)
    phase = phase_of(recipe, 4)
    whole, kept = optimizer_schedule(recipe, phase, 3)
    broken, lost = optimizer_schedule(recipe, phase, 3)

    def go(under_test: OptimizerSchedule, parameters: list[nn.Parameter]) -> None:
        for _ in range(3):
            under_test.step(sum((p**3).sum() for p in parameters), NO_SCALER)
        under_test.end_epoch(0.5)

    for _ in range(4):
        go(whole, kept)
        go(broken, lost)
        state = broken.state_dict()
        fresh, parameters = optimizer_schedule(recipe, phase, 3)
        with torch.no_grad():
            for new, old in zip(parameters, lost, strict=True):
                new.copy_(old)
        fresh.load_state_dict(state)
        broken, lost = fresh, parameters
        assert all(torch.equal(a, b) for a, b in zip(kept, lost, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_equals_its_formula(optimizer: Any) -> None:
    """Two steps with the gradients 2 and 1 from the weight 1, by the textbook formulas."""
    recipe = Recipe(optimizer=optimizer, schedule="constant", lr=0.1, weight_decay=0.5, warmup_epochs=0)
    weight = nn.Parameter(torch.ones(1))
    under_test = OptimizerSchedule([{"params": [weight], "lr": 0.1}], recipe, phase_of(recipe, 1), 1)
    w, velocity, mean, square = 1.0, 0.0, 0.0, 0.0
    for step, slope in enumerate((2.0, 1.0), 1):
        under_test.step((slope * weight).sum(), NO_SCALER)
        gradient = slope if optimizer == "adamw" else slope + 0.5 * w
        velocity = 0.9 * velocity + gradient
        mean = 0.9 * mean + 0.1 * gradient
        if optimizer == "rmsprop":
            square = 0.99 * square + 0.01 * gradient**2
        else:
            square = 0.999 * square + 0.001 * gradient**2
        adam = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)) ** 0.5 + 1e-8)
        w -= (
            0.1
            * {
                "sgd": gradient,
                "momentum": velocity,
                "rmsprop": gradient / (square**0.5 + 1e-8),
                "adam": adam,
                "adamw": adam + 0.5 * w,
            }[optimizer]
        )
        assert weight.item() == pytest.approx(w, rel=1e-5, abs=1e-6)


def test_optimizers_are_fused_if_torch_supports_it() -> None:
    for optimizer in OPTIMIZERS:
        under_test, _ = optimizer_schedule(replace(TRANSFER, optimizer=optimizer), phase_of(TRANSFER, 4))
        (group, _) = under_test.state_dict()["optimizer"]["param_groups"]
        assert group.get("fused") is (None if optimizer == "rmsprop" else True)


def test_resuming_former_sgd_with_momentum_is_refused() -> None:
    phase = phase_of(TRANSFER, 4)
    before, _ = optimizer_schedule(replace(TRANSFER, optimizer="momentum"), phase)  # the former sgd
    after, _ = optimizer_schedule(replace(TRANSFER, optimizer="sgd"), phase)
    with pytest.raises(RunError, match=r"momentum is 0\.9; this release uses 0; .* --set optimizer=momentum"):
        after.load_state_dict(before.state_dict())


# History


def epoch(number: int, accuracy: float, loss: float = 0.5) -> Epoch:
    return Epoch(number, "all", 1e-3, 0.4, 0.8, loss, 0.7, accuracy, 1.0)


@pytest.mark.parametrize(
    ("figures", "best"),
    [
        ([(0.5, 0.9), (0.8, 1.2), (0.7, 0.1)], 2),  # accuracy comes first
        ([(0.8, 0.6), (0.8, 0.5), (0.8, 0.7)], 2),  # then the loss
        ([(0.8, 0.5), (0.8, 0.5)], 1),  # then the first
        ([(0.0, 5.0)], 1),
    ],
)
def test_model_is_of_the_best_epoch_or_the_last(figures: list[tuple[float, float]], best: int) -> None:
    """Ties of the best go to the lower loss, then to the first; the last epoch takes no account of the figures."""
    history = [epoch(number, *figure) for number, figure in enumerate(figures, 1)]
    for recipe, expected in ((Recipe(), best), (Recipe.load("scratch"), len(figures))):
        assert {model_epoch(order, recipe).epoch for order in (history, history[::-1])} == {expected}


def test_early_stopping_patience() -> None:
    recipe = Recipe(epochs=20, warmup_epochs=2, early_stopping_patience=3)
    accuracies = [0.9, 0.5, 0.5, 0.5, 0.5, 0.95, 0.9, 0.9, 0.9]
    history = [epoch(number, accuracy) for number, accuracy in enumerate(accuracies, 1)]
    # The best epoch lies in the warm-up, so patience counts from its end: epochs 3, 4 and 5 bring no improvement.
    stops = [should_stop_early(history[:count], recipe) for count in range(len(history) + 1)]
    assert stops == [False, False, False, False, False, True, False, False, False, True]
    assert not any(should_stop_early(history[:n], replace(recipe, early_stopping_patience=0)) for n in range(10))


@pytest.mark.parametrize(
    ("values", "sides"),
    [
        ({}, [112] * 8),
        ({"progressive_fraction": 0.5, "progressive_scale": 4 / 7}, [64] * 4 + [112] * 4),
        (
            {"progressive_fraction": 0.6, "progressive_scale": 4 / 7, "input_size": 224},
            [128] * 4 + [224] * 4,
        ),  # 4.8 epochs are rounded down to 4
        ({"progressive_fraction": 1.0, "progressive_scale": 0.01}, [64] * 8),  # the minimum
        ({"progressive_fraction": 1.0, "input_size": 24}, [24] * 8),
        ({"progressive_fraction": 1.0, "backbone": "vit_b_16"}, [112] * 8),  # vision transformers have one input size
    ],
)
def test_progressive_resizing_sizes(values: dict[str, Any], sides: list[int]) -> None:
    recipe = Recipe(epochs=8, input_size=112).replace(**values)
    assert [training_size(recipe, epoch) for epoch in range(1, 9)] == sides
    assert progressive_epochs(recipe) == sum(side < recipe.input_size for side in sides)


def test_every_backbone_accepts_smallest_training_size() -> None:
    assert max(parts.min_input_size for parts in BACKBONES.values()) <= _MIN_TRAINING_SIZE


def test_single_epoch_uses_full_size() -> None:
    assert training_size(Recipe(epochs=1, progressive_fraction=0.9), 1) == 224
