"""The average of the weights: against its formula, and as what a run keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import ConfigError
from echoquad_train.averaging import Average, share_kept
from echoquad_train.checkpoint import load_last, load_run
from echoquad_train.fit import fit
from echoquad_train.networks.model import QuadrantClassifier
from echoquad_train.recipe import Recipe

CONTRACT = Contract(("a", "b"), input_size=16)


def test_it_is_the_weighted_sum_of_all_steps(thin: None) -> None:
    model = QuadrantClassifier("resnet18", CONTRACT)
    average = Average(model, 0.7)
    generator = torch.Generator().manual_seed(0)
    expected: np.ndarray | None = None
    for step in range(12):
        with torch.no_grad():
            for value in (*model.parameters(), *model.buffers()):
                if value.is_floating_point():
                    value.copy_(torch.randn(value.shape, generator=generator))
                else:
                    value.fill_(step)
        average.follow(model)
        weight, statistic = model.head[-1].weight, model.backbone.bn1.running_var
        now = torch.cat([weight.flatten(), statistic]).detach().double().numpy()
        kept = share_kept(0.7, step)
        expected = now if expected is None else kept * expected + (1 - kept) * now
    found = torch.cat([average.model.head[-1].weight.flatten(), average.model.backbone.bn1.running_var])
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert int(average.model.backbone.bn1.num_batches_tracked) == 11


def test_less_is_kept_of_the_first_steps() -> None:
    assert share_kept(0.998, 0) == 0.1 and share_kept(0.998, 90) == 0.91
    assert share_kept(0.998, 100_000) == 0.998 and share_kept(0.5, 90) == 0.5
    shares = [share_kept(0.99, step) for step in range(2000)]
    assert shares == sorted(shares) and shares[-1] == 0.99


def test_a_run_keeps_the_averaged_weights(
    tmp_path: Path, flat_data: Path, quiet: Any, thin: None, tiny: Recipe
) -> None:
    recipe = tiny.replace(weight_average=0.9, epochs=2)
    fitted = fit(flat_data, tmp_path / "run", recipe, device="cpu", resume=False, reporter=quiet())
    state, best = load_last(tmp_path / "run"), load_run(tmp_path / "run").model.state_dict()
    if fitted.best.epoch == 2:
        assert all(torch.equal(best[name], state["average"][f"module.{name}"]) for name in best)
    assert not all(torch.equal(best[name], value) for name, value in state["model"].items())


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_what_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"weight_average is .*; expected a fraction from 0 to below 1"):
        Recipe(weight_average=share)
