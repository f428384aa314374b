"""Cross-validation: train K runs, each validated on the patients of one fold, and combine them into an ensemble.

The frames of ``DATA/train`` and ``DATA/validation`` are pooled and split into K folds by patient, with similar class
proportions (scikit-learn's StratifiedGroupKFold). Run k trains on all folds but the k-th, so every frame is classified
once by a run that never saw its patient: the out-of-fold figures. They are optimistic, as validation figures are,
because each run's best epoch is chosen on the same fold. Frames of ``DATA/test`` are not used.
"""

from __future__ import annotations

import re
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from echoquad_runtime.errors import ConfigError, DatasetError, RunError
from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS, ReadOptions
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.predict.predictor import Predictor
from echoquad_runtime.storage.atomic import write_bytes, write_json
from echoquad_train.data.dataset import Split, read_classes, read_split
from echoquad_train.data.patients import patient_pattern, patients_of
from echoquad_train.data.stream import Stream
from echoquad_train.evaluation.evaluate import SplitPredictions, predict_split
from echoquad_train.evaluation.frame_metrics import frame_metrics
from echoquad_train.fitting.loop import Reporter, fit
from echoquad_train.fitting.resume import locked_run_folder, refuse_occupied
from echoquad_train.networks.device import Device, choose_device
from echoquad_train.networks.torch_engine import TorchEngine
from echoquad_train.recipe import Recipe
from echoquad_train.reporting.predictions_table import write_predictions
from echoquad_train.runs.checkpoint import RECIPE, RUN, load_last, load_run, read_info
from echoquad_train.runs.ensemble_folder import ensemble_metadata, is_ensemble, new_ensemble_metadata

__all__ = [
    "OUT_OF_FOLD",
    "CrossValidationResult",
    "FoldReporter",
    "FoldSettings",
    "fit_folds",
    "saved_fold_settings",
    "split_folds",
]

OUT_OF_FOLD: Final = "out_of_fold.csv"
FIGURES: Final = ("accuracy", "balanced_accuracy", "roc_auc", "patch_accuracy")
"""The frame metrics whose mean and standard deviation over the folds are reported."""


@dataclass(frozen=True, slots=True)
class FoldSettings:
    """The number of folds, and the regular expression that extracts the patient (None: the rule of `read_patient`)."""

    folds: int
    patient_regex: str | None = None

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ConfigError(f"--folds {self.folds}: expected 2 or more")

    @property
    def pattern(self) -> re.Pattern[str] | None:
        """The compiled expression."""
        return patient_pattern(self.patient_regex)


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


