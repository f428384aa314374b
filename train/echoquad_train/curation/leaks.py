"""Leaks: patients and duplicate pictures in more than one split, which make a model's figures too good.

``echoquad data audit`` compares every frame in full. ``echoquad train`` calls `leaks_of_stores`, which compares the
quadrants that training has decoded anyway.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from echoquad_runtime.contract import QUADRANTS
from echoquad_runtime.quadrants import Grey, stitch
from echoquad_train.curation.similarity import (
    CENTRED,
    HashBits,
    IndexArray,
    View,
    near_duplicates,
    perceptual_hashes,
    thumbnail,
)
from echoquad_train.data.dataset import Store
from echoquad_train.data.patient_summary import PatientSummary, summarize_patients
from echoquad_train.data.patients import patient_id
from echoquad_train.data.split_folders import canonical_split, normalize_name

__all__ = ["DuplicateGroup", "Leaks", "find_leaks", "leaks_of_stores", "split_of"]

ALIGNMENT_LIMIT: Final = 20_000
"""Candidates that are aligned at most, nearest hashes first: some minutes."""
_BATCH: Final = 64  # frames read from a store at a time


@dataclass(frozen=True, slots=True)
class DuplicateGroup:
    """Frames that are one picture.

    Attributes
    ----------
    kind
        ``file`` for equal files, ``pixels`` for equal grey levels, ``near`` for near duplicates.
    names, patients
        Name and patient of each frame, in the order of the names.
    distance, similarity
        See `echoquad_train.curation.similarity.NearDuplicate`; 0 and 1 for exact duplicates.
    """

    kind: str
    names: tuple[str, ...]
    patients: tuple[str, ...]
    distance: int = 0
    similarity: float = 1.0

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of the frames, sorted."""
        return tuple(sorted({split_of(name) for name in self.names}))

    @property
    def conflict(self) -> bool:
        """Whether the picture is in two classes."""
        return len({normalize_name(name.split("/")[1]) for name in self.names}) > 1

    @property
    def leak(self) -> bool:
        """Whether the picture is in more than one split."""
        return len(self.splits) > 1

    def to_dict(self) -> dict[str, Any]:
        """Return the group as JSON values."""
        return {
            "kind": self.kind,
            "files": list(self.names),
            "patients": sorted(set(self.patients)),
            "splits": list(self.splits),
            "leak": self.leak,
            "conflict": self.conflict,
            "distance": self.distance,
            "similarity": round(self.similarity, 4),
        }


@dataclass(frozen=True, slots=True)
class Leaks:
    """Leaks and duplicates of a data set.

    Attributes
    ----------
    patients_by_split
        Number of patients per split; a frame without a known patient counts as a patient of its own.
    patients
        The splits of each patient in more than one split.
    exact, near
        Exact and near duplicates, within a split or across splits.
    unchecked
        Number of candidate pairs that were not aligned; see `ALIGNMENT_LIMIT`.
    reading
        How the patients were read from the names, if that was summarized.
    """

    patients_by_split: dict[str, int]
    patients: dict[str, tuple[str, ...]]
    exact: tuple[DuplicateGroup, ...]
    near: tuple[DuplicateGroup, ...]
    unchecked: int
    reading: PatientSummary | None = None

    @property
    def counts(self) -> dict[str, Any]:
        """The numbers without any name, as ``run.json`` and bundles record them."""
        return {
            "patients": dict(self.patients_by_split),
            "patients_across": len(self.patients),
            "exact_across": sum(group.leak for group in self.exact),
            "near_across": sum(group.leak for group in self.near),
            "unchecked": self.unchecked,
        }

    @property
    def found(self) -> bool:
        """Whether a patient or a picture is in more than one split."""
        return bool(self.patients) or any(group.leak for group in (*self.exact, *self.near))

    @property
    def summary(self) -> str:
        """The counts in one line, without any name."""
        counts = self.counts
        what = (
            f"{_plural(counts['patients_across'], 'patient')}, {_plural(counts['exact_across'], 'exact duplicate')} "
            f"and {_plural(counts['near_across'], 'near duplicate')} in more than one split"
        )
        people = ", ".join(f"{split} {count}" for split, count in self.patients_by_split.items())
        if self.found:
            return f"LEAK: {what} (patients: {people}): figures will be too good; see `echoquad data audit`"
        more = f"; {self.unchecked} pairs not checked" if self.unchecked else ""
        return f"leaks: {what} (patients: {people}{more})"


def split_of(name: str) -> str:
    """Return the split of a frame called ``SPLIT/CLASS/...``, by its canonical name."""
    folder = name.partition("/")[0]
    return canonical_split(folder) or folder


