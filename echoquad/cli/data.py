"""``echoquad data``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from echoquad.cli.console import Progress, note, say
from echoquad.cli.data_audit import audit
from echoquad.cli.data_make import patches, split
from echoquad_runtime.errors import UsageError

__all__ = ["app"]

app = typer.Typer(help="Check data sets, and make them.")


@app.callback(invoke_without_command=True)
def options(context: typer.Context) -> None:
    """Show the help where no command is given."""
    if context.invoked_subcommand is None:
        context.get_help()  # Typer prints it
        raise typer.Exit(UsageError.exit_code)


app.command("audit", epilog="Example: echoquad data audit data --out audit --strict")(audit)
app.command("split", epilog="Example: echoquad data split frames --out data --mode link")(split)
app.command("patches", epilog="Example: echoquad data patches data --out data_patches")(patches)


@app.command(epilog="Example: echoquad data phantom data --patients 80")
def phantom(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; new or empty.")],
    patients: Annotated[
        int, typer.Option("--patients", metavar="N", help="Patients, half of each class; at least 6.")
    ] = 40,
    frames: Annotated[int, typer.Option("--frames", metavar="N", help="Frames a patient.")] = 4,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of all draws.")] = 0,
) -> None:
    """Write a synthetic data set: apical four-chamber phantoms, ASD against NORM. No patient's data."""
    from echoquad_train.phantom.dataset import write_dataset

    with Progress("drawing", patients * frames) as progress:
        counts = write_dataset(out, patients=patients, frames_per_patient=frames, seed=seed, progress=progress.update)
    for part, by_class in counts.items():
        say(f"{part}: {', '.join(f'{name} {count}' for name, count in by_class.items())}")
    note(f"wrote {out.as_posix()}/")
