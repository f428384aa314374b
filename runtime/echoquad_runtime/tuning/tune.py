"""Tuning: search for the fastest configuration of a bundle on this host.

The candidates are all combinations of device, precision, number of threads, spinning and batch size, restricted to
devices and precisions on which the golden frames pass the bundle's parity gate. Successive elimination
(`echoquad_runtime.tuning.racing`) selects one. The timed work is what ``predict`` does with a frame once its bytes are
in memory: decode, quadrants, inference, vote.

- ``latency``: median seconds of one frame, one at a time.
- ``throughput``: frames per second, as for a folder: every thread takes frames of its own, and none spins.
- ``power``: CPU-seconds of the process per frame, spinning threads included, while one frame arrives at a time,
  `FRAME_RATE` per second. It is a proxy: no power meter is read.
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
from echoquad_runtime.tuning.measurement import FRAME_RATE, CandidateTimer, GoldenFrameCheck
from echoquad_runtime.tuning.racing import (
    Round,
    Statistics,
    contenders,
    eligible,
    relative_costs,
    replay_elimination,
    select,
    successive_elimination,
    summarize,
)
from echoquad_runtime.tuning.saved_settings import Goal, RunConfig

__all__ = ["BATCH_SIZES", "FRAME_RATE", "CandidateResult", "TuningResult", "candidates", "tune"]

BATCH_SIZES: Final = (1, 2, 4, 8, 16)
"""Batch sizes to try for throughput; the other goals process one frame at a time."""

_PRECISION_ORDER: Final = ("fp32", TF32, BF16, "fp16", "int8")  # tie-break: closest to the trained network first


@dataclass(frozen=True, slots=True)
class CandidateResult:
    """The measurements of one candidate.

    Attributes
    ----------
    config
        The candidate.
    verdict
        ``chosen``; ``contender``, still in the race at the end; ``dropped``, eliminated as clearly slower;
        ``too slow`` for the bound on the 99th percentile; ``refused``, fails on the golden frames or does not run.
    reason
        Why it was refused; else empty.
    samples, calls
        Number of samples, and of timed calls in them.
    cost
        The deciding figure: cost relative to the best candidate within the bound, as the median over the rounds that
        measured both.
    p50_ms, p99_ms
        Milliseconds of a call, which is one batch of one thread: median over the samples of their medians, and 99th
        percentile of all calls.
    frames_per_second
        Median over the samples, without the pauses of a paced measurement.
    cpu_ms
        CPU-milliseconds of the process per frame, median over the samples.
    """

    config: RunConfig
    verdict: str
    reason: str = ""
    samples: int = 0
    calls: int = 0
    cost: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    frames_per_second: float | None = None
    cpu_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TuningResult:
    """The result of a search.

    Attributes
    ----------
    goal, max_p99_ms
        As given.
    choice
        The best candidate; None if no candidate is within the bound, or none runs.
    candidates
        The candidates, best first, then the refused ones.
    closest
        The lowest 99th percentile of any candidate in milliseconds, and that candidate; None if none ran.
    left_out
        Devices that were not tried, and why.
    rounds
        Number of measured rounds.
    racing_choice, racing_cost
        Of an exhaustive search: what elimination would have selected on the same samples, and its cost relative to
        the best. Else None.
    """

    goal: Goal
    max_p99_ms: float | None
    choice: RunConfig | None
    candidates: tuple[CandidateResult, ...]
    closest: tuple[float, RunConfig] | None
    left_out: dict[str, str]
    rounds: int
    racing_choice: RunConfig | None
    racing_cost: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the result and the facts of this host as JSON values."""
        closest = None if self.closest is None else {"p99_ms": self.closest[0], "choice": asdict(self.closest[1])}
        return {**asdict(self), "closest": closest, "host": host_facts()}


