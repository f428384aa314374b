"""``echoquad export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from echoquad.cli.console import note, say, table
from echoquad.cli.extras import require_extra

__all__ = ["export"]


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `echoquad train` wrote.")],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="BUNDLE", help="Bundle folder to write; an older bundle is replaced."),
    ],
    precision: Annotated[
        str,
        typer.Option(
            "--precision", metavar="NAME,...", help="Graphs to build, separated by commas; this release builds fp32."
        ),
    ] = "fp32",
    calibrate: Annotated[
        Path | None, typer.Option("--calibrate", metavar="DATA", help="Frames to calibrate int8 on; not for fp32.")
    ] = None,
    parity: Annotated[
        Path | None,
        typer.Option(
            "--parity",
            metavar="DATA",
            help="Data folder whose validation frames prove parity; the run's own where not given.",
        ),
    ] = None,
) -> None:
    """Export a run to a bundle, after proof that it decides as the training code does."""
    from echoquad_runtime.errors import UsageError

    if calibrate is not None:
        raise UsageError("--calibrate: only int8 is calibrated, and it is not built by this release; leave it out")
    require_extra("export")
    from echoquad_export.pack import check_precisions, export_run

    wanted = check_precisions([name.strip() for name in precision.split(",") if name.strip()])
    exported = export_run(run, out, precisions=wanted, parity_data=parity, progress=note)
    rows = [
        [
            found.precision,
            str(batch.batch_size),
            f"{batch.max_abs_dlogit:.2e}",
            f"{batch.max_abs_dprobability:.2e}",
            str(batch.patch_flips),
            str(batch.frame_flips),
        ]
        for found in exported.parities
        for batch in found.batches
    ]
    say(table(["precision", "batch", "max |dlogit|", "max |dp|", "patch flips", "frame flips"], rows))
    frames = exported.parities[0].frames
    note(f"parity passed on {frames} validation frames; {exported.verification.frames} golden frames replayed")
    if exported.unreadable:
        note(f"{exported.unreadable} validation frames could not be read and were left out")
    note(f"wrote {out.as_posix()}/; next: echoquad predict {out.as_posix()} INPUT")
