"""Figures of probabilities: ROC, precision-recall, reliability diagram, histograms, risk-coverage, confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import average_precision_score, precision_recall_curve

from echoquad_train.evaluation.abstention import AbstentionPoint
from echoquad_train.evaluation.arrays import BoolArray, Float64Array
from echoquad_train.evaluation.frame_metrics import RocCurve
from echoquad_train.evaluation.intervals import wilson_interval
from echoquad_train.evaluation.reliability import Bins
from echoquad_train.evaluation.scored_frames import ScoredFrames
from echoquad_train.plot_style import BLUE, GREY, VERMILION, short, stroke

__all__ = [
    "RocPoint",
    "accuracy_coverage",
    "confusion_matrix",
    "histograms",
    "precision_recall",
    "reliability_diagram",
    "roc",
]

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_SIZE = (6.4, 6.0)  # inches
_MAX_INSIDE = 6  # legend entries that fit inside the axes


@dataclass(frozen=True, slots=True)
class RocPoint:
    """A labelled point on a ROC figure."""

    label: str
    sensitivity: float
    specificity: float


def _legend(axes: Axes, entries: int, where: Literal["lower left", "lower right"]) -> None:
    """Add a legend inside the axes, or below them if it has too many entries."""
    if entries <= _MAX_INSIDE:
        axes.legend(loc=where, fontsize="small")
    else:
        axes.figure.legend(loc="outside lower center", fontsize="small", ncols=2)


def _unit_square(title: str, entries: int) -> tuple[Figure, Axes]:
    below = 0.0 if entries <= _MAX_INSIDE else 0.12 * entries + 0.3
    figure = Figure(figsize=(_SIZE[0], _SIZE[1] + below), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.set_aspect("equal")
    axes.grid(alpha=0.25)
    return figure, axes


def roc(curves: Sequence[RocCurve], title: str, points: Sequence[RocPoint] = ()) -> Figure:
    """Draw ROC curves and operating points."""
    entries = len(curves) + len(points) + 1
    figure, axes = _unit_square(title, entries)
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="chance")
    for index, curve in enumerate(curves):
        colour, style = stroke(index)
        # A wide first line of two stays visible below an equal second one.
        width = 4.0 if index == 0 and len(curves) == 2 else 1.6
        label = f"{short(curve.name)}, area {curve.area:.3f}"
        axes.plot(
            curve.false_positive, curve.true_positive, color=colour, linestyle=style, linewidth=width, label=label
        )
    for index, point in enumerate(points):
        axes.plot(
            1 - point.specificity,
            point.sensitivity,
            _MARKERS[index % len(_MARKERS)],
            color=stroke(index + 1)[0],
            markersize=9,
            markeredgecolor="black",
            label=point.label,
        )
    if not curves:
        axes.text(0.5, 0.8, "needs frames of both classes", ha="center")
    axes.set(xlabel="false positive rate (1 - specificity)", ylabel="true positive rate (sensitivity)")
    _legend(axes, entries, "lower right")
    return figure


def precision_recall(scored: ScoredFrames, title: str) -> Figure:
    """Draw precision against recall: of the positive class for two classes, of each against the rest for more."""
    classes = scored.classes
    candidates = [scored.positive] if len(classes) == 2 else classes
    truths = {name: truth for name in candidates if (truth := scored.labels == classes.index(name)).any()}
    figure, axes = _unit_square(title, len(truths) * (2 if len(truths) == 1 else 1))
    for index, (name, truth) in enumerate(truths.items()):
        score = scored.probabilities[:, classes.index(name)]
        precision, recall, _ = precision_recall_curve(truth, score)
        colour, style = stroke(index)
        label = f"{short(name)}, average precision {average_precision_score(truth, score):.3f}"
        axes.plot(recall, precision, color=colour, linestyle=style, drawstyle="steps-post", label=label)
        if len(truths) == 1:
            share = float(truth.mean())
            axes.axhline(share, color=GREY, linestyle=":", label=f"chance: {share:.3f} of the frames are {short(name)}")
    if truths:
        _legend(axes, len(axes.lines), "lower left")
    else:
        axes.text(0.5, 0.55, "needs frames of the positive class", ha="center")
    axes.set(xlabel="recall (sensitivity)", ylabel="precision (positive predictive value)")
    return figure


def reliability_diagram(
    bins: Bins, confidence: Float64Array, correct: BoolArray, title: str, uncalibrated: Bins | None = None
) -> Figure:
    """Draw accuracy by confidence in bins, with Wilson intervals, above the counts of correct and wrong frames.

    The confidence in the decided class is float64 [F]; `correct` is bool [F]; `uncalibrated` are the bins of the same
    frames without temperatures.
    """
    figure = Figure(figsize=(6.4, 8.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    begin = min(0.5, float(np.floor(confidence.min() * 10) / 10))
    upper.plot([begin, 1], [begin, 1], color=GREY, linestyle=":", label="perfectly calibrated")
    if uncalibrated is not None:
        label = f"plain mean, no temperature: ECE {uncalibrated.error:.3f}"
        upper.plot(uncalibrated.confidence, uncalibrated.accuracy, "x--", color=VERMILION, label=label, alpha=0.8)
    hits = np.rint(bins.accuracy * bins.counts).astype(int)
    bounds = np.array([wilson_interval(int(hit), int(count)) for hit, count in zip(hits, bins.counts, strict=True)])
    spread = np.abs(np.column_stack([bins.accuracy - bounds[:, 0], bounds[:, 1] - bins.accuracy]).T)
    label = f"as reported: ECE {bins.error:.3f}; bars: 95 % intervals"
    upper.errorbar(bins.confidence, bins.accuracy, spread, fmt="o-", color=BLUE, capsize=3, label=label)
    fewest, most = bins.counts.min(), bins.counts.max()
    counts = f"{len(confidence)} frames in bins of {fewest}" + (f" to {most}" if most > fewest else "")
    low = min(begin, float(np.floor(bounds.min() * 10) / 10))
    upper.set(title=title, ylabel=f"accuracy ({counts})", xlim=(begin - 0.01, 1.01), ylim=(low - 0.02, 1.02))
    upper.grid(alpha=0.25)
    lower.hist(
        [confidence[correct], confidence[~correct]],
        list(np.linspace(begin, 1, 21)),
        stacked=True,
        color=[BLUE, VERMILION],
        label=[f"right ({int(correct.sum())})", f"wrong ({int((~correct).sum())})"],
    )
    lower.set(xlabel="confidence in the decided class", ylabel="frames")
    lower.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", fontsize="small", ncols=2)
    lower.grid(alpha=0.25)
    lower.set_axisbelow(True)
    return figure


def histograms(scored: ScoredFrames, title: str, thresholds: Sequence[tuple[str, float]] = ()) -> Figure:
    """Draw histograms of the mean probability of the positive class, one row for the frames of each true class.

    `thresholds` (label and value) are marked in all rows.
    """
    classes = scored.classes
    height = 1.5 if len(classes) == 2 else 0.95
    figure = Figure(figsize=(7.2, 1.5 + height * len(classes) + 0.2 * len(thresholds)), layout="constrained")
    rows = figure.subplots(len(classes), 1, sharex=True, squeeze=False)[:, 0]
    edges = list(np.linspace(0, 1, 26))
    for index, (name, axes) in enumerate(zip(classes, rows, strict=True)):
        values = scored.score[scored.labels == index]
        axes.hist(values, edges, color=stroke(index)[0], alpha=0.85)
        for number, (label, value) in enumerate(thresholds):
            colour, style = stroke(number + 2)
            axes.axvline(min(value, 1.0), color=colour, linestyle=style, label=label if index == 0 else None)
        count = f"{len(values)} frames" if len(values) else "no frame"
        axes.set_title(f"true {short(name)}, {count}", loc="left", fontsize="small")
        axes.set_ylabel("frames", fontsize="small")
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.set_xlim(0, 1)
        if not len(values):
            axes.set_ylim(0, 1)
            axes.set_yticks([0])
    rows[-1].set_xlabel(f"mean probability of {short(scored.positive)}")
    figure.suptitle(title, fontsize="large")
    if thresholds:
        figure.legend(loc="outside lower center", fontsize="small")
    return figure


def accuracy_coverage(
    coverage: Float64Array, risk: Float64Array, title: str, at: AbstentionPoint | None = None
) -> Figure:
    """Draw the risk-coverage curve, float64 [K], as accuracy of the decided frames by coverage; mark the point `at`."""
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    accuracy = 1 - risk
    axes.plot(coverage, accuracy, color=BLUE, drawstyle="steps-post", marker="o" if len(coverage) < 2 else None)
    axes.plot(coverage[-1], accuracy[-1], "o", color=BLUE, label=f"all decided: accuracy {accuracy[-1]:.3f}")
    if at is not None and at.coverage.estimate is not None and at.accuracy.estimate is not None:
        decided, reached = at.coverage.estimate, at.accuracy.estimate
        label = f"INDETERMINATE below {at.below:g}: {decided:.1%} decided, accuracy {reached:.3f}"
        axes.plot(decided, reached, "D", color=VERMILION, markersize=9, markeredgecolor="black", label=label)
    low = max(0.0, min(float(accuracy.min()), 0.95) - 0.05)
    axes.set(
        title=title,
        xlabel="coverage: fraction of the frames that is decided, most confident first",
        ylabel="accuracy among these",
        xlim=(0, 1.02),
        ylim=(low, 1.005 + 0.01 * (1 - low)),
    )
    axes.grid(alpha=0.25)
    axes.legend(loc="lower left", fontsize="small")
    return figure


def confusion_matrix(matrix: npt.NDArray[np.int64], classes: Sequence[str], title: str) -> Figure:
    """Draw a confusion matrix, int64 [C, C], true classes in rows: counts, shaded by their fraction of the row."""
    side = 3.2 + 0.7 * len(classes) + 0.06 * max(len(short(name)) for name in classes)
    figure = Figure(figsize=(side + 0.9, side), layout="constrained")
    axes = figure.subplots()
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*matrix.shape):
        share = shares[row, column]
        text = f"{matrix[row, column]}\n{share:.1%}"
        axes.text(column, row, text, ha="center", va="center", color="white" if share > 0.55 else "black")
    ticks = range(len(classes))
    names = [short(name) for name in classes]
    slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(ticks, names, **(slanted if max(map(len, names)) > 8 else {}))
    axes.set_yticks(ticks, names)
    axes.set(title=title, xlabel="decided", ylabel="true")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    return figure
