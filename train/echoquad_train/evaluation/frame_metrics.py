"""Frame metrics: accuracy, recall, precision, F1, ROC AUC and vote agreement, without resampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from sklearn import metrics

from echoquad_runtime.contract import QUADRANTS
from echoquad_runtime.predict.prediction import Prediction
from echoquad_train.evaluation.arrays import Float64Array, IndexArray
from echoquad_train.evaluation.intervals import wilson_interval
from echoquad_train.evaluation.metrics_record import MetricsRecord
from echoquad_train.evaluation.scored_frames import ScoredFrames, score_frames

__all__ = [
    "ClassMetrics",
    "FrameMetrics",
    "RocCurve",
    "VoteAgreement",
    "frame_metrics",
    "metrics_of_frames",
    "roc_curves",
    "vote_agreement",
]


@dataclass(frozen=True)
class ClassMetrics(MetricsRecord):
    """Metrics of one class; `support` is its number of frames. Without frames, recall and F1 are None."""

    precision: float
    recall: float | None
    f1: float | None
    support: int


@dataclass(frozen=True)
class FrameMetrics(MetricsRecord):
    """Metrics of the decisions on frames.

    Attributes
    ----------
    frames
        Number of frames.
    accuracy, accuracy_ci95
        Fraction of correct decisions, and its Wilson interval.
    balanced_accuracy
        Mean recall of the classes that have frames.
    patch_accuracy
        Fraction of quadrants whose most probable class is correct.
    roc_auc
        Area under the ROC curve of the mean probability: of the positive class for two classes, the unweighted mean of
        one-against-rest areas for more. None if a class has no frame.
    positive, classes
        The positive class, and all class names.
    confusion
        Confusion matrix, true classes in rows.
    per_class, per_quadrant
        Metrics of each class, and accuracy of each quadrant.
    """

    frames: int
    accuracy: float
    accuracy_ci95: tuple[float, float]
    balanced_accuracy: float
    patch_accuracy: float
    roc_auc: float | None
    positive: str
    classes: tuple[str, ...]
    confusion: list[list[int]]
    per_class: dict[str, ClassMetrics]
    per_quadrant: dict[str, float]

    @property
    def absent_classes(self) -> tuple[str, ...]:
        """The classes without frames; what needs them is None."""
        return tuple(name for name, metrics_of in self.per_class.items() if not metrics_of.support)


@dataclass(frozen=True)
class VoteAgreement(MetricsRecord):
    """Accuracy of the frames in which a number of quadrants agrees with the decision; `right` counts the correct."""

    quadrants: int
    frames: int
    right: int
    accuracy: float | None
    accuracy_ci95: tuple[float, float] | None


class RocCurve(NamedTuple):
    """ROC curve of a class against the rest."""

    name: str
    false_positive: Float64Array
    true_positive: Float64Array
    area: float


def frame_metrics(predictions: Sequence[Prediction], labels: IndexArray, positive: str) -> FrameMetrics:
    """Return the metrics of predictions and true classes, int64 [F]."""
    return metrics_of_frames(score_frames(predictions, labels, positive))


def metrics_of_frames(scored: ScoredFrames) -> FrameMetrics:
    """Return the metrics of scored frames."""
    labels, indices = scored.labels, list(range(len(scored.classes)))
    correct = int(scored.correct.sum())
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, scored.decided, labels=indices, zero_division=0.0
    )
    areas = [curve.area for curve in roc_curves(scored)]
    hits = scored.quadrant_labels == labels[:, None]
    return FrameMetrics(
        frames=len(labels),
        accuracy=correct / len(labels),
        accuracy_ci95=wilson_interval(correct, len(labels)),
        balanced_accuracy=float(np.mean(recall[support > 0])),
        patch_accuracy=float(hits.mean()),
        roc_auc=float(np.mean(areas)) if scored.complete else None,
        positive=scored.positive,
        classes=scored.classes,
        confusion=metrics.confusion_matrix(labels, scored.decided, labels=indices).tolist(),
        per_class={
            name: ClassMetrics(
                float(precision[i]),
                float(recall[i]) if support[i] else None,
                float(f1[i]) if support[i] else None,
                int(support[i]),
            )
            for i, name in enumerate(scored.classes)
        },
        per_quadrant={name: float(hits[:, i].mean()) for i, name in enumerate(QUADRANTS)},
    )


def roc_curves(scored: ScoredFrames) -> list[RocCurve]:
    """Return the ROC curve of the positive class for two classes, or of each class against the rest for more.

    A class without frames, or with all frames, has no curve.
    """
    curves = []
    for name in (scored.positive,) if len(scored.classes) == 2 else scored.classes:
        column = scored.classes.index(name)
        truth = scored.labels == column
        if truth.all() or not truth.any():
            continue
        false_positive, true_positive, _ = metrics.roc_curve(truth, scored.probabilities[:, column])
        curves.append(RocCurve(name, false_positive, true_positive, float(metrics.auc(false_positive, true_positive))))
    return curves


def vote_agreement(scored: ScoredFrames) -> tuple[VoteAgreement, ...]:
    """Return the accuracy by the number of quadrants, 0 to 4, that agree with the decision."""
    agreeing = (scored.quadrant_labels == scored.decided[:, None]).sum(axis=1)
    rows = []
    for count in range(len(QUADRANTS) + 1):
        frames = agreeing == count
        total, right = int(frames.sum()), int((frames & scored.correct).sum())
        accuracy, interval = (right / total, wilson_interval(right, total)) if total else (None, None)
        rows.append(VoteAgreement(count, total, right, accuracy, interval))
    return tuple(rows)
