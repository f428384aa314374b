"""Tuning: which way of running a bundle suits this host, found by trying.

Every device, precision, number of threads, spinning or not, and batch size that could be is a candidate, but only
where the golden frames pass the bundle's gate on that device in that precision. What is timed is what ``predict``
does with a frame once its bytes are there: decode, quadrants, inference, vote.

- ``latency``: median seconds of one frame, one at a time.
- ``throughput``: frames a second, as over a folder: each thread judges frames of its own, and nothing spins.
- ``power``: CPU-seconds of the process a frame, threads that spin included, while frames come one at a time and
  `FRAME_RATE` times a second. It is a proxy: no power meter is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from echoquad_runtime.bench.benchmark import Encoded, encoded_golden_frames
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.manifest import BF16, TF32
from echoquad_runtime.devices.cpu_info import available_cpus
from echoquad_runtime.devices.host_facts import host_facts
from echoquad_runtime.devices.session_factory import Device, probe_devices
from echoquad_runtime.errors import ConfigError, InputNotFoundError
from echoquad_runtime.tuning.measurement import FRAME_RATE, GoldenFrames, Trial
from echoquad_runtime.tuning.racing import Round, Standing, contenders, costs, eligible, pick, race, replay, stand
from echoquad_runtime.tuning.saved_settings import Goal, RunConfig

__all__ = ["BATCH_SIZES", "FRAME_RATE", "Row", "Tuned", "candidates", "tune"]

BATCH_SIZES: Final = (1, 2, 4, 8, 16)
"""Frames at a time that are tried for throughput; for the other goals a frame is judged as it comes."""

_GENTLEST_FIRST: Final = ("fp32", TF32, BF16, "fp16", "int8")  # the nearer to what was trained, the gentler


@dataclass(frozen=True, slots=True)
class Row:
    """A candidate and what it showed.

    Attributes
    ----------
    choice
        The candidate.
    verdict
        ``chosen``; ``contender`` to the end; ``dropped`` on the way as clearly dearer; ``too slow`` for the limit;
        ``refused`` since it fails on the golden frames or does not run.
    reason
        Why it was refused; else empty.
    turns, calls
        How often it was measured.
    cost
        What decides: its cost over that of the best within the limit, the median of the rounds that both ran in.
    p50_ms, p99_ms
        Milliseconds of a call, which is one batch of one thread: median over the turns of their medians, and the 99th
        percentile of all calls.
    frames_per_second
        Median over the turns, back to back even where they were paced.
    cpu_ms
        CPU-milliseconds of the process a frame, median over the turns.
    """

    choice: RunConfig
    verdict: str
    reason: str = ""
    turns: int = 0
    calls: int = 0
    cost: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    frames_per_second: float | None = None
    cpu_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Give the figures as JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Tuned:
    """What the search came to.

    Attributes
    ----------
    goal, max_p99_ms
        What was asked for.
    choice
        The best; None where no candidate keeps the limit, or none runs.
    rows
        The candidates, best first, then those that were refused.
    closest
        The lowest p99 in milliseconds that any candidate reached, and which; None where none ran.
    left_out
        Devices that were not tried, and why.
    rounds
        How many rounds there were.
    raced, ratio
        Of an exhaustive search: what the race alone would have chosen on the same turns, and its cost over that of
        the best. Else None.
    """

    goal: Goal
    max_p99_ms: float | None
    choice: RunConfig | None
    rows: tuple[Row, ...]
    closest: tuple[float, RunConfig] | None
    left_out: dict[str, str]
    rounds: int
    raced: RunConfig | None
    ratio: float | None

    def to_dict(self) -> dict[str, Any]:
        """Give the findings as JSON values, with what this host is."""
        closest = None if self.closest is None else {"p99_ms": self.closest[0], "choice": asdict(self.closest[1])}
        rows = [row.to_dict() for row in self.rows]
        return {**asdict(self), "rows": rows, "closest": closest, "host": host_facts()}


def candidates(
    devices: Mapping[str, Sequence[str]],
    *,
    batch_sizes: Sequence[int],
    cpus: int,
    threads: int | None = None,
    may_spin: bool = True,
) -> list[RunConfig]:
    """List what is to be tried.

    Parameters
    ----------
    devices
        Precisions by device.
    batch_sizes
        Frames at a time.
    cpus
        CPUs that the process may use: thread counts are the powers of two below it, and itself.
    threads
        The only number of threads to try, where given.
    may_spin
        Whether to try threads that wait in a busy loop.
    """
    powers = [2**power for power in range(cpus.bit_length()) if 2**power < cpus]
    found = []
    for device, precisions in devices.items():
        # On CUDA they serve only the nodes that are left to the CPU.
        counts = [threads] if threads else [1, cpus] if device == "cuda" else [*powers, cpus]
        found += [
            RunConfig(device, precision, count, spinning, batch_size, graphs, nhwc)
            for precision in precisions
            for count in dict.fromkeys(counts)
            for spinning in ((False, True) if may_spin else (False,))
            for batch_size in batch_sizes
            for graphs in (False, True)[: 1 + (device == "cuda")]
            for nhwc in (False, True)[: 1 + (device == "cuda")]
        ]
    return [choice for choice in found if choice.can_spin or not choice.spinning]


def tune(
    folder: str | Path,
    frames: Sequence[Encoded] | None = None,
    *,
    goal: Goal = "latency",
    max_p99_ms: float | None = None,
    device: Device = "auto",
    precision: str | None = None,
    threads: int | None = None,
    batch_size: int | None = None,
    public_key: str | Path | None = None,
    seconds: float = 60.0,
    exhaustive: bool = False,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
    progress: Callable[[float], None] = lambda _: None,
) -> Tuned:
    """Try the ways of running a bundle on this host and choose one.

    Parameters
    ----------
    folder
        The bundle.
    frames
        Names and file bytes, gone through again and again; None is the bundle's golden frames.
    goal
        What is to be best: ``latency``, ``throughput`` or ``power``; see the module.
    max_p99_ms
        Candidates of which one call in a hundred takes longer are not chosen.
    device, precision, threads, batch_size
        What is given is kept fixed; ``auto`` and None are tried.
    public_key
        As `Bundle`.
    seconds
        Time to measure for; replaying the golden frames comes before it. Three rounds are run in any case.
    exhaustive
        Whether every candidate runs in every round, to see what the race would have missed.
    seed
        Of the order within the rounds.
    tell
        Told in a line what the golden frames showed.
    progress
        Told the seconds measured so far.

    Raises
    ------
    BundleError
        As `Bundle`.
    DeviceUnavailableError
        If `device` was given and is not there.
    ConfigError
        If `seconds`, `max_p99_ms`, `threads` or `batch_size` cannot be.
    InputNotFoundError
        If there is no frame to time.
    """
    for name, number in (
        ("seconds", seconds),
        ("max_p99_ms", max_p99_ms),
        ("threads", threads),
        ("batch_size", batch_size),
    ):
        if number is not None and not 0 < number < np.inf:
            raise ConfigError(f"{name} {number} found; expected a number above 0")
    bundle = Bundle(folder, public_key=public_key)
    if precision is not None:
        bundle.choose_precision(precision)
    encoded = [data for _, data in (encoded_golden_frames(bundle) if frames is None else frames)]
    if not encoded:
        raise InputNotFoundError(
            f"{bundle.folder.as_posix()}: its golden frames hold none to time; name frames to time"
        )
    cpus = available_cpus()
    batch_sizes = (batch_size,) if batch_size else BATCH_SIZES if goal == "throughput" else (1,)
    devices, left_out = _devices(device, goal)
    golden = GoldenFrames(bundle, public_key, tell)
    passed: dict[str, list[str]] = {}
    refused = []
    for name in devices:
        for one in [precision] if precision else bundle.precisions_on(name):
            if fault := golden.fault(name, one, threads or cpus):
                refused.append(Row(RunConfig(name, one, threads or cpus, False, batch_sizes[0]), "refused", fault))
            else:
                passed.setdefault(name, []).append(one)
    if device != "auto" and len(golden.unusable) == len(refused) > 0 and not passed:
        raise golden.unusable[0]
    choices = candidates(passed, batch_sizes=batch_sizes, cpus=cpus, threads=threads, may_spin=goal != "throughput")
    limit = np.inf if max_p99_ms is None else max_p99_ms / 1e3
    trial = Trial(bundle, encoded, choices, goal, seconds)
    rounds = race(
        len(choices),
        trial.give_turn,
        seconds=seconds,
        limit=limit,
        exhaustive=exhaustive,
        seed=seed,
        before_round=trial.close_others,
        progress=progress,
    )
    trial.close_others(())
    # What is chosen has passed its golden frames in the very way that it will run.
    gentleness = [_gentleness(choice) for choice in choices]
    while (best := pick(rounds, gentleness, limit)) is not None:
        if not (fault := golden.fault_of(choices[best])):
            break
        trial.faults[best] = fault
        rounds = [{index: turn for index, turn in one.items() if index != best} for one in rounds]
    seen = replay(rounds, limit) if exhaustive else rounds
    raced = pick(seen, gentleness, limit) if exhaustive else None
    cost = _costs(rounds, limit)
    standings, left = stand(rounds), contenders(seen, limit)
    rows = []
    for index in sorted(cost, key=lambda index: cost[index]):
        verdict = "contender" if index in left else "dropped"
        verdict = "chosen" if index == best else verdict if standings[index].keeps(limit) else "too slow"
        row = _row(choices[index], verdict, cost[index], standings[index], throughput=goal == "throughput")
        rows.append(row)
    rows += [Row(choices[index], "refused", fault) for index, fault in sorted(trial.faults.items())]
    closest = min(standings, key=lambda index: standings[index].p99, default=None)
    return Tuned(
        goal=goal,
        max_p99_ms=max_p99_ms,
        choice=None if best is None else choices[best],
        rows=(*rows, *refused),
        closest=None if closest is None else (1e3 * standings[closest].p99, choices[closest]),
        left_out=left_out,
        rounds=len(rounds),
        raced=None if raced is None else choices[raced],
        ratio=None if raced is None else cost[raced],
    )


def _costs(rounds: Sequence[Round], limit: float) -> dict[int, float]:
    """Give each candidate's cost over that of the best within the limit; over the best of all where none is."""
    cost = costs(rounds, limit) or costs(rounds)
    best = min((cost[index] for index in eligible(rounds, limit) or cost), default=1.0)
    return {index: cost[index] / best for index in cost}


