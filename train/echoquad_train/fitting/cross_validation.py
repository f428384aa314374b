"""Cross-validation: K runs, each validated on the patients that the others learn from, and together an ensemble.

The frames of ``DATA/train`` and ``DATA/validation`` are pooled and dealt into K folds, all of a patient's into one,
with about equal shares of the classes in each (scikit-learn's StratifiedGroupKFold). Run k learns from all folds but
the k-th. So every frame is judged once by a run that never saw its patient: these are the out-of-fold figures. Each
run's epoch was chosen on the very fold it is measured on, so they flatter, as validation figures do; frames of
``DATA/test`` are not touched.
"""

from __future__ import annotations

import csv
import io
import re
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from echoquad_runtime.errors import ConfigError, DatasetError, RunError
from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS, ReadOptions
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.predict.predictor import Predictor
from echoquad_runtime.results.row_formats import format_for
from echoquad_runtime.storage.atomic import make_folder, write_atomically, write_bytes, write_json
from echoquad_runtime.storage.row_names import without_formula
from echoquad_train.data.dataset import Split, read_classes, read_split
from echoquad_train.data.patients import patient_pattern, patients_of
from echoquad_train.data.stream import Stream
from echoquad_train.evaluation.evaluate import SplitPredictions, judge
from echoquad_train.evaluation.metrics import measure
from echoquad_train.fitting.loop import Reporter, fit
from echoquad_train.networks.device import Device, choose_device
from echoquad_train.networks.torch_engine import TorchEngine
from echoquad_train.recipe import Recipe
from echoquad_train.runs.checkpoint import RECIPE, RUN, load_last, load_run, read_info
from echoquad_train.runs.ensemble_folder import begin_facts, ensemble_facts, is_ensemble

__all__ = ["OUT_OF_FOLD", "FoldReporter", "FoldSettings", "Folded", "begun_with", "deal", "fit_folds"]

OUT_OF_FOLD: Final = "out_of_fold.csv"
FIGURES: Final = ("accuracy", "balanced_accuracy", "roc_auc", "patch_accuracy")
"""Of `echoquad_train.evaluation.evaluate.measure`: those of which mean and deviation over the folds are told."""


@dataclass(frozen=True, slots=True)
class FoldSettings:
    """How frames are dealt: the number of folds, and what tells patients apart (None: `patient_of`'s own rule)."""

    folds: int
    patient_regex: str | None = None

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ConfigError(f"--folds {self.folds}: expected 2 or more")

    @property
    def pattern(self) -> re.Pattern[str] | None:
        """The expression, compiled."""
        return patient_pattern(self.patient_regex)


class FoldReporter(Reporter, Protocol):
    """Hears of the progress."""

    def fold(self, number: int, folds: int, *, finished: bool) -> None:
        """Hear that a fold is begun, or was finished before."""

    def judging(self, number: int, done: int, total: int) -> None:
        """Hear that a frame of a fold was judged by the fold's run."""


@dataclass(frozen=True, slots=True)
class Folded:
    """Finished folds: the ensemble's folder, the out-of-fold figures, and the frames that could not be read."""

    folder: Path
    out_of_fold: dict[str, Any]
    failures: tuple[Failure, ...]


