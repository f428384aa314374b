"""``echoquad data``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from echoquad.cli.console import Progress, note

__all__ = ["app"]

app = typer.Typer(help="The data's own tools.", no_args_is_help=True)


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; new or empty.")],
    patients: Annotated[int, typer.Option("--patients", help="Patients, half of each class; at least 6.")] = 40,
    frames: Annotated[int, typer.Option("--frames", help="Frames a patient.")] = 4,
    seed: Annotated[int, typer.Option("--seed", help="Seed of all draws.")] = 0,
) -> None:
    """Write a synthetic data set: apical four-chamber phantoms, ASD against NORM. No patient's data."""
    from echoquad_train.phantom import write_dataset

    with Progress("drawing", patients * frames) as progress:
        counts = write_dataset(out, patients=patients, frames_per_patient=frames, seed=seed, progress=progress.update)
    for split, by_class in counts.items():
        typer.echo(f"{split}: {', '.join(f'{name} {count}' for name, count in by_class.items())}")
    note(f"wrote {out.as_posix()}/")
