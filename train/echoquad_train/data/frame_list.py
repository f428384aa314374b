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
from echoquad_runtime.storage.system_files import SkippedEntries
from echoquad_train.data.dataset import LabelledFrame, frames_below
from echoquad_train.data.prefetch import prefetch
from echoquad_train.data.split_folders import (
    EXPECTED_FOLDERS,
    SPLITS,
    class_folders,
    class_name_warnings,
    listed_splits,
    refuse_patient_folders,
)

__all__ = ["DecodedFile", "FrameListing", "list_frames", "list_splits", "read_all"]


class FrameListing(NamedTuple):
    """The frames of a data set; sentences about its folders; the hidden and system entries that were skipped."""

    frames: list[LabelledFrame]
    notes: tuple[str, ...]
    skipped: SkippedEntries


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


def list_frames(data: Path, reading: ReadOptions = DEFAULT_READ_OPTIONS) -> FrameListing:
    """List the frames of ``DATA/SPLIT/CLASS/**``; splits and classes may be missing.

    Raises
    ------
    DatasetError
        If `data` is not a folder, has none of the three splits, or contains no frame; or if a split holds patients in
        place of classes.
    """
    splits, others = listed_splits(data)
    if not splits:
        found = ", ".join([name for names in class_folders(data).values() for name in names][:6]) or "nothing"
        raise DatasetError(
            f"{data.as_posix()}: none of {', '.join(SPLITS)} found, only {found}; {EXPECTED_FOLDERS}; "
            "make them with `echoquad data split`"
        )
    for folder in splits.values():
        refuse_patient_folders(data / folder)
    skipped = SkippedEntries()
    frames = list_splits(data, splits.values(), reading, skipped)
    if not frames:
        hints = (matrices_hint(str(data / folder), reading) for folder in splits.values())
        raise DatasetError(f"{data.as_posix()}: no frame found; {EXPECTED_FILES}{next(filter(None, hints), '')}")
    notes = [f"{name}: not a split; its frames are not read" for name in others]
    notes += class_name_warnings(sorted({frame.class_name for frame in frames}))
    return FrameListing(frames, tuple(notes), skipped)


def list_splits(
    data: Path, folders: Iterable[str], reading: ReadOptions, skipped: SkippedEntries | None = None
) -> list[LabelledFrame]:
    """List the frames of the class folders below each split folder; the folder ``""`` is the data folder itself."""
    folders = list(folders)
    classes = sorted({name for folder in folders for name in class_folders(data / folder, skipped)})
    return [frame for folder in folders for frame in frames_below(data, folder, classes, reading, skipped)]


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
