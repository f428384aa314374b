"""``echoquad train --folds``: cross-validation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from echoquad.cli.commands.train.training_progress import TrainingProgress
from echoquad.cli.framework.console import format_command, format_table, print_failures, print_result, print_status
from echoquad_runtime.errors import UsageError

if TYPE_CHECKING:
    from echoquad_train.recipe import Recipe

__all__ = ["is_cross_validation", "train_folds"]

_FIGURES = ("accuracy", "balanced_accuracy", "roc_auc", "patch_accuracy")


def is_cross_validation(out: Path) -> bool:
    """Return whether a folder contains a cross-validation, finished or not."""
    from echoquad_train.runs.checkpoint import RUN, read_info

    return (out / RUN).is_file() and "folds" in read_info(out)


def train_folds(
    data: Path, out: Path, recipe: Recipe, folds: int | None, patient_regex: str | None, *, resume: bool, **options: Any
) -> int:
    """Train the folds, print the out-of-fold figures and return the exit code.

    A resumed folder provides `folds` and `patient_regex` if they are None. `options` are those of
    `echoquad_train.fitting.cross_validation.fit_folds`.

    Raises
    ------
    UsageError
        Under torchrun.
    """
    from echoquad_train.parallel.torchrun import torchrun_rank

    if torchrun_rank().world_size > 1:
        raise UsageError("--folds under torchrun: one process trains the folds; start it without torchrun")
    from echoquad_train.fitting.cross_validation import fit_folds, saved_fold_settings
    from echoquad_train.fitting.fold_splits import FoldSettings

    begun = saved_fold_settings(out) if resume else None
    count = folds or (begun.folds if begun else 0)
    regex = begun.patient_regex if begun and patient_regex is None else patient_regex
    settings = FoldSettings(count, regex)
    with FoldProgress(recipe) as progress:
        folded = fit_folds(data, out, recipe, settings, resume=resume, reporter=progress, **options)
    print_result(_summarize(folded.out_of_fold))
    print_status(f"out of fold: {_describe_pooled(folded.out_of_fold['pooled'])}")
    print_status(
        "no fold chose anything: epoch, learning rate and temperatures come from a validation split of the other "
        f"folds; {out.as_posix()}/ is an ensemble now"
    )
    print_status(f"next: {format_command('export', out.as_posix(), '--out', 'BUNDLE')}")
    return print_failures(folded.failures, done=1)


def _summarize(figures: dict[str, Any]) -> str:
    def row(label: str, frames: object, patients: object, values: dict[str, Any]) -> list[str]:
        cells = [f"{values[name]:.4f}" if values.get(name) is not None else "none" for name in _FIGURES]
        return [label, str(frames), str(patients), *cells]

    folds, pooled = figures["folds"], figures["pooled"]
    rows = [row(f"fold {fold['fold']}", fold["frames"], fold["patients"], fold) for fold in folds]
    rows += [
        row("pooled", pooled["frames"], sum(fold["patients"] for fold in folds), pooled),
        row("mean of folds", "", "", figures["mean"]),
        row("standard deviation", "", "", figures["standard_deviation"]),
    ]
    return format_table(["out of fold", "frames", "patients", "accuracy", "balanced", "ROC AUC", "quadrants"], rows)


def _describe_pooled(pooled: dict[str, Any]) -> str:
    """Return accuracy and ROC AUC of all frames, with their intervals."""
    intervals, found = pooled["intervals"], []
    for label, name in (("accuracy", "accuracy"), ("ROC AUC", "roc_auc")):
        value, interval = intervals[name]["estimate"], intervals[name]["ci95"]
        bounds = f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
        found.append(f"{label} none" if value is None else f"{label} {value:.4f}{bounds}")
    frames = f"{pooled['frames']} frames of {intervals['patients']} patients"
    return f"{', '.join(found)}; 95 % intervals by patient, {frames}"


class FoldProgress(TrainingProgress):
    """Reporter of the runs of a cross-validation, one after the other."""

    def fold(self, number: int, folds: int, *, finished: bool) -> None:
        """Print which fold starts."""
        self._close()
        print_status(f"fold {number} of {folds}{': finished before' if finished else ''}")

    def judging(self, number: int, done: int, total: int) -> None:
        """Show how many held-out frames of a fold are classified."""
        self._show(f"judging fold {number}", done, total)