def deal(splits: Sequence[Split], settings: FoldSettings, seed: int) -> list[tuple[Split, Split]]:
    """Deal pooled frames into folds.

    Parameters
    ----------
    splits
        What to pool, of the same classes.
    settings
        Number of folds and rule for patients.
    seed
        Of the draw.

    Returns
    -------
    list of tuple of Split and Split
        For each fold what to train on and what to validate on, named ``train`` and ``validation``, in the pool's order.

    Raises
    ------
    DatasetError
        If a class has fewer patients than there are folds, or a fold would lack a class.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    classes = splits[0].classes
    frames = [frame for split in splits for frame in split.frames]
    patients = [patient for split in splits for patient in patients_of(split.frames, settings.pattern)]
    labels = np.array([frame.label for frame in frames])
    for index, name in enumerate(classes):
        known = {patient for patient, label in zip(patients, labels, strict=True) if label == index}
        if len(known) < settings.folds:
            raise DatasetError(
                f"--folds {settings.folds}: class {name} has {len(known)} patients; expected one or more for every "
                "fold; choose fewer folds, or tell patients apart with --patient-regex"
            )
    dealer = StratifiedGroupKFold(settings.folds, shuffle=True, random_state=seed % 2**32)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with few frames, which are checked here
        parts = list(dealer.split(np.zeros(len(frames)), labels, patients))
    for number, (inside, outside) in enumerate(parts, 1):
        for chosen, name in ((inside, "training"), (outside, "validation")):
            lacking = [classes[index] for index in range(len(classes)) if index not in labels[chosen]]
            if lacking:
                raise DatasetError(
                    f"--folds {settings.folds}: fold {number} has no {name} frame of class {lacking[0]}: its patients "
                    "cannot be shared out evenly; choose fewer folds or another --seed"
                )
        train, validation = (
            Split(name, classes, tuple(frames[index] for index in chosen))
            for name, chosen in (("train", inside), ("validation", outside))
        )
        found.append((train, validation))
    return found


def begun_with(folder: Path) -> FoldSettings | None:
    """Tell what folds a folder's ensemble was begun with; None where there is none."""
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
) -> Folded:
    """Train a run a fold, and make them an ensemble with soft vote.

    Parameters
    ----------
    data
        ``DATA/{train,validation}/CLASS/**``.
    folder
        The ensemble's folder; run k is ``fold-k`` in it.
    recipe
        How to train; all folds with the same seed.
    settings
        Number of folds and rule for patients.
    device
        ``auto``, ``cpu`` or ``cuda``.
    resume
        Go on with the folds that `folder` holds: finished ones are left as they are.
    reporter
        Hears of the progress.
    stream, workers, tensorboard, reading
        As `echoquad_train.fitting.loop.fit`.

    Raises
    ------
    DatasetError, ConfigError, RunError, DeviceUnavailableError, OutputError
        As `echoquad_train.fitting.loop.fit`; or if a fold would lack a class.
    """
    where = choose_device(device)
    facts = _begun(folder, recipe, settings, resume=resume)
    classes = read_classes(data)
    recipe.contract(classes)  # what cannot be is refused before anything is written
    splits = [read_split(data, name, classes, reading) for name in ("train", "validation")]
    parts = deal(splits, settings, recipe.seed)
    if facts is None:
        dealt = {"folds": settings.folds, "patient_regex": settings.patient_regex}
        facts = begin_facts(folds=dealt, data={"reading": reading.to_dict()})
        make_folder(folder)
        write_bytes(folder / RECIPE, recipe.to_toml().encode())
        write_json(folder / RUN, facts)
    held_out: list[SplitPredictions] = []
    failures: dict[str, Failure] = {}
    for number, (train, validation) in enumerate(parts, 1):
        place = folder / f"fold-{number}"
        finished = resume and _is_finished(place, (train, validation))
        reporter.fold(number, settings.folds, finished=finished)
        if not finished:
            about = {"fold": {"number": number, "of": settings.folds}}
            fitted = fit(
                data,
                place,
                recipe,
                device=device,
                resume=resume and (place / RECIPE).is_file(),
                reporter=reporter,
                stream=stream,
                workers=workers,
                tensorboard=tensorboard,
                reading=reading,
                patient_regex=settings.patient_regex,
                splits=(train, validation),
                about=about,
            )
            failures |= {failure.file: failure for failure in fitted.failures}
        run = load_run(place)
        predictor = Predictor(TorchEngine(run.model, run.contract, where))
        found = judge(predictor, validation, settings.pattern, progress=_told(reporter, number))
        failures |= {failure.file: failure for failure in found.failures}
        held_out.append(found)

    figures = _figures(held_out, recipe.contract(classes).positive)
    _write_predictions(folder / OUT_OF_FOLD, held_out, classes)
    members = [(f"fold-{number}", load_run(folder / f"fold-{number}")) for number in range(1, settings.folds + 1)]
    made = ensemble_facts(members, "soft", flip=False)
    write_json(folder / RUN, {**made, "created": facts["created"], "folds": facts["folds"], "out_of_fold": figures})
    return Folded(folder, figures, tuple(failures.values()))


