"""Comparison of two models: McNemar's test, paired differences with bootstrap intervals, and the written folder."""

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
from echoquad_train.evaluation.metrics import EvaluationOptions
from echoquad_train.reporting import evaluation_folder
from echoquad_train.reporting.comparison import compare, mcnemar, write_comparison

CONTRACT = Contract(("bright", "dark"), input_size=16)


class Guess:
    """An engine whose probability of `bright` is the brightness of a quadrant plus noise."""

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


def test_mcnemar_of_small_counts() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 5) == 1
    assert mcnemar(0, 6) == pytest.approx(2 / 64)
    assert mcnemar(1, 8) == pytest.approx(2 * (1 + 9) / 2**9)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_symmetric_and_equals_the_binomial_test(first: int, second: int) -> None:
    assert mcnemar(first, second) == pytest.approx(mcnemar(second, first))
    less, count = min(first, second), first + second
    assert mcnemar(first, second) == pytest.approx(min(1, 2 * binom.cdf(less, count, 0.5)))


def test_compare_counts_decisions_and_pairs_differences(pair: tuple[Evaluation, Evaluation]) -> None:
    first, second = pair
    found = compare(first, second, EvaluationOptions(resamples=200))
    a, b = first.scored, second.scored
    assert found.frames == 30
    assert found.both_right + found.first_only == a.correct.sum() and a.correct.sum() > b.correct.sum()
    assert found.both_right + found.second_only == b.correct.sum()
    assert sum(getattr(found, name) for name in ("both_right", "first_only", "second_only", "both_wrong")) == 30
    assert found.mcnemar_p == mcnemar(found.first_only, found.second_only)
    assert np.sum(found.decisions) == 30
    assert found.agreement == (a.decided == b.decided).mean()
    assert found.kappa == pytest.approx(cohen_kappa_score(a.decided, b.decided))
    gap = found.difference["accuracy"]
    assert gap.estimate is not None and gap.ci95 is not None
    assert gap.estimate == pytest.approx(first.metrics.frame.accuracy - second.metrics.frame.accuracy)
    assert gap.ci95[0] <= gap.estimate <= gap.ci95[1]
    area = found.difference["roc_auc"].estimate
    assert first.metrics.frame.roc_auc is not None and second.metrics.frame.roc_auc is not None
    assert area == pytest.approx(first.metrics.frame.roc_auc - second.metrics.frame.roc_auc)
    swapped = compare(second, first, EvaluationOptions(resamples=200))
    assert swapped.difference["accuracy"].ci95 == pytest.approx((-gap.ci95[1], -gap.ci95[0]))
    same = compare(first, first)
    assert (same.mcnemar_p, same.kappa, same.difference["accuracy"].ci95) == (1.0, 1.0, (0.0, 0.0))


def test_models_with_different_positive_class_raise_config_error(
    pair: tuple[Evaluation, Evaluation], flat_data: Path
) -> None:
    other = evaluate(
        Predictor(Guess(0.3, Contract(("bright", "dark"), positive="dark", input_size=16))),
        read_split(flat_data, "test", ("bright", "dark")),
    )
    with pytest.raises(ConfigError, match="positive class bright in A, dark in B"):
        compare(pair[0], other)


def test_write_comparison_writes_both_evaluations_and_a_report(
    pair: tuple[Evaluation, Evaluation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_folder, "save_figures", lambda evaluation, folder: [])  # tested in test_report
    found = compare(*pair, EvaluationOptions(resamples=50))
    write_comparison(*pair, found, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "compare.json").read_text("utf-8")) == found.to_dict()
    text = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert f"p = {found.mcnemar_p:.3g}" in text and "Research use only" in text
    for letter in "ab":
        written: Any = json.loads((tmp_path / "out" / letter / "metrics.json").read_text("utf-8"))
        assert written["frames"] == 30 and (tmp_path / "out" / letter / "report.html").is_file()
