"""Figures of quadrants and votes: accuracy of each quadrant, and agreement of the quadrants with the decision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from echoquad_train.evaluation.frame_metrics import VoteAgreement
from echoquad_train.evaluation.metrics import EvaluationMetrics
from echoquad_train.plot_style import BLUE, GREY, VERMILION

__all__ = ["agreement", "quadrant_accuracy"]


def quadrant_accuracy(metrics: EvaluationMetrics, title: str) -> Figure:
    """Draw the accuracy of each quadrant and of the vote, with bootstrap intervals."""
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    bars = [(name, value, metrics.quadrant_ci95[name]) for name, value in metrics.frame.per_quadrant.items()]
    bars.append(("vote", metrics.frame.accuracy, metrics.intervals.accuracy.ci95))
    for index, (name, value, interval) in enumerate(bars):
        axes.bar(index, value, color=VERMILION if name == "vote" else BLUE, width=0.65)
        top = value
        if interval is not None:
            spread = [[max(0.0, value - interval[0])], [max(0.0, interval[1] - value)]]
            axes.errorbar(index, value, spread, color="black", capsize=5, fmt="none")
            top = max(value, interval[1])
        axes.text(index, top + 0.015, f"{value:.3f}", ha="center", fontsize="small")
    classes = len(metrics.frame.classes)
    axes.axhline(1 / classes, color=GREY, linestyle=":", label=f"even chance of {classes} classes")
    axes.set_xticks(range(len(bars)), [name for name, *_ in bars])
    axes.set(title=title, ylabel="accuracy (bars: 95 % intervals by patient)", ylim=(0, 1.16))
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.legend(loc="upper left", fontsize="small")
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)
    return figure


def agreement(rows: Sequence[VoteAgreement], title: str) -> Figure:
    """Draw correct and wrong decisions by the number of quadrants that agree with the decision."""
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    counts = np.array([row.quadrants for row in rows])
    right = np.array([row.right for row in rows])
    wrong = np.array([row.frames for row in rows]) - right
    axes.bar(counts, right, color=BLUE, width=0.65, label=f"right ({right.sum()})")
    axes.bar(counts, wrong, bottom=right, color=VERMILION, width=0.65, label=f"wrong ({wrong.sum()})")
    most = max(1, int((right + wrong).max()))
    for row in rows:
        text = "no frame" if row.accuracy is None else f"{row.accuracy:.1%} right"
        axes.text(row.quadrants, row.frames + 0.02 * most, text, ha="center", fontsize="small")
    axes.set_xticks(counts)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=title, xlabel="quadrants that agree with the decision", ylabel="frames", ylim=(0, 1.25 * most))
    axes.legend(loc="upper left", fontsize="small")
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)
    return figure
