"""Listing and reading every frame of a data set, complete or not, for the audit and the curation tools.

Training requires complete splits (`echoquad_train.data.dataset`). The audit reports what is missing, and
``echoquad data split`` takes what is present.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from echoquad_runtime.errors import DatasetError, EchoQuadError, FrameReadError
from echoquad_runtime.frames.discovery import EXPECTED_FILES, matrices_hint
from echoquad_runtime.frames.file_access import read_bytes
from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS, IMAGE_EXTENSIONS, ReadOptions
from echoquad_runtime.frames.reader import decode_grey, load_grey, pixel_format
from echoquad_runtime.quadrants import Grey
from echoquad_train.data.dataset import EXPECTED_FOLDERS, SPLITS, LabelledFrame, class_folders, frames_below
from echoquad_train.data.prefetch import prefetch

__all__ = ["DecodedFile", "list_frames", "list_splits", "read_all"]


class DecodedFile(NamedTuple):
    """A decoded frame: grey levels, uint8 [H, W]; SHA-256 and size in bytes of its file; its pixel format.

    The digest is empty for a frame of a clip, which shares its file with other frames.
    """

    grey: Grey
    digest: bytes
    size: int
    mode: str

    @property
    def pixel_digest(self) -> bytes:
        """SHA-256 of the grey levels and their shape; equal for equal pictures in different files."""
        return hashlib.sha256(repr(self.grey.shape).encode() + self.grey.tobytes()).digest()


def list_frames(data: Path, reading: ReadOptions = DEFAULT_READ_OPTIONS) -> list[LabelledFrame]:
    """List the frames of ``DATA/SPLIT/CLASS/**``; splits and classes may be missing.

    Raises
    ------
    DatasetError
        If `data` is not a folder, has none of the three splits, or contains no frame.
    """
    if not data.is_dir():
        raise DatasetError(f"{data.as_posix()}: no such folder; {EXPECTED_FOLDERS}")
    splits = [split for split in SPLITS if (data / split).is_dir()]
    if not splits:
        found = ", ".join(sorted(entry.name for entry in data.iterdir())[:6]) or "nothing"
        raise DatasetError(
            f"{data.as_posix()}: none of {', '.join(SPLITS)} found, only {found}; {EXPECTED_FOLDERS}; "
            "make them with `echoquad data split`"
        )
    frames = list_splits(data, splits, reading)
    if not frames:
        hints = (matrices_hint(str(data / split), reading) for split in splits)
        raise DatasetError(f"{data.as_posix()}: no frame found; {EXPECTED_FILES}{next(filter(None, hints), '')}")
    return frames


def list_splits(data: Path, splits: Iterable[str], reading: ReadOptions) -> list[LabelledFrame]:
    """List the frames of the class folders below each split; the split ``""`` is the data folder itself."""
    splits = list(splits)
    classes = sorted({name for split in splits for name in class_folders(data / split)})
    return [frame for split in splits for frame in frames_below(data, split, classes, reading)]


def read_all(frames: Iterable[LabelledFrame]) -> Iterator[tuple[LabelledFrame, DecodedFile | EchoQuadError]]:
    """Read frames in order, prefetching; yield an error in place of a frame that cannot be read."""
    return prefetch(_read, frames, "read")


def _read(frame: LabelledFrame) -> DecodedFile | EchoQuadError:
    if frame.error is not None:
        return frame.error
    extension = frame.path.suffix.lower()
    try:
        if extension in IMAGE_EXTENSIONS and frame.frame is None:  # read the bytes once, for pixels and digest
            data = read_bytes(frame.path)
            return DecodedFile(decode_grey(data), hashlib.sha256(data).digest(), len(data), pixel_format(data))
        grey, mode = load_grey(frame.file), extension.removeprefix(".") or "other"
        if frame.frame is not None:
            return DecodedFile(grey, b"", frame.path.stat().st_size, mode)
        data = read_bytes(frame.path)
        return DecodedFile(grey, hashlib.sha256(data).digest(), len(data), mode)
    except EchoQuadError as error:
        return error
    except OSError as error:  # removed since it was listed
        return FrameReadError(f"it cannot be read ({error.strerror}); expected an image file")
