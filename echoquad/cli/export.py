"""``echoquad export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from echoquad.cli.console import note, say, table
from echoquad.cli.declare import Argument, Option
from echoquad.cli.extras import require_extra

__all__ = ["export"]


def export(
    run: Annotated[Path, Argument(metavar="RUN", help="Folder that `echoquad train` or `ensemble` wrote.")],
    out: Annotated[
        Path,
        Option("--out", metavar="BUNDLE", help="Bundle folder to write; an older bundle is replaced."),
    ],
    precision: Annotated[
        str,
        Option(
            "--precision",
            metavar="NAME,...",
            help="Graphs to build, of fp32, fp16 and int8, separated by commas; the first is what runs by default.",
        ),
    ] = "fp32",
    calibrate: Annotated[
        Path | None,
        Option(
            "--calibrate",
            metavar="DATA",
            help="Data folder whose training frames int8 is calibrated on; the run's own where not given.",
        ),
    ] = None,
    calibration_frames: Annotated[
        int, Option("--calibration-frames", metavar="N", min=1, help="Frames that int8 is calibrated on.")
    ] = 64,
    parity: Annotated[
        Path | None,
        Option(
            "--parity",
            metavar="DATA",
            help="Data folder whose validation frames prove parity; the run's own where not given.",
        ),
    ] = None,
    golden: Annotated[
        str,
        Option(
            "--golden",
            metavar="phantom|validation|DIR",
            help="Where the golden frames, which ship with the bundle, come from: phantoms, the validation frames, "
            "or the frames of a folder.",
        ),
    ] = "phantom",
    frame_graph: Annotated[
        bool,
        Option(
            "--frame-graph",
            help="Also write frame.NAME.onnx, from raw grey frames to decisions, for programs that are not Python.",
        ),
    ] = False,
    sign_key: Annotated[
        Path | None,
        Option("--sign-key", metavar="PEM", help="Private key that signs the bundle; see echoquad sign."),
    ] = None,
) -> None:
    """Export a run to a bundle, after proof that it decides as the training code does."""
    from echoquad_runtime.errors import UsageError

    asked = [name.strip() for name in precision.split(",") if name.strip()]
    if calibrate is not None and "int8" not in asked:
        raise UsageError("--calibrate: only int8 is calibrated; add int8 to --precision, or leave --calibrate out")
    require_extra("export")
    from echoquad_export.packing.exporter import check_precisions, export_run

    wanted = check_precisions(asked)
    exported = export_run(
        run,
        out,
        precisions=wanted,
        calibrate_data=calibrate,
        calibration_frames=calibration_frames,
        parity_data=parity,
        golden=golden,
        frame_graph=frame_graph,
        sign_key=sign_key,
        progress=note,
    )
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
    if golden != "phantom":
        note("the golden frames are not phantoms: their pixels, burnt-in names included, are in the bundle")
    if exported.unreadable:
        note(f"{exported.unreadable} validation frames could not be read and were left out")
    note(f"wrote {out.as_posix()}/; next: echoquad predict {out.as_posix()} INPUT")
