"""A live source: frames that arrive at a fixed rate, and whether each is decided before the next one is due."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["Clock", "LiveRun", "count_missed", "run_live"]

_TOLERANCE: Final = 1e-4  # seconds: a sleep may end this much before a frame is due


@dataclass(frozen=True, slots=True)
class LiveRun:
    """The result of a run with a live source.

    Attributes
    ----------
    fps
        Frames per second of the source.
    latencies
        Seconds from the time a frame was due to its decision, one per frame, including the wait for the previous frame.
    missed
        Number of frames decided after the next frame was due.
    cpu_cores
        CPU time of the process per second: 1 is one core that never rests.
    idle_cpu
        The same, only between a decision and the next frame: the cost of waiting. None if there was no wait.
    """

    fps: float
    latencies: tuple[float, ...]
    missed: int
    cpu_cores: float
    idle_cpu: float | None


@dataclass(frozen=True, slots=True)
class Clock:
    """Functions that measure and pass time; tests replace them.

    Attributes
    ----------
    now, cpu
        Return the wall-clock seconds, and the CPU-seconds of the process.
    sleep
        Waits for a number of seconds.
    """

    now: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = time.process_time
    sleep: Callable[[float], object] = time.sleep


def run_live(predict_one: Callable[[int], object], fps: float, count: int, clock: Clock | None = None) -> LiveRun:
    """Call `predict_one` with 0, 1, 2, ... when each frame is due. None is dropped: a late frame delays the next ones.

    Parameters
    ----------
    predict_one
        Takes the frame of a number from its bytes to its decision.
    fps
        Frames per second, more than 0.
    count
        Number of frames, at least 1.
    clock
        Measures and passes time; None is the clock of the host.
    """
    now, cpu, sleep = (c := clock or Clock()).now, c.cpu, c.sleep
    latencies: list[float] = []
    idle = idle_cpu = 0.0
    begin, begin_cpu = now(), cpu()
    for index in range(count):
        due = begin + index / fps
        if now() < due - _TOLERANCE:
            since, since_cpu = now(), cpu()
            while (left := due - now()) > _TOLERANCE:
                sleep(left)
            idle, idle_cpu = idle + now() - since, idle_cpu + cpu() - since_cpu
        predict_one(index)
        latencies.append(now() - due)
    seconds = now() - begin
    return LiveRun(
        fps=fps,
        latencies=tuple(latencies),
        missed=count_missed(latencies, fps),
        cpu_cores=(cpu() - begin_cpu) / seconds if seconds else 0.0,
        idle_cpu=idle_cpu / idle if idle else None,
    )


def count_missed(latencies: Sequence[float], fps: float) -> int:
    """Return the number of latencies, in seconds since a frame was due, that end after the next frame is due."""
    return sum(latency > 1 / fps for latency in latencies)
