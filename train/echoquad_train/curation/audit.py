"""The audit: what is in a data set, what is wrong with it, and what a network could cheat with.

`audit` reads every frame once and gives an `Audit`: counts, unreadable files, leaks (`leaks`),
shortcuts (`shortcut_features`), and the size, kind and brightness of frames by class. ``docs/reference/audit.md`` says
what each finding means and by which rule it is one.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from echoquad_runtime._version import __version__
from echoquad_runtime.errors import DatasetError
from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS, ReadOptions
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.quadrants import Grey
from echoquad_train.curation.leaks import LOOKS, Leaks, find_leaks
from echoquad_train.curation.shortcut_features import MIN_AUC, Shortcut, Traces, find_shortcuts, traces_of
from echoquad_train.curation.similarity import DISTANCE, LIKENESS
from echoquad_train.curation.thumbnails import read_pictures
from echoquad_train.data.dataset import SPLITS
from echoquad_train.data.frame_list import DecodedFile, FrameRecord, list_frames
from echoquad_train.data.patients import patient_id, patient_of

__all__ = ["Audit", "audit"]

SCHEMA: Final = 1


@dataclass(frozen=True, slots=True)
class Audit:
    """What was found.

    Attributes
    ----------
    data
        The folder.
    frames, failures
        All frames, and those that cannot be read.
    read
        The frames that could be read; the following have an entry for each.
    thumbs
        uint8 [128, 128] of each.
    patients
        Whom each is of.
    unknown
        Frames, of all, whose name does not tell whom they are of.
    leaks, shortcuts
        See their modules.
    classes
        By class the figures of its frames: ``sizes``, ``kinds``, ``brightness``, ``file_bytes``.
    notes
        What is odd about the folders, a sentence each.
    views
        Views of each frame at the first look for near duplicates.
    patient_regex, seed, reading
        What it was told.
    """

    data: Path
    frames: tuple[FrameRecord, ...]
    failures: tuple[Failure, ...]
    read: tuple[FrameRecord, ...]
    thumbs: tuple[Grey, ...]
    patients: tuple[str, ...]
    unknown: int
    leaks: Leaks
    shortcuts: tuple[Shortcut, ...]
    classes: dict[str, dict[str, Any]]
    notes: tuple[str, ...]
    views: int
    patient_regex: str | None
    seed: int
    reading: ReadOptions = DEFAULT_READ_OPTIONS

    @property
    def names(self) -> list[str]:
        """The classes, sorted."""
        return sorted({frame.label for frame in self.frames})

    @property
    def counts(self) -> dict[str, dict[str, dict[str, int]]]:
        """By split and class: ``frames``, ``unreadable``, and ``patients`` of the readable ones."""
        lost = {failure.file for failure in self.failures}
        people: dict[tuple[str, str], set[str]] = defaultdict(set)
        for frame, patient in zip(self.read, self.patients, strict=True):
            people[frame.split, frame.label].add(patient)
        all_of = Counter((frame.split, frame.label) for frame in self.frames)
        lost_of = Counter((frame.split, frame.label) for frame in self.frames if frame.name in lost)
        return {
            split: {
                name: {
                    "frames": all_of[split, name],
                    "unreadable": lost_of[split, name],
                    "patients": len(people[split, name]),
                }
                for name in self.names
            }
            for split in dict.fromkeys(frame.split for frame in self.frames)
        }

    @property
    def flagged(self) -> tuple[Shortcut, ...]:
        """The shortcuts."""
        return tuple(shortcut for shortcut in self.shortcuts if shortcut.flagged)

    def to_dict(self) -> dict[str, Any]:
        """Give it as JSON values; ``docs/reference/audit.md`` describes each."""
        leaks = self.leaks
        return {
            "schema": SCHEMA,
            "echoquad": __version__,
            "data": self.data.resolve().as_posix(),
            "patient_regex": self.patient_regex,
            "seed": self.seed,
            **({"reading": self.reading.to_dict()} if self.reading != DEFAULT_READ_OPTIONS else {}),
            "frames": len(self.frames),
            "counts": self.counts,
            "notes": list(self.notes),
            "unreadable": [{"file": failure.file, "error": str(failure.error)} for failure in self.failures],
            "patients": {
                "by_split": leaks.members,
                "frames_without": self.unknown,
                "across_splits": {patient: list(splits) for patient, splits in leaks.patients.items()},
            },
            "duplicates": {
                "exact": [twins.to_dict() for twins in leaks.exact],
                "near": [twins.to_dict() for twins in leaks.near],
                "unchecked": leaks.unchecked,
            },
            "classes": self.classes,
            "shortcuts": [shortcut.to_dict() for shortcut in self.shortcuts],
            "leak": leaks.found,
            "rules": {
                "hash_bits": 256,
                "hash_distance": DISTANCE,
                "views": self.views,
                "likeness": LIKENESS,
                "shortcut_auc": MIN_AUC,
            },
        }


def audit(
    data: Path,
    pattern: re.Pattern[str] | None = None,
    *,
    reading: ReadOptions = DEFAULT_READ_OPTIONS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Audit a data set, ``DATA/{train,validation,test}/CLASS/**``.

    Parameters
    ----------
    data
        The folder; splits and classes may be missing.
    pattern
        See `echoquad_train.data.patients.patient_of`.
    reading
        How the data's files are read.
    seed
        Of the folds and permutations by which shortcuts are judged.
    progress
        Called with the number of frames read and of all.

    Raises
    ------
    DatasetError
        If there is no frame, or none that can be read.
    """
    frames = list_frames(data, reading)
    traces: list[Traces] = []
    files: list[bytes] = []
    modes: list[str] = []

    def trace(content: DecodedFile) -> None:
        traces.append(traces_of(content.grey, content.size))
        files.append(content.digest)
        modes.append(content.mode)

    found = read_pictures(frames, progress=progress, also=trace)
    read, failures = found.read, found.failures
    if not read:
        raise DatasetError(
            f"{data.as_posix()}: no frame can be read; the first failure: {failures[0].file}: {failures[0].error}"
        )
    patients = tuple(patient_id(frame.name, pattern) for frame in read)
    leaks = find_leaks(
        [frame.name for frame in read],
        patients,
        files,
        found.pixels,
        found.hashes,
        found.thumbs.__getitem__,
        found.views,
        looks=LOOKS,
    )
    return Audit(
        data=data,
        frames=tuple(frames),
        failures=tuple(failures),
        read=tuple(read),
        thumbs=tuple(found.thumbs),
        patients=patients,
        unknown=sum(patient_of(frame.name.split("/", 2)[2], pattern) is None for frame in frames),
        leaks=leaks,
        shortcuts=tuple(find_shortcuts(traces, [frame.label for frame in read], patients, seed)),
        classes=_by_class(read, traces, modes),
        notes=tuple(_oddities(frames)),
        views=len(found.views),
        patient_regex=pattern.pattern if pattern else None,
        seed=seed,
        reading=reading,
    )


