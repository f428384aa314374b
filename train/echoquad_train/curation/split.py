"""Partition: labelled frames into train, validation and test, by patient and by class, never a patient in two.

Patients who share a picture stay together: in CAMUS two of 450 are one exam under two names, and a split by name alone
could put it on both sides. What is shared is found as the audit finds it, so that an audit of the result has no leak to
tell of.
"""

from __future__ import annotations

import csv
import errno
import io
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from echoquad_runtime.errors import ConfigError, DatasetError
from echoquad_runtime.frames.discovery import matrices_hint
from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS, ReadOptions
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.storage.atomic import write_bytes
from echoquad_runtime.storage.atomic_folder import atomic_folder
from echoquad_runtime.storage.row_names import encoded, printed
from echoquad_train.curation.leaks import find_leaks
from echoquad_train.curation.thumbnails import read_pictures
from echoquad_train.data.dataset import SPLITS
from echoquad_train.data.frame_list import FrameRecord, class_folders, frames_below
from echoquad_train.data.patients import patient_of

__all__ = ["FRACTIONS", "MANIFEST", "Mode", "Partition", "assign", "parse_fractions", "partition", "write_partition"]

Mode = Literal["copy", "link", "manifest"]
FRACTIONS: Final = (0.70, 0.15, 0.15)
MANIFEST: Final = "split.csv"


@dataclass(frozen=True, slots=True)
class Partition:
    """Who goes where.

    Attributes
    ----------
    source
        The folder that the frames come from.
    frames, patients, splits
        The readable frames, whom each is of, and its split.
    failures
        Frames that cannot be read; they are in no split.
    joined
        Groups of patients who share a picture.
    """

    source: Path
    frames: tuple[FrameRecord, ...]
    patients: tuple[str, ...]
    splits: tuple[str, ...]
    failures: tuple[Failure, ...]
    joined: tuple[tuple[str, ...], ...]

    @property
    def counts(self) -> dict[str, dict[str, tuple[int, int]]]:
        """By split and class: frames and patients."""
        frames: dict[tuple[str, str], set[str]] = defaultdict(set)
        people: dict[tuple[str, str], set[str]] = defaultdict(set)
        for frame, patient, split in zip(self.frames, self.patients, self.splits, strict=True):
            frames[split, frame.label].add(frame.name)
            people[split, frame.label].add(patient)
        names = sorted({frame.label for frame in self.frames})
        used = [split for split in SPLITS if split in self.splits]
        return {split: {n: (len(frames[split, n]), len(people[split, n])) for n in names} for split in used}


def parse_fractions(text: str) -> tuple[float, float, float]:
    """Read ``70-15-15`` or ``0.8,0.1,0.1``; the last, of the test split, may be 0.

    Raises
    ------
    ConfigError
        If they are no three numbers with the sum 1 or 100.
    """
    error = ConfigError(
        f"--fractions {text!r}: expected three shares of train, validation and test with the sum 100 or 1, "
        "such as 70-15-15; only the last may be 0"
    )
    try:
        shares = [float(part) for part in re.split(r"[-,/]", text)]
    except ValueError:
        raise error from None
    total = sum(shares)
    if len(shares) != len(SPLITS) or not all(0 <= share < total for share in shares) or 0 in shares[:2]:
        raise error
    if not any(abs(total - wanted) < 1e-6 * wanted for wanted in (1, 100)):
        raise error
    train, validation, test = (share / total for share in shares)
    return train, validation, test


def partition(
    source: Path,
    fractions: tuple[float, float, float] = FRACTIONS,
    pattern: re.Pattern[str] | None = None,
    *,
    reading: ReadOptions = DEFAULT_READ_OPTIONS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Partition:
    """Divide the frames of ``SOURCE/CLASS/**``, or those of ``SOURCE/{train,validation,test}/CLASS/**`` anew.

    Raises
    ------
    DatasetError
        If there are fewer than two classes, a class has too few patients for the splits, or two frames would get one
        name.
    """
    frames = _pool(source, reading)
    found = read_pictures(frames, progress=progress)
    read = found.read
    inner = [_inner(frame) for frame in read]
    patients = [patient_of(name.partition("/")[2], pattern) or name for name in inner]
    # Named as if each patient were a split, so that what two of them share counts as a leak between them.
    number = {patient: str(index) for index, patient in enumerate(dict.fromkeys(patients))}
    named = [f"{number[patient]}/{index}" for index, patient in enumerate(patients)]
    leaks = find_leaks(
        named, patients, None, found.pixels, found.hashes, found.thumbs.__getitem__, found.views, across_only=True
    )
    groups = _join(patients, [set(twins.patients) for twins in (*leaks.exact, *leaks.near)])
    classes = sorted({frame.label for frame in frames})
    unit_of = {patient: index for index, group in enumerate(groups) for patient in group}
    sizes = np.zeros((len(groups), len(classes)), np.int64)
    for frame, patient in zip(read, patients, strict=True):
        sizes[unit_of[patient], classes.index(frame.label)] += 1
    chosen = assign(sizes, fractions, classes, seed)
    splits = tuple(SPLITS[chosen[unit_of[patient]]] for patient in patients)
    joined = tuple(group for group in groups if len(group) > 1)
    return Partition(source, tuple(read), tuple(patients), splits, tuple(found.failures), joined)


def assign(
    sizes: npt.NDArray[np.int64], fractions: Sequence[float], classes: Sequence[str], seed: int
) -> npt.NDArray[np.intp]:
    """Choose a split for each unit that must stay together.

    Largest first, each goes where most is lacking of the classes that it has; then a split that has nothing of a class
    gets the smallest unit that has, from the split with the most of them.

    Parameters
    ----------
    sizes
        int64 [U, C], frames of each unit by class.
    fractions
        Shares of the splits, with the sum 1; a split with the share 0 stays empty.
    classes
        C names.
    seed
        Of the order among units of one size.

    Returns
    -------
    intp [U]
        Indices of splits.

    Raises
    ------
    DatasetError
        If a class has fewer units than there are splits.
    """
    used = [index for index, share in enumerate(fractions) if share > 0]
    for name, units in zip(classes, (sizes > 0).sum(axis=0).tolist(), strict=True):
        if units < len(used):
            raise DatasetError(
                f"class {name}: frames of {units} patients found who share no picture; expected at least {len(used)}, "
                "one for each split; --patient-regex says what a patient is"
            )
    totals = sizes.sum(axis=0)
    lacking = np.outer(fractions, totals).astype(np.float64)
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.argsort(-sizes[order].sum(axis=1), kind="stable")]
    chosen = np.zeros(len(sizes), np.intp)
    for unit in order:
        # Of each class the part that is lacking, weighted with what the unit would bring of it.
        gains = (lacking / totals) @ sizes[unit]
        chosen[unit] = used[int(np.argmax(gains[used]))]
        lacking[chosen[unit]] -= sizes[unit]
    return _fill(sizes, chosen, used)


