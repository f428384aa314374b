"""Operating points and abstention: thresholds by hand, cross-fitting, and the risk-coverage curve."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echoquad_runtime.errors import ConfigError
from echoquad_train.evaluation.abstention import AbstentionPoint, abstention, risk_coverage
from echoquad_train.evaluation.intervals import Bootstrap, Estimate
from echoquad_train.evaluation.operating_points import check_targets, choose_threshold, operating_points
from echoquad_train.evaluation.scored_frames import ScoredFrames


def scored_frames(positive: Any, truth: Any) -> ScoredFrames:
    """Return frames whose four quadrants give the positive class the same probability."""
    p = np.asarray(positive, float)
    return ScoredFrames(
        names=tuple(f"{index}.png" for index in range(len(p))),
        classes=("ASD", "NORM"),
        positive="ASD",
        method="majority",
        vote_weights=(1.0, 1.0, 1.0, 1.0),
        labels=np.where(np.asarray(truth), 0, 1),
        quadrants=np.repeat(np.stack([p, 1 - p], axis=1)[:, None], 4, axis=1),
        decided=np.where(p >= 0.5, 0, 1),
        patients=tuple(f"p{index}" for index in range(len(p))),
    )


SCORE = np.array([0.9, 0.8, 0.7, 0.6, 0.4, 0.3, 0.2])
TRUTH = np.array([True, True, False, True, False, True, False])


@pytest.mark.parametrize(
    ("kind", "target", "threshold"),
    [
        ("specificity", 1.0, 0.75),  # between the lowest positive above and the highest negative
        ("specificity", 0.6, 0.5),
        ("specificity", 0.1, 0.25),
        ("sensitivity", 1.0, 0.25),
        ("sensitivity", 0.75, 0.5),
        ("sensitivity", 0.5, 0.75),
        ("sensitivity", 0.01, 0.85),
    ],
)
def test_threshold_holds_the_rate_in_a_small_example(kind: str, target: float, threshold: float) -> None:
    assert choose_threshold(SCORE, TRUTH, kind, target) == pytest.approx(threshold)


def test_specificity_without_any_positive_decision() -> None:
    found = choose_threshold(np.array([0.9, 0.8]), np.array([False, True]), "specificity", 1.0)
    assert found is not None and 0.9 < found < 0.9000001
    assert choose_threshold(SCORE, np.ones(7, bool), "sensitivity", 0.9) is None


@given(st.integers(4, 40), st.floats(0.05, 1), st.sampled_from(["specificity", "sensitivity"]), st.integers(0, 2**31))
def test_threshold_holds_its_rate_and_maximises_the_other(count: int, target: float, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    score, truth = rng.random(count).round(1), rng.random(count) < 0.5
    truth[:2] = [True, False]
    threshold = choose_threshold(score, truth, kind, target)
    assert threshold is not None

    def rate(at: float) -> tuple[float, float]:
        called = score >= at
        return float((~called[~truth]).mean()), float(called[truth].mean())

    mine = 0 if kind == "specificity" else 1
    assert rate(threshold)[mine] >= target - 1e-9
    for other in (*np.unique(score), 1.1):
        if rate(other)[mine] >= target - 1e-9:
            assert rate(threshold)[1 - mine] >= rate(other)[1 - mine] - 1e-9


def test_threshold_is_chosen_on_validation_and_measured_on_the_reported_frames() -> None:
    reported, reference = (
        scored_frames(SCORE, TRUTH),
        scored_frames([0.95, 0.65, 0.51, 0.1], [True, True, False, False]),
    )
    sampler = Bootstrap(reported.patient_index, 200)
    (point,) = operating_points(reported, sampler, [("specificity", 1.0)], reference, None)
    assert point.thresholds == pytest.approx((0.58,))  # of the validation frames; 0.75 would be better here
    assert point.sensitivity is not None and point.specificity is not None and point.sensitivity.ci95 is not None
    assert point.sensitivity.estimate == 3 / 4 and point.specificity.estimate == 2 / 3
    low, high = point.sensitivity.ci95
    assert low <= 3 / 4 <= high
    (none,) = operating_points(reported, sampler, [("sensitivity", 0.9)], None, None)
    assert none.to_dict() == {"fixed": "sensitivity", "target": 0.9, "sensitivity": None, "specificity": None}


def test_cross_fitted_threshold_does_not_depend_on_its_fold() -> None:
    rng = np.random.default_rng(0)
    score, truth = rng.random(40).round(3), rng.random(40) < 0.5
    folds = np.arange(40) % 4
    sampler = Bootstrap(np.arange(40), 10)
    flipped = np.where(folds == 1, ~truth, truth)
    (a,), (b,) = (
        operating_points(scored_frames(score, of), sampler, [("specificity", 0.8)], None, folds)
        for of in (truth, flipped)
    )
    assert a.thresholds[1] == b.thresholds[1] and a.thresholds != b.thresholds
    assert a.thresholds[0] == choose_threshold(score[folds != 0], truth[folds != 0], "specificity", 0.8)


@pytest.mark.parametrize("value", [0.0, -0.1, 1.5, float("nan")])
def test_rate_outside_zero_to_one_raises_config_error(value: float) -> None:
    with pytest.raises(ConfigError, match="--at-specificity"):
        check_targets([0.9, value], "--at-specificity")


# Abstention


def test_risk_coverage_curve_of_a_small_example() -> None:
    confidence, correct = np.array([0.6, 0.9, 0.8, 0.8, 0.7]), np.array([True, True, False, True, True])
    thresholds, coverage, risk = risk_coverage(confidence, correct)
    assert thresholds.tolist() == [0.9, 0.8, 0.7, 0.6]
    assert coverage.tolist() == [0.2, 0.6, 0.8, 1.0]
    assert risk == pytest.approx([0, 1 / 3, 1 / 4, 1 / 5])


def test_abstaining_trades_coverage_for_accuracy() -> None:
    found = scored_frames([0.9, 0.8, 0.7, 0.55, 0.1], [True, True, True, False, False])
    sampler = Bootstrap(found.patient_index, 300)
    plain = abstention(found, sampler)
    assert "at" not in plain.to_dict() and plain.aurc == pytest.approx(0.2 * 0.2)  # only the last frame is wrong
    first = {"threshold": pytest.approx(0.55), "coverage": 1.0, "accuracy": pytest.approx(0.8)}
    assert plain.points[0].to_dict() == first
    assert plain.points[3].coverage == pytest.approx(0.8) and plain.points[3].accuracy == 1.0

    def at(scored: ScoredFrames, below: float) -> AbstentionPoint:
        point = abstention(scored, sampler, below).at
        assert point is not None
        return point

    point = at(found, 0.6)
    assert (point.indeterminate, point.coverage.estimate, point.accuracy.estimate) == (1, 0.8, 1.0)
    assert at(found, 0.99).accuracy == Estimate(None)
    # The threshold applies to the calibrated confidence: 0.7 under the temperature 0.25 is 0.97.
    assert at(replace(found, frame_temperature=0.25), 0.95).indeterminate == 1
