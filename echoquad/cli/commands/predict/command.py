"""The command ``echoquad predict``."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from echoquad.cli.commands.predict.frames import FrameSelection
from echoquad.cli.commands.predict.rows import print_resume_state, row_writer
from echoquad.cli.commands.predict.tally import Tally
from echoquad.cli.framework.console import Progress, print_skipped, print_status
from echoquad.cli.framework.options import (
    BundleFolder,
    CudaGraphs,
    Every,
    Flip,
    FlipName,
    Matrices,
    Method,
    Nhwc,
    Precision,
    PublicKey,
    Threads,
    TunedBatchSize,
    TunedDevice,
    Untuned,
    read_options,
)

if TYPE_CHECKING:
    from echoquad_runtime.bundle.bundle import Bundle
    from echoquad_runtime.cluster.ray_predictor import RayPredictor
    from echoquad_runtime.frames.formats import ReadOptions
    from echoquad_runtime.frames.frame_file import Failure, FrameFile
    from echoquad_runtime.predict.prediction import Prediction
    from echoquad_runtime.predict.predictor import Predictor
    from echoquad_runtime.results.row_formats import Writer
    from echoquad_runtime.results.shards import Shard

    _Results = Generator[Prediction | Failure, None, None]

__all__ = ["predict"]


def predict(
    bundle: BundleFolder,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help="Images, DICOM files, clips, matrices; folders; patterns such as 'exam/*.png'; any number of them. "
            "clip.dcm#12 is the twelfth frame of a clip. Rows name frames relative to the folder, or to the deepest "
            "folder that contains all inputs. Hidden and system files in folders are skipped and counted.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Result file, .csv or .jsonl. Default: CSV on stdout.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue an interrupted run of --out, or add new frames to a finished one."),
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="I/N",
            help="Classify only part I of N of the frames, each part with its own --out; see echoquad merge.",
        ),
    ] = None,
    method: Method = None,
    overlay: Annotated[
        Path | None, typer.Option("--overlay", metavar="DIR", help="Also draw each frame with its four decisions.")
    ] = None,
    cam: Annotated[
        bool, typer.Option("--cam", help="Colour the overlays by class activation maps, which show the evidence.")
    ] = False,
    abstain_below: Annotated[
        float | None,
        typer.Option(
            "--abstain-below",
            metavar="P",
            min=0,
            max=1,
            help="Label a frame INDETERMINATE if the calibrated mean probability of its class is below P.",
        ),
    ] = None,
    abstain_unlike: Annotated[
        bool,
        typer.Option(
            "--abstain-unlike",
            help="Label a frame INDETERMINATE if it is unlike the training frames (flag unlike-training).",
        ),
    ] = False,
    matrices: Matrices = False,
    flip: Flip = None,
    every: Every = 1,
    device: TunedDevice = None,
    precision: Precision = None,
    batch_size: TunedBatchSize = None,
    threads: Threads = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            metavar="N",
            min=0,
            max=512,
            help="Processes that read and crop all frames if there are many; 0 reads PNG, JPEG, BMP and uncompressed "
            "DICOM in threads. Default: 0 for up to four threads, otherwise one per thread.",
        ),
    ] = None,
    untuned: Untuned = False,
    public_key: PublicKey = None,
    cuda_graphs: CudaGraphs = False,
    nhwc: Nhwc = False,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(
            "--engine",
            help="local is this machine; ray is the workers of a Ray cluster (extra ray) with --threads CPUs each, one "
            "by default.",
        ),
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            metavar="HOST:PORT",
            help="Head of the Ray cluster that this machine belongs to, or auto. Default: start a local Ray.",
        ),
    ] = None,
) -> None:
    """Classify frames with a bundle. Needs no torch.

    Rows are collected in FILE.partial, which an interruption leaves in place; --resume continues after them.
    FILE.run.json beside the finished file describes the run.
    """
    from echoquad_runtime.bundle.bundle import Bundle
    from echoquad_runtime.devices.cpu_info import available_cpus
    from echoquad_runtime.engine.self_test import PASSED
    from echoquad_runtime.results.result_file import ResultFile, is_stream
    from echoquad_runtime.tuning.saved_settings import resolve_settings

    on_ray = engine == "ray"
    _check_engine(ray_address, workers, cam=cam, overlay=overlay, on_ray=on_ray)
    _check_output(out, resume=resume)
    part = _parse_shard(shard)
    opened = Bundle(bundle, public_key=public_key)
    config = resolve_settings(
        opened,
        device=device,
        precision=precision,
        threads=threads,
        batch_size=batch_size,
        untuned=untuned or on_ray,  # the tuned settings are those of this host
    )
    rows = ResultFile(out, resume=resume) if out is not None and not is_stream(out) else None
    tally, written = Tally(), rows is None
    try:
        with rows or nullcontext():
            reading = _read_options(opened, matrices, flip, every)
            frames = FrameSelection(inputs, reading, part, rows)
            first = frames.peek((config.threads or available_cpus()) + 1)
            if frames.complete and not frames.selected and not frames.has_result:
                for failure in first:
                    tally.fail(cast("Failure", failure))
                print_skipped(frames.skipped)
                raise typer.Exit(tally.exit_code(0))
            options: dict[str, Any] = {
                "device": config.device,
                "precision": config.precision,
                "threads": config.threads,
                "method": method,
                "batch_size": config.batch_size,
                "abstain_below": abstain_below,
                "abstain_unlike": abstain_unlike,
            }
            if on_ray:
                options |= {"public_key": public_key, "address": ray_address}
            else:
                options |= {
                    "spinning": config.spinning,
                    "cuda_graphs": cuda_graphs or config.cuda_graphs,
                    "nhwc": nhwc or config.nhwc,
                    "concurrent": not frames.complete,
                    "cam": cam,
                    "workers": workers,
                    "warm_up": False,  # the user waits for the first frame: an inference before it would delay it
                }
            predictor = _predictor_class(on_ray=on_ray)(opened, **options)
            if config.note:
                print_status(config.note)
            if predictor.engine.note or not config.tuned:  # the tuned settings name device and precision
                print_status(predictor.engine.note or f"on {predictor.engine.device} in {predictor.engine.precision}")
            if rows is not None:
                rows.begin(
                    predictor.contract.classes,
                    {
                        "bundle": opened.manifest["manifest_sha256"],
                        "method": predictor.method,
                        "device": predictor.engine.device,
                        "precision": predictor.engine.precision,
                        "shard": str(part) if part else None,
                        **({} if reading.flip == "none" else {"flip": reading.flip}),
                        "abstain_below": None if abstain_below is None else f"{abstain_below:g}",
                        **({"abstain_unlike": "yes"} if abstain_unlike else {}),
                        "self_test": PASSED,  # a predictor that fails it yields no row
                    },
                )
                print_resume_state(rows)
            with row_writer(out, rows, predictor.contract.classes) as writer:
                _write_rows(predictor, frames, writer, tally, overlay)
            if rows is not None and (tally.frames or frames.has_result):  # a file without rows only for a shard
                written = rows.finish()
    finally:
        if rows is not None and rows.interrupted:
            print_status(
                f"{rows.rows} rows are kept in {rows.partial.as_posix()}; run the same command with --resume to "
                "continue"
            )
    print_skipped(frames.skipped)
    if tally.frames or frames.has_result:
        outputs = [f"{'wrote' if written else 'unchanged:'} {out.as_posix()}"] if out is not None else []
        outputs += [f"overlays in {overlay.as_posix()}/"] if overlay is not None else []
        print_status("; ".join([*tally.summary(predictor.contract.classes, frames.kept), *outputs]))
    raise typer.Exit(tally.exit_code(tally.frames + frames.kept))


def _check_engine(
    ray_address: str | None, workers: int | None, *, cam: bool, overlay: Path | None, on_ray: bool
) -> None:
    from echoquad_runtime.errors import UsageError

    if ray_address is not None and not on_ray:
        raise UsageError("--ray-address without --engine ray; give both, or neither")
    if workers is not None and on_ray:
        raise UsageError("--workers with --engine ray: Ray starts its own workers; leave one out")
    if cam and overlay is None:
        raise UsageError("--cam without --overlay DIR; name the folder for the pictures")
    if cam and on_ray:
        raise UsageError("--cam with --engine ray: activation maps are not sent between machines; leave one out")


def _check_output(out: Path | None, *, resume: bool) -> None:
    from echoquad_runtime.results.result_file import check_resume
    from echoquad_runtime.results.row_formats import format_for

    if out is not None:
        format_for(out)
    if resume:
        check_resume(out)


def _parse_shard(shard: str | None) -> Shard | None:
    if shard is None:
        return None
    from echoquad_runtime.results.shards import Shard

    return Shard.parse(shard)


def _predictor_class(*, on_ray: bool) -> type[Predictor | RayPredictor]:
    if on_ray:
        from echoquad_runtime.cluster.ray_predictor import RayPredictor

        return RayPredictor
    from echoquad_runtime.predict.predictor import Predictor

    return Predictor


def _read_options(opened: Bundle, matrices: bool, flip: FlipName | None, every: int) -> ReadOptions:
    """Return the options for reading frames; report a flip of matrices that the command line does not state."""
    from echoquad_runtime.frames.formats import ReadOptions

    trained = ReadOptions.from_record(opened.manifest["training"])
    if flip is None and trained.flip != "none":
        print_status(f"matrices are flipped ({trained.flip}), as in training")
    elif flip is not None and flip != trained.flip:
        print_status(f"--flip {flip}: differs from training, which had {trained.flip}")
    return read_options(matrices, flip, every, trained)


def _write_rows(
    predictor: Predictor | RayPredictor, frames: FrameSelection, writer: Writer, tally: Tally, overlay: Path | None
) -> None:
    """Predict the frames; write a row and draw an overlay for each, print each failure."""
    from echoquad_runtime.bundle.typicality import UNLIKE_TRAINING
    from echoquad_runtime.frames.frame_file import Failure

    def draw(frame: FrameFile, prediction: Prediction) -> None:
        from echoquad_runtime.overlay.drawing import save_overlay

        assert overlay is not None
        save_overlay(overlay, frame, prediction, predictor.contract)

    begin = time.perf_counter()
    with (
        Progress("predicting") as progress,
        closing(cast("_Results", predictor.predict(frames, draw if overlay is not None else None))) as results,
    ):
        for done, result in enumerate(results, 1):
            if isinstance(result, Failure):
                tally.fail(result)
            else:
                writer.write(result)
                tally.labels[result.label] += 1
                tally.unlike += UNLIKE_TRAINING in result.flags
            progress.update(done, frames.yielded if frames.complete else None)
    tally.seconds = time.perf_counter() - begin
