"""How the patients of a data set were read from its names, in figures, examples and doubts, for a person to check."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from echoquad_train.data.patients import PatientReading, read_patient

__all__ = ["PatientSummary", "summarize_patients"]

_EXAMPLES: Final = 3
_MOST_SINGLE: Final = 0.5
"""Fraction of patients with a single frame above which frames may have been read as patients."""
_LARGEST: Final = 0.5
"""Fraction of the frames above which one patient is doubtful."""
_FEW: Final = 4  # patients below which fractions say nothing


@dataclass(frozen=True, slots=True)
class PatientSummary:
    """The patients of a data set.

    Attributes
    ----------
    patients
        Number of patients in the names; frames without one are not counted.
    fewest, median, most
        Frames per patient; 0 without patients.
    single
        Number of patients with one frame.
    without
        Number of frames whose name tells no patient.
    rules
        Number of frames by what named the patient, most frequent first.
    examples
        Names below the class folder, and the patient that was read from each.
    doubts
        Sentences about what may have been read wrongly.
    """

    patients: int
    fewest: int
    median: float
    most: int
    single: int
    without: int
    rules: dict[str, int]
    examples: tuple[tuple[str, str], ...]
    doubts: tuple[str, ...]

    @property
    def line(self) -> str:
        """The summary in one line."""
        if not self.patients:
            return f"patients: none in the names of {self.without} frames, each counts as one; use --patient-regex"
        name, patient = self.examples[0]
        without = f"; {self.without} frames tell none and count as one each" if self.without else ""
        return (
            f"patients: {self.patients}, {self.frames_each}, read from {' and '.join(self.rules)}, as {patient} from "
            f"{name}{without}"
        )

    @property
    def frames_each(self) -> str:
        """Frames per patient in words."""
        if self.fewest == self.most:
            return f"{_frames(self.most)} each"
        return f"{self.fewest} to {_frames(self.most)} each (median {self.median:g})"

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return {
            "count": self.patients,
            "frames_each": {"min": self.fewest, "median": self.median, "max": self.most},
            "with_one_frame": self.single,
            "read_from": dict(self.rules),
            "examples": [{"file": name, "patient": patient} for name, patient in self.examples],
            "doubts": list(self.doubts),
        }


def summarize_patients(names: Iterable[str], pattern: re.Pattern[str] | None = None) -> PatientSummary:
    """Summarize the patients in frames' names, which are paths below the class folder."""
    count: Counter[str] = Counter()
    rules: Counter[str] = Counter()
    example: dict[str, tuple[str, str]] = {}  # by rule, the first
    examples: dict[str, tuple[str, str]] = {}  # by patient, the first
    folders: dict[str, set[str]] = defaultdict(set)
    without = 0
    for name in names:
        found: PatientReading = read_patient(name, pattern)
        if found.patient is None:
            without += 1
            continue
        count[found.patient] += 1
        rules[found.rule] += 1
        example.setdefault(found.rule, (name, found.patient))
        if len(examples) < _EXAMPLES:
            examples.setdefault(found.patient, (name, found.patient))
        if found.folder:
            folders[found.patient].add(found.folder)
    ordered = dict(rules.most_common())
    shown = dict.fromkeys([*(example[rule] for rule in ordered), *examples.values()])
    frames = list(count.values()) or [0]
    return PatientSummary(
        patients=len(count),
        fewest=min(frames),
        median=float(statistics.median(frames)),
        most=max(frames),
        single=sum(frames_of == 1 for frames_of in frames),
        without=without,
        rules=ordered,
        examples=tuple(shown)[: max(_EXAMPLES, len(ordered))],
        doubts=tuple(_doubts(count, folders)),
    )


def _doubts(count: Counter[str], folders: dict[str, set[str]]) -> list[str]:
    doubts = []
    single = sum(frames == 1 for frames in count.values())
    if len(count) >= _FEW and single > _MOST_SINGLE * len(count):
        doubts.append(f"{single} of {len(count)} patients have a single frame: frames may have been read as patients")
    if count and count.most_common(1)[0][1] > max(_LARGEST * count.total(), 2 * _FEW):
        patient, frames = count.most_common(1)[0]
        doubts.append(f"{patient} has {frames} of {count.total()} frames: patients may have been read as one")
    deep = [sorted(paths) for _, paths in sorted(folders.items()) if len({path.count("/") for path in paths}) > 1]
    doubts += _shown(deep, "folders of one name at different depths are one patient")
    spread = [
        sorted(paths)
        for _, paths in sorted(folders.items())
        if len({path.rpartition("/")[0] for path in paths}) > 1 and len({path.count("/") for path in paths}) == 1
    ]
    return doubts + _shown(spread, "folders of one name in different folders are one patient")


def _shown(found: Sequence[Sequence[str]], sentence: str) -> list[str]:
    lines = [f"{', '.join(paths[:_EXAMPLES])}: {sentence}" for paths in found[:_EXAMPLES]]
    more = len(found) - _EXAMPLES
    return lines + ([f"and {more} more patients: {sentence}"] if more > 0 else [])


def _frames(count: int) -> str:
    return "1 frame" if count == 1 else f"{count} frames"
