"""Quadrant files: the four quadrants of every frame as PNG, and a table that maps them to the frames.

They serve people and other tools; training cuts quadrants from the frames itself. The runtime's own functions cut and
check them, so a file holds what a network receives before the resize.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

import numpy as np
from PIL import Image

from echoquad_runtime.contract import QUADRANTS
from echoquad_runtime.errors import EchoQuadError, VerificationError
from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS, ReadOptions
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.frames.reader import read_grey
from echoquad_runtime.quadrants import Grey, crop_box, split, stitch
from echoquad_runtime.storage.atomic import write_bytes
from echoquad_runtime.storage.atomic_folder import atomic_folder
from echoquad_runtime.storage.row_names import encode_text, to_row_name
from echoquad_runtime.storage.system_files import SkippedEntries
from echoquad_train.data.dataset import LabelledFrame, Progress, no_readable_frame
from echoquad_train.data.frame_list import list_frames, read_all

__all__ = ["MAPPING", "QuadrantFiles", "write_quadrants"]

MAPPING: Final = "patch_mapping.csv"


@dataclass(frozen=True, slots=True)
class QuadrantFiles:
    """The result of `write_quadrants`: frames by split and class, the unreadable frames, and what was not listed."""

    counts: dict[tuple[str, str], int]
    failures: tuple[Failure, ...]
    notes: tuple[str, ...]
    skipped: SkippedEntries

    @property
    def frames(self) -> int:
        """Number of frames that were written and checked."""
        return sum(self.counts.values())


def write_quadrants(
    data: Path,
    out: Path,
    keep: float,
    *,
    layout: Sequence[str] = QUADRANTS,
    reading: ReadOptions = DEFAULT_READ_OPTIONS,
    progress: Progress | None = None,
) -> QuadrantFiles:
    """Write ``out/SPLIT/CLASS/*_{LA,RA,LV,RV}.png`` and ``out/patch_mapping.csv``.

    The frames are those of ``DATA/SPLIT/CLASS/**``; `keep` is the fraction of each side that the crop keeps, and
    `layout` has the names of the top left, top right, bottom left and bottom right quadrant. The quadrants of each
    frame are read back, stitched, and compared to the cropped frame pixel by pixel.

    Raises
    ------
    DatasetError
        If there is no frame, or no readable one.
    VerificationError
        If the stitched quadrants differ from the frame; `out` is not created then.
    OutputError
        If `out` exists and is not empty, or cannot be written.
    """
    frames, notes, skipped = list_frames(data, reading)
    stems = _stems(frames)
    counts: Counter[tuple[str, str]] = Counter()
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
                box = left, top, right, bottom = crop_box(width, height, keep)
                quadrants = split(content.grey, keep, layout)
            except EchoQuadError as error:
                failures.append(Failure(frame.name, error))
            else:
                names = [f"{stems[frame.name]}_{quadrant}.png" for quadrant in QUADRANTS]
                for name, quadrant in zip(names, quadrants, strict=True):
                    (partial / name).parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(quadrant).save(partial / name)
                _check(partial, names, content.grey[top:bottom, left:right], frame, layout)
                rows.writerow([*map(to_row_name, (frame.name, frame.split, frame.class_name, *names)), *box])
                counts[frame.split, frame.class_name] += 1
            if progress is not None:
                progress(done, len(frames))
        if not counts:
            raise no_readable_frame(data.as_posix(), failures)
        write_bytes(partial / MAPPING, encode_text(text.getvalue()))
    return QuadrantFiles(dict(counts), tuple(failures), notes, skipped)


def _check(folder: Path, names: Sequence[str], cropped: Grey, frame: LabelledFrame, layout: Sequence[str]) -> None:
    stitched = stitch(*(read_grey(folder / name) for name in names), layout=layout)
    if not np.array_equal(stitched, cropped):
        raise VerificationError(
            f"{frame.name}: its four stitched quadrants differ from the cropped frame; expected equal pixels; "
            "nothing is written: check the disk"
        )


def _stems(frames: Sequence[LabelledFrame]) -> dict[str, str]:
    """Return the start of each frame's file names: its name without extension, or with it if another has the same."""
    stems = {
        frame.name: frame.name
        if "#" in PurePosixPath(frame.name).name
        else PurePosixPath(frame.name).with_suffix("").as_posix()
        for frame in frames
    }
    uses = Counter(stem.lower() for stem in stems.values())
    return {name: stem if uses[stem.lower()] == 1 else name for name, stem in stems.items()}
