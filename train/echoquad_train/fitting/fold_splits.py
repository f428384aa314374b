"""Nested splits by patient: K folds that are held out in turn, and a validation split within the others.

The held-out fold is only measured. What a run chooses (its epoch, a plateau of its learning rate, early stopping, its
temperatures) it chooses on its own validation split, a tenth of the patients of the other folds.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from echoquad_runtime.errors import ConfigError, DatasetError
from echoquad_train.data.dataset import Split
from echoquad_train.data.patients import patient_pattern, patients_of

__all__ = ["Fold", "FoldSettings", "split_folds"]

VALIDATION_PARTS: Final = 10
"""One of so many parts of the patients of the other folds is the validation split."""

_Indices = npt.NDArray[np.int64]


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


@dataclass(frozen=True, slots=True)
class Fold:
    """A fold, counted from 1: the frames of its run's training and validation, and those held out; no patient twice."""

    number: int
    train: Split
    validation: Split
    held_out: Split


def split_folds(splits: Sequence[Split], settings: FoldSettings, seed: int) -> list[Fold]:
    """Split pooled frames into folds by patient, and the frames of each run into training and validation.

    Both splits give classes similar proportions (scikit-learn's StratifiedGroupKFold). The validation split is a tenth
    of the patients, or one of P parts if a class has P patients and P is below ten.

    Parameters
    ----------
    splits
        The splits to pool, with the same classes.
    settings
        The number of folds and the rule for patients.
    seed
        Of the shuffles.

    Returns
    -------
    list of Fold
        Splits named ``train``, ``validation`` and ``held-out``, in the pool's order.

    Raises
    ------
    DatasetError
        If a class has fewer patients than there are folds, or one of the splits would lack a class.
    """
    classes = splits[0].classes
    frames = [frame for split in splits for frame in split.frames]
    patients = np.array([patient for split in splits for patient in patients_of(split.frames, settings.pattern)])
    labels = np.array([frame.label for frame in frames])
    name, count = _rarest_class(classes, labels, patients)
    if count < settings.folds:
        raise DatasetError(
            f"--folds {settings.folds}: class {name} has {count} patients; expected one or more for every fold; use "
            "fewer folds, or distinguish patients with --patient-regex"
        )

    def split_of(name: str, chosen: _Indices) -> Split:
        return Split(name, classes, tuple(frames[index] for index in chosen))

    folds = []
    for number, (others, held_out) in enumerate(_parts(settings.folds, labels, patients, seed), 1):
        for chosen, kind in ((others, "training"), (held_out, "held-out")):
            _require_classes(chosen, labels, classes, f"--folds {settings.folds}: fold {number} has no {kind} frame")
        inside, validation = _validation_part(others, labels, patients, classes, number, settings, seed)
        folds.append(
            Fold(number, split_of("train", inside), split_of("validation", validation), split_of("held-out", held_out))
        )
    return folds


def _validation_part(
    others: _Indices,
    labels: npt.NDArray[np.int64],
    patients: npt.NDArray[np.str_],
    classes: Sequence[str],
    number: int,
    settings: FoldSettings,
    seed: int,
) -> tuple[_Indices, _Indices]:
    """Split the frames that a fold does not hold out into training and validation; return their indices."""
    name, count = _rarest_class(classes, labels[others], patients[others])
    label = f"--folds {settings.folds}: without fold {number}"
    if count < 2:
        raise DatasetError(
            f"{label}, class {name} has {count} patient; expected two or more, one to train on and one to validate on; "
            "add patients, or distinguish them with --patient-regex"
        )
    parts = _parts(min(VALIDATION_PARTS, count), labels[others], patients[others], seed)
    whole = set(labels[others])
    for inside, validation in parts:
        if set(labels[others][inside]) == whole == set(labels[others][validation]):
            return others[inside], others[validation]
    raise DatasetError(
        f"{label}, no tenth of the patients has frames of every class and leaves some to train on: its patients cannot "
        "be split evenly; use fewer folds or another --seed"
    )


def _parts(
    count: int, labels: npt.NDArray[np.int64], patients: npt.NDArray[np.str_], seed: int
) -> list[tuple[_Indices, _Indices]]:
    """Split frames into parts by patient; return the indices of the other parts and of each part."""
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed % 2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about classes with few frames, which the callers check
        return list(splitter.split(np.zeros(len(labels)), labels, patients))


def _rarest_class(
    classes: Sequence[str], labels: npt.NDArray[np.int64], patients: npt.NDArray[np.str_]
) -> tuple[str, int]:
    """Return the class with the fewest patients, and their number."""
    counts = [len(set(patients[labels == index])) for index in range(len(classes))]
    rarest = int(np.argmin(counts))
    return classes[rarest], counts[rarest]


def _require_classes(chosen: _Indices, labels: npt.NDArray[np.int64], classes: Sequence[str], words: str) -> None:
    missing = [name for index, name in enumerate(classes) if index not in labels[chosen]]
    if missing:
        raise DatasetError(
            f"{words} of class {missing[0]}: its patients cannot be split evenly; use fewer folds or another --seed"
        )