def candidates(
    devices: Mapping[str, Sequence[str]],
    *,
    batch_sizes: Sequence[int],
    cpus: int,
    threads: int | None = None,
    may_spin: bool = True,
) -> list[RunConfig]:
    """Return the configurations to try.

    Parameters
    ----------
    devices
        Precisions by device.
    batch_sizes
        Batch sizes.
    cpus
        CPUs that the process may use. Thread counts are this number and the powers of two below it.
    threads
        If given, the only thread count.
    may_spin
        Whether to try threads that wait in a busy loop.
    """
    powers = [2**power for power in range(cpus.bit_length()) if 2**power < cpus]
    configs = []
    for device, precisions in devices.items():
        # On CUDA, threads only run the nodes that stay on the CPU.
        counts = [threads] if threads else [1, cpus] if device == "cuda" else [*powers, cpus]
        cuda_switch = (False, True) if device == "cuda" else (False,)
        configs += [
            RunConfig(device, precision, count, spinning, batch_size, graphs, nhwc)
            for precision in precisions
            for count in dict.fromkeys(counts)
            for spinning in ((False, True) if may_spin else (False,))
            for batch_size in batch_sizes
            for graphs in cuda_switch
            for nhwc in cuda_switch
        ]
    return [config for config in configs if config.can_spin or not config.spinning]


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
    progress: Callable[[float], None] = lambda _: None,
) -> TuningResult:
    """Measure the configurations of a bundle on this host and select one.

    Parameters
    ----------
    folder
        The bundle.
    frames
        Names and file bytes, used repeatedly; None uses the bundle's golden frames.
    goal
        What to optimize: ``latency``, ``throughput`` or ``power``; see the module.
    max_p99_ms
        Upper bound for the 99th percentile of a call in milliseconds; None has no bound.
    device, precision, threads, batch_size
        Fixed where given; ``auto`` and None try all.
    public_key
        As `Bundle`.
    seconds
        Time limit of the measurement; replaying the golden frames comes before it. `MIN_ROUNDS` rounds always run.
    exhaustive
        Whether to measure every candidate in every round, to see what elimination would have missed.
    seed
        Seed for the order within the rounds.
    progress
        Called with the seconds measured so far.

    Raises
    ------
    BundleError
        As `Bundle`.
    DeviceUnavailableError
        If `device` is given and not available.
    ConfigError
        If `seconds`, `max_p99_ms`, `threads` or `batch_size` is not positive and finite.
    InputNotFoundError
        If there is no frame to time.
    """
    given = {"seconds": seconds, "max_p99_ms": max_p99_ms, "threads": threads, "batch_size": batch_size}
    for name, number in given.items():
        if number is not None and not 0 < number < np.inf:
            raise ConfigError(f"{name} is {number}; expected a number above 0")
    bundle = Bundle(folder, public_key=public_key)
    if precision is not None:
        bundle.choose_precision(precision)
    encoded = [data for _, data in (encoded_golden_frames(bundle) if frames is None else frames)]
    if not encoded:
        raise InputNotFoundError(f"{bundle.folder.as_posix()}: no golden frame can be timed; name frames to time")
    cpus = available_cpus()
    batch_sizes = (batch_size,) if batch_size else BATCH_SIZES if goal == "throughput" else (1,)
    devices, left_out = _devices(device, goal)
    golden = GoldenFrameCheck(bundle, public_key)
    passed: dict[str, list[str]] = {}
    refused = []
    for name in devices:
        for one in [precision] if precision else bundle.precisions_on(name):
            if reason := golden.failure_reason(RunConfig(name, one, threads or cpus, False, 1)):
                config = RunConfig(name, one, threads or cpus, False, batch_sizes[0])
                refused.append(CandidateResult(config, "refused", reason))
            else:
                passed.setdefault(name, []).append(one)
    if device != "auto" and len(golden.unavailable) == len(refused) > 0 and not passed:
        raise golden.unavailable[0]
    configs = candidates(passed, batch_sizes=batch_sizes, cpus=cpus, threads=threads, may_spin=goal != "throughput")
    max_p99 = np.inf if max_p99_ms is None else max_p99_ms / 1e3
    timer = CandidateTimer(bundle, encoded, configs, goal, seconds)
    rounds = successive_elimination(
        len(configs),
        timer.measure,
        seconds=seconds,
        max_p99=max_p99,
        exhaustive=exhaustive,
        seed=seed,
        before_round=timer.close_others,
        progress=progress,
    )
    timer.close_others(())
    tie_break = [_tie_break(config) for config in configs]
    # The selected candidate must pass the golden frames with exactly the options that it will run with.
    while (best := select(rounds, tie_break, max_p99)) is not None:
        if not (reason := golden.failure_reason(configs[best])):
            break
        timer.failures[best] = reason
        rounds = [{index: sample for index, sample in one.items() if index != best} for one in rounds]
    seen = replay_elimination(rounds, max_p99) if exhaustive else rounds
    raced = select(seen, tie_break, max_p99) if exhaustive else None
    costs = _costs(rounds, max_p99)
    statistics, remaining = summarize(rounds), contenders(seen, max_p99)
    results = []
    for index in sorted(costs, key=costs.__getitem__):
        verdict = "contender" if index in remaining else "dropped"
        verdict = "chosen" if index == best else verdict if statistics[index].within(max_p99) else "too slow"
        results.append(_result(configs[index], verdict, costs[index], statistics[index], pool=goal == "throughput"))
    results += [CandidateResult(configs[index], "refused", why) for index, why in sorted(timer.failures.items())]
    closest = min(statistics, key=lambda index: statistics[index].p99, default=None)
    return TuningResult(
        goal=goal,
        max_p99_ms=max_p99_ms,
        choice=None if best is None else configs[best],
        candidates=(*results, *refused),
        closest=None if closest is None else (1e3 * statistics[closest].p99, configs[closest]),
        left_out=left_out,
        rounds=len(rounds),
        racing_choice=None if raced is None else configs[raced],
        racing_cost=None if raced is None else costs[raced],
    )


