"""Gathering: every labelled frame of a data set, whatever is wrong with its folders, read one after the other.

Training asks for splits that are complete (`echoquad_train.dataset`). Here nothing has to be: the audit tells what is
missing, and ``echoquad data split`` takes what there is.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from echoquad_runtime.devices import available_cpus
from echoquad_runtime.errors import DatasetError, FrameError
from echoquad_runtime.frames import EXTENSIONS, decode_frame, read_bytes
from echoquad_runtime.inputs import walk
from echoquad_runtime.quadrants import Grey
from echoquad_train.dataset import SPLITS

__all__ = ["Content", "Found", "class_folders", "frames_below", "gather", "read_all"]


@dataclass(frozen=True, slots=True)
class Found:
    """A frame on disk: its name below the data folder, its class, its split (empty where there are none)."""

    path: Path
    name: str
    label: str
    split: str


class Content(NamedTuple):
    """What a file holds: grey levels, uint8 [H, W]; the SHA-256 and number of its bytes; how it is stored."""

    grey: Grey
    digest: bytes
    size: int
    mode: str


def gather(data: Path) -> list[Found]:
    """List the frames of ``DATA/SPLIT/CLASS/**``, of as many splits and classes as there are.

    Raises
    ------
    DatasetError
        If `data` is no folder, has none of the three splits, or no frame in them.
    """
    expected = f"expected {'/, '.join(SPLITS)}/ with a folder a class"
    if not data.is_dir():
        raise DatasetError(f"{data.as_posix()}: no such folder; {expected}")
    there = [split for split in SPLITS if (data / split).is_dir()]
    if not there:
        found = ", ".join(sorted(entry.name for entry in data.iterdir())[:6]) or "nothing"
        raise DatasetError(
            f"{data.as_posix()}: none of {', '.join(SPLITS)} found, only {found}; {expected}; "
            "make them with `echoquad data split`"
        )
    frames = [frame for split in there for frame in frames_below(data, data / split, split)]
    if not frames:
        raise DatasetError(f"{data.as_posix()}: no frame found; expected {', '.join(sorted(EXTENSIONS))} files")
    return frames


def frames_below(data: Path, folder: Path, split: str) -> Iterator[Found]:
    """List the frames in the class folders of a folder; named by their paths below `data`."""
    for name in class_folders(folder):
        for path in walk(folder / name):
            yield Found(path, path.relative_to(data).as_posix(), name, split)


def class_folders(folder: Path) -> list[str]:
    """Name the folders that count as classes, sorted."""
    return sorted(e.name for e in folder.iterdir() if e.is_dir() and not e.name.startswith((".", "__")))


def read_all(frames: Iterable[Found]) -> Iterator[tuple[Found, Content | FrameError]]:
    """Read frames in threads, in order, a bounded number ahead; an error takes the place of what cannot be read."""
    workers = min(8, available_cpus())
    rest = iter(frames)
    with ThreadPoolExecutor(workers, "read") as pool:
        waiting: list[tuple[Found, Future[Content | FrameError]]] = []
        waiting += ((frame, pool.submit(_read, frame)) for frame in islice(rest, 4 * workers))
        while waiting:
            frame, future = waiting.pop(0)
            yield frame, future.result()
            waiting += ((frame, pool.submit(_read, frame)) for frame in islice(rest, 1))


def _read(frame: Found) -> Content | FrameError:
    try:
        data = read_bytes(frame.path)
        return Content(decode_frame(data), hashlib.sha256(data).digest(), len(data), _mode(data))
    except FrameError as error:
        return error


def _mode(data: bytes) -> str:
    """Tell Pillow's word for a file's pixels from its header: ``L`` is 8-bit grey."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return f"{image.format} {image.mode}"
    except OSError:  # a kind that the runtime reads and Pillow does not
        return "other"