def _fill(sizes: npt.NDArray[np.int64], chosen: npt.NDArray[np.intp], used: Sequence[int]) -> npt.NDArray[np.intp]:
    """Give each split something of each class, where that takes nothing from another that has no more of it."""
    for _ in range(len(sizes)):
        held = np.array([(sizes[chosen == split] > 0).sum(axis=0) for split in used])
        empty = np.argwhere(held == 0)
        if not len(empty):
            return chosen
        to, kind = (int(value) for value in empty[0])
        movable = [
            unit
            for unit in np.flatnonzero(sizes[:, kind] > 0).tolist()
            if np.all(held[used.index(int(chosen[unit]))][sizes[unit] > 0] > 1)
        ]
        if not movable:
            break
        best = min(movable, key=lambda unit: (-held[used.index(int(chosen[unit])), kind], sizes[unit].sum(), unit))
        chosen[best] = used[to]
    raise DatasetError(
        "the patients' classes are so mixed that no way was found to have every class in every split; "
        "expected more patients, or fewer splits: --fractions 80-20-0"
    )


def write_partition(parts: Partition, out: Path, mode: Mode = "copy") -> int:
    """Write the data set, ``out/SPLIT/CLASS/**``, and ``split.csv``; the manifest alone where that is the mode.

    Returns
    -------
    int
        Files that were copied because no hard link could be made: they lie on another disk.

    Raises
    ------
    OutputError
        If `out` is in the way or cannot be written.
    """
    copied = 0
    with atomic_folder(out) as partial:
        if mode != "manifest":
            done: set[Path] = set()
            for frame, split in zip(parts.frames, parts.splits, strict=True):
                target = partial / split / _inner_path(parts.source, frame)
                if target not in done:
                    done.add(target)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    copied += _put(frame.path, target, mode)
        write_bytes(partial / MANIFEST, _manifest(parts))
    return copied


def _put(path: Path, target: Path, mode: Mode) -> int:
    if mode == "link":
        try:
            os.link(path.resolve(), target)
            return 0
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EACCES):
                raise
    shutil.copyfile(path, target)
    return 1 if mode == "link" else 0


def _manifest(parts: Partition) -> bytes:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", "class", "patient", "split"])
    for frame, patient, split in zip(parts.frames, parts.patients, parts.splits, strict=True):
        rows.writerow([printed(frame.name), printed(frame.label), printed(patient), split])
    return encoded(text.getvalue())


def _pool(source: Path, reading: ReadOptions) -> list[FrameRecord]:
    if not source.is_dir():
        raise DatasetError(f"{source.as_posix()}: no such folder; expected a folder a class")
    there = [split for split in SPLITS if (source / split).is_dir()]
    frames = [f for split in there for f in frames_below(source, source / split, split, reading)]
    frames = frames if there else list(frames_below(source, source, "", reading))
    classes = sorted({frame.label for frame in frames})
    if len(classes) < 2:
        found = f"frames of the class {classes[0]} alone" if classes else "no frame"
        folders = ", ".join(class_folders(source)[:6]) or "none"
        raise DatasetError(
            f"{source.as_posix()}: {found} found (folders: {folders}); expected frames in two or more folders named "
            f"after classes{matrices_hint(str(source), reading) if not classes else ''}"
        )
    seen: dict[str, str] = {}
    for frame in frames:
        if (other := seen.setdefault(_inner(frame), frame.name)) != frame.name:
            raise DatasetError(
                f"{source.as_posix()}: {other} and {frame.name} would both become {_inner(frame)}; expected names that "
                "differ within a class; rename one"
            )
    return frames


def _inner(frame: FrameRecord) -> str:
    """Give a frame's name without its old split."""
    return frame.name.removeprefix(f"{frame.split}/") if frame.split else frame.name


def _inner_path(source: Path, frame: FrameRecord) -> Path:
    return frame.path.relative_to(source / frame.split if frame.split else source)


def _join(patients: Sequence[str], shared: Sequence[set[str]]) -> list[tuple[str, ...]]:
    """Group patients, those who share something together; in order of their first frames."""
    group = {patient: {patient} for patient in patients}
    for people in shared:
        union = set().union(*(group[patient] for patient in people))
        for patient in union:
            group[patient] = union
    unique = {id(members): members for members in group.values()}
    return [tuple(sorted(members)) for members in unique.values()]
