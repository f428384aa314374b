"""``echoquad tune``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from echoquad.cli.bench import MAX_FRAMES
from echoquad.cli.console import Progress, list_failures, note, say, table
from echoquad.cli.declare import Argument, Option
from echoquad.cli.options import BundleFolder, DeviceName, PublicKey

if TYPE_CHECKING:
    from echoquad_runtime.tuning.tune import CandidateResult, TuningResult

__all__ = ["tune"]

COST = {
    "latency": "median time of one frame",
    "throughput": "time a frame in batches",
    "power": "CPU time a frame, a proxy for power",
}


class GoalName(StrEnum):
    """Goals by the names that --goal takes."""

    latency = "latency"
    throughput = "throughput"
    power = "power"


def tune(
    bundle: BundleFolder,
    inputs: Annotated[
        list[str] | None,
        Argument(metavar="INPUT", help="Frame files, folders, patterns; the bundle's golden frames if none."),
    ] = None,
    goal: Annotated[
        GoalName,
        Option(
            "--goal",
            help="What is to be best: the median time of one frame, frames a second in batches, or CPU time a frame "
            "from a source of 30 a second, which stands for power.",
        ),
    ] = GoalName.latency,
    max_p99_ms: Annotated[
        float | None,
        Option("--max-p99-ms", metavar="MS", min=0, help="Choose nothing whose calls have a p99 above this."),
    ] = None,
    device: Annotated[
        DeviceName, Option("--device", help="Device to try; auto tries every one that works here.")
    ] = DeviceName.auto,
    precision: Annotated[
        str | None, Option("--precision", metavar="NAME", help="Precision to try; all where not given.")
    ] = None,
    threads: Annotated[
        int | None,
        Option("--threads", metavar="N", min=1, help="CPU threads to try; 1, 2, 4, ... where not given."),
    ] = None,
    batch_size: Annotated[
        int | None,
        Option(
            "--batch-size",
            metavar="N",
            min=1,
            help="Frames at a time to try; where not given 1, for throughput 1, 2, 4, 8 and 16.",
        ),
    ] = None,
    seconds: Annotated[
        float,
        Option("--seconds", metavar="S", min=0, help="How long to measure; checking golden frames comes before."),
    ] = 60.0,
    exhaustive: Annotated[
        bool,
        Option("--exhaustive", help="Measure everything in every round; compare with what is chosen otherwise."),
    ] = False,
    seed: Annotated[int, Option("--seed", metavar="N", help="Of the order within the rounds.")] = 0,
    public_key: PublicKey = None,
    json_file: Annotated[Path | None, Option("--json", metavar="FILE", help="Also write the findings as JSON.")] = None,
    forget: Annotated[
        bool, Option("--forget", help="Measure nothing; remove what was chosen for this bundle before.")
    ] = False,
) -> None:
    """Find by trying how this host runs a bundle best; predict and bench then run it so. Needs no torch.

    Only what passes the golden frames under the bundle's parity gate is chosen from: device, precision, threads,
    whether they spin, frames at a time. The choice is kept in a file of the user's configuration folder, or of
    ECHOQUAD_CONFIG_DIR, and is used until the host or EchoQuad changes.
    """
    from echoquad_runtime.bench.benchmark import read_encoded
    from echoquad_runtime.bundle.bundle import Bundle
    from echoquad_runtime.storage.atomic import write_json
    from echoquad_runtime.tuning import saved_settings
    from echoquad_runtime.tuning import tune as tuning

    opened = Bundle(bundle, public_key=public_key)
    if forget:
        gone = saved_settings.delete(opened)
        say(f"removed {gone.as_posix()}" if gone else "nothing was kept for this bundle")
        return
    frames, failures = read_encoded(inputs, MAX_FRAMES) if inputs else (None, [])
    with Progress("measuring, seconds", max(1, round(seconds))) as progress:
        found = tuning.tune(
            bundle,
            frames,
            goal=goal.value,
            max_p99_ms=max_p99_ms,
            device=device.value,
            precision=precision,
            threads=threads,
            batch_size=batch_size,
            public_key=public_key,
            seconds=seconds,
            exhaustive=exhaustive,
            seed=seed,
            tell=progress.print,
            progress=lambda spent: progress.update(min(round(spent), max(1, round(seconds)))),
        )
    _print(found)
    if json_file is not None:
        write_json(json_file, found.to_dict())
        note(f"wrote {json_file.as_posix()}")
    if found.choice is None:
        raise _nothing(bundle, found)
    path = saved_settings.save(
        opened, found.choice, goal=goal.value, max_p99_ms=max_p99_ms, table=[row.to_dict() for row in found.candidates]
    )
    note(f"kept for this host in {path.as_posix()}; predict and bench use it, unless told --untuned")
    raise SystemExit(list_failures(failures, done=1))


def _print(found: TuningResult) -> None:
    from echoquad_runtime.tuning.racing import MIN_P99_CALLS
    from echoquad_runtime.tuning.tune import FRAME_RATE

    for name, obstacle in found.left_out.items():
        note(f"{name} was not tried: {obstacle}")
    for row in found.candidates:
        if row.reason:
            note(f"refused, {row.config}: {row.reason}")
    paced = f" at {FRAME_RATE:.0f}/s" if found.goal == "power" else ""
    header = ["", "threads", "spin", "batch", "cost", "p50 ms", "p99 ms", "frames/s", f"CPU ms/frame{paced}"]
    say(table([*header, "calls", ""], [_cells(row) for row in found.candidates]))
    say(f"cost: {COST[found.goal]}, over the best; times are of a call; measured over {found.rounds} rounds")
    if found.racing_choice is not None and found.racing_cost is not None:
        say(f"without --exhaustive: {found.racing_choice}, at {found.racing_cost:.3f} of the best cost")
    for row in found.candidates:
        if row.verdict == "chosen":
            say(f"chosen for {found.goal}: {row.config}")
            if found.max_p99_ms is not None and row.calls < MIN_P99_CALLS:
                note(f"its p99 comes from {row.calls} calls alone: measure for longer by --seconds")


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


def _nothing(bundle: Path, found: TuningResult) -> Exception:
    """Say why nothing can be chosen."""
    from echoquad_runtime.errors import VerificationError

    if found.closest is None:
        first = next((row.reason for row in found.candidates), "no device works, see echoquad doctor")
        return VerificationError(
            f"{bundle.as_posix()}: nothing runs and passes its golden frames on this host; the first: {first}"
        )
    reached, choice = found.closest
    return VerificationError(
        f"{bundle.as_posix()}: nothing keeps a p99 of {found.max_p99_ms:g} ms on this host; the closest is "
        f"{reached:.1f} ms ({choice}); allow more by --max-p99-ms, or export a smaller or int8 model"
    )
