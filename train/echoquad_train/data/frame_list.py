"""Gathering: every labelled frame of a data set, whatever is wrong with its folders, read one after the other.

Training asks for splits that are complete (`echoquad_train.data.dataset`). Here nothing has to be: the audit tells what
is missing, and ``echoquad data split`` takes what there is.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from echoquad_runtime.errors import DatasetError, EchoQuadError, FrameReadError
from echoquad_runtime.frames.discovery import EXPECTED_FILES, find_in_folder, matrices_hint
from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS, IMAGE_EXTENSIONS, Flip, ReadOptions
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.frames.image import read_bytes
from echoquad_runtime.frames.reader import decode_frame, load_grey
from echoquad_runtime.quadrants import Grey
from echoquad_train.data.dataset import SPLITS
from echoquad_train.data.prefetch import prefetch

__all__ = ["DecodedFile", "FrameRecord", "class_folders", "frames_below", "list_frames", "read_all"]


@dataclass(frozen=True, slots=True)
class FrameRecord:
    """A frame on disk, or what is known not to be read as one.

    Attributes
    ----------
    path, name, frame, flip
        As of a `FrameFile`; `name` is relative to the data folder.
    label, split
        Its class and its split; the split is empty where there are none.
    fault
        Why it cannot be read, where that is known already.
    """

    path: Path
    name: str
    label: str
    split: str
    frame: int | None = None
    flip: Flip = "none"
    fault: EchoQuadError | None = None


class DecodedFile(NamedTuple):
    """What a frame holds: grey levels, uint8 [H, W]; the SHA-256 and number of its file's bytes; how it is stored.

    The digest is empty for a frame of a clip: its file is not its own.
    """

    grey: Grey
    digest: bytes
    size: int
    mode: str

    @property
    def pixel_digest(self) -> bytes:
        """SHA-256 of the grey levels and their shape: equal for equal pictures, however they are stored."""
        return hashlib.sha256(repr(self.grey.shape).encode() + self.grey.tobytes()).digest()


def list_frames(data: Path, reading: ReadOptions = DEFAULT_READ_OPTIONS) -> list[FrameRecord]:
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
    frames = [frame for split in there for frame in frames_below(data, data / split, split, reading)]
    if not frames:
        hints = (matrices_hint(str(data / split), reading) for split in there)
        raise DatasetError(f"{data.as_posix()}: no frame found; {EXPECTED_FILES}{next(filter(None, hints), '')}")
    return frames


def frames_below(
    data: Path, folder: Path, split: str, reading: ReadOptions = DEFAULT_READ_OPTIONS
) -> Iterator[FrameRecord]:
    """List the frames in the class folders of a folder; named by their paths below `data`."""
    for name in class_folders(folder):
        for item in find_in_folder(folder / name, f"{split}/{name}/" if split else f"{name}/", reading):
            if isinstance(item, Failure):
                yield FrameRecord(data / item.file, item.file, name, split, fault=item.error)
            else:
                yield FrameRecord(item.path, item.name, name, split, item.frame, item.flip)


def class_folders(folder: Path) -> list[str]:
    """Name the folders that count as classes, sorted."""
    return sorted(e.name for e in folder.iterdir() if e.is_dir() and not e.name.startswith((".", "__")))


def read_all(frames: Iterable[FrameRecord]) -> Iterator[tuple[FrameRecord, DecodedFile | EchoQuadError]]:
    """Read frames ahead, in order; an error takes the place of what cannot be read."""
    return prefetch(_read, frames, "read")


def _read(frame: FrameRecord) -> DecodedFile | EchoQuadError:
    if frame.fault is not None:
        return frame.fault
    try:
        if frame.path.suffix.lower() in IMAGE_EXTENSIONS:  # its bytes are read once for all
            data = read_bytes(frame.path)
            return DecodedFile(decode_frame(data), hashlib.sha256(data).digest(), len(data), _mode(data))
        grey = load_grey(FrameFile(frame.path, frame.name, frame.frame, frame.flip))
        kind = frame.path.suffix.lower().removeprefix(".") or "other"
        if frame.frame is not None:
            return DecodedFile(grey, b"", frame.path.stat().st_size, kind)
        data = read_bytes(frame.path)
        return DecodedFile(grey, hashlib.sha256(data).digest(), len(data), kind)
    except EchoQuadError as error:
        return error
    except OSError as error:  # gone between two looks
        return FrameReadError(f"it cannot be read ({error.strerror}); expected an image file")


def _mode(data: bytes) -> str:
    """Tell Pillow's word for a file's pixels from its header: ``L`` is 8-bit grey."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return f"{image.format} {image.mode}"
    except OSError:  # a kind that the runtime reads and Pillow does not
        return "other"
