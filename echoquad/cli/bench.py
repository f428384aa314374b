"""``echoquad bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from echoquad.cli.console import list_failures, note, say, table
from echoquad.cli.options import BundleFolder, Precision, PublicKey, Threads, TunedBatchSize, TunedDevice, Untuned

__all__ = ["bench"]

MAX_FRAMES = 256  # kept in memory as files; more would only repeat them


def bench(
    bundle: BundleFolder,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="INPUT", help="Frame files, folders, patterns; the bundle's golden frames if none."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures as JSON.")
    ] = None,
    frames: Annotated[int, typer.Option("--frames", metavar="N", min=1, help="Frames to time.")] = 100,
    device: TunedDevice = None,
    precision: Precision = None,
    batch_size: TunedBatchSize = None,
    threads: Threads = None,
    untuned: Untuned = False,
    public_key: PublicKey = None,
) -> None:
    """Measure latency and throughput by stage on this machine."""
    from echoquad_runtime.bench import read_encoded, run_benchmark
    from echoquad_runtime.bundle import Bundle
    from echoquad_runtime.files import write_json
    from echoquad_runtime.host import settle

    encoded, failures = read_encoded(inputs, MAX_FRAMES) if inputs else (None, [])
    settings = settle(
        Bundle(bundle, public_key=public_key),
        device=device.value if device else None,
        precision=precision,
        threads=threads,
        batch_size=batch_size,
        untuned=untuned,
    )
    found = run_benchmark(
        bundle,
        encoded,
        device=settings.device,
        precision=settings.precision,
        batch_size=settings.batch_size,
        threads=settings.threads,
        spinning=settings.spinning,
        public_key=public_key,
        count=frames,
    )
    for line in filter(None, (settings.note, found.note)):
        note(line)
    rows = [[name, f"{value:.2f}"] for name, value in found.stages.items()]
    rows += [[f"latency {name}", f"{value:.2f}"] for name, value in found.latency_ms.items()]
    rows += [["load", f"{found.load_ms:.1f}"], ["first frame", f"{found.first_frame_ms:.1f}"]]
    say(f"{found.frames} frames on {found.device} in {found.precision}, one at a time; stages are medians")
    say(table(["", "ms a frame"], rows))
    say(f"throughput {found.frames_per_second:.1f} frames a second in batches of {found.batch_size}")
    say(f"peak memory {found.peak_rss_mb:.0f} MB")
    if json_file is not None:
        write_json(json_file, found.to_dict())
        note(f"wrote {json_file.as_posix()}")
    raise typer.Exit(list_failures(failures, done=1))
