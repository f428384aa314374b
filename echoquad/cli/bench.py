"""``echoquad bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from echoquad.cli.console import list_failures, note, say, table
from echoquad.cli.declare import Argument, Option
from echoquad.cli.options import (
    BundleFolder,
    CudaGraphs,
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

MAX_FRAMES = 256  # kept in memory as files; more would only repeat them
QUIET_SECONDS = 10.0  # longer than this, and it is told how long it will be quiet


def bench(
    bundle: BundleFolder,
    inputs: Annotated[
        list[str] | None,
        Argument(metavar="INPUT", help="Frame files, folders, patterns; the bundle's golden frames if none."),
    ] = None,
    json_file: Annotated[Path | None, Option("--json", metavar="FILE", help="Also write the figures as JSON.")] = None,
    frames: Annotated[int, Option("--frames", metavar="N", min=1, help="Frames to time.")] = 100,
    fps: Annotated[
        float | None,
        Option(
            "--fps",
            metavar="F",
            min=0,
            help="Let the timed frames come at F a second, as from a live source, and count the deadlines missed.",
        ),
    ] = None,
    histogram: Annotated[
        Path | None, Option("--histogram", metavar="FILE.png", help="Also draw the latencies as a histogram.")
    ] = None,
    max_p99_ms: Annotated[
        float | None,
        Option("--max-p99-ms", metavar="MS", min=0, help="End with exit code 3 if the p99 latency is above this."),
    ] = None,
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
    from echoquad_runtime.storage.atomic import write_json
    from echoquad_runtime.tuning.saved_settings import resolve_settings

    if histogram is not None:
        _check_ending(histogram)
    encoded, failures = read_encoded(inputs, MAX_FRAMES) if inputs else (None, [])
    settings = resolve_settings(
        Bundle(bundle, public_key=public_key),
        device=device.value if device else None,
        precision=precision,
        threads=threads,
        batch_size=batch_size,
        untuned=untuned,
    )
    if fps and frames / fps > QUIET_SECONDS:
        note(f"{frames} frames at {fps:g} a second: this takes {frames / fps:.0f} seconds")
    found = run_benchmark(
        bundle,
        encoded,
        device=settings.device,
        precision=settings.precision,
        batch_size=settings.batch_size,
        threads=settings.threads,
        spinning=settings.spinning,
        cuda_graphs=cuda_graphs or settings.cuda_graphs,
        nhwc=nhwc or settings.nhwc,
        public_key=public_key,
        count=frames,
        fps=fps,
    )
    for line in filter(None, (settings.note, found.note)):
        note(line)
    _print(found)
    if json_file is not None:
        write_json(json_file, found.to_dict())
        note(f"wrote {json_file.as_posix()}")
    if histogram is not None:
        _draw(found, histogram, bundle.resolve().name)
        note(f"wrote {histogram.as_posix()}")
    if max_p99_ms is not None:
        try:
            found.check_p99(max_p99_ms)
        except GateError:  # the one error of this run: what could not be read is told as a note
            for failure in failures:
                note(f"not timed: {failure.file}: {failure.error}")
            raise
    raise SystemExit(list_failures(failures, done=1))


def _print(found: Benchmark) -> None:
    rows = [[name, f"{value:.2f}"] for name, value in found.stages.items()]
    rows += [[f"latency {name}", f"{value:.2f}"] for name, value in found.latency_ms.items()]
    rows += [["load", f"{found.load_ms:.1f}"], ["first frame", f"{found.first_frame_ms:.1f}"]]
    say(f"{_what(found)}; stages are medians")
    say(table(["", "ms a frame"], rows))
    if found.missed_deadlines is not None:
        waiting = "" if found.idle_cpu_percent is None else f"; {found.idle_cpu_percent:.1f} % of one while waiting"
        say(f"deadlines missed: {found.missed_deadlines} of {found.frames}")
        say(f"cores kept busy: {found.cpu_cores:.2f}{waiting}")
    say(f"throughput {found.frames_per_second:.1f} frames a second in batches of {found.batch_size}")
    say(f"peak memory {found.peak_rss_mb:.0f} MB")


def _what(found: Benchmark) -> str:
    source = f"live at {found.fps:g} a second" if found.fps else "one at a time"
    return f"{found.frames} frames on {found.device} in {found.precision}, {source}"


def _check_ending(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise UsageError(f"--histogram {path.as_posix()}: the ending is {path.suffix!r}; expected .png")


def _draw(found: Benchmark, path: Path, bundle: str) -> None:
    from echoquad_runtime.bench.latency_plot import draw_histogram
    from echoquad_runtime.storage.atomic import write_atomically

    threads = f"{found.threads} thread{'s' * (found.threads > 1)}"
    detail = f"{bundle}, {threads}, EchoQuad {found.versions['echoquad']}, {found.versions['machine']}"
    if found.missed_deadlines is not None:
        detail += f"; deadlines missed: {found.missed_deadlines}"
    picture = draw_histogram(found.latencies_ms, found.latency_ms, f"Latency of {_what(found)}", detail)
    with write_atomically(path) as stream:
        picture.save(stream, "PNG")
