"""``echoquad data phantom``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from echoquad.cli.framework.console import Progress, print_result, print_status

__all__ = ["phantom"]


def phantom(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; new or empty.")],
    patients: Annotated[
        int, typer.Option("--patients", metavar="N", help="Patients, half of each class; at least 6.")
    ] = 40,
    frames: Annotated[int, typer.Option("--frames", metavar="N", help="Frames per patient.")] = 4,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the random number generator.")] = 0,
) -> None:
    """Write a synthetic data set: apical four-chamber phantoms, ASD against NORM. It contains no patient data."""
    from echoquad_train.phantom.dataset import write_dataset

    with Progress("drawing", patients * frames) as progress:
        counts = write_dataset(out, patients=patients, frames_per_patient=frames, seed=seed, progress=progress.update)
    for part, by_class in counts.items():
        print_result(f"{part}: {', '.join(f'{name} {count}' for name, count in by_class.items())}")
    print_status(f"wrote {out.as_posix()}/")
