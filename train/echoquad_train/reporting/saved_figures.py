"""The figures of an evaluation, drawn and written, each with what it says in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from echoquad_runtime.contract import Contract
from echoquad_train import plot_style as figures
from echoquad_train.evaluation.abstention import risk_coverage
from echoquad_train.evaluation.metrics import plain, roc_curves
from echoquad_train.evaluation.reliability import sweep_bins
from echoquad_train.evaluation.scored_frames import ScoredFrames
from echoquad_train.reporting import score_figures as figures_scores
from echoquad_train.reporting import vote_figures as figures_votes

__all__ = ["Picture", "point_words", "save_figures"]


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure on the disk, and what it shows."""

    path: Path
    title: str
    caption: str


def point_words(point: Mapping[str, Any]) -> str:
    """Call an operating point by what it holds."""
    return f"{point['fixed']} at least {point['target']:g}"


def save_figures(judged: ScoredFrames, contract: Contract, metrics: Mapping[str, Any], folder: Path) -> list[Picture]:
    """Draw and write the figures of an evaluation, in the order in which a report shows them.

    Raises
    ------
    OutputError
        If the system refuses.
    """
    split, classes, positive = metrics["split"], judged.classes, judged.positive
    low, high = metrics["accuracy_ci95"]
    which = f"{split}: {len(judged)} frames"
    curves = roc_curves(judged.probabilities, judged.labels, classes, positive)
    wanted = [positive] if len(classes) == 2 else list(classes)
    points = [(point_words(point), point) for point in metrics["operating_points"] if _measured(point)]
    marks = [figures_scores.Point(f"{figures.short(positive)}: {words}", *_rates(point)) for words, point in points]
    vote = metrics["intervals"]
    if vote["sensitivity"]["estimate"] is not None and vote["specificity"]["estimate"] is not None:
        marks.insert(
            0,
            figures_scores.Point(
                f"{figures.short(positive)}: the vote", vote["sensitivity"]["estimate"], vote["specificity"]["estimate"]
            ),
        )
    thresholds = [(words, float(point["threshold"])) for words, point in points if point.get("threshold") is not None]
    thresholds += [
        (f"{words} (mean of the groups)", float(np.mean(point["thresholds"])))
        for words, point in points
        if point.get("thresholds")
    ]
    _, coverage, risk = risk_coverage(judged.confidence, judged.right)
    at = metrics["abstention"].get("at")
    marked = None
    if at and at["accuracy"]["estimate"] is not None:
        accuracy = at["accuracy"]["estimate"]
        marked = (
            f"INDETERMINATE below {at['below']:g}: {at['coverage']['estimate']:.1%} decided, accuracy {accuracy:.3f}",
            at["coverage"]["estimate"],
            accuracy,
        )
    calibration = metrics["calibration"]
    uncalibrated = plain(judged, contract) if calibration["uncalibrated"] else None
    words = f"temperatures {calibration['temperature']:g} and {calibration['frame_temperature']:g}"
    shares = {name: (share, metrics["quadrant_ci95"][name]) for name, share in metrics["per_quadrant"].items()} | {
        "vote": (metrics["accuracy"], vote["accuracy"]["ci95"])
    }
    drawn: list[tuple[str, Figure, str, str]] = [
        (
            "confusion",
            figures_scores.confusion(
                np.array(metrics["confusion"]),
                classes,
                f"{split}: accuracy {metrics['accuracy']:.3f} [{low:.3f}, {high:.3f}]",
            ),
            "Confusion matrix",
            "True classes in rows, decided ones in columns: counts, and shares of each true class.",
        ),
        (
            "roc",
            figures_scores.roc(curves, which, marks),
            "ROC",
            "Sensitivity against the false positive rate as the threshold on the mean probability moves. Marked: the "
            "vote, and operating points with thresholds as stated below; cross-fitted ones need not lie on the curve.",
        ),
        (
            "precision_recall",
            figures_scores.precision_recall(judged.probabilities, judged.labels, classes, wanted, which),
            "Precision and recall",
            "Precision hangs on how common a class is among these frames; it is another where the class is rarer.",
        ),
        (
            "reliability",
            figures_scores.reliability_diagram(
                sweep_bins(judged.confidence, judged.right),
                judged.confidence,
                judged.right,
                f"{which}, {words}",
                sweep_bins(uncalibrated.confidence, uncalibrated.right) if uncalibrated else None,
            ),
            "Reliability",
            "Above: how often decisions of a confidence are right; on the dotted line, as often as they claim. Below: "
            "how many frames have that confidence.",
        ),
        (
            "probabilities",
            figures_scores.histograms(judged.score, judged.labels, classes, positive, which, thresholds),
            "Probabilities",
            "The mean probability of the positive class in the frames of each true class.",
        ),
        (
            "quadrants",
            figures_votes.quadrants(shares, which, len(classes)),
            "Quadrants",
            "How often each quadrant alone is right, and the vote of the four.",
        ),
        (
            "agreement",
            figures_votes.agreement(metrics["vote_agreement"], which),
            "Agreement of the quadrants",
            "Decisions that fewer quadrants share are right less often, if agreement tells anything.",
        ),
        (
            "risk_coverage",
            figures_scores.risk_coverage_curve(
                coverage, risk, f"{which}, AURC {metrics['abstention']['aurc']:.4f}", marked
            ),
            "Accuracy against coverage",
            "How accuracy rises where the least sure frames are left undecided.",
        ),
    ]
    pictures = []
    for name, figure, title, caption in drawn:
        path = folder / f"{name}.png"
        figures.save(figure, path)
        pictures.append(Picture(path, title, caption))
    return pictures


def _measured(point: Mapping[str, Any]) -> bool:
    return all(point[name] and point[name]["estimate"] is not None for name in ("sensitivity", "specificity"))


def _rates(point: Mapping[str, Any]) -> tuple[float, float]:
    return point["sensitivity"]["estimate"], point["specificity"]["estimate"]
