"""Patches: the four quadrants of every frame as files, and a table that leads back.

They are for people and for other tools; training cuts its quadrants itself, from the frames. Cut, and checked, with the
runtime's own functions: what is written is what a network gets before the resize.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

import numpy as np
from PIL import Image

from echoquad_runtime.contract import QUADRANTS
from echoquad_runtime.errors import DatasetError, EchoQuadError, VerificationError
from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS, ReadOptions
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.frames.reader import read_frame
from echoquad_runtime.quadrants import Grey, crop_box, split, stitch
from echoquad_runtime.storage.atomic import write_bytes
from echoquad_runtime.storage.atomic_folder import atomic_folder
from echoquad_runtime.storage.row_names import encoded, printed
from echoquad_train.data.frame_list import FrameRecord, list_frames, read_all

__all__ = ["MAPPING", "Patches", "write_patches"]

MAPPING: Final = "patch_mapping.csv"


@dataclass(frozen=True, slots=True)
class Patches:
    """What was written: frames, by split and class, and those that cannot be read."""

    counts: dict[tuple[str, str], int]
    failures: tuple[Failure, ...]

    @property
    def frames(self) -> int:
        """How many frames were cut, and found again by stitching."""
        return sum(self.counts.values())


def write_patches(
    data: Path,
    out: Path,
    keep: float,
    *,
    reading: ReadOptions = DEFAULT_READ_OPTIONS,
    progress: Callable[[int, int], None] | None = None,
) -> Patches:
    """Write ``out/SPLIT/CLASS/*_{LA,RA,LV,RV}.png`` and ``out/patch_mapping.csv``.

    Each frame's patches are read back from the disk and stitched, and held against the cropped frame, pixel for pixel.

    Parameters
    ----------
    data
        ``DATA/SPLIT/CLASS/**``, of as many splits as there are.
    out
        New or empty.
    keep
        The kept fraction of each side, as of a contract; 1 is the whole frame.
    reading
        How the data's files are read.
    progress
        Called with the number of frames done and of all.

    Raises
    ------
    DatasetError
        If there is no frame, or none that can be read.
    VerificationError
        If a frame is not found again; nothing is left then.
    OutputError
        If `out` is in the way or cannot be written.
    """
    frames = list_frames(data, reading)
    bases = _bases(frames)
    counts: dict[tuple[str, str], int] = {}
    failures: list[Failure] = []
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", "split", "class", *QUADRANTS, "left", "top", "right", "bottom"])
    with atomic_folder(out) as partial:
        for done, (frame, content) in enumerate(read_all(frames), 1):
            try:
                if isinstance(content, EchoQuadError):
                    raise content
                height, width = content.grey.shape
                box = crop_box(width, height, keep)
                names = [f"{bases[frame.name]}_{quadrant}.png" for quadrant in QUADRANTS]
                _write(partial, names, content.grey, keep)
            except VerificationError:
                raise
            except EchoQuadError as error:
                failures.append(Failure(frame.name, error))
            else:
                left, top, right, bottom = box
                _check(partial, names, content.grey[top:bottom, left:right], frame)
                rows.writerow([*map(printed, (frame.name, frame.split, frame.label, *names)), *box])
                counts[frame.split, frame.label] = counts.get((frame.split, frame.label), 0) + 1
            if progress is not None:
                progress(done, len(frames))
        if not counts:
            raise DatasetError(
                f"{data.as_posix()}: no frame can be read; the first failure: {failures[0].file}: {failures[0].error}"
            )
        write_bytes(partial / MAPPING, encoded(text.getvalue()))
    return Patches(counts, tuple(failures))


def _write(folder: Path, names: Sequence[str], grey: Grey, keep: float) -> None:
    for name, patch in zip(names, split(grey, keep), strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(patch).save(path)


def _check(folder: Path, names: Sequence[str], cropped: Grey, frame: FrameRecord) -> None:
    stitched = stitch(*(read_frame(folder / name) for name in names))
    if not np.array_equal(stitched, cropped):
        raise VerificationError(
            f"{frame.name}: its four patches, stitched, are not the cropped frame; expected every pixel; nothing is "
            "written: check the disk"
        )


def _bases(frames: Sequence[FrameRecord]) -> dict[str, str]:
    """Give what a frame's patches are called: its name without the ending, where no other has the same."""
    bare = {frame.name: _without_ending(frame.name) for frame in frames}
    often: dict[str, int] = {}
    for base in bare.values():
        often[base.lower()] = often.get(base.lower(), 0) + 1
    return {name: base if often[base.lower()] == 1 else name for name, base in bare.items()}


def _without_ending(name: str) -> str:
    return name if "#" in PurePosixPath(name).name else PurePosixPath(name).with_suffix("").as_posix()