def find_leaks(
    names: Sequence[str],
    patients: Sequence[str],
    files: Sequence[bytes] | None,
    pixels: Sequence[bytes],
    bits: Sequence[HashBits],
    thumb: Callable[[int], Grey],
    views: Sequence[View],
    *,
    across_only: bool = False,
    limit: int = ALIGNMENT_LIMIT,
) -> Leaks:
    """Find the patients and pictures in more than one split, and the duplicates within a split.

    Parameters
    ----------
    names, patients
        F names ``SPLIT/CLASS/...``, and the patient of each frame.
    files, pixels
        F digests of the files' bytes (None if unknown), and of the grey levels with their shape.
    bits, thumb, views, limit
        See `echoquad_train.curation.similarity.near_duplicates`.
    across_only
        Ignore duplicates within a split.
    """
    splits = [split_of(name) for name in names]
    patients_in: dict[str, set[str]] = {split: set() for split in splits}
    splits_of: dict[str, set[str]] = defaultdict(set)
    for patient, split in zip(patients, splits, strict=True):
        patients_in[split].add(patient)
        splits_of[patient].add(split)

    def duplicates(kind: str, indices: Sequence[int], distance: int = 0, similarity: float = 1.0) -> DuplicateGroup:
        ordered = sorted(indices, key=lambda index: names[index])
        people = tuple(patients[index] for index in ordered)
        return DuplicateGroup(kind, tuple(names[index] for index in ordered), people, distance, similarity)

    indices_of: dict[bytes, list[int]] = defaultdict(list)
    for index, digest in enumerate(pixels):
        indices_of[digest].append(index)
    equal = [group for group in indices_of.values() if len(group) > 1]
    exact = [
        # A frame of a clip has no file digest.
        duplicates("file" if files and files[group[0]] and len({files[i] for i in group}) == 1 else "pixels", group)
        for group in equal
    ]
    redundant = {index for group in equal for index in group[1:]}  # compare each picture once
    left = [index for index in range(len(names)) if index not in redundant]
    code = np.unique(splits, return_inverse=True)[1][left] if left else np.zeros(0, int)

    def compared(first: IndexArray, second: IndexArray) -> np.ndarray[Any, np.dtype[np.bool_]]:
        return code[first] != code[second] if across_only else np.ones(len(first), bool)

    pairs, unchecked = near_duplicates([bits[i] for i in left], lambda i: thumb(left[i]), views, compared, limit)
    near = [duplicates("near", (left[pair.first], left[pair.second]), pair.distance, pair.similarity) for pair in pairs]

    def reported(groups: Sequence[DuplicateGroup]) -> tuple[DuplicateGroup, ...]:
        chosen = [group for group in groups if group.leak or not across_only]
        return tuple(sorted(chosen, key=lambda group: (not group.leak, group.names)))

    return Leaks(
        {split: len(people) for split, people in patients_in.items()},
        {patient: tuple(sorted(found)) for patient, found in sorted(splits_of.items()) if len(found) > 1},
        reported(exact),
        reported(near),
        unchecked,
    )


def leaks_of_stores(
    stores: Mapping[str, Store], pattern: re.Pattern[str] | None = None, layout: Sequence[str] = QUADRANTS
) -> Leaks:
    """Find the patients and pictures in more than one of several decoded or streamed splits, by their names.

    The splits are those of the run, not those in the names of frames: folds divide the pooled frames anew. Pictures are
    compared as the network receives them, cropped and resized. Cropped copies are found only if all sides were cropped
    equally. `layout` is the contract's field ``quadrants``.
    """
    names = [f"{split}/{name.split('/', 1)[1]}" for split, store in stores.items() for name in store.names]
    positions = [(store, index) for store in stores.values() for index in range(len(store.names))]

    def thumb(index: int) -> Grey:
        store, position = positions[index]
        return thumbnail(next(_stitched_frames(store, [position], layout)))

    pixels: list[bytes] = []
    bits: list[HashBits] = []
    for store in stores.values():
        for frame in _stitched_frames(store, range(len(store.names)), layout):
            pixels.append(hashlib.blake2b(frame.tobytes(), digest_size=16).digest())
            bits.append(perceptual_hashes(thumbnail(frame), CENTRED))
    people = [patient_id(name, pattern) for name in names]
    leaks = find_leaks(names, people, None, pixels, bits, thumb, CENTRED, across_only=True)
    return replace(leaks, reading=summarize_patients((name.split("/", 2)[2] for name in names), pattern))


def _stitched_frames(store: Store, frames: Sequence[int], layout: Sequence[str]) -> Iterator[Grey]:
    """Yield frames of a store, stitched from their quadrants: uint8 [2 S, 2 S]."""
    batches = (
        np.concatenate([np.arange(4 * frame, 4 * frame + 4) for frame in frames[start : start + _BATCH]])
        for start in range(0, len(frames), _BATCH)
    )
    for batch in store.feed(batches):
        for quadrants in batch.reshape(-1, 4, store.size, store.size):
            yield stitch(*quadrants, layout=layout)


def _plural(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
