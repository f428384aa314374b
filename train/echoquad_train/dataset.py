"""Data sets: labelled frames on disk, decoded once into 8-bit quadrants."""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Final

import numpy as np
import numpy.typing as npt

from echoquad_runtime.contract import Contract
from echoquad_runtime.devices import available_cpus
from echoquad_runtime.errors import DatasetError, FrameError
from echoquad_runtime.files import output_errors
from echoquad_runtime.frames import EXTENSIONS, read_frame
from echoquad_runtime.inputs import Failure, FrameFile, walk
from echoquad_runtime.quadrants import frame_quadrants

__all__ = [
    "SPLITS",
    "LabelledFrame",
    "QuadrantStore",
    "Split",
    "load_quadrants",
    "read_classes",
    "read_split",
]

SPLITS: Final = ("train", "validation", "test")

MEMORY_BYTES: Final = 4 * 1024**3
"""Quadrants beyond this size are kept in a memory-mapped file beside the run, which the system pages in and out."""


@dataclass(frozen=True, slots=True)
class LabelledFrame:
    """A frame on disk and the index of its class. `name` is relative to the data folder, with forward slashes."""

    path: Path
    name: str
    label: int


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

    def files(self) -> Iterator[FrameFile]:
        """Give the frames as a predictor takes them."""
        return (FrameFile(frame.path, frame.name) for frame in self.frames)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the frames' names and file sizes: whether a run is resumed on the data it was begun on."""
        digest = hashlib.sha256()
        for frame in self.frames:
            try:
                size = frame.path.stat().st_size
            except OSError:  # a broken link: decoding will say so
                size = -1
            digest.update(f"{frame.name}\0{size}\n".encode("utf-8", "surrogateescape"))
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


def read_split(data: Path, split: str, classes: Sequence[str]) -> Split:
    """List a split's frames by class: ``DATA/SPLIT/CLASS/**/*.png`` and the other endings that frames have.

    Raises
    ------
    DatasetError
        If the split or a class in it is missing, is empty, or has a class that is not among `classes`.
    """
    folder = _split_folder(data, split)
    found = sorted(entry.name for entry in folder.iterdir() if _is_class(entry))
    missing, unknown = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
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
        paths = list(walk(folder / name))
        if not paths:
            raise DatasetError(
                f"{(folder / name).as_posix()}: no frame found; expected {', '.join(sorted(EXTENSIONS))} files"
            )
        frames += (LabelledFrame(path, path.relative_to(data).as_posix(), label) for path in paths)
    return Split(split, tuple(classes), tuple(frames))


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
    large = overflow is not None and count * 4 * size * size > MEMORY_BYTES
    quadrants = np.empty((0 if large else count, 4, size, size), np.uint8)
    kept: list[LabelledFrame] = []
    failures: dict[LabelledFrame, Failure] = {}
    with _overflow_file(overflow if large else None) as file:
        for done, (frame, outcome) in enumerate(_decoded(split.frames, contract), 1):
            if isinstance(outcome, FrameError):
                failures[frame] = Failure(frame.name, outcome)
            else:
                if file is None:
                    quadrants[len(kept)] = outcome[:, 0]
                else:
                    file.write(outcome.tobytes())
                kept.append(frame)
            if progress is not None:
                progress(done, count)
        labels = np.array([frame.label for frame in kept], np.int64)
        for index, name in enumerate(split.classes):
            if index not in labels:
                first = next(failure for frame, failure in failures.items() if frame.label == index)
                raise DatasetError(
                    f"{split.name}: no frame of class {name} can be read; "
                    f"the first failure: {first.file}: {first.error}"
                )
        if file is not None:
            file.flush()
            # Writable, though nothing writes: torch warns of arrays that are not.
            quadrants = np.memmap(file, np.uint8, "r+", shape=(len(kept), 4, size, size))
    names = tuple(frame.name for frame in kept)
    return QuadrantStore(quadrants[: len(kept)], labels, names, tuple(failures.values()))


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


Decoded = npt.NDArray[np.uint8] | FrameError


def _decoded(frames: Iterable[LabelledFrame], contract: Contract) -> Iterator[tuple[LabelledFrame, Decoded]]:
    """Decode in threads, in order, a bounded number ahead: Pillow lets go of the GIL, and no process is spawned."""

    def decode(frame: LabelledFrame) -> Decoded:
        try:
            return frame_quadrants(read_frame(frame.path), contract)
        except FrameError as error:
            return error

    workers = min(8, available_cpus())
    rest = iter(frames)
    with ThreadPoolExecutor(workers, "decode") as pool:
        waiting: list[tuple[LabelledFrame, Future[Decoded]]] = []
        waiting += ((frame, pool.submit(decode, frame)) for frame in islice(rest, 4 * workers))
        while waiting:
            frame, future = waiting.pop(0)
            yield frame, future.result()
            waiting += ((frame, pool.submit(decode, frame)) for frame in islice(rest, 1))


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
