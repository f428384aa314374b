"""Phantom data set: frames of many synthetic patients in the folders that training reads."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

from echoquad_runtime.errors import ConfigError
from echoquad_runtime.storage.atomic_folder import atomic_folder
from echoquad_train.data.dataset import Progress
from echoquad_train.data.split_folders import SPLITS
from echoquad_train.phantom.drawing import LABELS, draw_patient, generator_of, render

__all__ = ["MIN_PATIENTS", "write_dataset"]

MIN_PATIENTS = 6  # one of each class in each of three splits


def _shares(total: int, split: tuple[float, float, float]) -> list[int]:
    """Divide patients by largest remainder; an empty split takes one from the largest."""
    exact = [total * part for part in split]
    counts = [math.floor(value) for value in exact]
    order = sorted(range(len(split)), key=lambda k: counts[k] - exact[k])
    for k in order[: total - sum(counts)]:
        counts[k] += 1
    while 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return counts


def _check_numbers(patients: int, frames: int, split: tuple[float, ...]) -> None:
    """Raise ConfigError for numbers outside their range."""
    if patients < MIN_PATIENTS:
        need = f"{MIN_PATIENTS} or more (both classes in each of three splits)"
        raise ConfigError(f"patients is {patients}, expected {need}")
    if frames < 1:
        raise ConfigError(f"frames per patient is {frames}, expected 1 or more")
    if len(split) != len(SPLITS) or not all(part > 0.0 for part in split) or abs(sum(split) - 1.0) > 1e-6:
        raise ConfigError(f"split is {tuple(split)}, expected three shares above 0 with sum 1")


def write_dataset(
    out: Path,
    *,
    patients: int = 40,
    frames_per_patient: int = 4,
    seed: int = 0,
    split: tuple[float, float, float] = (0.7, 0.15, 0.15),
    progress: Progress | None = None,
) -> dict[str, dict[str, int]]:
    """Write a labelled data set of phantom frames, ``out/{train,validation,test}/{ASD,NORM}/ASD3-0.png``.

    Half of the patients are ASD and half NORM, which has the odd one. No patient is in two splits, and each split has
    both classes.

    Parameters
    ----------
    out
        New or empty folder.
    patients, frames_per_patient
        At least 6, and at least 1.
    seed
        0 or more. A patient's frames depend on the seed and the patient's number only.
    split
        Fractions of the patients for train, validation and test: each above 0, with sum 1.

    Returns
    -------
    dict
        Number of frames by split and class.

    Raises
    ------
    ConfigError
        If a number is out of range.
    OutputError
        If `out` exists and is not empty, or cannot be written.
    """
    _check_numbers(patients, frames_per_patient, split)
    shuffle = generator_of(seed, 0)
    total, done = patients * frames_per_patient, 0
    counts = {name: dict.fromkeys(LABELS, 0) for name in SPLITS}
    with atomic_folder(Path(out)) as partial:
        for kind, label in enumerate(LABELS):
            members = patients // 2 if label == "ASD" else patients - patients // 2
            order = shuffle.permutation(members) + 1  # a series number must not reveal its split
            ends = np.cumsum(_shares(members, split))[:-1]
            for name, series in zip(SPLITS, np.split(order, ends), strict=True):
                folder = partial / name / label
                folder.mkdir(parents=True)
                for number in series.tolist():
                    anatomy = draw_patient(generator_of(seed, 1, kind, number), label)
                    for index in range(frames_per_patient):
                        rng = generator_of(seed, 2, kind, number, index)
                        frame = render(anatomy, rng, float(rng.random()))
                        Image.fromarray(frame).save(folder / f"{label}{number}-{index}.png")
                        counts[name][label] += 1
                        done += 1
                        if progress is not None:
                            progress(done, total)
    return counts
