"""Wilson intervals, and bootstrap intervals by patient: resampled metrics equal those of sklearn with weights."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, roc_auc_score

from echoquad_train.evaluation.intervals import (
    Bootstrap,
    Estimate,
    weighted_auc,
    weighted_counts,
    weighted_ece,
    wilson_interval,
)
from echoquad_train.evaluation.reliability import sweep_bins


def sample(frames: int, patients: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, frames)
    score = np.clip(0.5 + 0.2 * (labels - 0.5) + rng.normal(0, 0.2, frames), 0, 1).round(2)  # with ties
    return labels, score, (score > 0.5).astype(int), rng.integers(0, patients, frames)


def numbered(patients: np.ndarray) -> np.ndarray:
    return np.unique(patients, return_inverse=True)[1]


def test_each_resample_equals_sklearn_with_sample_weights() -> None:
    labels, score, decided, patients = sample(60, 20)
    sampler = Bootstrap(numbered(patients), 40, seed=3)
    areas = weighted_auc(sampler, score, labels == 1)
    counts = weighted_counts(sampler, labels, decided, 2)
    bins = sweep_bins(score, labels == 1)
    errors = weighted_ece(sampler, bins, score, labels == 1)
    for number, weights in enumerate(sampler.weights):
        weight = weights[numbered(patients)]
        assert areas[number] == pytest.approx(roc_auc_score(labels, score, sample_weight=weight))
        assert counts[number] == pytest.approx(confusion_matrix(labels, decided, sample_weight=weight))
        assert sampler.mean(score)[number] == pytest.approx(np.average(score, weights=weight))
        by_bin = [abs(((labels - score) * weight)[bins.index == at].sum()) for at in range(len(bins.counts))]
        assert errors[number] == pytest.approx(sum(by_bin) / weight.sum())


def test_patients_are_resampled_and_not_frames() -> None:
    patients = np.repeat(np.arange(10), 50)
    correct = np.repeat(np.arange(10) < 8, 50).astype(float)  # all frames of two patients are wrong
    clustered, single = (Bootstrap(whom, 2000).mean(correct) for whom in (patients, np.arange(500)))
    assert clustered.std() == pytest.approx(np.sqrt(0.16 / 10), rel=0.1)
    assert single.std() == pytest.approx(np.sqrt(0.16 / 500), rel=0.1)


def test_same_seed_gives_the_same_resamples() -> None:
    patients = np.arange(30)
    assert np.array_equal(Bootstrap(patients, 50, 1).weights, Bootstrap(patients, 50, 1).weights)
    assert not np.array_equal(Bootstrap(patients, 50, 1).weights, Bootstrap(patients, 50, 2).weights)
    assert Bootstrap(patients, 50).weights.sum(axis=1).tolist() == [30] * 50


@given(st.integers(8, 60), st.integers(0, 2**32 - 1))
def test_bootstrap_interval_contains_its_estimate(frames: int, seed: int) -> None:
    labels, score, decided, patients = sample(frames, max(4, frames // 2), seed)
    sampler = Bootstrap(numbered(patients), 200)
    correct = decided == labels
    accuracy = float(correct.mean())
    interval = Estimate.bootstrap(accuracy, sampler.mean(correct)).ci95
    assert interval is not None and 0 <= interval[0] <= accuracy <= interval[1] <= 1
    if 2 < labels.sum() < frames - 2 and sampler.count > 5:
        area = float(roc_auc_score(labels, score))
        interval = Estimate.bootstrap(area, weighted_auc(sampler, score, labels == 1)).ci95
        assert interval is None or interval[0] <= area <= interval[1]


def test_undefined_statistic_has_no_interval() -> None:
    assert Estimate.bootstrap(None, np.ones(10)).to_dict() == {"estimate": None, "ci95": None}
    assert Estimate.bootstrap(float("nan"), np.ones(10)) == Estimate(None)
    assert Estimate.bootstrap(0.5, np.empty(0)) == Estimate(0.5)
    mostly = np.array([np.nan] * 6 + [0.5] * 4)  # six of ten resamples lack the class
    assert Estimate.bootstrap(0.5, mostly) == Estimate(0.5)
    one_kind = weighted_auc(Bootstrap(np.arange(5), 20), np.linspace(0, 1, 5), np.ones(5, bool))
    assert np.isnan(one_kind).all()
    assert len(weighted_auc(Bootstrap(np.arange(5), 0), np.linspace(0, 1, 5), np.arange(5) > 2)) == 0


def test_thousand_resamples_of_thousand_frames_take_under_a_second() -> None:
    labels, score, decided, patients = sample(1000, 500)
    begin = time.process_time()
    sampler = Bootstrap(numbered(patients), 1000)
    weighted_auc(sampler, score, labels == 1)
    weighted_counts(sampler, labels, decided, 2)
    assert time.process_time() - begin < 1


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # R. G. Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_published_values(right: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(right, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(count - right, count) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize("count", [1, 2, 7, 100, 10**6])
def test_wilson_interval_at_zero_and_all_successes(count: int) -> None:
    z2 = 1.959963984540054**2
    none, every = wilson_interval(0, count), wilson_interval(count, count)
    assert none[0] == 0.0 and none[1] == pytest.approx(z2 / (count + z2))
    assert every[1] == 1.0 and every[0] == pytest.approx(count / (count + z2))
    for right in {0, 1, count // 2, count}:
        low, high = wilson_interval(right, count)
        assert 0 <= low <= right / count <= high + 1e-12 <= 1 + 1e-12


def test_wilson_interval_solves_its_equation() -> None:
    for bound in wilson_interval(30, 45):
        assert (30 / 45 - bound) / math.sqrt(bound * (1 - bound) / 45) == pytest.approx(
            math.copysign(1.959963984540054, 30 / 45 - bound)
        )
