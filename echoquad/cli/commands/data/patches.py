"""``echoquad data patches``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
from echoquad.cli.framework.options import Every, Flip, Matrices, QuadrantLayout, read_options

__all__ = ["patches"]


def patches(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder with {train,validation,test}/CLASS/**.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write; new or empty.")],
    keep: Annotated[
        float,
        typer.Option("--keep", metavar="SHARE", min=0.01, max=1.0, help="Centre crop: share of each side; 1 is all."),
    ] = 0.9,
    quadrant_layout: QuadrantLayout = None,
    matrices: Matrices = False,
    flip: Flip = None,
    every: Every = 1,
) -> None:
    """Write the four quadrants of every frame and a table of them; check that together they equal the frame."""
    require_extra("train")
    from echoquad_runtime.contract import parse_layout
    from echoquad_train.curation.quadrant_files import MAPPING, write_quadrants

    layout, reading = parse_layout(quadrant_layout or "reference"), read_options(matrices, flip, every)
    with Progress("cutting") as progress:
        done = write_quadrants(data, out, keep, layout=layout, reading=reading, progress=progress.update)
    rows = [[f"{part}/{name}", str(count), str(4 * count)] for (part, name), count in done.counts.items()]
    print_result(format_table(["split/class", "frames", "quadrants"], rows))
    print_result(f"stitched back: all {done.frames} frames equal their crop, pixel for pixel")
    for note in done.notes:
        print_status(f"note: {note}")
    print_skipped(done.skipped)
    print_status(f"wrote {out.as_posix()}/ with {MAPPING}")
    raise typer.Exit(print_failures(done.failures, done=done.frames))
