"""Data sets: labelled frames on disk, decoded once into 8-bit quadrants."""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Final, Protocol

import numpy as np
import numpy.typing as npt

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import DatasetError, EchoQuadError, FrameError
from echoquad_runtime.frames.discovery import EXPECTED_FILES, find_in_folder, matrices_hint
from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS, Flip, ReadOptions
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.frames.reader import load_grey
from echoquad_runtime.quadrants import frame_quadrants
from echoquad_runtime.storage.atomic import output_errors
from echoquad_train.data.prefetch import prefetch

__all__ = [
    "SPLITS",
    "LabelledFrame",
    "QuadrantStore",
    "Split",
    "Store",
    "decode",
    "decode_split",
    "load_quadrants",
    "read_classes",
    "read_split",
    "stored_bytes",
]

SPLITS: Final = ("train", "validation", "test")

MEMORY_BYTES: Final = 4 * 1024**3
"""Quadrants beyond this size are kept in a memory-mapped file beside the run, which the system pages in and out; where
the disk has no room for that, they are streamed, see `echoquad_train.data.stream`."""


@dataclass(frozen=True, slots=True)
class LabelledFrame:
    """A frame on disk and the index of its class.

    Attributes
    ----------
    path, name, frame, flip
        As of a `FrameFile`; `name` is relative to the data folder.
    label
        The index of its class.
    fault
        Why it cannot be read, where that is known already.
    """

    path: Path
    name: str
    label: int
    frame: int | None = None
    flip: Flip = "none"
    fault: EchoQuadError | None = None

    @property
    def file(self) -> FrameFile:
        """Give it as a reader takes it."""
        return FrameFile(self.path, self.name, self.frame, self.flip)


