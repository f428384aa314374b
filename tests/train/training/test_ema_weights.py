"""Exponential moving average of the weights: its formula, its state, and its use by a run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import ConfigError
from echoquad_train.fitting.loop import fit
from echoquad_train.networks.classifier import QuadrantClassifier
from echoquad_train.recipe import Recipe
from echoquad_train.runs.checkpoint import load_last, load_run
from echoquad_train.training.ema_weights import EmaWeights, decay_at

CONTRACT = Contract(("a", "b"), input_size=16)


def randomize(model: QuadrantClassifier, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator))
            else:
                value.fill_(step)


@pytest.mark.parametrize("capturable", [False, True])
def test_average_equals_weighted_sum_of_steps(thin: None, capturable: bool) -> None:
    model = QuadrantClassifier("resnet18", CONTRACT)
    ema = EmaWeights(model, 0.7, capturable=capturable)
    expected: np.ndarray | None = None
    for step in range(12):
        randomize(model, step)
        ema.advance()
        ema.update()
        weight, statistic = model.head[-1].weight, model.backbone.bn1.running_var
        now = torch.cat([weight.flatten(), statistic]).detach().double().numpy()
        kept = decay_at(0.7, step)
        expected = now if expected is None else kept * expected + (1 - kept) * now
    found = torch.cat([ema.model.head[-1].weight.flatten(), ema.model.backbone.bn1.running_var])
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert int(ema.model.backbone.bn1.num_batches_tracked) == 11


def test_average_equals_torch_averaged_model(thin: None) -> None:
    """Earlier releases used torch's class, and their runs can be resumed."""
    model = QuadrantClassifier("resnet18", CONTRACT)
    ema = EmaWeights(model, 0.9)
    reference = AveragedModel(
        model,
        avg_fn=lambda average, trained, steps: (
            torch.lerp(average, trained, 1 - decay_at(0.9, int(steps))) if average.is_floating_point() else trained
        ),
        use_buffers=True,
    )
    for step in range(5):
        randomize(model, step)
        reference.update_parameters(model)
        ema.advance()
        ema.update()
    state, expected = ema.state_dict(), reference.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_average_resumes_from_state(thin: None) -> None:
    model = QuadrantClassifier("resnet18", CONTRACT)
    whole, first = EmaWeights(model, 0.9), EmaWeights(model, 0.9)
    for step in range(6):
        if step == 3:
            state = copy.deepcopy(first.state_dict())
            first = EmaWeights(model, 0.9)
            first.load_state_dict(state)
        randomize(model, step)
        for ema in (whole, first):
            ema.advance()
            ema.update()
    found, expected = first.state_dict(), whole.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_update_does_not_iterate_modules(thin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = QuadrantClassifier("resnet18", CONTRACT)
    ema = EmaWeights(model, 0.9)
    monkeypatch.setattr(torch.nn.Module, "named_modules", None)
    ema.advance()
    ema.update()


def test_decay_is_smaller_for_first_steps() -> None:
    assert decay_at(0.998, 0) == 0.1 and decay_at(0.998, 90) == 0.91
    assert decay_at(0.998, 100_000) == 0.998 and decay_at(0.5, 90) == 0.5
    shares = [decay_at(0.99, step) for step in range(2000)]
    assert shares == sorted(shares) and shares[-1] == 0.99


def test_run_saves_averaged_weights(tmp_path: Path, flat_data: Path, quiet: Any, thin: None, tiny: Recipe) -> None:
    recipe = tiny.replace(ema_decay=0.9, epochs=2)
    fitted = fit(flat_data, tmp_path / "run", recipe, device="cpu", resume=False, reporter=quiet())
    state, best = load_last(tmp_path / "run"), load_run(tmp_path / "run").model.state_dict()
    if fitted.best.epoch == 2:
        assert all(torch.equal(best[name], state["ema"][f"module.{name}"]) for name in best)
    assert not all(torch.equal(best[name], value) for name, value in state["model"].items())


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_invalid_decay_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"ema_decay is .*; expected a fraction from 0 to below 1"):
        Recipe(ema_decay=share)
