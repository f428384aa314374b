"""Leaks: patients and pictures that are in more than one split, so that a model is measured on what it has seen.

``echoquad data audit`` looks at every frame in full; `leaks_of_stores` is the part that ``echoquad train`` runs by
itself, on the quadrants that it has decoded anyway.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from echoquad_runtime.quadrants import Grey, stitch
from echoquad_train.curation.similarity import CENTRED, Bits, View, alike, hashes, thumbnail
from echoquad_train.data.dataset import Store
from echoquad_train.data.patients import patient_id

__all__ = ["DuplicateGroup", "Leaks", "find_leaks", "leaks_of_stores", "split_of"]

LOOKS: Final = 20_000
"""Second looks at most, nearest hashes first: some minutes."""
_BATCH: Final = 64  # frames that are taken from a store at a time


@dataclass(frozen=True, slots=True)
class DuplicateGroup:
    """Frames that are one picture.

    Attributes
    ----------
    kind
        ``file`` where the files are equal, ``pixels`` where what they show is, ``near`` where it is nearly.
    names, patients
        Of each frame, in order of their names.
    distance, likeness
        See `echoquad_train.curation.similarity.Pair`; of nearly equal frames, else 0 and 1.
    """

    kind: str
    names: tuple[str, ...]
    patients: tuple[str, ...]
    distance: int = 0
    likeness: float = 1.0

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that they are in, sorted."""
        return tuple(sorted({split_of(name) for name in self.names}))

    @property
    def conflict(self) -> bool:
        """Whether one picture is in two classes."""
        return len({name.split("/")[1] for name in self.names}) > 1

    @property
    def leak(self) -> bool:
        """Whether they are in more than one split."""
        return len(self.splits) > 1

    def to_dict(self) -> dict[str, Any]:
        """Give it as JSON values."""
        return {
            "kind": self.kind,
            "files": list(self.names),
            "patients": sorted(set(self.patients)),
            "splits": list(self.splits),
            "leak": self.leak,
            "conflict": self.conflict,
            "distance": self.distance,
            "likeness": round(self.likeness, 4),
        }


@dataclass(frozen=True, slots=True)
class Leaks:
    """What was found.

    Attributes
    ----------
    members
        Patients by split; a frame whose name does not tell counts as one of its own.
    patients
        The splits of each patient who is in more than one.
    exact, near
        Frames that are one picture, in one split or in several.
    unchecked
        Pairs that may be nearly equal and were not looked at closely, for want of time.
    """

    members: dict[str, int]
    patients: dict[str, tuple[str, ...]]
    exact: tuple[DuplicateGroup, ...]
    near: tuple[DuplicateGroup, ...]
    unchecked: int

    @property
    def counts(self) -> dict[str, Any]:
        """Give the counts, without any name: what a run and a bundle say of it."""
        return {
            "patients": dict(self.members),
            "patients_across": len(self.patients),
            "exact_across": sum(twins.leak for twins in self.exact),
            "near_across": sum(twins.leak for twins in self.near),
            "unchecked": self.unchecked,
        }

    @property
    def found(self) -> bool:
        """Whether anything is in more than one split."""
        return bool(self.patients) or any(twins.leak for twins in (*self.exact, *self.near))

    @property
    def line(self) -> str:
        """Say it in one line."""
        counts = self.counts
        what = (
            f"{_many(counts['patients_across'], 'patient')}, {_many(counts['exact_across'], 'exact duplicate')} and "
            f"{_many(counts['near_across'], 'near duplicate')} in more than one split"
        )
        people = ", ".join(f"{split} {count}" for split, count in self.members.items())
        if self.found:
            return f"LEAK: {what} (patients: {people}): figures will be too good; see `echoquad data audit`"
        more = f"; {self.unchecked} pairs not looked at" if self.unchecked else ""
        return f"leaks: {what} (patients: {people}{more})"


def split_of(name: str) -> str:
    """Tell the split from a frame's name, ``SPLIT/CLASS/...``."""
    return name.partition("/")[0]


