"""The figure of a run's training curves."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from echoquad_train.plot_style import BLUE, GREY, VERMILION
from echoquad_train.runs.history import Epoch

__all__ = ["training_curves"]


def training_curves(history: Sequence[Epoch], chosen: Epoch, progressive_epochs: int = 0) -> Figure:
    """Draw loss and accuracy by epoch.

    Parameters
    ----------
    history
        The epochs.
    chosen
        The one whose weights are the model; it is marked.
    progressive_epochs
        Number of epochs, the first ones, on smaller quadrants; they are shaded.
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    epochs = [epoch.epoch for epoch in history]
    marker = "o" if len(history) < 2 else None  # a line through one point is invisible
    for axes, figures, colour, label in (
        (losses, [epoch.train_loss for epoch in history], GREY, "train"),
        (losses, [epoch.validation_loss for epoch in history], BLUE, "validation"),
        (accuracies, [epoch.train_patch_accuracy for epoch in history], GREY, "train, quadrants"),
        (accuracies, [epoch.validation_patch_accuracy for epoch in history], BLUE, "validation, quadrants"),
        (accuracies, [epoch.validation_frame_accuracy for epoch in history], VERMILION, "validation, frames"),
    ):
        axes.plot(epochs, figures, color=colour, marker=marker, label=label)
    label = f"model: {chosen.validation_frame_accuracy:.3f} in epoch {chosen.epoch}"
    accuracies.plot(chosen.epoch, chosen.validation_frame_accuracy, "*", color=VERMILION, markersize=13, label=label)
    losses.set(title="Loss (quadrants)", xlabel="epoch", ylabel="cross-entropy in nats")
    accuracies.set(title="Accuracy", xlabel="epoch", ylabel="fraction right", ylim=(0, 1.02))
    if progressive_epochs:  # after them the training loss jumps: the network sees another size
        end = min(progressive_epochs, len(history)) + 0.5
        for axes in (losses, accuracies):
            axes.axvspan(0.5, end, color=GREY, alpha=0.12, lw=0, label="smaller quadrants")
    # loc="best" makes matplotlib search, and warn about its slowness on a busy machine.
    for axes, location in ((losses, "lower left"), (accuracies, "lower right")):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.legend(loc=location, fontsize="small")
    losses.set_ylim(bottom=0)
    return figure