@dataclass(frozen=True, slots=True)
class Split:
    """The labelled frames of ``train``, ``validation`` or ``test``."""

    name: str
    classes: tuple[str, ...]
    frames: tuple[LabelledFrame, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Frames by class."""
        counted = Counter(frame.label for frame in self.frames)
        return {name: counted[index] for index, name in enumerate(self.classes)}

    def files(self) -> Iterator[FrameFile | Failure]:
        """Give the frames as a predictor takes them."""
        return (frame.file if frame.fault is None else Failure(frame.name, frame.fault) for frame in self.frames)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the frames' names and file sizes: whether a run is resumed on the data it was begun on."""
        digest = hashlib.sha256()
        for frame in self.frames:
            try:
                size = frame.path.stat().st_size
            except OSError:  # a broken link: decoding will say so
                size = -1
            turned = "" if frame.flip == "none" else f"\0{frame.flip}"
            digest.update(f"{frame.name}\0{size}{turned}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class QuadrantStore:
    """Decoded frames.

    Attributes
    ----------
    quadrants
        uint8 [F, 4, S, S], grey levels; in memory or memory-mapped.
    labels
        int64 [F], class indices.
    names
        F names.
    failures
        Frames that could not be read, and why; they are in none of the above.
    """

    quadrants: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    names: tuple[str, ...]
    failures: tuple[Failure, ...]

    @property
    def size(self) -> int:
        """Give S."""
        return int(self.quadrants.shape[-1])

    def feed(self, batches: Iterable[npt.NDArray[np.int64]], *, whole: bool = False) -> Iterator[npt.NDArray[np.uint8]]:
        """Give copies of the quadrants, uint8 [B, 1, S, S], of each batch of indices into [F * 4].

        With `whole`, all four of each one's frame, [B, 4, S, S].
        """
        if whole:
            return (self.quadrants[chosen // 4] for chosen in batches)
        return (self.quadrants[chosen // 4, chosen % 4][:, None] for chosen in batches)


class Store(Protocol):
    """Where training finds its quadrants: decoded, in a `QuadrantStore`, or on disk, in a `StreamedStore`."""

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Give the class indices of the readable frames, int64 [F]."""

    @property
    def names(self) -> tuple[str, ...]:
        """Give their names."""

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Give the frames that could not be read."""

    @property
    def size(self) -> int:
        """Give the quadrants' side."""

    def feed(self, batches: Iterable[npt.NDArray[np.int64]], *, whole: bool = False) -> Iterator[npt.NDArray[np.uint8]]:
        """Give the quadrants, uint8 [B, 1, S, S], of each batch of indices into [F * 4].

        With `whole`, all four of each one's frame, [B, 4, S, S].
        """


def read_classes(data: Path) -> tuple[str, ...]:
    """Read the class names: the folders of ``DATA/train``, sorted.

    Raises
    ------
    DatasetError
        If there is no such folder, or it holds fewer than two classes.
    """
    folder = _split_folder(data, "train")
    classes = tuple(sorted(entry.name for entry in folder.iterdir() if _is_class(entry)))
    if len(classes) < 2:
        found = f"the single class {classes[0]!r}" if classes else "no class folder"
        raise DatasetError(f"{folder.as_posix()}: {found} found; expected two or more folders named after classes")
    return classes


def read_split(data: Path, split: str, classes: Sequence[str], reading: ReadOptions = DEFAULT_READ_OPTIONS) -> Split:
    """List a split's frames by class: ``DATA/SPLIT/CLASS/**/*.png`` and the other endings that frames have.

    Each frame of a clip is a frame, of the clip's class.

    Raises
    ------
    DatasetError
        If the split or a class in it is missing, is empty, or has a class that is not among `classes`.
    """
    folder = _split_folder(data, split)
    there = {entry.name for entry in folder.iterdir() if _is_class(entry)}
    missing, unknown = sorted(set(classes) - there), sorted(there - set(classes))
    if missing:
        raise DatasetError(
            f"{folder.as_posix()}: class {', '.join(missing)} is missing; "
            f"expected a folder for each of {', '.join(classes)}"
        )
    if unknown:
        raise DatasetError(
            f"{folder.as_posix()}: class {', '.join(unknown)} is unknown; expected only {', '.join(classes)}"
        )
    frames: list[LabelledFrame] = []
    for label, name in enumerate(classes):
        found = [_labelled(item, data, label) for item in find_in_folder(folder / name, f"{split}/{name}/", reading)]
        if not found:
            hint = matrices_hint(str(folder / name), reading)
            raise DatasetError(f"{(folder / name).as_posix()}: no frame found; {EXPECTED_FILES}{hint}")
        frames += found
    return Split(split, tuple(classes), tuple(frames))


def _labelled(item: FrameFile | Failure, data: Path, label: int) -> LabelledFrame:
    if isinstance(item, Failure):
        return LabelledFrame(data / item.file, item.file, label, fault=item.error)
    return LabelledFrame(item.path, item.name, label, item.frame, item.flip)


def load_quadrants(
    split: Split,
    contract: Contract,
    *,
    overflow: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> QuadrantStore:
    """Decode every frame of a split once.

    Parameters
    ----------
    split
        What to decode.
    contract
        Gives the crop and the input size S.
    overflow
        The folder whose disk takes the quadrants where they exceed `MEMORY_BYTES`, in a file without a name that is
        gone as soon as nothing uses it, however the process ends; None keeps them in memory.
    progress
        Called with the number of frames done and of all.

    Raises
    ------
    DatasetError
        If of some class no frame can be read.
    OutputError
        If the overflow folder's disk is full or cannot be written to.
    """
    count, size = len(split.frames), contract.input_size
    large = overflow is not None and stored_bytes(split, contract) > MEMORY_BYTES
    quadrants = np.empty((0 if large else count, 4, size, size), np.uint8)
    with _overflow_file(overflow if large else None) as file:

        def keep(index: int, decoded: npt.NDArray[np.uint8]) -> None:
            if file is None:
                quadrants[index] = decoded[:, 0]
            else:
                file.write(decoded.tobytes())

        kept, failures = decode_split(split, contract, keep, progress)
        if file is not None:
            file.flush()
            # Writable, though nothing writes: torch warns of arrays that are not.
            quadrants = np.memmap(file, np.uint8, "r+", shape=(len(kept), 4, size, size))
    labels = np.array([frame.label for frame in kept], np.int64)
    return QuadrantStore(quadrants[: len(kept)], labels, tuple(frame.name for frame in kept), failures)


def stored_bytes(split: Split, contract: Contract) -> int:
    """Give the bytes that a split's quadrants take."""
    return len(split.frames) * 4 * contract.input_size**2


def decode_split(
    split: Split,
    contract: Contract,
    keep: Callable[[int, npt.NDArray[np.uint8]], None],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[LabelledFrame], tuple[Failure, ...]]:
    """Decode every frame of a split; gives those that can be read, and the failures of the others.

    `keep` is called with each readable frame's place among such, counted from 0, and its quadrants, uint8 [4, 1, S, S].

    Raises
    ------
    DatasetError
        If of some class no frame can be read.
    """
    kept: list[LabelledFrame] = []
    failures: dict[LabelledFrame, Failure] = {}
    for done, (frame, outcome) in enumerate(prefetch(partial(decode, contract=contract), split.frames, "decode"), 1):
        if isinstance(outcome, EchoQuadError):
            failures[frame] = Failure(frame.name, outcome)
        else:
            keep(len(kept), outcome)
            kept.append(frame)
        if progress is not None:
            progress(done, len(split.frames))
    found = {frame.label for frame in kept}
    for index, name in enumerate(split.classes):
        if index not in found:
            first = next(failure for frame, failure in failures.items() if frame.label == index)
            raise DatasetError(
                f"{split.name}: no frame of class {name} can be read; the first failure: {first.file}: {first.error}"
            )
    return kept, tuple(failures.values())


@contextmanager
def _overflow_file(folder: Path | None) -> Iterator[IO[bytes] | None]:
    """Open a file that the system removes with its last user, a memory map of it included; None without a folder.

    It is written from front to end before it is mapped: a full disk is an error then, and no bus error later.
    """
    if folder is None:
        yield None
        return
    with output_errors(folder), tempfile.TemporaryFile(dir=folder, prefix=".quadrants-") as file:
        yield file


Decoded = npt.NDArray[np.uint8] | EchoQuadError


def decode(frame: LabelledFrame, contract: Contract) -> Decoded:
    """Give a frame's quadrants, uint8 [4, 1, S, S], or why it cannot be read."""
    if frame.fault is not None:
        return frame.fault
    try:
        return frame_quadrants(load_grey(frame.file), contract)
    except FrameError as error:
        return error


def _split_folder(data: Path, split: str) -> Path:
    folder = data / split
    if not data.is_dir():
        raise DatasetError(f"{data.as_posix()}: no such folder; expected {'/, '.join(SPLITS)}/ with a folder a class")
    if not folder.is_dir():
        found = sorted(entry.name for entry in data.iterdir())
        raise DatasetError(
            f"{data.as_posix()}: no {split}/ folder, only {', '.join(found[:6]) or 'nothing'}; "
            f"expected {'/, '.join(SPLITS)}/ with a folder a class"
        )
    return folder


def _is_class(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith((".", "__"))
