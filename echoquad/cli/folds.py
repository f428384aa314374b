"""What ``echoquad train --folds`` does and prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from echoquad.cli.console import list_failures, note, say, table
from echoquad.cli.train import TrainingProgress
from echoquad_runtime.errors import UsageError

if TYPE_CHECKING:
    from echoquad_train.recipe import Recipe

__all__ = ["is_folded", "require_folds", "summarize_folds", "train_folds"]

_FIGURES = ("accuracy", "balanced_accuracy", "roc_auc", "patch_accuracy")


def is_folded(out: Path) -> bool:
    """Tell whether a folder is one of folds that were begun."""
    from echoquad_train.runs.checkpoint import RUN, read_info

    return (out / RUN).is_file() and "folds" in read_info(out)


def train_folds(
    data: Path, out: Path, recipe: Recipe, folds: int | None, patient_regex: str | None, *, resume: bool, **options: Any
) -> int:
    """Train in folds, print what they came to, and give the exit code. What is not given, a resumed folder says.

    `options` are `echoquad_train.fitting.cross_validation.fit_folds`'s.

    Raises
    ------
    UsageError
        Under torchrun.
    """
    from echoquad_train.parallel.torchrun import torchrun_rank

    if torchrun_rank().world_size > 1:
        raise UsageError("--folds under torchrun: folds are trained by one process; start it without torchrun")
    from echoquad_train.fitting.cross_validation import FoldSettings, fit_folds, saved_fold_settings

    begun = saved_fold_settings(out) if resume else None
    count = folds or (begun.folds if begun else 0)
    regex = patient_regex if patient_regex is not None or begun is None else begun.patient_regex
    settings = FoldSettings(count, regex)
    with FoldProgress() as progress:
        folded = fit_folds(data, out, recipe, settings, resume=resume, reporter=progress, **options)
    say(summarize_folds(folded.out_of_fold))
    note(
        f"out of fold: {folded.out_of_fold['caveat']}, so figures are optimistic; {out.as_posix()}/ is an ensemble now"
    )
    note(f"next: echoquad export {out.as_posix()} --out BUNDLE")
    return list_failures(folded.failures, done=1)


def require_folds(folds: int | None, teacher: Path | None, linear: str | None) -> None:
    """Refuse options that contradict each other.

    Raises
    ------
    UsageError
        If they do.
    """
    if folds is not None and linear is not None:
        raise UsageError(f"--folds with --fit {linear}: folds train networks; leave out one of the two")
    if folds is not None and teacher is not None:
        raise UsageError(
            "--folds with --teacher: the teacher has learned from frames that folds hold out; leave out one of the two"
        )


def summarize_folds(found: dict[str, Any]) -> str:
    """Lay out the out-of-fold figures for a terminal."""

    def row(label: str, frames: object, patients: object, figures: dict[str, Any]) -> list[str]:
        shown = [f"{figures[name]:.4f}" if figures.get(name) is not None else "none" for name in _FIGURES]
        return [label, str(frames), str(patients), *shown]

    folds = found["folds"]
    everybody = sum(fold["patients"] for fold in folds)
    rows = [row(f"fold {fold['fold']}", fold["frames"], fold["patients"], fold) for fold in folds]
    rows += [
        row("pooled", found["pooled"]["frames"], everybody, found["pooled"]),
        row("mean of folds", "", "", found["mean"]),
        row("standard deviation", "", "", found["standard_deviation"]),
    ]
    return table(["out of fold", "frames", "patients", "accuracy", "balanced", "ROC AUC", "quadrants"], rows)


class FoldProgress(TrainingProgress):
    """Shows the folds' runs, one after the other."""

    def fold(self, number: int, folds: int, *, finished: bool) -> None:
        """Say which fold is begun."""
        self._close()
        note(f"fold {number} of {folds}{': finished before' if finished else ''}")

    def judging(self, number: int, done: int, total: int) -> None:
        """Show that a held-out frame was judged."""
        self._show(f"judging fold {number}", done, total)
