"""``echoquad bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from echoquad.cli.framework.console import (
    describe_failure,
    format_table,
    print_failures,
    print_result,
    print_status,
    save_json,
)
from echoquad.cli.framework.options import (
    MAX_FRAMES,
    BundleFolder,
    CudaGraphs,
    FrameInputs,
    JsonFile,
    MaxP99,
    Nhwc,
    Precision,
    PublicKey,
    Threads,
    TunedBatchSize,
    TunedDevice,
    Untuned,
)
from echoquad_runtime.errors import GateError, UsageError

if TYPE_CHECKING:
    from echoquad_runtime.bench.benchmark import Benchmark

__all__ = ["bench"]

ANNOUNCED_SECONDS = 10.0  # a live run that takes longer is announced with its duration


def bench(
    bundle: BundleFolder,
    inputs: FrameInputs = None,
    json_file: JsonFile = None,
    frames: Annotated[int, typer.Option("--frames", metavar="N", min=1, help="Frames to time.")] = 100,
    fps: Annotated[
        float | None,
        typer.Option(
            "--fps",
            metavar="F",
            min=0,
            help="Feed the timed frames at F per second, as a live source does, and count missed deadlines.",
        ),
    ] = None,
    histogram: Annotated[
        Path | None, typer.Option("--histogram", metavar="FILE.png", help="Also draw a histogram of the latencies.")
    ] = None,
    max_p99_ms: MaxP99 = None,
    device: TunedDevice = None,
    precision: Precision = None,
    batch_size: TunedBatchSize = None,
    threads: Threads = None,
    untuned: Untuned = False,
    cuda_graphs: CudaGraphs = False,
    nhwc: Nhwc = False,
    public_key: PublicKey = None,
) -> None:
    """Measure latency and throughput by stage on this machine."""
    from echoquad_runtime.bench.benchmark import read_encoded, run_benchmark
    from echoquad_runtime.bundle.bundle import Bundle
    from echoquad_runtime.tuning.saved_settings import resolve_settings

    if histogram is not None and histogram.suffix.lower() != ".png":
        raise UsageError(f"--histogram {histogram.as_posix()}: the extension is {histogram.suffix!r}; expected .png")
    encoded, failures = read_encoded(inputs, MAX_FRAMES) if inputs else (None, [])
    config = resolve_settings(
        Bundle(bundle, public_key=public_key),
        device=device,
        precision=precision,
        threads=threads,
        batch_size=batch_size,
        untuned=untuned,
    )
    if fps and frames / fps > ANNOUNCED_SECONDS:
        print_status(f"{frames} frames at {fps:g} per second: this takes {frames / fps:.0f} seconds")
    found = run_benchmark(
        bundle,
        encoded,
        device=config.device,
        precision=config.precision,
        batch_size=config.batch_size,
        threads=config.threads,
        spinning=config.spinning,
        cuda_graphs=cuda_graphs or config.cuda_graphs,
        nhwc=nhwc or config.nhwc,
        public_key=public_key,
        count=frames,
        fps=fps,
    )
    for note in filter(None, (config.note, found.note)):
        print_status(note)
    _print(found)
    save_json(json_file, found.to_dict())
    if histogram is not None:
        _draw(found, histogram, bundle.resolve().name)
        print_status(f"wrote {histogram.as_posix()}")
    if max_p99_ms is not None:
        try:
            found.check_p99(max_p99_ms)
        except GateError:  # exit code 3 has one error line: unreadable frames become status lines
            for failure in failures:
                print_status(f"not timed: {describe_failure(failure)}")
            raise
    raise typer.Exit(print_failures(failures, done=1))


def _print(found: Benchmark) -> None:
    rows = [[name, f"{value:.2f}"] for name, value in found.stages.items()]
    rows += [[f"latency {name}", f"{value:.2f}"] for name, value in found.latency_ms.items()]
    rows += [["load", f"{found.load_ms:.1f}"], ["first frame", f"{found.first_frame_ms:.1f}"]]
    print_result(f"{_title(found)}; stages are medians")
    print_result(format_table(["", "ms per frame"], rows))
    if found.missed_deadlines is not None:
        idle = "" if found.idle_cpu_percent is None else f"; {found.idle_cpu_percent:.1f} % of one while waiting"
        print_result(f"deadlines missed: {found.missed_deadlines} of {found.frames}")
        print_result(f"cores used: {found.cpu_cores:.2f}{idle}")
    print_result(f"throughput {found.frames_per_second:.1f} frames per second in batches of {found.batch_size}")
    print_result(f"peak memory {found.peak_rss_mb:.0f} MB")


def _title(found: Benchmark) -> str:
    source = f"live at {found.fps:g} per second" if found.fps else "one at a time"
    return f"{found.frames} frames on {found.device} in {found.precision}, {source}"


def _draw(found: Benchmark, path: Path, bundle: str) -> None:
    from echoquad_runtime.bench.latency_plot import draw_histogram
    from echoquad_runtime.storage.atomic import write_atomically

    threads = f"{found.threads} thread{'s' * (found.threads > 1)}"
    detail = f"{bundle}, {threads}, EchoQuad {found.versions['echoquad']}, {found.versions['machine']}"
    if found.missed_deadlines is not None:
        detail += f"; deadlines missed: {found.missed_deadlines}"
    picture = draw_histogram(found.latencies_ms, found.latency_ms, f"Latency of {_title(found)}", detail)
    with write_atomically(path) as stream:
        picture.save(stream, "PNG")
