"""Train and measure one fold for `out_of_fold.py`, in a process of its own, which ends when its parent does.

    python benchmarks/workers/fold.py JOB

JOB is a `Job` as JSON. The result, an ``.npz`` file, holds what every vote and every metric can be computed from: the
probabilities of each quadrant of the held-out frames.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import DatasetError
from echoquad_runtime.storage.atomic import write_atomically
from echoquad_train.data.dataset import Split, read_classes, read_split
from echoquad_train.data.patients import patients_of
from echoquad_train.evaluation.frame_metrics import metrics_of_frames
from echoquad_train.evaluation.scored_frames import ScoredFrames
from echoquad_train.fitting.cross_validation import fit_fold, fit_folds, measure_fold
from echoquad_train.fitting.fold_splits import Fold, FoldSettings, split_folds
from echoquad_train.networks.device import Device, choose_device
from echoquad_train.recipe import Recipe
from echoquad_train.runs.checkpoint import METRICS, RECIPE, Run
from echoquad_train.runs.ensemble_folder import Ensemble, load_trained


@dataclass(frozen=True)
class Job:
    """A fold to train and measure.

    Attributes
    ----------
    data, folder, name
        The data, the folder of results, and the name of this result in it.
    label, recipe
        The recipe's name in tables, and its fields as TOML, with the seed of training and folds.
    patients
        How many patients the run sees, its validation split included; None: all.
    folds, number, patient_regex
        The folds, the one that is held out, from 1, and the rule for patients.
    members
        Train an ensemble of the runs of so many folds of what the run would see; 0: a single run.
    teacher
        The folder of the run or ensemble to distil from, below `folder`.
    device, threads, keep
        Where to train, and whether the run folder stays.
    """

    data: str
    folder: str
    name: str
    label: str
    recipe: str
    patients: int | None
    folds: int
    number: int
    members: int = 0
    teacher: str | None = None
    patient_regex: str | None = None
    device: Device = "auto"
    threads: int = 1
    keep: bool = False

    @property
    def result(self) -> Path:
        """The file of the result."""
        return Path(self.folder) / f"{self.name}.npz"

    @property
    def settings(self) -> FoldSettings:
        return FoldSettings(self.folds, self.patient_regex)


class Log:
    """A reporter that prints epochs."""

    def _ignore(self, *_: Any, **__: Any) -> None: ...

    decoding = started = audited = batch = fold = judging = _ignore

    def epoch(self, epoch: Any, epochs: int, best: bool) -> None:
        print(json.dumps({**epoch.to_dict(), "of": epochs}), flush=True)


def main(text: str) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    measure(Job(**json.loads(text)))


def end_with_parent() -> None:
    """Wait until the parent closes standard input, which it does however it ends."""
    os.read(0, 1)  # a buffered reader would hold a lock that the interpreter takes when it ends
    os._exit(1)


def read_splits(data: str) -> list[Split]:
    """Return the splits that folds pool."""
    classes = read_classes(Path(data))
    return [read_split(Path(data), name, classes) for name in ("train", "validation")]


def measure(job: Job) -> None:
    """Train the fold's run, or go on with it, and write the predictions of the frames that it holds out."""
    import torch

    torch.set_num_threads(job.threads)
    recipe = Recipe.from_toml(job.recipe)
    fold = split_folds(read_splits(job.data), job.settings, recipe.seed)[job.number - 1]
    fold = limit_patients(fold, job.patients, job.settings, recipe.seed)
    folder, started = job.result.with_suffix(""), time.perf_counter()
    data, options = Path(job.data), {"device": job.device, "reporter": Log(), "resume": (folder / RECIPE).is_file()}
    if job.members:
        pool = (fold.train, fold.validation)
        fit_folds(data, folder, recipe, replace(job.settings, folds=job.members), splits=pool, **options)
    else:
        teacher = Path(job.folder) / job.teacher if job.teacher else None
        fit_fold(data, folder, recipe, fold, job.settings, teacher=teacher, **options)
    scored = measure_fold(folder, fold, job.settings, choose_device(job.device)).scored
    trained = load_trained(folder)
    runs = trained.members if isinstance(trained, Ensemble) else (trained,)
    figures = metrics_of_frames(scored)
    facts = {
        "recipe": job.label,
        "patients": count_patients(fold, job.settings),
        "asked": job.patients,  # None: all
        "seed": recipe.seed,
        "fold": job.number,
        "folds": job.folds,
        "held_out_patients": len(set(scored.patients)),
        "held_out_frames": len(scored),
        "accuracy": figures.accuracy,
        "roc_auc": figures.roc_auc,
        "patch_accuracy": figures.patch_accuracy,
        "model_epochs": [run.info["best"]["epoch"] for run in runs],
        "epoch_seconds": round(sum(map(seconds_of, runs)), 1),
        "last_start_seconds": round(time.perf_counter() - started, 1),
        "device": runs[0].info["device"],
        "precision": runs[0].info["precision"],
        "contract": trained.contract.to_dict(),
    }
    with write_atomically(job.result) as stream:
        np.savez_compressed(
            stream,
            facts=json.dumps(facts),
            classes=scored.classes,
            names=scored.names,
            patients=scored.patients,
            labels=scored.labels,
            quadrants=scored.quadrants,  # float64 [F, 4, C]: probabilities under the quadrants' temperature
            decided=scored.decided,
        )
    if not job.keep:
        shutil.rmtree(folder)


