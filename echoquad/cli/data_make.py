"""``echoquad data split`` and ``echoquad data patches``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from echoquad.cli.console import Progress, list_failures, note, say, table
from echoquad.cli.data_audit import PatientRegex
from echoquad.cli.extras import require_extra
from echoquad.cli.options import Every, Flip, Matrices, reading_of

__all__ = ["patches", "split"]


class ModeName(StrEnum):
    """What --mode takes."""

    copy = "copy"
    link = "link"
    manifest = "manifest"


def split(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="Folder with CLASS/**, or with {train,validation,test}/CLASS/** to mix."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write; new or empty.")],
    fractions: Annotated[
        str,
        typer.Option("--fractions", metavar="A-B-C", help="Shares of train, validation and test; 80-20-0 has no test."),
    ] = "70-15-15",
    mode: Annotated[
        ModeName,
        typer.Option("--mode", help="Copies, hard links (copies on another disk), or the manifest split.csv alone."),
    ] = ModeName.copy,
    patient_regex: PatientRegex = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the draw.")] = 0,
    matrices: Matrices = False,
    every: Every = 1,
) -> None:
    """Divide frames into train, validation and test by patient, each class alike. Never a patient in two."""
    from echoquad_runtime.frames.formats import ReadOptions
    from echoquad_runtime.storage.row_names import display_name
    from echoquad_train.data.patients import patient_pattern

    require_extra("train")
    pattern, reading = patient_pattern(patient_regex), ReadOptions(matrices, every=every)
    from echoquad_train.curation import split as partition

    shares = partition.parse_fractions(fractions)
    with Progress("reading") as progress:
        parts = partition.partition(source, shares, pattern, reading=reading, seed=seed, progress=progress.update)
    copied = partition.write_partition(parts, out, mode.value)
    rows = [
        [f"{part}/{display_name(name)}", str(frames), str(patients)]
        for part, by_class in parts.counts.items()
        for name, (frames, patients) in by_class.items()
    ]
    say(table(["split/class", "frames", "patients"], rows))
    for group in parts.joined:
        note(f"kept together, since they share a picture: {', '.join(map(display_name, group))}")
    if copied:
        note(f"{copied} files were copied: no hard link can be made from {source.as_posix()} to {out.as_posix()}")
    note(f"wrote {(out / partition.MANIFEST if mode is ModeName.manifest else out).as_posix()}")
    raise SystemExit(list_failures(parts.failures, done=len(parts.frames)))


def patches(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder with {train,validation,test}/CLASS/**.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write; new or empty.")],
    keep: Annotated[
        float,
        typer.Option("--keep", metavar="SHARE", min=0.01, max=1.0, help="Of each side, in the middle; 1 is all."),
    ] = 0.9,
    matrices: Matrices = False,
    flip: Flip = None,
    every: Every = 1,
) -> None:
    """Write every frame's four quadrants, and the table that leads back; check that stitched they are the frame."""
    require_extra("train")
    from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS
    from echoquad_runtime.storage.row_names import display_name
    from echoquad_train.curation.quadrant_files import MAPPING, write_quadrants

    reading = reading_of(matrices, flip, every, DEFAULT_READ_OPTIONS)
    with Progress("cutting") as progress:
        done = write_quadrants(data, out, keep, reading=reading, progress=progress.update)
    rows = [[f"{part}/{display_name(name)}", str(count), str(4 * count)] for (part, name), count in done.counts.items()]
    say(table(["split/class", "frames", "patches"], rows))
    say(f"stitched back: all {done.frames} frames as they were, pixel for pixel, after the crop")
    note(f"wrote {out.as_posix()}/ with {MAPPING}")
    raise SystemExit(list_failures(done.failures, done=done.frames))
