"""Frame metrics: a hand-computed example, random decisions against sklearn, and missing classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.voting import aggregate_votes
from echoquad_train.evaluation.frame_metrics import frame_metrics, metrics_of_frames, roc_curves
from echoquad_train.evaluation.intervals import wilson_interval
from echoquad_train.evaluation.scored_frames import score_frames


def predictions(
    quadrants: Sequence[Sequence[Sequence[float]]], classes: Sequence[str], method: Any = "majority"
) -> list[Prediction]:
    """Return predictions of probabilities [F, 4, C], with the runtime's vote."""
    p = np.array(quadrants, float)
    decision = aggregate_votes(p, method, (1, 1, 1.5, 1.5))
    return [
        Prediction(
            file=f"{index}.png",
            classes=tuple(classes),
            method=method,
            label=classes[decision.labels[index]],
            probabilities=tuple(decision.probabilities[index].tolist()),
            quadrant_labels=tuple(classes[label] for label in decision.quadrant_labels[index]),
            quadrant_probabilities=tuple(tuple(row) for row in p[index].tolist()),
            flags=(),
            device="cpu",
            precision="fp32",
        )
        for index in range(len(p))
    ]


def two(*rows: Sequence[float]) -> list[list[list[float]]]:
    """Return probabilities of two classes from those of ASD, one row of four quadrants per frame."""
    return [[[p, 1 - p] for p in row] for row in rows]


def test_frame_metrics_of_a_small_example() -> None:
    """Three ASD, two NORM: one ASD is missed, and one NORM is decided as ASD."""
    found = frame_metrics(
        predictions(
            two(
                [0.9, 0.8, 0.7, 0.6],  # ASD, all right
                [0.9, 0.2, 0.7, 0.6],  # ASD, RA wrong
                [0.1, 0.2, 0.3, 0.6],  # ASD taken for NORM: only RV right
                [0.4, 0.3, 0.2, 0.1],  # NORM, all right
                [0.6, 0.7, 0.8, 0.4],  # NORM taken for ASD: only RV right
            ),
            ("ASD", "NORM"),
        ),
        np.array([0, 0, 0, 1, 1]),
        "ASD",
    )
    assert found.frames == 5 and found.accuracy == 3 / 5
    assert found.confusion == [[2, 1], [1, 1]]
    assert found.per_class["ASD"].to_dict() == pytest.approx(
        {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3}
    )
    assert found.per_class["NORM"].to_dict() == pytest.approx(
        {"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "support": 2}
    )
    assert found.balanced_accuracy == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found.per_quadrant == pytest.approx({"LA": 3 / 5, "RA": 2 / 5, "LV": 3 / 5, "RV": 5 / 5})
    assert found.patch_accuracy == pytest.approx((3 + 2 + 3 + 5) / 20)
    # Mean probabilities 0.75, 0.6, 0.3 of ASD against 0.25, 0.625: 4 of 6 pairs are in order.
    assert found.roc_auc == pytest.approx(4 / 6)
    assert found.accuracy_ci95 == wilson_interval(3, 5)
    assert found.classes == ("ASD", "NORM") and found.positive == "ASD"
    json.dumps(found.to_dict(), allow_nan=False)


def pairs_in_order(score: np.ndarray, truth: np.ndarray) -> float:
    above, below = score[truth][:, None], score[~truth][None, :]
    return float(np.mean((above > below) + 0.5 * (above == below)))


@pytest.mark.parametrize("classes", [("ASD", "NORM"), ("a", "b", "c"), ("1", "2", "3", "4", "5")])
@pytest.mark.parametrize("method", ["majority", "average", "weighted"])
def test_frame_metrics_of_random_decisions_equal_sklearn(classes: tuple[str, ...], method: str) -> None:
    rng = np.random.default_rng(len(classes))
    p = rng.dirichlet(np.ones(len(classes)), (200, 4)).round(2)
    p /= p.sum(axis=2, keepdims=True)
    labels = rng.integers(0, len(classes), 200)
    made = predictions(p, classes, method)
    found = frame_metrics(made, labels, classes[-1])
    decided = np.array([classes.index(prediction.label) for prediction in made])
    assert found.accuracy == sklearn_metrics.accuracy_score(labels, decided)
    assert found.balanced_accuracy == pytest.approx(sklearn_metrics.balanced_accuracy_score(labels, decided))
    assert found.confusion == sklearn_metrics.confusion_matrix(labels, decided).tolist()
    report = sklearn_metrics.classification_report(labels, decided, target_names=classes, output_dict=True)
    for name in classes:
        expected = {key.replace("f1-score", "f1"): value for key, value in report[name].items()}
        assert found.per_class[name].to_dict() == pytest.approx(expected)
    mean = p.mean(axis=1)
    wanted = [len(classes) - 1] if len(classes) == 2 else range(len(classes))
    areas = [pairs_in_order(mean[:, index], labels == index) for index in wanted]
    assert found.roc_auc == pytest.approx(np.mean(areas))


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1]])
def test_missing_class_of_two_gives_no_roc_auc(labels: list[int]) -> None:
    made = predictions(two([0.9] * 4, [0.1] * 4, [0.6] * 4), ("ASD", "NORM"))
    found = frame_metrics(made, np.array(labels), "ASD")
    assert found.roc_auc is None
    assert found.balanced_accuracy == found.accuracy
    assert len(found.confusion) == 2 and found.per_class["ASD"].support == 3 - sum(labels)
    json.dumps(found.to_dict(), allow_nan=False)


def test_missing_class_of_three_gives_no_mean_roc_auc() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(3), (20, 4))
    labels = np.arange(20) % 2
    scored = score_frames(predictions(p, ("a", "b", "c")), labels, "a")
    assert metrics_of_frames(scored).roc_auc is None
    assert [curve.name for curve in roc_curves(scored)] == ["a", "b"]


def test_roc_curve_is_that_of_the_positive_class() -> None:
    made = predictions(two([0.9] * 4, [0.2] * 4, [0.6] * 4, [0.7] * 4), ("ASD", "NORM"))
    labels = np.array([0, 0, 1, 1])
    asd, norm = (frame_metrics(made, labels, name).roc_auc for name in ("ASD", "NORM"))
    assert asd == norm == pytest.approx(0.5)
    labels = np.array([0, 1, 0, 0])
    ((name, false_positive, true_positive, area),) = roc_curves(score_frames(made, labels, "NORM"))
    assert (name, area) == ("NORM", 1.0) and false_positive[-1] == true_positive[-1] == 1
