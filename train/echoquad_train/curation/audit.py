"""Audit: contents, faults, leaks and shortcut features of a data set.

`audit` reads every frame once and returns an `Audit`. ``docs/reference/audit.md`` explains each finding and its rule.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from echoquad_runtime._version import __version__
from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS, ReadOptions
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.quadrants import Grey
from echoquad_runtime.storage.system_files import SkippedEntries
from echoquad_train.curation.frame_scan import scan_frames
from echoquad_train.curation.leaks import Leaks, find_leaks
from echoquad_train.curation.shortcut_features import (
    MIN_AUC,
    Shortcut,
    ShortcutFeatures,
    find_shortcuts,
    shortcut_features,
)
from echoquad_train.curation.similarity import MAX_HASH_DISTANCE, MIN_SIMILARITY
from echoquad_train.data.dataset import LabelledFrame, Progress, no_readable_frame
from echoquad_train.data.frame_list import DecodedFile, list_frames
from echoquad_train.data.patient_summary import PatientSummary, summarize_patients
from echoquad_train.data.patients import patient_id
from echoquad_train.data.split_folders import SPLITS

__all__ = ["Audit", "audit"]

SCHEMA: Final = 2
"""2 renamed ``likeness`` to ``similarity``."""


@dataclass(frozen=True, slots=True)
class Audit:
    """The findings of an audit.

    Attributes
    ----------
    data
        The data folder.
    frames, failures
        All frames, and the unreadable ones.
    readable, thumbnails, patients
        The readable frames, and for each its thumbnail, uint8 [128, 128], and its patient.
    patient_reading
        How the patients of all frames were read from their names.
    leaks, shortcuts
        See `Leaks` and `Shortcut`.
    classes
        Figures of the frames of each class: ``width``, ``height``, ``brightness``, ``file_bytes``, ``kinds``.
    notes
        Sentences about missing splits and classes, and about names of folders.
    views
        Number of views per frame that were hashed to find near duplicates.
    patient_regex, seed, reading
        The options of the audit.
    skipped
        The hidden and system entries that were skipped.
    """

    data: Path
    frames: tuple[LabelledFrame, ...]
    failures: tuple[Failure, ...]
    readable: tuple[LabelledFrame, ...]
    thumbnails: tuple[Grey, ...]
    patients: tuple[str, ...]
    patient_reading: PatientSummary
    leaks: Leaks
    shortcuts: tuple[Shortcut, ...]
    classes: dict[str, dict[str, Any]]
    notes: tuple[str, ...]
    views: int
    patient_regex: str | None
    seed: int
    reading: ReadOptions = DEFAULT_READ_OPTIONS
    skipped: SkippedEntries = field(default_factory=SkippedEntries)

    @property
    def frames_without_patient(self) -> int:
        """Number of frames whose name contains no patient."""
        return self.patient_reading.without

    @property
    def class_names(self) -> list[str]:
        """The classes, sorted."""
        return sorted({frame.class_name for frame in self.frames})

    @property
    def counts(self) -> dict[str, dict[str, dict[str, int]]]:
        """Numbers by split and class: ``frames``, ``unreadable``, and ``patients`` of the readable frames."""
        people: dict[tuple[str, str], set[str]] = defaultdict(set)
        for frame, patient in zip(self.readable, self.patients, strict=True):
            people[frame.split, frame.class_name].add(patient)
        frames = Counter((frame.split, frame.class_name) for frame in self.frames)
        readable = Counter((frame.split, frame.class_name) for frame in self.readable)
        return {
            split: {
                name: {
                    "frames": frames[split, name],
                    "unreadable": frames[split, name] - readable[split, name],
                    "patients": len(people[split, name]),
                }
                for name in self.class_names
            }
            for split in dict.fromkeys(frame.split for frame in self.frames)
        }

    @property
    def flagged(self) -> tuple[Shortcut, ...]:
        """The shortcuts that predict a class better than chance."""
        return tuple(shortcut for shortcut in self.shortcuts if shortcut.flagged)

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of ``audit.json``, which ``docs/reference/audit.md`` describes."""
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
            **({"skipped": dict(self.skipped.counts)} if self.skipped.total else {}),
            "unreadable": [{"file": failure.file, "error": str(failure.error)} for failure in self.failures],
            "patients": {
                "by_split": leaks.patients_by_split,
                "frames_without": self.frames_without_patient,
                "across_splits": {patient: list(splits) for patient, splits in leaks.patients.items()},
                **self.patient_reading.to_dict(),
            },
            "duplicates": {
                "exact": [group.to_dict() for group in leaks.exact],
                "near": [group.to_dict() for group in leaks.near],
                "unchecked": leaks.unchecked,
            },
            "classes": self.classes,
            "shortcuts": [shortcut.to_dict() for shortcut in self.shortcuts],
            "leak": leaks.found,
            "rules": {
                "hash_bits": 256,
                "hash_distance": MAX_HASH_DISTANCE,
                "views": self.views,
                "similarity": MIN_SIMILARITY,
                "shortcut_auc": MIN_AUC,
            },
        }


