"""Data splits: divide labelled frames into train, validation and test, by patient and stratified by class.

No patient is in two splits. Patients who share a picture stay together: two of the 450 CAMUS patients are one exam
under two names, and a split by name alone could separate them. Shared pictures are found as the audit finds them, so
that an audit of the result reports no leak.
"""

from __future__ import annotations

import csv
import errno
import io
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from echoquad_runtime.storage.row_names import encode_text, to_row_name
from echoquad_runtime.storage.system_files import SkippedEntries
from echoquad_train.curation.frame_scan import scan_frames
from echoquad_train.curation.leaks import find_leaks
from echoquad_train.data.dataset import LabelledFrame, Progress
from echoquad_train.data.frame_list import list_splits
from echoquad_train.data.patient_summary import PatientSummary, summarize_patients
from echoquad_train.data.patients import patient_of
from echoquad_train.data.split_folders import (
    SPLITS,
    class_folders,
    class_name_warnings,
    listed_splits,
    patient_class_folders,
)

__all__ = ["FRACTIONS", "MANIFEST", "Mode", "Partition", "assign", "parse_fractions", "partition", "write_partition"]

Mode = Literal["copy", "link", "manifest"]
FRACTIONS: Final = (0.70, 0.15, 0.15)
MANIFEST: Final = "split.csv"


