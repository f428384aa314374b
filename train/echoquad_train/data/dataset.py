"""Data sets: labelled frames on disk, and their quadrants decoded once to 8 bits."""

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
from echoquad_runtime.storage.system_files import SkippedEntries
from echoquad_train.data.prefetch import prefetch
from echoquad_train.data.split_folders import (
    canonical_split,
    class_folders,
    normalize_name,
    refuse_patient_folders,
    split_folder,
)

__all__ = [
    "LabelledFrame",
    "QuadrantStore",
    "Split",
    "Store",
    "decode",
    "decode_split",
    "frames_below",
    "load_quadrants",
    "no_readable_frame",
    "read_classes",
    "read_split",
    "stored_bytes",
]

MEMORY_BYTES: Final = 4 * 1024**3
"""Size above which quadrants go to a memory-mapped file beside the run instead of memory. If the disk has no room for
that file, `echoquad_train.data.stream` streams the frames."""

Progress = Callable[[int, int], None]
"""Called with the number of frames done and the total."""


@dataclass(frozen=True, slots=True)
class LabelledFrame:
    """Record of one listed frame: its file, its name and its class.

    Attributes
    ----------
    path, frame, flip
        See `FrameFile`.
    name
        Path below the data folder as it is on disk, ``SPLIT/CLASS/...``, or ``CLASS/...`` if the folder has no splits.
    label
        Index of the class.
    error
        Why the frame cannot be read, if listing it already showed that.
    """

    path: Path
    name: str
    label: int
    frame: int | None = None
    flip: Flip = "none"
    error: EchoQuadError | None = None

    @property
    def file(self) -> FrameFile:
        """The frame as the runtime's readers take it."""
        return FrameFile(self.path, self.name, self.frame, self.flip)

    @property
    def split(self) -> str:
        """The canonical name of the split in the name; empty if there is none."""
        return canonical_split(self.name.partition("/")[0]) or ""

    @property
    def class_name(self) -> str:
        """The class in the name, in composed form."""
        return self.name_in_pool.partition("/")[0]

    @property
    def name_in_pool(self) -> str:
        """The name without the split, and with the class in composed form: ``CLASS/...``."""
        name = self.name.partition("/")[2] if self.split else self.name
        folder, slash, rest = name.partition("/")
        return f"{normalize_name(folder)}{slash}{rest}"