def _devices(device: Device, goal: Goal) -> tuple[list[str], dict[str, str]]:
    """Give the devices to try, and why others are left out."""
    if device != "auto":
        return [device], {}
    found = probe_devices()
    left_out = {name: obstacle for name, obstacle in found.items() if obstacle is not None}
    if goal == "power" and "cuda" in found:
        # It would always win: what it burns is not CPU time.
        left_out.setdefault("cuda", "CPU time does not tell what a GPU takes; compare its settings by --device cuda")
    return [name for name in found if name not in left_out], left_out


def _gentleness(choice: RunConfig) -> tuple[int, ...]:
    """Order candidates of equal cost: what else runs on the cart comes first, then closeness to what was trained."""
    return (
        choice.threads,
        int(choice.spinning),
        _GENTLEST_FIRST.index(choice.precision),
        choice.batch_size,
        int(choice.cuda_graphs) + int(choice.nhwc),
        int(choice.device != "cpu"),
    )


def _row(choice: RunConfig, verdict: str, cost: float, standing: Standing, *, throughput: bool) -> Row:
    turns = standing.turns
    return Row(
        choice,
        verdict,
        turns=len(turns),
        calls=sum(len(turn.calls) for turn in turns),
        cost=cost,
        p50_ms=1e3 * standing.p50,
        p99_ms=1e3 * standing.p99,
        frames_per_second=1 / standing.score if throughput else median(turn.frames / sum(turn.calls) for turn in turns),
        cpu_ms=1e3 * median(turn.cpu / turn.frames for turn in turns),
    )