@dataclass(frozen=True, slots=True)
class Partition:
    """The result of `partition`.

    Attributes
    ----------
    source
        The source folder.
    frames, patients, splits
        The readable frames, and the patient and the split of each.
    failures
        The unreadable frames, which are in no split.
    joined
        Groups of patients who share a picture.
    reading
        How the patients were read from the names.
    notes, skipped
        Sentences about the folders; the hidden and system entries that were skipped.
    """

    source: Path
    frames: tuple[LabelledFrame, ...]
    patients: tuple[str, ...]
    splits: tuple[str, ...]
    failures: tuple[Failure, ...]
    joined: tuple[tuple[str, ...], ...]
    reading: PatientSummary
    notes: tuple[str, ...]
    skipped: SkippedEntries

    @property
    def counts(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Number of frames and of patients, by split and class."""
        frames: dict[tuple[str, str], set[str]] = defaultdict(set)
        people: dict[tuple[str, str], set[str]] = defaultdict(set)
        for frame, patient, split in zip(self.frames, self.patients, self.splits, strict=True):
            frames[split, frame.class_name].add(frame.name)
            people[split, frame.class_name].add(patient)
        names = sorted({frame.class_name for frame in self.frames})
        used = [split for split in SPLITS if split in self.splits]
        return {split: {n: (len(frames[split, n]), len(people[split, n])) for n in names} for split in used}


def parse_fractions(text: str) -> tuple[float, float, float]:
    """Parse ``70-15-15`` or ``0.8,0.1,0.1``; the last fraction, that of the test split, may be 0.

    Raises
    ------
    ConfigError
        If `text` is not three numbers with sum 1 or 100.
    """
    error = ConfigError(
        f"--fractions {text!r}: expected three shares of train, validation and test with sum 100 or 1, "
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
    progress: Progress | None = None,
) -> Partition:
    """Assign the frames of ``SOURCE/CLASS/**``, or of ``SOURCE/{train,validation,test}/CLASS/**``, to new splits.

    Folders may also be nested as ``PATIENT/CLASS/**``; the result has ``CLASS/PATIENT/**``.

    Raises
    ------
    DatasetError
        If there are fewer than two classes, a class has too few patients for the splits, two frames would have the
        same name, or some folders are named as splits are and others are not.
    """
    frames, notes, skipped = _list_pool(source, reading)
    scan = scan_frames(frames, progress=progress)
    names = [frame.name_in_pool for frame in scan.frames]
    patients = [patient_of(name.partition("/")[2], pattern) or name for name in names]
    # find_leaks compares splits. Names that present each patient as a split make it report what patients share.
    number = {patient: str(index) for index, patient in enumerate(dict.fromkeys(patients))}
    leaks = find_leaks(
        [f"{number[patient]}/{index}" for index, patient in enumerate(patients)],
        patients,
        None,
        scan.pixel_digests,
        scan.hashes,
        scan.thumbnails.__getitem__,
        scan.views,
        across_only=True,
    )
    groups = _join(patients, [set(group.patients) for group in (*leaks.exact, *leaks.near)])
    classes = sorted({frame.class_name for frame in frames})
    unit_of = {patient: index for index, group in enumerate(groups) for patient in group}
    sizes = np.zeros((len(groups), len(classes)), np.int64)
    for frame, patient in zip(scan.frames, patients, strict=True):
        sizes[unit_of[patient], classes.index(frame.class_name)] += 1
    chosen = assign(sizes, fractions, classes, seed)
    splits = tuple(SPLITS[chosen[unit_of[patient]]] for patient in patients)
    joined = tuple(group for group in groups if len(group) > 1)
    return Partition(
        source,
        tuple(scan.frames),
        tuple(patients),
        splits,
        tuple(scan.failures),
        joined,
        summarize_patients((name.partition("/")[2] for name in names), pattern),
        notes,
        skipped,
    )


def assign(
    sizes: npt.NDArray[np.int64], fractions: Sequence[float], classes: Sequence[str], seed: int
) -> npt.NDArray[np.intp]:
    """Assign a split to each unit: a patient, or patients who must stay together.

    Units are assigned in descending size, each to the split that lacks most of the unit's classes. Then a split without
    a class receives the smallest unit with that class, from the split that has most of these units.

    Parameters
    ----------
    sizes
        int64 [U, C], frames of each unit by class.
    fractions
        Fraction of each split, with sum 1; a split with fraction 0 stays empty.
    classes
        C names.
    seed
        Seed of the order among units of one size.

    Returns
    -------
    intp [U]
        Split indices.

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
                "one for each split; define patients with --patient-regex"
            )
    totals = sizes.sum(axis=0)
    lacking = np.outer(fractions, totals).astype(np.float64)
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.argsort(-sizes[order].sum(axis=1), kind="stable")]
    chosen = np.zeros(len(sizes), np.intp)
    for unit in order:
        # The lacking fraction of each class, weighted by the unit's frames of that class.
        gains = (lacking / totals) @ sizes[unit]
        chosen[unit] = used[int(np.argmax(gains[used]))]
        lacking[chosen[unit]] -= sizes[unit]
    return _fill(sizes, chosen, used)


def _fill(sizes: npt.NDArray[np.int64], chosen: npt.NDArray[np.intp], used: Sequence[int]) -> npt.NDArray[np.intp]:
    """Move units until each split has each class; never move the last unit of a class out of a split."""
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
        "no assignment was found that has every class in every split; "
        "expected more patients, or fewer splits: --fractions 80-20-0"
    )


def write_partition(parts: Partition, out: Path, mode: Mode = "copy") -> int:
    """Write ``out/SPLIT/CLASS/**`` and ``split.csv``; mode ``manifest`` writes ``split.csv`` only.

    Returns
    -------
    int
        Number of files that were copied in mode ``link`` because hard links do not cross disks.

    Raises
    ------
    OutputError
        If `out` exists and is not empty, or cannot be written.
    """
    copied = 0
    with atomic_folder(out) as partial:
        if mode != "manifest":
            done: set[Path] = set()
            for frame, split in zip(parts.frames, parts.splits, strict=True):
                target = partial / split / _name_of_file(frame.name_in_pool, frame)
                if target not in done:
                    done.add(target)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    copied += _place_file(frame.path, target, mode)
        write_bytes(partial / MANIFEST, _manifest(parts))
    return copied


def _place_file(path: Path, target: Path, mode: Mode) -> int:
    """Link or copy a file; return 1 if it was copied in place of a link."""
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
        file = frame.path.relative_to(parts.source).as_posix() + ("" if frame.frame is None else f"#{frame.frame}")
        rows.writerow([to_row_name(file), to_row_name(frame.class_name), to_row_name(patient), split])
    return encode_text(text.getvalue())


def _name_of_file(name: str, frame: LabelledFrame) -> str:
    """Return a frame's name without the number of a frame in a clip."""
    return name if frame.frame is None else name.removesuffix(f"#{frame.frame}")


def _list_pool(source: Path, reading: ReadOptions) -> tuple[list[LabelledFrame], tuple[str, ...], SkippedEntries]:
    """Return the frames of the source, sentences about its folders, and what was skipped."""
    if not source.is_dir():
        raise DatasetError(f"{source.as_posix()}: no such folder; expected one folder per class")
    folders = [*listed_splits(source, strict=True)[0].values()] or [""]
    skipped = SkippedEntries()
    notes = []
    frames = []
    for folder in folders:
        if inner := patient_class_folders(source / folder):
            notes.append(f"{folder or '.'}: read as PATIENT/CLASS, with classes {', '.join(inner)}")
            frames += _class_first(list_splits(source, [folder], reading, skipped), folder)
        else:
            frames += list_splits(source, [folder], reading, skipped)
    classes = sorted({frame.class_name for frame in frames})
    if len(classes) < 2:
        found = f"frames of the single class {classes[0]}" if classes else "no frame"
        shown = ", ".join([*class_folders(source)][:6]) or "none"
        raise DatasetError(
            f"{source.as_posix()}: {found} found (folders: {shown}); expected frames in two or more folders named "
            f"after classes{matrices_hint(str(source), reading) if not classes else ''}"
        )
    seen: dict[str, str] = {}
    for frame in frames:
        if (other := seen.setdefault(frame.name_in_pool, frame.name)) != frame.name:
            raise DatasetError(
                f"{source.as_posix()}: {other} and {frame.name} would both become {frame.name_in_pool}; "
                "expected different names within a class; rename one"
            )
    return frames, (*notes, *class_name_warnings(classes)), skipped


def _class_first(frames: Sequence[LabelledFrame], folder: str) -> list[LabelledFrame]:
    """Rename frames from ``PATIENT/CLASS/...`` to ``CLASS/PATIENT/...``; frames beside the classes have none."""
    prefix = f"{folder}/" if folder else ""
    renamed = []
    for frame in frames:
        patient, _, rest = frame.name.removeprefix(prefix).partition("/")
        kind, _, file = rest.partition("/")
        if not file:
            raise DatasetError(
                f"{frame.name}: lies beside the class folders of its patient; expected PATIENT/CLASS/**; move it into "
                "one of them"
            )
        renamed.append(replace(frame, name=f"{prefix}{kind}/{patient}/{file}"))
    return renamed


def _join(patients: Sequence[str], shared: Sequence[set[str]]) -> list[tuple[str, ...]]:
    """Return groups of patients connected by shared pictures, in the order of their first frames."""
    group = {patient: {patient} for patient in patients}
    for people in shared:
        union = set().union(*(group[patient] for patient in people))
        for patient in union:
            group[patient] = union
    unique = {id(members): members for members in group.values()}
    return [tuple(sorted(members)) for members in unique.values()]
