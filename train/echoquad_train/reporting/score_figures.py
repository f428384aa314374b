"""Figures of probabilities: ROC, precision and recall, reliability, histograms, risk against coverage."""

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

from echoquad_train.evaluation.intervals import wilson_interval
from echoquad_train.evaluation.reliability import Bins, Floats
from echoquad_train.plot_style import BLUE, GREY, ORANGE, short, stroke

__all__ = [
    "Curve",
    "Point",
    "confusion",
    "histograms",
    "precision_recall",
    "reliability_diagram",
    "risk_coverage_curve",
    "roc",
]

Curve = tuple[str, Floats, Floats, float]
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_SIZE = (6.4, 6.0)  # inches
_FEWEST = _PAIR = 2


@dataclass(frozen=True, slots=True)
class Point:
    """An operating point to mark: what to call it, and where it lies."""

    label: str
    sensitivity: float
    specificity: float


def _legend(axes: Axes, entries: int, where: Literal["lower left", "lower right"]) -> None:
    """Put a legend inside while there is room for it, else below the axes."""
    if entries <= 6:
        axes.legend(loc=where, fontsize="small")
    else:
        axes.figure.legend(loc="outside lower center", fontsize="small", ncols=2)


def _square(title: str, entries: int) -> tuple[Figure, Axes]:
    below = 0.0 if entries <= 6 else 0.12 * entries + 0.3
    figure = Figure(figsize=(_SIZE[0], _SIZE[1] + below), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.set_aspect("equal")
    axes.grid(alpha=0.25)
    return figure, axes


def roc(curve: Sequence[Curve], title: str, points: Sequence[Point] = ()) -> Figure:
    """Draw ROC curves: name, false positive rate, true positive rate and area of each; and operating points."""
    figure, axes = _square(title, len(curve) + len(points) + 1)
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="chance")
    for index, (name, false_positive, true_positive, area) in enumerate(curve):
        colour, style = stroke(index)
        label = f"{short(name)}, area {area:.3f}"
        # The first of a pair is drawn broad, so that it is seen below another that is the same.
        width = 4.0 if index == 0 and len(curve) == _PAIR else 1.6
        axes.plot(false_positive, true_positive, color=colour, linestyle=style, linewidth=width, label=label)
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
    if not curve:
        axes.text(0.5, 0.8, "needs frames of both classes", ha="center")
    axes.set(xlabel="false positive rate (1 - specificity)", ylabel="true positive rate (sensitivity)")
    _legend(axes, len(curve) + len(points) + 1, "lower right")
    return figure


def precision_recall(
    probabilities: Floats, labels: npt.NDArray[np.int64], classes: Sequence[str], wanted: Sequence[str], title: str
) -> Figure:
    """Draw precision against recall of the classes `wanted`, each against the rest, and what chance would reach."""
    drawn = [name for name in wanted if (labels == classes.index(name)).any()]
    figure, axes = _square(title, len(drawn) * (2 if len(drawn) == 1 else 1))
    for index, name in enumerate(drawn):
        truth = labels == classes.index(name)
        score = probabilities[:, classes.index(name)]
        precision, recall, _ = precision_recall_curve(truth, score)
        colour, style = stroke(index)
        label = f"{short(name)}, average precision {average_precision_score(truth, score):.3f}"
        axes.plot(recall, precision, color=colour, linestyle=style, drawstyle="steps-post", label=label)
        if len(drawn) == 1:
            share = float(truth.mean())
            axes.axhline(share, color=GREY, linestyle=":", label=f"chance: {share:.3f} of the frames are {short(name)}")
    if not drawn:
        axes.text(0.5, 0.55, "needs frames of the positive class", ha="center")
    else:
        _legend(axes, len(axes.lines), "lower left")
    axes.set(xlabel="recall (sensitivity)", ylabel="precision (positive predictive value)")
    return figure


