"""Pacing: frames that come when a live source sends them, and whether each is decided before the next is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["Paced", "Waiting", "count_missed", "pace"]

_EARLY: Final = 1e-4  # seconds: a sleep that ends so much before a frame is due is as good as one that does not


@dataclass(frozen=True, slots=True)
class Paced:
    """What came of a live source.

    Attributes
    ----------
    fps
        Frames a second that the source sent.
    latencies
        Seconds from the moment a frame was due to its decision, one a frame: those that it waited for the frame before
        are counted in.
    missed
        Frames whose decision came after the next frame was due.
    cpu_cores
        CPU time of the process over time on the clock: 1 is one core without a rest.
    idle_cpu
        The same between a decision and the next frame: what waiting costs. None where there was no wait.
    """

    fps: float
    latencies: tuple[float, ...]
    missed: int
    cpu_cores: float
    idle_cpu: float | None


@dataclass(frozen=True, slots=True)
class Waiting:
    """How time is told and passed; another one in tests.

    Attributes
    ----------
    clock, cpu
        Seconds on the clock, and CPU-seconds of the process.
    sleep
        Lets seconds pass.
    """

    clock: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = time.process_time
    sleep: Callable[[float], object] = time.sleep


def pace(call: Callable[[int], object], fps: float, count: int, waiting: Waiting | None = None) -> Paced:
    """Call with 0, 1, 2, ... when each frame is due; none is dropped, so a late one delays those behind it.

    Parameters
    ----------
    call
        Takes a frame from its bytes to its decision.
    fps
        Frames a second, more than 0.
    count
        Frames, at least 1.
    waiting
        How time is told and passed.
    """
    clock, cpu, sleep = (w := waiting or Waiting()).clock, w.cpu, w.sleep
    latencies: list[float] = []
    idle = idle_cpu = 0.0
    begin, begin_cpu = clock(), cpu()
    for index in range(count):
        due = begin + index / fps
        if clock() < due - _EARLY:
            since, since_cpu = clock(), cpu()
            while (left := due - clock()) > _EARLY:
                sleep(left)
            idle, idle_cpu = idle + clock() - since, idle_cpu + cpu() - since_cpu
        call(index)
        latencies.append(clock() - due)
    seconds = clock() - begin
    return Paced(
        fps=fps,
        latencies=tuple(latencies),
        missed=count_missed(latencies, fps),
        cpu_cores=(cpu() - begin_cpu) / seconds if seconds else 0.0,
        idle_cpu=idle_cpu / idle if idle else None,
    )


def count_missed(latencies: Sequence[float], fps: float) -> int:
    """Count the latencies, in seconds since a frame was due, that reach beyond the moment the next one is due."""
    return sum(latency > 1 / fps for latency in latencies)
