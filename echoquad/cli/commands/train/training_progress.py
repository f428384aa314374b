"""Progress of a training run on the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from echoquad.cli.framework.console import Progress, print_status

if TYPE_CHECKING:
    from echoquad_train.recipe import Recipe

__all__ = ["TrainingProgress", "describe_calibration"]


class TrainingProgress:
    """Reporter of a training run: a progress bar for each epoch, then a line with its figures.

    Parameters
    ----------
    recipe
        The recipe of the run; None if it is not known.
    """

    def __init__(self, recipe: Recipe | None = None) -> None:
        self._recipe = recipe
        self._progress: Progress | None = None
        self._label = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def decoding(self, split: str, done: int, total: int) -> None:
        """Show how many frames of a split are decoded."""
        self._show(f"decoding {split}", done, total)

    def started(self, device: str, precision: str, train: Any, validation: Any) -> None:
        """Print the size of the data set, the device and the precision."""
        from echoquad_runtime.contract import describe_layout, parse_layout
        from echoquad_train.training.optimizer_schedule import progressive_epochs

        self._close()
        for split in (train, validation):
            counts = ", ".join(f"{name} {count}" for name, count in split.counts.items())
            print_status(f"{split.name}: {len(split.frames)} frames ({counts})")
        if self._recipe and self._recipe.quadrant_layout != "reference":
            print_status(f"quadrant layout: {describe_layout(parse_layout(self._recipe.quadrant_layout))}")
        small = progressive_epochs(self._recipe) if self._recipe else 0
        sizes = f"; the first {small} epochs on smaller quadrants, validated at full size" if small else ""
        print_status(f"training on {device} in {precision}{sizes}")

    def audited(self, leaks: Any) -> None:
        """Print how patients were read from the names, and how many of them and of the frames are in both splits."""
        if leaks.reading is not None:
            print_status(leaks.reading.line)
        print_status(leaks.summary)

    def batch(self, epoch: int, done: int, total: int) -> None:
        """Show how many batches of an epoch are done."""
        self._show(f"epoch {epoch}", done, total)

    def epoch(self, epoch: Any, epochs: int, best: bool) -> None:
        """Print the figures of a finished epoch."""
        self._close()
        chosen = best and (self._recipe is None or self._recipe.model_epoch == "best")
        print_status(
            f"Epoch {epoch.epoch:02d}/{epochs} [{epoch.phase}] "
            f"train loss {epoch.train_loss:.4f} acc {epoch.train_patch_accuracy:.4f} | "
            f"val loss {epoch.validation_loss:.4f} acc {epoch.validation_patch_accuracy:.4f} "
            f"frame acc {epoch.validation_frame_accuracy:.4f} | lr {epoch.lr:.1e} | {epoch.seconds:.1f} s"
            f"{' | best' if chosen else ''}"
        )

    def _show(self, label: str, done: int, total: int) -> None:
        if self._progress is None or self._label != label:
            self._close()
            self._progress, self._label = Progress(label, total).__enter__(), label
        self._progress.update(done, total)

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
        self._progress = None


def describe_calibration(calibration: Mapping[str, Any]) -> str:
    """Return a line about the temperatures and the ECE of the ``calibration`` in a run's metadata."""
    before, after, crossed = calibration["before"], calibration["after"], calibration["cross_fitted"]
    note = f", {calibration['note']}" if calibration["note"] else ""
    cross_fitted = f", {crossed['ece']:.3f} cross-fitted by patient" if crossed else ""
    return (
        f"calibration: temperatures {calibration['temperature']:g} for quadrants, "
        f"{calibration['frame_temperature']:g} for frames{note}; "
        f"ECE {before['ece']:.3f} before, {after['ece']:.3f} after{cross_fitted}; "
        f"validation frame accuracy {after['frame_accuracy']:.4f}"
    )