@dataclass(frozen=True, slots=True)
class Split:
    """The labelled frames of ``train``, ``validation`` or ``test``."""

    name: str
    classes: tuple[str, ...]
    frames: tuple[LabelledFrame, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Number of frames per class."""
        counted = Counter(frame.label for frame in self.frames)
        return {name: counted[index] for index, name in enumerate(self.classes)}

    def files(self) -> Iterator[FrameFile | Failure]:
        """Return the frames as a predictor takes them."""
        return (frame.file if frame.error is None else Failure(frame.name, frame.error) for frame in self.frames)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the frames' names and file sizes; a run resumes only on the data that it began with."""
        digest = hashlib.sha256()
        for frame in self.frames:
            try:
                size = frame.path.stat().st_size
            except OSError:  # a broken link; decoding reports it
                size = -1
            flip = "" if frame.flip == "none" else f"\0{frame.flip}"
            digest.update(f"{frame.name}\0{size}{flip}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


class Store(Protocol):
    """The quadrants of a split: decoded (`QuadrantStore`) or streamed from disk (`StreamedStore`)."""

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class indices of the F readable frames, int64 [F]."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the readable frames."""

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Frames that could not be read."""

    @property
    def size(self) -> int:
        """Side S of a quadrant, in pixels."""

    def feed(self, batches: Iterable[npt.NDArray[np.int64]], *, whole: bool = False) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the quadrants, uint8 [B, 1, S, S], of each batch of indices into [F * 4].

        With `whole`, yield all four quadrants of the frame of each index, [B, 4, S, S].
        """


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
        Frames that could not be read; the other attributes leave them out.
    """

    quadrants: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    names: tuple[str, ...]
    failures: tuple[Failure, ...]

    @property
    def size(self) -> int:
        """Side S of a quadrant, in pixels."""
        return int(self.quadrants.shape[-1])

    def feed(self, batches: Iterable[npt.NDArray[np.int64]], *, whole: bool = False) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield copies of the quadrants of each batch; see `Store.feed`."""
        if whole:
            return (self.quadrants[chosen // 4] for chosen in batches)
        return (self.quadrants[chosen // 4, chosen % 4][:, None] for chosen in batches)


def read_classes(data: Path) -> tuple[str, ...]:
    """Return the class names: the folders of the training split, in composed form, sorted.

    Raises
    ------
    DatasetError
        If the folder is missing, holds fewer than two classes, or holds splits or patients in place of classes.
    """
    folder = split_folder(data, "train")
    classes = tuple(class_folders(folder))
    if classes and all(map(canonical_split, classes)):
        raise DatasetError(
            f"{folder.as_posix()}: {', '.join(classes)} found, which are names of splits; expected two or more folders "
            f"named after classes; the data folder may be {folder.as_posix()}"
        )
    if len(classes) < 2:
        shown = f"the single class {classes[0]!r}" if classes else "no class folder"
        raise DatasetError(f"{folder.as_posix()}: {shown} found; expected two or more folders named after classes")
    refuse_patient_folders(folder)
    return classes


def read_split(
    data: Path,
    split: str,
    classes: Sequence[str],
    reading: ReadOptions = DEFAULT_READ_OPTIONS,
    *,
    complete: bool = True,
    skipped: SkippedEntries | None = None,
) -> Split:
    """List the frames of ``DATA/SPLIT/CLASS/**``, class by class.

    Each frame of a clip counts as a frame.

    Parameters
    ----------
    data, split
        The data folder, and a split in any spelling of `echoquad_train.data.split_folders.canonical_split`; another
        name is that of a folder.
    classes
        The expected classes.
    reading
        How to read the files.
    complete
        Whether each class has to have a frame; otherwise one class is enough.
    skipped
        Counts the hidden and system entries.

    Raises
    ------
    DatasetError
        If the split or a class in it is missing or empty, or has a class that is not in `classes`.
    """
    folder = split_folder(data, split)
    present = class_folders(folder, skipped)
    expected = {normalize_name(name) for name in classes}
    if complete and (missing := sorted(expected - present.keys())):
        raise DatasetError(
            f"{folder.as_posix()}: class {', '.join(missing)} is missing; "
            f"expected a folder for each of {', '.join(classes)}"
        )
    if unknown := sorted(present.keys() - expected):
        raise DatasetError(
            f"{folder.as_posix()}: class {', '.join(unknown)} is unknown; expected only {', '.join(classes)}"
        )
    frames = tuple(frames_below(data, folder.name, classes, reading, skipped))
    labels = {frame.label for frame in frames}
    for label, name in enumerate(classes):
        if label not in labels and (complete or not labels):
            where = folder / name if complete else folder
            hint = matrices_hint(str(where), reading)
            raise DatasetError(f"{where.as_posix()}: no frame found; {EXPECTED_FILES}{hint}")
    return Split(canonical_split(split) or split, tuple(classes), frames)


def frames_below(
    data: Path,
    folder: str,
    classes: Sequence[str],
    reading: ReadOptions = DEFAULT_READ_OPTIONS,
    skipped: SkippedEntries | None = None,
) -> Iterator[LabelledFrame]:
    """List the frames of ``DATA/FOLDER/CLASS/**`` for the classes that have a folder; an empty folder is ``DATA``."""
    prefix = f"{folder}/" if folder else ""
    present = class_folders(data / folder)
    for label, name in enumerate(classes):
        for on_disk in present.get(normalize_name(name), ()):
            for item in find_in_folder(data / folder / on_disk, f"{prefix}{on_disk}/", reading, skipped):
                if isinstance(item, Failure):
                    yield LabelledFrame(data / item.file, item.file, label, error=item.error)
                else:
                    yield LabelledFrame(item.path, item.name, label, item.frame, item.flip)


def load_quadrants(
    split: Split, contract: Contract, *, overflow: Path | None = None, progress: Progress | None = None
) -> QuadrantStore:
    """Decode every frame of a split once, by the contract's crop and input size.

    `overflow` is the folder of the file that takes quadrants larger than `MEMORY_BYTES`. The file has no name, and the
    system removes it with its last user, however the process ends. None keeps the quadrants in memory.

    Raises
    ------
    DatasetError
        If no frame of some class can be read.
    OutputError
        If the overflow folder's disk is full or not writable.
    """
    count, size = len(split.frames), contract.input_size
    large = overflow is not None and stored_bytes(split, contract) > MEMORY_BYTES
    quadrants = np.empty((0 if large else count, 4, size, size), np.uint8)
    with _overflow_file(overflow if large else None) as file:

        def store(index: int, decoded: npt.NDArray[np.uint8]) -> None:
            if file is None:
                quadrants[index] = decoded[:, 0]
            else:
                file.write(decoded.tobytes())

        frames, failures = decode_split(split, contract, store, progress)
        if file is not None:
            file.flush()
            # Opened as writable because torch warns of read-only arrays; nothing writes to it.
            quadrants = np.memmap(file, np.uint8, "r+", shape=(len(frames), 4, size, size))
    labels = np.array([frame.label for frame in frames], np.int64)
    return QuadrantStore(quadrants[: len(frames)], labels, tuple(frame.name for frame in frames), failures)


def stored_bytes(split: Split, contract: Contract) -> int:
    """Return the size of a split's quadrants in bytes."""
    return len(split.frames) * 4 * contract.input_size**2


def decode_split(
    split: Split,
    contract: Contract,
    store: Callable[[int, npt.NDArray[np.uint8]], None],
    progress: Progress | None = None,
) -> tuple[list[LabelledFrame], tuple[Failure, ...]]:
    """Decode every frame of a split; return the readable frames and the failures.

    `store` is called with the index of each readable frame among these, and its quadrants, uint8 [4, 1, S, S].

    Raises
    ------
    DatasetError
        If no frame of some class can be read.
    """
    frames: list[LabelledFrame] = []
    failures: dict[LabelledFrame, Failure] = {}
    for done, (frame, outcome) in enumerate(prefetch(partial(decode, contract=contract), split.frames, "decode"), 1):
        if isinstance(outcome, EchoQuadError):
            failures[frame] = Failure(frame.name, outcome)
        else:
            store(len(frames), outcome)
            frames.append(frame)
        if progress is not None:
            progress(done, len(split.frames))
    labels = {frame.label for frame in frames}
    for index, name in enumerate(split.classes):
        if index not in labels:
            of_class = [failure for frame, failure in failures.items() if frame.label == index]
            raise no_readable_frame(split.name, of_class, f" of class {name}")
    return frames, tuple(failures.values())


def no_readable_frame(where: str, failures: Sequence[Failure], which: str = "") -> DatasetError:
    """Return the error for data of which every frame failed; it names the first failure."""
    first = failures[0]
    return DatasetError(f"{where}: no frame{which} can be read; the first failure: {first.file}: {first.error}")


@contextmanager
def _overflow_file(folder: Path | None) -> Iterator[IO[bytes] | None]:
    """Open a file that the system removes with its last user, memory maps included; yield None without a folder.

    The caller writes it from front to end before mapping it, so that a full disk is an exception and not a bus error.
    """
    if folder is None:
        yield None
        return
    with output_errors(folder), tempfile.TemporaryFile(dir=folder, prefix=".quadrants-") as file:
        yield file


def decode(frame: LabelledFrame, contract: Contract) -> npt.NDArray[np.uint8] | EchoQuadError:
    """Return a frame's quadrants, uint8 [4, 1, S, S], or the error if it cannot be read."""
    if frame.error is not None:
        return frame.error
    try:
        return frame_quadrants(load_grey(frame.file), contract)
    except FrameError as error:
        return error
