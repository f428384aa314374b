"""``echoquad data split``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from echoquad.cli.framework.console import (
    Progress,
    format_table,
    print_failures,
    print_result,
    print_skipped,
    print_status,
)
from echoquad.cli.framework.extras import require_extra
from echoquad.cli.framework.options import Every, Matrices, PatientRegex, read_options

__all__ = ["split"]


def split(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Folder with CLASS/** or PATIENT/CLASS/**, or with {train,validation,test}/CLASS/** to divide again.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write; new or empty.")],
    fractions: Annotated[
        str,
        typer.Option(
            "--fractions", metavar="A-B-C", help="Shares of train, validation and test; 80-20-0 makes no test split."
        ),
    ] = "70-15-15",
    mode: Annotated[
        Literal["copy", "link", "manifest"],
        typer.Option("--mode", help="Copy files, make hard links (copies on another disk), or write only split.csv."),
    ] = "copy",
    patient_regex: PatientRegex = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the random split.")] = 0,
    matrices: Matrices = False,
    every: Every = 1,
) -> None:
    """Divide frames into train, validation and test by patient, stratified by class. No patient is in two splits."""
    from echoquad_train.data.patients import patient_pattern

    require_extra("train")
    pattern = patient_pattern(patient_regex)
    from echoquad_train.curation import split as partition

    shares = partition.parse_fractions(fractions)
    with Progress("reading") as progress:
        parts = partition.partition(
            source, shares, pattern, reading=read_options(matrices, None, every), seed=seed, progress=progress.update
        )
    copied = partition.write_partition(parts, out, mode)
    rows = [
        [f"{part}/{name}", str(frames), str(patients)]
        for part, by_class in parts.counts.items()
        for name, (frames, patients) in by_class.items()
    ]
    print_result(format_table(["split/class", "frames", "patients"], rows))
    for note in parts.notes:
        print_status(f"note: {note}")
    print_skipped(parts.skipped)
    print_status(parts.reading.line)
    for doubt in parts.reading.doubts:
        print_status(f"doubt: {doubt}; use --patient-regex if it is wrong")
    for group in parts.joined:
        print_status(f"kept together, because they share a picture: {', '.join(group)}")
    if copied:
        print_status(f"{copied} files were copied: {source.as_posix()} and {out.as_posix()} allow no hard link")
    print_status(f"wrote {(out / partition.MANIFEST if mode == 'manifest' else out).as_posix()}")
    raise typer.Exit(print_failures(parts.failures, done=len(parts.frames)))
