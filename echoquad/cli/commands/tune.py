"""``echoquad tune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from echoquad.cli.framework.console import Progress, format_table, print_failures, print_result, print_status, save_json
from echoquad.cli.framework.options import (
    MAX_COUNT,
    MAX_FRAMES,
    BundleFolder,
    DeviceName,
    FrameInputs,
    JsonFile,
    MaxP99,
    PublicKey,
)

if TYPE_CHECKING:
    from echoquad_runtime.errors import VerificationError
    from echoquad_runtime.tuning.tune import CandidateResult, TuningResult

__all__ = ["tune"]

COST = {
    "latency": "median time of one frame",
    "throughput": "time per frame in batches",
    "power": "CPU time per frame, a proxy for power",
}


def tune(
    bundle: BundleFolder,
    inputs: FrameInputs = None,
    goal: Annotated[
        Literal["latency", "throughput", "power"],
        typer.Option(
            "--goal",
            help="What to optimise: the median time of one frame, frames per second in batches, or CPU time per frame "
            "from a source of 30 frames per second, a proxy for power.",
        ),
    ] = "latency",
    max_p99_ms: MaxP99 = None,
    device: Annotated[
        DeviceName, typer.Option("--device", help="Device to try; auto tries every device that works here.")
    ] = "auto",
    precision: Annotated[
        str | None, typer.Option("--precision", metavar="NAME", help="Precision to try. Default: all.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", metavar="N", min=1, max=MAX_COUNT, help="CPU threads to try. Default: 1, 2, 4, ..."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            metavar="N",
            min=1,
            max=MAX_COUNT,
            help="Frames per batch to try. Default: 1; with --goal throughput 1, 2, 4, 8 and 16.",
        ),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds", metavar="S", min=0, help="Measuring time; the check on golden frames comes before it."
        ),
    ] = 60.0,
    exhaustive: Annotated[
        bool,
        typer.Option(
            "--exhaustive",
            help="Measure every candidate in every round, and compare with what early elimination would choose.",
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="Seed for the order of candidates within a round.")
    ] = 0,
    public_key: PublicKey = None,
    json_file: JsonFile = None,
    forget: Annotated[
        bool, typer.Option("--forget", help="Measure nothing; delete the saved settings of this bundle.")
    ] = False,
) -> None:
    """Find the fastest settings for a bundle on this host; predict and bench then use them. Needs no torch.

    The settings are device, precision, threads, thread spinning and batch size. Only those that pass the golden frames
    within the parity gate of the bundle are considered. The choice is saved in the user's configuration folder, or in
    ECHOQUAD_CONFIG_DIR, and is used until the host or EchoQuad changes.
    """
    from echoquad_runtime.bench.benchmark import read_encoded
    from echoquad_runtime.bundle.bundle import Bundle
    from echoquad_runtime.tuning import saved_settings
    from echoquad_runtime.tuning import tune as tuning

    opened = Bundle(bundle, public_key=public_key)
    if forget:
        removed = saved_settings.delete(opened)
        print_result(f"removed {removed.as_posix()}" if removed else "no settings are saved for this bundle")
        return
    frames, failures = read_encoded(inputs, MAX_FRAMES) if inputs else (None, [])
    total = max(1, round(seconds))
    with Progress("measuring, seconds", total) as progress:
        found = tuning.tune(
            bundle,
            frames,
            goal=goal,
            max_p99_ms=max_p99_ms,
            device=device,
            precision=precision,
            threads=threads,
            batch_size=batch_size,
            public_key=public_key,
            seconds=seconds,
            exhaustive=exhaustive,
            seed=seed,
            progress=lambda spent: progress.update(min(round(spent), total)),
        )
    _print(found)
    save_json(json_file, found.to_dict())
    if found.choice is None:
        raise _no_choice(bundle, found)
    path = saved_settings.save(
        opened, found.choice, goal=goal, max_p99_ms=max_p99_ms, table=[row.to_dict() for row in found.candidates]
    )
    print_status(f"saved for this host in {path.as_posix()}; predict and bench use it unless --untuned is given")
    raise typer.Exit(print_failures(failures, done=1))


def _print(found: TuningResult) -> None:
    from echoquad_runtime.tuning.racing import MIN_P99_CALLS
    from echoquad_runtime.tuning.tune import FRAME_RATE

    for name, reason in found.left_out.items():
        print_status(f"{name} was not tried: {reason}")
    for row in found.candidates:
        if row.reason:
            print_status(f"refused, {row.config}: {row.reason}")
    paced = f" at {FRAME_RATE:.0f}/s" if found.goal == "power" else ""
    header = ["", "threads", "spin", "batch", "cost", "p50 ms", "p99 ms", "frames/s", f"CPU ms/frame{paced}"]
    print_result(format_table([*header, "calls", ""], [_cells(row) for row in found.candidates]))
    print_result(
        f"cost: {COST[found.goal]}, relative to the best; times are per call; measured over {found.rounds} rounds"
    )
    if found.racing_choice is not None and found.racing_cost is not None:
        print_result(f"without --exhaustive: {found.racing_choice}, at {found.racing_cost:.3f} of the best cost")
    for row in found.candidates:
        if row.verdict == "chosen":
            print_result(f"chosen for {found.goal}: {row.config}")
            if found.max_p99_ms is not None and row.calls < MIN_P99_CALLS:
                print_status(f"its p99 is based on only {row.calls} calls: measure longer with --seconds")


def _cells(row: CandidateResult) -> list[str]:
    config = row.config
    name = f"{config.precision} {config.device}{config.cuda_options}"
    if row.cost is None:
        return [name, *["-"] * 9, row.verdict]
    spin = "-" if not config.can_spin else "yes" if config.spinning else "no"
    figures = (row.p50_ms, row.p99_ms, row.frames_per_second, row.cpu_ms)
    return [
        name,
        str(config.threads),
        spin,
        str(config.batch_size),
        f"{row.cost:.3f}",
        *(f"{value:.2f}" for value in figures),
        str(row.calls),
        row.verdict,
    ]


def _no_choice(bundle: Path, found: TuningResult) -> VerificationError:
    """Build the error for a search that found no usable settings."""
    from echoquad_runtime.errors import VerificationError

    if found.closest is None:
        first = next((row.reason for row in found.candidates), "no device works, see echoquad doctor")
        return VerificationError(
            f"{bundle.as_posix()}: no settings pass the golden frames on this host; the first failure: {first}"
        )
    reached, choice = found.closest
    return VerificationError(
        f"{bundle.as_posix()}: no settings reach a p99 of {found.max_p99_ms:g} ms on this host; the closest is "
        f"{reached:.1f} ms ({choice}); raise --max-p99-ms, or export a smaller or int8 model"
    )
