"""Figures of quadrants and votes: how often each is right, and how many agree; and of two models' accuracies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from echoquad_train.plot_style import BLUE, GREY, ORANGE

__all__ = ["agreement", "quadrants"]


def quadrants(shares: Mapping[str, tuple[float, Sequence[float] | None]], title: str, classes: int) -> Figure:
    """Draw the accuracy of each quadrant, and of the vote, with its interval; `classes` says what chance is."""
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    names = list(shares)
    for index, (share, bounds) in enumerate(shares.values()):
        colour = ORANGE if index == len(names) - 1 else BLUE
        axes.bar(index, share, color=colour, width=0.65)
        top = share
        if bounds is not None:
            spread = [[max(0.0, share - bounds[0])], [max(0.0, bounds[1] - share)]]
            axes.errorbar(index, share, spread, color="black", capsize=5, fmt="none")
            top = max(share, bounds[1])
        axes.text(index, top + 0.015, f"{share:.3f}", ha="center", fontsize="small")
    axes.axhline(1 / classes, color=GREY, linestyle=":", label=f"even chance of {classes} classes")
    axes.set_xticks(range(len(names)), names)
    axes.set(title=title, ylabel="accuracy (bars: 95 % intervals by patient)", ylim=(0, 1.16))
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.legend(loc="upper left", fontsize="small")
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)
    return figure


def agreement(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draw, by how many quadrants agree with the decision, the frames that are judged rightly and wrongly."""
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    counts = np.array([row["quadrants"] for row in rows])
    right = np.array([row["right"] for row in rows])
    wrong = np.array([row["frames"] - row["right"] for row in rows])
    axes.bar(counts, right, color=BLUE, width=0.65, label=f"right ({right.sum()})")
    axes.bar(counts, wrong, bottom=right, color=ORANGE, width=0.65, label=f"wrong ({wrong.sum()})")
    most = max(1, int((right + wrong).max()))
    for row in rows:
        words = f"{row['accuracy']:.1%} right" if row["frames"] else "no frame"
        axes.text(row["quadrants"], row["frames"] + 0.02 * most, words, ha="center", fontsize="small")
    axes.set_xticks(counts)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=title, xlabel="quadrants that agree with the decision", ylabel="frames", ylim=(0, 1.25 * most))
    axes.legend(loc="upper left", fontsize="small")
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)
    return figure