def _by_class(read: Sequence[FrameRecord], traces: Sequence[Traces], modes: Sequence[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in sorted({frame.label for frame in read}):
        chosen = [index for index, frame in enumerate(read) if frame.label == name]
        figures = np.stack([traces[index].file for index in chosen]).astype(np.float64)
        found[name] = {
            "width": _spread(figures[:, 0]),
            "height": _spread(figures[:, 1]),
            "brightness": _spread(figures[:, 3]),
            "file_bytes": _spread(np.exp(figures[:, 4])),
            "kinds": dict(Counter(modes[index] for index in chosen).most_common()),
        }
    return found


def _spread(values: npt.NDArray[np.float64]) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return {"p5": round(float(low), 2), "median": round(float(middle), 2), "p95": round(float(high), 2)}


def _oddities(frames: Sequence[FrameRecord]) -> list[str]:
    classes = sorted({frame.label for frame in frames})
    held = defaultdict(set)
    for frame in frames:
        held[frame.split].add(frame.label)
    notes = [f"{split}: there is no such split" for split in SPLITS if split not in held]
    for split, names in held.items():
        notes += [f"{split}: no frame of class {name}" for name in classes if name not in names]
    if len(classes) < 2:
        notes.append(f"{classes[0]} is the only class: nothing can be told from it")
    return notes