def audit(
    data: Path,
    pattern: re.Pattern[str] | None = None,
    *,
    reading: ReadOptions = DEFAULT_READ_OPTIONS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Audit:
    """Audit a data set, ``DATA/{train,validation,test}/CLASS/**``.

    Splits and classes may be missing. `pattern` defines patients, see `echoquad_train.data.patients.read_patient`;
    `seed` is that of the folds and permutations that measure shortcut features.

    Raises
    ------
    DatasetError
        If there is no frame, or no readable one.
    """
    frames, notes, skipped = list_frames(data, reading)
    features: list[ShortcutFeatures] = []
    file_digests: list[bytes] = []
    modes: list[str] = []

    def visit(content: DecodedFile) -> None:
        features.append(shortcut_features(content.grey, content.size))
        file_digests.append(content.digest)
        modes.append(content.mode)

    scan = scan_frames(frames, progress=progress, visit=visit)
    if not scan.frames:
        raise no_readable_frame(data.as_posix(), scan.failures)
    patients = tuple(patient_id(frame.name, pattern) for frame in scan.frames)
    leaks = find_leaks(
        [frame.name for frame in scan.frames],
        patients,
        file_digests,
        scan.pixel_digests,
        scan.hashes,
        scan.thumbnails.__getitem__,
        scan.views,
    )
    return Audit(
        data=data,
        frames=tuple(frames),
        failures=tuple(scan.failures),
        readable=tuple(scan.frames),
        thumbnails=tuple(scan.thumbnails),
        patients=patients,
        patient_reading=summarize_patients((frame.name.split("/", 2)[2] for frame in frames), pattern),
        leaks=leaks,
        shortcuts=tuple(find_shortcuts(features, [frame.class_name for frame in scan.frames], patients, seed)),
        classes=_class_figures(scan.frames, features, modes),
        notes=(*_notes(frames), *notes),
        views=len(scan.views),
        patient_regex=pattern.pattern if pattern else None,
        seed=seed,
        reading=reading,
        skipped=skipped,
    )


def _class_figures(
    frames: Sequence[LabelledFrame], features: Sequence[ShortcutFeatures], modes: Sequence[str]
) -> dict[str, dict[str, Any]]:
    figures: dict[str, dict[str, Any]] = {}
    for name in sorted({frame.class_name for frame in frames}):
        chosen = [index for index, frame in enumerate(frames) if frame.class_name == name]
        values = np.stack([features[index].file for index in chosen]).astype(np.float64)
        figures[name] = {
            "width": _percentiles(values[:, 0]),
            "height": _percentiles(values[:, 1]),
            "brightness": _percentiles(values[:, 3]),
            "file_bytes": _percentiles(np.exp(values[:, 4])),
            "kinds": dict(Counter(modes[index] for index in chosen).most_common()),
        }
    return figures


def _percentiles(values: npt.NDArray[np.float64]) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.05, 0.5, 0.95])
    return {"p5": round(float(low), 2), "median": round(float(median), 2), "p95": round(float(high), 2)}


def _notes(frames: Sequence[LabelledFrame]) -> list[str]:
    classes = sorted({frame.class_name for frame in frames})
    classes_in = defaultdict(set)
    for frame in frames:
        classes_in[frame.split].add(frame.class_name)
    notes = [f"{split}: this split is missing" for split in SPLITS if split not in classes_in]
    for split, names in classes_in.items():
        notes += [f"{split}: no frame of class {name}" for name in classes if name not in names]
    if len(classes) < 2:
        notes.append(f"{classes[0]} is the only class: there is nothing to classify")
    return notes