def find_leaks(
    names: Sequence[str],
    patients: Sequence[str],
    files: Sequence[bytes] | None,
    pixels: Sequence[bytes],
    bits: Sequence[Bits],
    thumb: Callable[[int], Grey],
    views: Sequence[View],
    *,
    across_only: bool = False,
    looks: int = LOOKS,
) -> Leaks:
    """Find patients and pictures that are in more than one split, and pictures that are in one split twice.

    Parameters
    ----------
    names, patients
        F names ``SPLIT/CLASS/...``, and whom each is of.
    files, pixels
        F digests, of a file's bytes (None where these were not looked at) and of its grey levels and their shape.
    bits, thumb, views
        See `echoquad_train.curation.similarity.alike`.
    across_only
        Pass over what is in one split.
    looks
        See there.
    """
    splits = [split_of(name) for name in names]
    homes: dict[str, set[str]] = defaultdict(set)
    for patient, split in zip(patients, splits, strict=True):
        homes[patient].add(split)

    def twins(kind: str, members: Sequence[int], distance: int = 0, alike: float = 1.0) -> DuplicateGroup:
        ordered = sorted(members, key=lambda index: names[index])
        people = tuple(patients[index] for index in ordered)
        return DuplicateGroup(kind, tuple(names[index] for index in ordered), people, distance, alike)

    same = [group for group in _groups(pixels) if len(group) > 1]
    exact = [
        # A frame of a clip has no file of its own.
        twins("file" if files and files[group[0]] and len({files[i] for i in group}) == 1 else "pixels", group)
        for group in same
    ]
    spare = {index for group in same for index in group[1:]}  # their picture is compared once
    left = [index for index in range(len(names)) if index not in spare]
    code = np.unique(splits, return_inverse=True)[1][left] if left else np.zeros(0, int)

    def compared(first: npt.NDArray[np.intp], second: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        return code[first] != code[second] if across_only else np.ones(len(first), bool)

    pairs, unchecked = alike([bits[i] for i in left], lambda place: thumb(left[place]), views, compared, looks)
    near = [twins("near", (left[pair.first], left[pair.second]), pair.distance, pair.likeness) for pair in pairs]

    def kept(found: Sequence[DuplicateGroup]) -> tuple[DuplicateGroup, ...]:
        chosen = [one for one in found if one.leak or not across_only]
        return tuple(sorted(chosen, key=lambda one: (not one.leak, one.names)))

    members: dict[str, set[str]] = {split: set() for split in splits}
    for patient, split in zip(patients, splits, strict=True):
        members[split].add(patient)
    across = {patient: tuple(sorted(found)) for patient, found in sorted(homes.items()) if len(found) > 1}
    counts = {split: len(people) for split, people in members.items()}
    return Leaks(counts, across, kept(exact), kept(near), unchecked)


def leaks_of_stores(stores: Sequence[Store], pattern: re.Pattern[str] | None = None) -> Leaks:
    """Find what is in more than one of several decoded splits: by the quadrants, no file is opened but of a stream.

    Pictures are compared as the network gets them, cropped and resized; copies that were cut are found where all sides
    were cut alike.
    """
    names = [name for store in stores for name in store.names]
    places = [(store, index) for store in stores for index in range(len(store.names))]

    def thumb(index: int) -> Grey:
        store, place = places[index]
        return thumbnail(next(_pictures(store, [place])))

    pixels: list[bytes] = []
    bits: list[Bits] = []
    for store in stores:
        for picture in _pictures(store, range(len(store.names))):
            pixels.append(hashlib.blake2b(picture.tobytes(), digest_size=16).digest())
            bits.append(hashes(thumbnail(picture), CENTRED))
    people = [patient_id(name, pattern) for name in names]
    return find_leaks(names, people, None, pixels, bits, thumb, CENTRED, across_only=True)


def _pictures(store: Store, frames: Sequence[int]) -> Iterator[Grey]:
    """Give frames of a store, stitched again: uint8 [2 S, 2 S]."""
    batches = (
        np.concatenate([np.arange(4 * frame, 4 * frame + 4) for frame in frames[start : start + _BATCH]])
        for start in range(0, len(frames), _BATCH)
    )
    for batch in store.feed(batches):
        for quadrants in batch.reshape(-1, 4, store.size, store.size):
            yield stitch(*quadrants)


def _groups(keys: Sequence[Hashable]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    return list(groups.values())


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