def seconds_of(run: Run) -> float:
    """Return the time that the epochs of a run took."""
    with (run.folder / METRICS).open(encoding="utf-8", newline="") as stream:
        return sum(float(row["seconds"]) for row in csv.DictReader(stream))


def load_result(path: Path) -> tuple[dict[str, Any], ScoredFrames]:
    """Return the facts and the held-out frames of a finished job."""
    with np.load(path, allow_pickle=False) as found:
        facts = json.loads(str(found["facts"]))
        contract = Contract.from_dict(facts["contract"])
        scored = ScoredFrames(
            names=tuple(found["names"].tolist()),
            classes=tuple(found["classes"].tolist()),
            positive=contract.positive,
            method=contract.vote,
            vote_weights=contract.vote_weights,
            labels=found["labels"],
            quadrants=found["quadrants"],
            decided=found["decided"],
            patients=tuple(found["patients"].tolist()),
            frame_temperature=contract.frame_temperature,
        )
    return facts, scored


def fingerprint(job: Job, fold: Fold) -> str:
    """Return eight digits that change with whatever a result depends on: recipe, frames, members, teacher."""
    parts = [split.fingerprint for split in (fold.train, fold.validation, fold.held_out)]
    recipe = sorted(asdict(Recipe.from_toml(job.recipe)).items())
    others = filter(None, (job.members, job.teacher))
    return hashlib.sha256(json.dumps([recipe, parts, *others]).encode()).hexdigest()[:8]


# Patients


def count_patients(fold: Fold, settings: FoldSettings) -> int:
    """Return the number of patients that a fold's run sees."""
    return sum(len(set(patients_of(split.frames, settings.pattern))) for split in (fold.train, fold.validation))


def limit_patients(fold: Fold, count: int | None, settings: FoldSettings, seed: int) -> Fold:
    """Return a fold whose run sees `count` patients; None, or more than there are: all. What is held out stays whole.

    Training and validation are reduced in proportion, each to the first patients of a random order, so that the
    patients of a smaller count are among those of a larger one.

    Raises
    ------
    DatasetError
        If a split is left without a class.
    """
    splits = (fold.train, fold.validation)
    orders = [patient_order(split, settings, seed) for split in splits]
    total = sum(map(len, orders))
    if count is None or count >= total:
        return fold
    validation = max(1, round(count * len(orders[1]) / total))
    limited = []
    for split, order, kept in zip(splits, orders, (count - validation, validation), strict=True):
        chosen, owners = set(order[:kept]), patients_of(split.frames, settings.pattern)
        frames = (frame for frame, owner in zip(split.frames, owners, strict=True) if owner in chosen)
        limited.append(replace(split, frames=tuple(frames)))
        if not all(limited[-1].counts.values()):
            raise DatasetError(f"--patients {count}: {split.name} has no frame of a class; use a larger number")
    return Fold(fold.number, *limited, fold.held_out)


def patient_order(split: Split, settings: FoldSettings, seed: int) -> list[str]:
    """Return the patients in random order, of which every beginning has the classes in proportion.

    Patients with frames of the same classes are shuffled, and spread evenly over the order.
    """
    classes_of: dict[str, set[int]] = {}
    for frame, patient in zip(split.frames, patients_of(split.frames, settings.pattern), strict=True):
        classes_of.setdefault(patient, set()).add(frame.label)
    groups: dict[tuple[int, ...], list[str]] = {}
    for patient in sorted(classes_of):
        groups.setdefault(tuple(sorted(classes_of[patient])), []).append(patient)
    rng, placed = random.Random(seed), []
    for _, members in sorted(groups.items()):
        rng.shuffle(members)
        placed += [((index + 0.5) / len(members), patient) for index, patient in enumerate(members)]
    return [patient for _, patient in sorted(placed, key=lambda item: item[0])]


def joined(parts: Sequence[ScoredFrames]) -> ScoredFrames:
    """Return the frames of all folds, each decided by its own run."""
    return replace(
        parts[0],
        names=sum((part.names for part in parts), ()),
        labels=np.concatenate([part.labels for part in parts]),
        quadrants=np.concatenate([part.quadrants for part in parts]),
        decided=np.concatenate([part.decided for part in parts]),
        patients=sum((part.patients for part in parts), ()),
    )


if __name__ == "__main__":
    main(sys.argv[1])
