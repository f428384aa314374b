"""``echoquad ensemble``."""

from __future__ import annotations

import shutil
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from echoquad.cli.console import note, say, table
from echoquad.cli.declare import Argument, Option
from echoquad.cli.extras import require_extra

__all__ = ["VoteName", "ensemble"]


class VoteName(StrEnum):
    """How members judge a quadrant together, by the names that --vote takes."""

    soft = "soft"
    hard = "hard"


def ensemble(
    runs: Annotated[
        list[Path],
        Argument(
            metavar="RUN",
            help="Folders that `echoquad train` wrote, of the same classes, crop and input size; backbones may differ. "
            "An ensemble among them stands for its members.",
        ),
    ],
    out: Annotated[
        Path, Option("--out", metavar="ENSEMBLE", help="Folder to write, with copies of the runs' weights.")
    ],
    vote: Annotated[
        VoteName,
        Option(
            "--vote",
            help="soft takes the mean of the members' probabilities for each quadrant, hard the share of their votes.",
        ),
    ] = VoteName.soft,
    flip: Annotated[
        bool,
        Option(
            "--flip",
            help="Have every member judge each quadrant flipped left to right as well; useful with one RUN too.",
        ),
    ] = False,
    calibrate: Annotated[
        Path | None,
        Option(
            "--calibrate",
            metavar="DATA",
            help="Data folder on whose validation frames the ensemble's own temperatures are fitted; they are 1 else.",
        ),
    ] = None,
) -> None:
    """Join runs into one model, which evaluates and exports as a run does. Its latency is the sum of its members'."""
    from echoquad_runtime.errors import EchoQuadError, RunError

    require_extra("train")
    for run in runs:
        if not run.is_dir():
            raise RunError(f"{run.as_posix()}: no such folder; expected a run that `echoquad train` wrote")
    from echoquad_train.runs.ensemble_folder import write_ensemble

    made = write_ensemble(runs, out, vote=vote.value, flip_tta=flip)
    if calibrate is not None:
        from echoquad.cli.train import calibration_line
        from echoquad_train.training.run_calibration import calibrate_ensemble

        try:
            made = calibrate_ensemble(made, calibrate)
        except EchoQuadError:
            shutil.rmtree(out, ignore_errors=True)  # it was new or empty: all of it, or nothing
            raise
        note(calibration_line(made.info["calibration"]))
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
    say(table(["member", "backbone", "seed", "epoch", "validation frames"], rows))
    passes = len(rows) * len(made.info["views"])
    if passes > 1:
        note(f"every quadrant passes {passes} times through a network: latency is the sum of these")
    if made.trained_in_folds:
        note("members of folds have learned from each other's validation frames: measure the ensemble on a test split")
    note(f"wrote {out.as_posix()}/; next: echoquad export {out.as_posix()} --out BUNDLE")