def split_folds(splits: Sequence[Split], settings: FoldSettings, seed: int) -> list[tuple[Split, Split]]:
    """Split pooled frames into folds by patient.

    Parameters
    ----------
    splits
        The splits to pool, with the same classes.
    settings
        The number of folds and the rule for patients.
    seed
        Of the shuffle.

    Returns
    -------
    list of tuple of Split and Split
        The training and the validation frames of each fold, named ``train`` and ``validation``, in the pool's order.

    Raises
    ------
    DatasetError
        If a class has fewer patients than there are folds, or a fold lacks a class.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    classes = splits[0].classes
    frames = [frame for split in splits for frame in split.frames]
    patients = [patient for split in splits for patient in patients_of(split.frames, settings.pattern)]
    labels = np.array([frame.label for frame in frames])
    for index, name in enumerate(classes):
        members = {patient for patient, label in zip(patients, labels, strict=True) if label == index}
        if len(members) < settings.folds:
            raise DatasetError(
                f"--folds {settings.folds}: class {name} has {len(members)} patients; expected one or more for every "
                "fold; use fewer folds, or distinguish patients with --patient-regex"
            )
    splitter = StratifiedGroupKFold(settings.folds, shuffle=True, random_state=seed % 2**32)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about classes with few frames, which are checked below
        parts = list(splitter.split(np.zeros(len(frames)), labels, patients))
    for number, (inside, outside) in enumerate(parts, 1):
        for chosen, name in ((inside, "training"), (outside, "validation")):
            missing = [classes[index] for index in range(len(classes)) if index not in labels[chosen]]
            if missing:
                raise DatasetError(
                    f"--folds {settings.folds}: fold {number} has no {name} frame of class {missing[0]}: its patients "
                    "cannot be split evenly; use fewer folds or another --seed"
                )
        train, validation = (
            Split(name, classes, tuple(frames[index] for index in chosen))
            for name, chosen in (("train", inside), ("validation", outside))
        )
        found.append((train, validation))
    return found


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
        splits = [read_split(data, name, classes, reading) for name in ("train", "validation")]
        parts = split_folds(splits, settings, recipe.seed)
        if metadata is None:
            metadata = new_ensemble_metadata(folds=asdict(settings), data={"reading": reading.to_dict()})
            write_json(folder / RUN, metadata)  # before the recipe, with which --resume would train a single run
            write_bytes(folder / RECIPE, recipe.to_toml().encode())
        held_out: list[SplitPredictions] = []
        failures: dict[str, Failure] = {}
        for number, (train, validation) in enumerate(parts, 1):
            fold_folder = folder / f"fold-{number}"
            finished = resume and _is_finished(fold_folder, (train, validation))
            reporter.fold(number, settings.folds, finished=finished)
            if not finished:
                fitted = fit(
                    data,
                    fold_folder,
                    recipe,
                    device=device,
                    resume=resume and (fold_folder / RECIPE).is_file(),
                    reporter=reporter,
                    stream=stream,
                    workers=workers,
                    tensorboard=tensorboard,
                    reading=reading,
                    patient_regex=settings.patient_regex,
                    splits=(train, validation),
                    extra_metadata={"fold": {"number": number, "of": settings.folds}},
                )
                failures |= {failure.file: failure for failure in fitted.failures}
            run = load_run(fold_folder)
            predictor = Predictor(TorchEngine(run.model, run.contract, torch_device))
            found = predict_split(predictor, validation, settings.pattern, progress=partial(reporter.judging, number))
            failures |= {failure.file: failure for failure in found.failures}
            held_out.append(found)

        figures = _figures(held_out, recipe.contract(classes).positive)
        rows = (
            (prediction, label, (number,))
            for number, found in enumerate(held_out, 1)
            for prediction, label in zip(found.predictions, found.scored.labels, strict=True)
        )
        write_predictions(folder / OUT_OF_FOLD, rows, classes, ["fold"])
        members = [(f"fold-{number}", load_run(folder / f"fold-{number}")) for number in range(1, settings.folds + 1)]
        kept = {key: metadata[key] for key in ("created", "folds")}
        write_json(folder / RUN, {**ensemble_metadata(members, "soft", flip_tta=False), **kept, "out_of_fold": figures})
        return CrossValidationResult(folder, figures, tuple(failures.values()))


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


def _is_finished(folder: Path, splits: Sequence[Split]) -> bool:
    """Return whether the run of a fold is finished; refuse one of other frames."""
    try:
        if read_info(folder).get("status") != "finished":
            return False
    except RunError:  # not started, or killed before it was written
        return False
    if load_last(folder)["data"] != [split.fingerprint for split in splits]:
        raise RunError(f"{folder.as_posix()}: the data has changed since the folds began; train into another folder")
    return True


def _figures(held_out: Sequence[SplitPredictions], positive: str) -> dict[str, Any]:
    """Return the figures of each fold, those of all frames, and the mean and standard deviation over the folds.

    The sample standard deviation (K - 1) describes the spread of the folds. It is no confidence interval of the mean,
    because the training frames of the folds overlap.
    """
    folds = [
        {
            "fold": number,
            "patients": len(set(found.scored.patients)),
            **frame_metrics(found.predictions, found.scored.labels, positive).to_dict(),
            "unreadable": len(found.failures),
        }
        for number, found in enumerate(held_out, 1)
    ]
    predictions = [prediction for found in held_out for prediction in found.predictions]
    labels = np.concatenate([found.scored.labels for found in held_out])
    columns = {name: [fold[name] for fold in folds if fold[name] is not None] for name in FIGURES}
    return {
        "folds": folds,
        "pooled": frame_metrics(predictions, labels, positive).to_dict(),
        "mean": {name: statistics.fmean(column) for name, column in columns.items() if column},
        "standard_deviation": {name: statistics.stdev(column) for name, column in columns.items() if len(column) > 1},
        "caveat": "each fold's epoch was chosen on the frames that it is measured on",
    }
