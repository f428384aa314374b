"""Cross-validation: train K runs, each measured on the patients of one fold, and combine them into an ensemble.

The frames of ``DATA/train`` and ``DATA/validation`` are pooled and split by patient; see
`echoquad_train.fitting.fold_splits`. Run k sees all folds but the k-th, of which a tenth of the patients is its
validation split. Every frame is thus classified once by a run that neither trained nor chose anything on its patient:
the out-of-fold figures. Frames of ``DATA/test`` are not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch

from echoquad_runtime.errors import RunError
from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS, ReadOptions
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.predict.predictor import Predictor
from echoquad_runtime.storage.atomic import write_bytes, write_json
from echoquad_train.data.dataset import Progress, Split, read_classes, read_split
from echoquad_train.data.stream import Stream
from echoquad_train.evaluation.evaluate import SplitPredictions, predict_split
from echoquad_train.fitting.fold_splits import Fold, FoldSettings, split_folds
from echoquad_train.fitting.loop import FitResult, Reporter, fit
from echoquad_train.fitting.out_of_fold import out_of_fold_figures
from echoquad_train.fitting.resume import locked_run_folder, refuse_occupied
from echoquad_train.networks.device import Device, choose_device
from echoquad_train.networks.torch_engine import TorchEngine
from echoquad_train.recipe import Recipe
from echoquad_train.reporting.predictions_table import write_predictions
from echoquad_train.runs.checkpoint import LAST, RECIPE, RUN, load_last, load_run, read_info
from echoquad_train.runs.ensemble_folder import ensemble_metadata, is_ensemble, load_trained, new_ensemble_metadata

__all__ = [
    "OUT_OF_FOLD",
    "CrossValidationResult",
    "FoldReporter",
    "fit_fold",
    "fit_folds",
    "measure_fold",
    "saved_fold_settings",
]

OUT_OF_FOLD: Final = "out_of_fold.csv"


class FoldReporter(Reporter, Protocol):
    """Receives progress events."""

    def fold(self, number: int, folds: int, *, finished: bool) -> None:
        """Receive the start of a fold, or that it is already finished."""

    def judging(self, number: int, done: int, total: int) -> None:
        """Receive the number of frames of a fold that its run has classified."""


@dataclass(frozen=True, slots=True)
class CrossValidationResult:
    """Finished folds: the folder of the ensemble, the out-of-fold figures, and the unreadable frames."""

    folder: Path
    out_of_fold: dict[str, Any]
    failures: tuple[Failure, ...]


def saved_fold_settings(folder: Path) -> FoldSettings | None:
    """Return the settings of the folds in a folder; None if there are none."""
    try:
        info = read_info(folder)
        return FoldSettings(**info["folds"]) if is_ensemble(info) and "folds" in info else None
    except (RunError, TypeError):
        return None


def fit_folds(
    data: Path,
    folder: Path,
    recipe: Recipe,
    settings: FoldSettings,
    *,
    device: Device = "auto",
    resume: bool,
    reporter: FoldReporter,
    stream: Stream = "auto",
    workers: int | None = None,
    tensorboard: bool = False,
    reading: ReadOptions = DEFAULT_READ_OPTIONS,
    splits: Sequence[Split] | None = None,
) -> CrossValidationResult:
    """Train one run for each fold and combine them into an ensemble with soft vote.

    Parameters
    ----------
    data
        ``DATA/{train,validation}/CLASS/**``.
    folder
        The folder of the ensemble, with the runs in ``fold-1`` and so on.
    recipe
        How to train; all folds use the same seed.
    settings
        The number of folds and the rule for patients.
    device
        ``auto``, ``cpu`` or ``cuda``.
    resume
        Continue the folds in `folder`; finished ones are not changed.
    reporter
        Receives progress events.
    stream, workers, tensorboard, reading
        As `echoquad_train.fitting.loop.fit`.
    splits
        Pool these instead of `data`'s own training and validation splits; of the same classes.

    Raises
    ------
    DatasetError, ConfigError, RunError, DeviceUnavailableError, OutputError
        As `echoquad_train.fitting.loop.fit`; or if a fold lacks a class.
    """
    torch_device = choose_device(device)
    with locked_run_folder(folder):
        metadata = _open_folder(folder, recipe, settings, resume=resume)
        classes = read_classes(data)
        recipe.contract(classes)  # fails before anything is written
        splits = splits or [read_split(data, name, classes, reading) for name in ("train", "validation")]
        folds = split_folds(splits, settings, recipe.seed)
        if metadata is None:
            metadata = new_ensemble_metadata(folds=asdict(settings), data={"reading": reading.to_dict()})
            write_json(folder / RUN, metadata)  # before the recipe, with which --resume would train a single run
            write_bytes(folder / RECIPE, recipe.to_toml().encode())
        held_out: list[SplitPredictions] = []
        failures: dict[str, Failure] = {}
        for fold in folds:
            number, fold_folder = fold.number, folder / f"fold-{fold.number}"
            finished = resume and _is_finished(fold_folder, fold)
            reporter.fold(number, settings.folds, finished=finished)
            if not finished:
                resumed = resume and (fold_folder / RECIPE).is_file()
                fitted = fit_fold(
                    data,
                    fold_folder,
                    recipe,
                    fold,
                    settings,
                    device=device,
                    resume=resumed,
                    reporter=reporter,
                    stream=stream,
                    workers=workers,
                    tensorboard=tensorboard,
                    reading=reading,
                )
                failures |= {failure.file: failure for failure in fitted.failures}
            found = measure_fold(fold_folder, fold, settings, torch_device, partial(reporter.judging, number))
            failures |= {failure.file: failure for failure in found.failures}
            held_out.append(found)

        figures = out_of_fold_figures(held_out, recipe.contract(classes).positive)
        rows = (
            (prediction, label, (number,))
            for number, found in enumerate(held_out, 1)
            for prediction, label in zip(found.predictions, found.scored.labels, strict=True)
        )
        write_predictions(folder / OUT_OF_FOLD, rows, classes, ["fold"])
        members = [(f"fold-{number}", load_run(folder / f"fold-{number}")) for number in range(1, settings.folds + 1)]
        counts = np.bincount(np.concatenate([found.scored.labels for found in held_out]), minlength=len(classes))
        combined = ensemble_metadata(members, "soft", flip_tta=False)
        combined["data"]["frames"] = {"train and validation": dict(zip(classes, counts.tolist(), strict=True))}
        kept = {key: metadata[key] for key in ("created", "folds")}
        write_json(folder / RUN, {**combined, **kept, "out_of_fold": figures})
        return CrossValidationResult(folder, figures, tuple(failures.values()))


def fit_fold(data: Path, folder: Path, recipe: Recipe, fold: Fold, settings: FoldSettings, **options: Any) -> FitResult:
    """Train the run of a fold, without the frames it holds out; for `options` see `echoquad_train.fitting.loop.fit`."""
    return fit(
        data,
        folder,
        recipe,
        patient_regex=settings.patient_regex,
        splits=(fold.train, fold.validation),
        extra_metadata={"fold": {"number": fold.number, "of": settings.folds, "held_out": fold.held_out.counts}},
        **options,
    )


def measure_fold(
    folder: Path, fold: Fold, settings: FoldSettings, device: torch.device, progress: Progress | None = None
) -> SplitPredictions:
    """Predict the frames that a fold holds out with its finished run, or ensemble of runs, in `folder`."""
    run = load_trained(folder)
    predictor = Predictor(TorchEngine(run.model, run.contract, device))
    return predict_split(predictor, fold.held_out, settings.pattern, progress=progress)


def _open_folder(folder: Path, recipe: Recipe, settings: FoldSettings, *, resume: bool) -> dict[str, Any] | None:
    """Return the metadata of the folds to resume, None for new ones; refuse a folder that does not match."""
    label = folder.as_posix()
    if not resume:
        refuse_occupied(folder)
        return None
    saved = saved_fold_settings(folder)
    if saved is None:
        raise RunError(f"{label}: holds no folds to resume; train without --resume, or omit --folds")
    if saved != settings:
        raise RunError(
            f"{label}: began with --folds {saved.folds} and --patient-regex {saved.patient_regex}; resume with the same"
        )
    if not (folder / RECIPE).is_file():
        raise RunError(
            f"{label}: {RECIPE} is missing, so the folds cannot be resumed; remove the folder and train without "
            "--resume"
        )
    if Recipe.load(str(folder / RECIPE)) != recipe:
        raise RunError(f"{label}: began with another recipe; resume it with the options it began with")
    return read_info(folder)


def _is_finished(folder: Path, fold: Fold) -> bool:
    """Return whether the run of a fold is finished; refuse one of other frames."""
    try:
        finished = read_info(folder).get("status") == "finished"
    except RunError:  # not started, or killed before it was written
        return False
    began = finished or (folder / LAST).exists()
    if began and load_last(folder)["data"] != [fold.train.fingerprint, fold.validation.fingerprint]:
        raise RunError(
            f"{folder.as_posix()}: trained on other frames than this fold has now: the data has changed, or an earlier "
            "release divided it, without a validation split of its own; train into another folder"
        )
    return finished
