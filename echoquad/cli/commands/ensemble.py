"""``echoquad ensemble``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Literal

import typer

from echoquad.cli.framework.console import format_command, format_table, print_result, print_status
from echoquad.cli.framework.extras import require_extra

__all__ = ["ensemble"]


def ensemble(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Folders that `echoquad train` wrote, of the same classes, crop and input size; backbones may differ. "
            "An ensemble stands for its members.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="ENSEMBLE", help="Folder to write, with copies of the weights.")
    ],
    vote: Annotated[
        Literal["soft", "hard"],
        typer.Option(
            "--vote", help="How members vote on a quadrant: soft averages their probabilities, hard counts their votes."
        ),
    ] = "soft",
    flip: Annotated[
        bool,
        typer.Option(
            "--flip",
            help="Test-time augmentation: every member also classifies each quadrant mirrored left to right. Useful "
            "with one RUN, too.",
        ),
    ] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            metavar="DATA",
            help="Data folder on whose validation frames the temperatures are fitted. Default: temperatures of 1.",
        ),
    ] = None,
) -> None:
    """Combine runs into one model, which evaluates and exports like a run. Its latency is the sum of its members'."""
    from echoquad_runtime.errors import EchoQuadError, RunError

    require_extra("train")
    for run in runs:
        if not run.is_dir():
            raise RunError(f"{run.as_posix()}: no such folder; expected a run that `echoquad train` wrote")
    from echoquad_train.runs.ensemble_folder import write_ensemble

    made = write_ensemble(runs, out, vote=vote, flip_tta=flip)
    if calibrate is not None:
        from echoquad.cli.commands.train.training_progress import describe_calibration
        from echoquad_train.fitting.run_temperatures import fit_ensemble_temperatures

        try:
            made = fit_ensemble_temperatures(made, calibrate)
        except EchoQuadError:
            shutil.rmtree(out, ignore_errors=True)  # the folder was new or empty: leave no uncalibrated ensemble
            raise
        print_status(describe_calibration(made.info["calibration"]))
    rows = [
        [
            entry["folder"],
            entry["backbone"],
            str(entry["seed"]),
            str(entry["best"]["epoch"]),
            f"{entry['best']['validation_frame_accuracy']:.4f}",
        ]
        for entry in made.info["members"]
    ]
    print_result(format_table(["member", "backbone", "seed", "epoch", "validation accuracy"], rows))
    passes = len(rows) * len(made.info["views"])
    if passes > 1:
        print_status(f"each quadrant passes through a network {passes} times: latency is the sum of these passes")
    if made.trained_in_folds:
        print_status(
            "members from folds were trained on each other's held-out frames: measure the ensemble on a test split"
        )
    print_status(f"wrote {out.as_posix()}/; next: {format_command('export', out.as_posix(), '--out', 'BUNDLE')}")