def _begun(folder: Path, recipe: Recipe, settings: FoldSettings, *, resume: bool) -> dict[str, Any] | None:
    """Give the record of folds to go on with, None for new ones; refuse what is in the way, or was begun otherwise."""
    label = folder.as_posix()
    if not resume:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(f"{label}: is there and not empty; go on with it by --resume, or choose another --out")
        return None
    begun = begun_with(folder)
    if begun is None:
        raise RunError(f"{label}: no folds here to go on with; train without --resume, or leave --folds out")
    if begun != settings:
        raise RunError(f"{label}: was begun with --folds {begun.folds} and the regex {begun.patient_regex}; resume so")
    if Recipe.load(str(folder / RECIPE)) != recipe:
        raise RunError(f"{label}: was begun with another recipe; resume it with the options it was begun with")
    return read_info(folder)


def _is_finished(place: Path, splits: Sequence[Split]) -> bool:
    """Tell whether a fold's run is finished; refuse one of other frames."""
    try:
        if read_info(place).get("status") != "finished":
            return False
    except RunError:  # not begun, or killed before it was written
        return False
    if load_last(place)["data"] != [split.fingerprint for split in splits]:
        raise RunError(
            f"{place.as_posix()}: the data has changed since the folds were begun; train into another folder"
        )
    return True


def _told(reporter: FoldReporter, number: int) -> Callable[[int, int], None]:
    return lambda done, total: reporter.judging(number, done, total)


def _figures(held_out: Sequence[SplitPredictions], positive: str) -> dict[str, Any]:
    """Give each fold's figures, those of all frames together, and the folds' mean and standard deviation.

    The deviation is the sample's, with K - 1: how far one fold's figure lies from another's, which is no interval of
    the mean, since the folds' training frames overlap.
    """
    folds = [
        {
            "fold": number,
            "patients": len(set(found.judged.patients)),
            **measure(found.predictions, found.judged.labels, positive),
            "unreadable": len(found.failures),
        }
        for number, found in enumerate(held_out, 1)
    ]
    predictions = [prediction for found in held_out for prediction in found.predictions]
    labels = np.concatenate([found.judged.labels for found in held_out])
    columns = {name: [fold[name] for fold in folds if fold[name] is not None] for name in FIGURES}
    return {
        "folds": folds,
        "pooled": measure(predictions, labels, positive),
        "mean": {name: statistics.fmean(column) for name, column in columns.items() if column},
        "standard_deviation": {name: statistics.stdev(column) for name, column in columns.items() if len(column) > 1},
        "caveat": "each fold's epoch was chosen on the frames that it is measured on",
    }


def _write_predictions(path: Path, held_out: Sequence[SplitPredictions], classes: Sequence[str]) -> None:
    """Write the predictions' table with the fold that a frame was held out in, and its true class, behind it."""
    layout = format_for(path)
    with write_atomically(path) as stream:
        stream.write(layout.header(classes).rstrip(b"\n") + b",fold,true_class\n")
        for number, found in enumerate(held_out, 1):
            for prediction, label in zip(found.predictions, found.judged.labels, strict=True):
                cells = io.StringIO()
                csv.writer(cells, lineterminator="\n").writerow([number, without_formula(classes[label])])
                stream.write(layout.row(prediction).removesuffix(b"\n") + b"," + cells.getvalue().encode())