def reliability_diagram(
    bins: Bins, confidence: Floats, right: npt.NDArray[np.bool_], title: str, before: Bins | None = None
) -> Figure:
    """Draw accuracy against confidence in bins, with Wilson intervals, above the counts of right and wrong frames.

    Parameters
    ----------
    bins
        The frames in bins.
    confidence, right
        float64 [F] and bool [F]: the confidence in the decided class, and whether it is the true one.
    title
        What it is of.
    before
        The bins of the same frames without temperatures, where there were any.
    """
    figure = Figure(figsize=(6.4, 8.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    begin = min(0.5, float(np.floor(confidence.min() * 10) / 10))
    upper.plot([begin, 1], [begin, 1], color=GREY, linestyle=":", label="perfectly calibrated")
    if before is not None:
        label = f"plain mean, no temperature: ECE {before.error:.3f}"
        upper.plot(before.confidence, before.accuracy, "x--", color=ORANGE, label=label, alpha=0.8)
    hits = np.rint(bins.accuracy * bins.counts).astype(int)
    bounds = np.array([wilson_interval(int(hit), int(count)) for hit, count in zip(hits, bins.counts, strict=True)])
    spread = np.abs(np.column_stack([bins.accuracy - bounds[:, 0], bounds[:, 1] - bins.accuracy]).T)
    upper.errorbar(
        bins.confidence,
        bins.accuracy,
        spread,
        fmt="o-",
        color=BLUE,
        capsize=3,
        label=f"as reported: ECE {bins.error:.3f}; bars: 95 % intervals",
    )
    counts = f"{len(confidence)} frames in bins of {bins.counts.min()}" + (
        f" to {bins.counts.max()}" if bins.counts.max() > bins.counts.min() else ""
    )
    low = min(begin, float(np.floor(bounds.min() * 10) / 10))
    upper.set(title=title, ylabel=f"accuracy ({counts})", xlim=(begin - 0.01, 1.01), ylim=(low - 0.02, 1.02))
    upper.grid(alpha=0.25)
    edges = np.linspace(begin, 1, 21)
    lower.hist(
        [confidence[right], confidence[~right]],
        list(edges),
        stacked=True,
        color=[BLUE, ORANGE],
        label=[f"right ({int(right.sum())})", f"wrong ({int((~right).sum())})"],
    )
    lower.set(xlabel="confidence in the decided class", ylabel="frames")
    lower.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", fontsize="small", ncols=2)
    lower.grid(alpha=0.25)
    lower.set_axisbelow(True)
    return figure


def histograms(
    score: Floats,
    labels: npt.NDArray[np.int64],
    classes: Sequence[str],
    positive: str,
    title: str,
    thresholds: Sequence[tuple[str, float]] = (),
) -> Figure:
    """Draw how the positive class's mean probability, float64 [F], lies in the frames of each true class, a row each.

    `thresholds` are marked in all rows: what to call each, and where it lies.
    """
    height = 1.5 if len(classes) <= _FEWEST else 0.95
    figure = Figure(figsize=(7.2, 1.5 + height * len(classes) + 0.2 * len(thresholds)), layout="constrained")
    rows = figure.subplots(len(classes), 1, sharex=True, squeeze=False)[:, 0]
    edges = list(np.linspace(0, 1, 26))
    for index, (name, axes) in enumerate(zip(classes, rows, strict=True)):
        values = score[labels == index]
        axes.hist(values, edges, color=stroke(index)[0], alpha=0.85)
        for number, (label, value) in enumerate(thresholds):
            colour, style = stroke(number + 2)
            axes.axvline(min(value, 1.0), color=colour, linestyle=style, label=label if index == 0 else None)
        words = f"true {short(name)}, {len(values)} frames" if len(values) else f"true {short(name)}, no frame"
        axes.set_title(words, loc="left", fontsize="small")
        axes.set_ylabel("frames", fontsize="small")
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.set_xlim(0, 1)
        if not len(values):
            axes.set_ylim(0, 1)
            axes.set_yticks([0])
    rows[-1].set_xlabel(f"mean probability of {short(positive)}")
    figure.suptitle(title, fontsize="large")
    if thresholds:
        figure.legend(loc="outside lower center", fontsize="small")
    return figure


def risk_coverage_curve(
    coverage: Floats, risk: Floats, title: str, at: tuple[str, float, float] | None = None
) -> Figure:
    """Draw accuracy among the decided frames against the share that is decided.

    Parameters
    ----------
    coverage, risk
        float64 [K], of `echoquad_train.evaluation.abstention.risk_coverage`.
    title
        What it is of.
    at
        A point to mark: what to call it, its coverage and its accuracy.
    """
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    accuracy = 1 - risk
    axes.plot(coverage, accuracy, color=BLUE, drawstyle="steps-post", marker="o" if len(coverage) < _FEWEST else None)
    axes.plot(coverage[-1], accuracy[-1], "o", color=BLUE, label=f"all decided: accuracy {accuracy[-1]:.3f}")
    if at is not None:
        axes.plot(at[1], at[2], "D", color=ORANGE, markersize=9, markeredgecolor="black", label=at[0])
    low = max(0.0, min(float(accuracy.min()), 0.95) - 0.05)
    axes.set(
        title=title,
        xlabel="coverage: share of the frames that is decided, the surest first",
        ylabel="accuracy among these",
        xlim=(0, 1.02),
        ylim=(low, 1.005 + 0.01 * (1 - low)),
    )
    axes.grid(alpha=0.25)
    axes.legend(loc="lower left", fontsize="small")
    return figure


def confusion(matrix: npt.NDArray[np.int64], classes: Sequence[str], title: str) -> Figure:
    """Draw a confusion matrix, int64 [C, C], true classes in rows: counts, and each row's shares as shades."""
    side = 3.2 + 0.7 * len(classes) + 0.06 * max(len(short(name)) for name in classes)
    figure = Figure(figsize=(side + 0.9, side), layout="constrained")
    axes = figure.subplots()
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*matrix.shape):
        share = shares[row, column]
        words = f"{matrix[row, column]}\n{share:.1%}"
        axes.text(column, row, words, ha="center", va="center", color="white" if share > 0.55 else "black")
    ticks = range(len(classes))
    names = [short(name) for name in classes]
    slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(ticks, names, **(slanted if max(map(len, names)) > 8 else {}))
    axes.set_yticks(ticks, names)
    axes.set(title=title, xlabel="decided", ylabel="true")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    return figure