def _costs(rounds: Sequence[Round], max_p99: float) -> dict[int, float]:
    """Return costs relative to the best candidate within the bound, or to the best of all if none is."""
    costs = relative_costs(rounds, max_p99) or relative_costs(rounds)
    best = min((costs[index] for index in eligible(rounds, max_p99) or costs), default=1.0)
    return {index: cost / best for index, cost in costs.items()}


def _devices(device: Device, goal: Goal) -> tuple[list[str], dict[str, str]]:
    """Return the devices to try, and why others are left out."""
    if device != "auto":
        return [device], {}
    usable = probe_devices()
    left_out = {name: reason for name, reason in usable.items() if reason is not None}
    if goal == "power" and "cuda" in usable:
        # CUDA would always win: the energy of a GPU is not CPU time.
        left_out.setdefault("cuda", "CPU time does not measure a GPU's power; compare its settings by --device cuda")
    return [name for name in usable if name not in left_out], left_out


def _tie_break(config: RunConfig) -> tuple[int, ...]:
    """Return the sort key of tied candidates: least load on the host first, then closest to the trained network."""
    return (
        config.threads,
        int(config.spinning),
        _PRECISION_ORDER.index(config.precision),
        config.batch_size,
        int(config.cuda_graphs) + int(config.nhwc),
        int(config.device != "cpu"),
    )


def _result(config: RunConfig, verdict: str, cost: float, statistics: Statistics, *, pool: bool) -> CandidateResult:
    samples = statistics.samples
    return CandidateResult(
        config,
        verdict,
        samples=len(samples),
        calls=sum(len(sample.call_seconds) for sample in samples),
        cost=cost,
        p50_ms=1e3 * statistics.p50,
        p99_ms=1e3 * statistics.p99,
        frames_per_second=1 / statistics.score
        if pool
        else median(sample.frames / sum(sample.call_seconds) for sample in samples),
        cpu_ms=1e3 * median(sample.cpu_seconds / sample.frames for sample in samples),
    )
