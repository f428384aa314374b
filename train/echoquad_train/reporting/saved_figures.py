"""Saved figures: draw and write the figures of an evaluation, each with its title and caption."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from echoquad_train.evaluation.abstention import risk_coverage
from echoquad_train.evaluation.evaluate import Evaluation
from echoquad_train.evaluation.frame_metrics import roc_curves
from echoquad_train.evaluation.metrics import EvaluationMetrics
from echoquad_train.evaluation.reliability import sweep_bins
from echoquad_train.plot_style import save, short
from echoquad_train.reporting import score_figures, vote_figures
from echoquad_train.reporting.score_figures import RocPoint

__all__ = ["Picture", "save_figures"]


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG file, and what it shows."""

    path: Path
    title: str
    caption: str


def save_figures(evaluation: Evaluation, folder: Path) -> list[Picture]:
    """Write the figures of an evaluation as PNG, and return them in the order of the report.

    Raises
    ------
    OutputError
        If a file cannot be written.
    """
    metrics, scored = evaluation.metrics, evaluation.scored
    frame, calibration = metrics.frame, metrics.calibration
    low, high = frame.accuracy_ci95
    title = f"{metrics.split}: {len(scored)} frames"
    uncalibrated = scored.uncalibrated(evaluation.contract) if calibration.uncalibrated else None
    _, coverage, risk = risk_coverage(scored.confidence, scored.correct)
    figures: list[tuple[str, Figure, str, str]] = [
        (
            "confusion",
            score_figures.confusion_matrix(
                np.array(frame.confusion),
                scored.classes,
                f"{metrics.split}: accuracy {frame.accuracy:.3f} [{low:.3f}, {high:.3f}]",
            ),
            "Confusion matrix",
            "True classes in rows, decided classes in columns: counts, and fractions of each true class.",
        ),
        (
            "roc",
            score_figures.roc(roc_curves(scored), title, _roc_points(metrics)),
            "ROC",
            "Sensitivity against the false positive rate as the threshold on the mean probability moves. Marked: the "
            "vote, and the operating points of the table below; cross-fitted points need not lie on the curve.",
        ),
        (
            "precision_recall",
            score_figures.precision_recall(scored, title),
            "Precision and recall",
            "Precision depends on how common a class is among these frames.",
        ),
        (
            "reliability",
            score_figures.reliability_diagram(
                sweep_bins(scored.confidence, scored.correct),
                scored.confidence,
                scored.correct,
                f"{title}, temperatures {calibration.temperature:g} and {calibration.frame_temperature:g}",
                sweep_bins(uncalibrated.confidence, uncalibrated.correct) if uncalibrated else None,
            ),
            "Reliability",
            "Above: accuracy of the decisions by confidence; equal on the dotted line. Below: number of frames by "
            "confidence.",
        ),
        (
            "probabilities",
            score_figures.histograms(scored, title, _thresholds(metrics)),
            "Probabilities",
            "Mean probability of the positive class, for the frames of each true class.",
        ),
        (
            "quadrants",
            vote_figures.quadrant_accuracy(metrics, title),
            "Quadrants",
            "Accuracy of each quadrant alone, and of the vote of the four.",
        ),
        (
            "agreement",
            vote_figures.agreement(metrics.vote_agreement, title),
            "Agreement of the quadrants",
            "Correct and wrong decisions by the number of quadrants that agree with the decision.",
        ),
        (
            "risk_coverage",
            score_figures.accuracy_coverage(
                coverage, risk, f"{title}, AURC {metrics.abstention.aurc:.4f}", metrics.abstention.at
            ),
            "Accuracy against coverage",
            "Accuracy when the least confident frames stay undecided.",
        ),
    ]
    pictures = []
    for name, figure, heading, caption in figures:
        path = folder / f"{name}.png"
        save(figure, path)
        pictures.append(Picture(path, heading, caption))
    return pictures


def _roc_points(metrics: EvaluationMetrics) -> list[RocPoint]:
    """Return the vote and the operating points whose rates are both measured."""
    rates = [("the vote", metrics.intervals.sensitivity, metrics.intervals.specificity)]
    rates += [
        (f"{point.fixed} at least {point.target:g}", point.sensitivity, point.specificity)
        for point in metrics.operating_points
        if point.sensitivity and point.specificity
    ]
    return [
        RocPoint(f"{short(metrics.frame.positive)}: {label}", sensitivity.estimate, specificity.estimate)
        for label, sensitivity, specificity in rates
        if sensitivity.estimate is not None and specificity.estimate is not None
    ]


def _thresholds(metrics: EvaluationMetrics) -> list[tuple[str, float]]:
    """Return label and value of each measured threshold; of cross-fitted thresholds the mean."""
    thresholds = []
    for point in metrics.operating_points:
        values = [value for value in point.thresholds if value is not None]
        if point.measured and values:
            label = f"{point.fixed} at least {point.target:g}"
            label += " (mean of the groups)" if point.cross_fitted else ""
            thresholds.append((label, float(np.mean(values))))
    return thresholds
