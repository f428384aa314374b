from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.metrics import cohen_kappa_score

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import ConfigError
from echoquad_runtime.predict.predictor import Predictor
from echoquad_train.data.dataset import read_split
from echoquad_train.evaluation.evaluate import Evaluation, evaluate
from echoquad_train.evaluation.metrics import Settings
from echoquad_train.reporting.comparison import compare, mcnemar, write_comparison

CONTRACT = Contract(("bright", "dark"), input_size=16)


class Guess:
    """An engine whose probability of `bright` is the quadrant's brightness, but noise."""

    device, precision, note = "cpu", "fp32", ""

    def __init__(self, noise: float, contract: Contract = CONTRACT) -> None:
        self.contract, self.noise = contract, noise

    def infer(self, quadrants: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        level = quadrants.mean(axis=(1, 2, 3), dtype=np.float64) / 255
        shift = np.sin(1e4 * level) * self.noise
        p = np.clip(level + shift, 0.01, 0.99)
        both = np.stack([p, 1 - p], axis=1).astype(np.float32)
        return np.log(both), both


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, make_data: Callable[..., Path]) -> tuple[Evaluation, Evaluation]:
    data = make_data(tmp_path_factory.mktemp("pair") / "data", frames=15, splits=("test",), noise=90.0)
    split = read_split(data, "test", ("bright", "dark"))
    first, second = (evaluate(Predictor(Guess(noise)), split) for noise in (0.3, 1.5))
    return first, second


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 5) == 1
    assert mcnemar(0, 6) == pytest.approx(2 / 64)
    assert mcnemar(1, 8) == pytest.approx(2 * (1 + 9) / 2**9)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_takes_no_side_and_is_the_binomial(first: int, second: int) -> None:
    assert mcnemar(first, second) == pytest.approx(mcnemar(second, first))
    less, count = min(first, second), first + second
    assert mcnemar(first, second) == pytest.approx(min(1, 2 * binom.cdf(less, count, 0.5)))


def test_a_comparison_counts_what_the_decisions_say(pair: tuple[Evaluation, Evaluation]) -> None:
    first, second = pair
    found = compare(first, second, Settings(resamples=200))
    a, b = first.judged, second.judged
    assert found["frames"] == 30
    assert found["both_right"] + found["first_only"] == a.right.sum() and a.right.sum() > b.right.sum()
    assert found["both_right"] + found["second_only"] == b.right.sum()
    assert sum(found[name] for name in ("both_right", "first_only", "second_only", "both_wrong")) == 30
    assert found["mcnemar_p"] == mcnemar(found["first_only"], found["second_only"])
    assert np.sum(found["decisions"]) == 30
    assert found["agreement"] == (a.decided == b.decided).mean()
    assert found["kappa"] == pytest.approx(cohen_kappa_score(a.decided, b.decided))
    gap = found["difference"]["accuracy"]
    assert gap["estimate"] == pytest.approx(first.metrics["accuracy"] - second.metrics["accuracy"])
    assert gap["ci95"][0] <= gap["estimate"] <= gap["ci95"][1]
    area = found["difference"]["roc_auc"]["estimate"]
    assert area == pytest.approx(first.metrics["roc_auc"] - second.metrics["roc_auc"])
    turned = compare(second, first, Settings(resamples=200))
    assert turned["difference"]["accuracy"]["ci95"] == pytest.approx([-gap["ci95"][1], -gap["ci95"][0]])
    same = compare(first, first)
    assert (same["mcnemar_p"], same["kappa"], same["difference"]["accuracy"]["ci95"]) == (1.0, 1.0, [0.0, 0.0])


def test_models_of_other_classes_are_refused(pair: tuple[Evaluation, Evaluation], flat_data: Path) -> None:
    other = evaluate(
        Predictor(Guess(0.3, Contract(("bright", "dark"), positive="dark", input_size=16))),
        read_split(flat_data, "test", ("bright", "dark")),
    )
    with pytest.raises(ConfigError, match="A's positive class is bright, B's is dark; compare models of the same"):
        compare(pair[0], other)


def test_a_comparison_is_written(pair: tuple[Evaluation, Evaluation], tmp_path: Path) -> None:
    found = compare(*pair, Settings(resamples=50))
    write_comparison(*pair, found, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "compare.json").read_text("utf-8")) == found
    text = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert f"p = {found['mcnemar_p']:.3g}" in text and "Research use only" in text
    for letter in "ab":
        written: Any = json.loads((tmp_path / "out" / letter / "metrics.json").read_text("utf-8"))
        assert written["frames"] == 30 and (tmp_path / "out" / letter / "report.html").is_file()
