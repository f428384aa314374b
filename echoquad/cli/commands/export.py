"""``echoquad export``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from echoquad.cli.framework.console import format_command, format_table, print_result, print_status
from echoquad.cli.framework.extras import require_extra

__all__ = ["export"]

logger = logging.getLogger(__name__)


def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="Folder that `echoquad train` or `echoquad ensemble` wrote; with --triton alone, a bundle.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="BUNDLE",
            help="Bundle folder to write; an older bundle is replaced. Required, unless RUN is a bundle.",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            metavar="NAME,...",
            help="Graphs to build: fp32, fp16, int8, separated by commas. The first is the default of the bundle. "
            "Default: fp32. Of a bundle, the graph for Triton; default: that of the bundle.",
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            metavar="DATA",
            help="Data folder whose training frames are the int8 calibration set. Default: the data of the run.",
        ),
    ] = None,
    calibration_frames: Annotated[
        int,
        typer.Option("--calibration-frames", metavar="N", min=1, help="Number of frames in the int8 calibration set."),
    ] = 64,
    parity: Annotated[
        Path | None,
        typer.Option(
            "--parity",
            metavar="DATA",
            help="Data folder whose validation frames parity is measured on. Default: the data of the run.",
        ),
    ] = None,
    golden: Annotated[
        str,
        typer.Option(
            "--golden",
            metavar="phantom|validation|DIR",
            help="Source of the golden frames, which are part of the bundle: phantoms, the validation frames, or the "
            "frames of a folder.",
        ),
    ] = "phantom",
    frame_graph: Annotated[
        bool,
        typer.Option(
            "--frame-graph",
            help="Also write frame.NAME.onnx, from raw grey frames to decisions, for programs in other languages.",
        ),
    ] = False,
    triton: Annotated[
        Path | None,
        typer.Option(
            "--triton",
            metavar="DIR",
            help="Also write the frame graph into a model repository of Triton Inference Server; implies "
            "--frame-graph.",
        ),
    ] = None,
    sign_key: Annotated[
        Path | None,
        typer.Option("--sign-key", metavar="PEM", help="Private key that signs the bundle; see echoquad sign."),
    ] = None,
    codes: Annotated[
        Path | None,
        typer.Option(
            "--codes",
            metavar="TOML",
            help="Code table: what findings the classes stand for in DICOM structured reports of echoquad serve.",
        ),
    ] = None,
) -> None:
    """Export a run to a bundle, after proving that it decides as the training code does.

    With --triton DIR and a bundle in the place of RUN, nothing is exported again: the frame graph of the bundle is
    written for Triton. This needs no torch.
    """
    from echoquad_runtime.bundle.manifest import MANIFEST
    from echoquad_runtime.errors import UsageError

    if out is None:
        if triton is None or not (run / MANIFEST).is_file():
            raise UsageError(
                "Missing option '--out'; name the bundle folder to write, or an existing bundle and --triton DIR"
            )
        if calibrate or parity or sign_key or codes or frame_graph or golden != "phantom":
            raise UsageError("with a bundle, --triton takes no option but --precision; leave the others out")
        _write_triton(run, triton, precision)
        return
    requested = [name.strip() for name in (precision or "fp32").split(",") if name.strip()]
    if calibrate is not None and "int8" not in requested:
        raise UsageError("--calibrate: only int8 is calibrated; add int8 to --precision, or leave out --calibrate")
    require_extra("export")
    from echoquad_export.packing.exporter import check_precisions, export_run

    if triton is not None:  # before a long export
        from echoquad_deploy.triton.repository import check_target, model_name

        check_target(triton, model_name(out))
    exported = export_run(
        run,
        out,
        precisions=check_precisions(requested),
        calibrate_data=calibrate,
        calibration_frames=calibration_frames,
        parity_data=parity,
        golden=golden,
        frame_graph=frame_graph or triton is not None,
        sign_key=sign_key,
        codes=codes,
        progress=logger.info,
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
    header = ["precision", "batch", "max |dlogit|", "max |dp|", "quadrant flips", "frame flips"]
    print_result(format_table(header, rows))
    frames = exported.parities[0].frames
    print_status(f"parity passed on {frames} validation frames; {exported.verification.frames} golden frames replayed")
    if golden != "phantom":
        print_status("the golden frames are not phantoms: their pixels, with any burnt-in names, are in the bundle")
    if exported.unreadable:
        print_status(f"{exported.unreadable} validation frames could not be read and were left out")
    print_status(f"wrote {out.as_posix()}/; next: {format_command('predict', out.as_posix(), 'INPUT')}")
    if triton is not None:
        _write_triton(out, triton, None)


def _write_triton(bundle: Path, repository: Path, precision: str | None) -> None:
    """Write the frame graph of a bundle for Triton, and print what was checked."""
    from echoquad_deploy.triton.repository import write_triton_model
    from echoquad_runtime.bundle.bundle import Bundle

    model = write_triton_model(Bundle(bundle), repository, precision)
    batches = f"batches of up to {model.max_batch_size} frames" if model.max_batch_size else "no batches"
    print_status(f"the {model.precision} frame graph decides {model.frames} golden frames as predict does; {batches}")
    if not model.max_batch_size:
        print_status("a batch has other answers than single frames, so Triton forms none")
    if not model.gpu:
        print_status(f"{model.precision} does not run on CUDA: there is no configuration for a GPU")
    print_result(f"wrote {model.folder.as_posix()}/; next: tritonserver --model-repository={repository.as_posix()}")
