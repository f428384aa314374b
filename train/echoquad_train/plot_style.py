"""Figures: what all of them share, training curves, and the confusion matrix.

Drawn without a display and without pyplot's global state. `figures_scores` and `figures_votes` have the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from echoquad_runtime.storage.atomic import write_atomically
from echoquad_train.runs.history import Epoch, best_of

__all__ = ["BLUE", "GREY", "ORANGE", "confusion", "curves", "save", "short", "stroke"]

# Okabe and Ito's palette, which readers with a colour vision deficiency can tell apart. doi:10.1038/nmeth.1618
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREY = "#7F7F7F"
_CLASSES = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


_LONGEST = 28  # characters of a class's name in a figure


def stroke(index: int) -> tuple[str, str]:
    """Give the colour and the line style of the class of an index: 21 pairs, then from the beginning."""
    return _CLASSES[index % len(_CLASSES)], ("-", "--", "-.")[index // len(_CLASSES) % 3]


def short(name: str, longest: int = _LONGEST) -> str:
    """Shorten a class's name to what a figure has room for; long names often differ at their ends."""
    tail = longest // 3
    return name if len(name) <= longest else f"{name[: longest - 1 - tail]}…{name[-tail:]}"


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically.

    Raises
    ------
    OutputError
        If the system refuses.
    """
    FigureCanvasAgg(figure)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a class may be called A$B$C
    with write_atomically(path) as stream, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as a box: of no harm
        figure.savefig(stream, format="png", dpi=150)


def curves(history: Sequence[Epoch], small: int = 0) -> Figure:
    """Draw loss and accuracy by epoch, the best one marked, the first `small` shaded: trained on smaller quadrants."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    epochs = [epoch.epoch for epoch in history]
    marker = "o" if len(history) < 2 else None  # a line of one point would not be seen
    for axes, figures, colour, label in (
        (losses, [epoch.train_loss for epoch in history], GREY, "train"),
        (losses, [epoch.validation_loss for epoch in history], BLUE, "validation"),
        (accuracies, [epoch.train_patch_accuracy for epoch in history], GREY, "train, quadrants"),
        (accuracies, [epoch.validation_patch_accuracy for epoch in history], BLUE, "validation, quadrants"),
        (accuracies, [epoch.validation_frame_accuracy for epoch in history], ORANGE, "validation, frames"),
    ):
        axes.plot(epochs, figures, color=colour, marker=marker, label=label)
    best = best_of(history)
    accuracies.plot(
        best.epoch,
        best.validation_frame_accuracy,
        "*",
        color=ORANGE,
        markersize=13,
        label=f"best: {best.validation_frame_accuracy:.3f} in epoch {best.epoch}",
    )
    losses.set(title="Loss (quadrants)", xlabel="epoch", ylabel="cross-entropy in nats")
    accuracies.set(title="Accuracy", xlabel="epoch", ylabel="fraction right", ylim=(0, 1.02))
    if small:  # where they end, the training loss leaps: the network meets another size
        for axes in (losses, accuracies):
            axes.axvspan(0.5, min(small, len(history)) + 0.5, color=GREY, alpha=0.12, lw=0, label="smaller quadrants")
    # Where "best" is, matplotlib would look for, and warn on a machine that is busy.
    for axes, place in ((losses, "lower left"), (accuracies, "lower right")):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.legend(loc=place, fontsize="small")
    losses.set_ylim(bottom=0)
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
