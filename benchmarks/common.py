"""What the benchmarks share: alternating timings, and the machine they were taken on."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

WARM_UP = 3  # rounds: they allocate and choose kernels
PAUSE = 0.08  # seconds: threads of the engine before, which spin on for half of that, would take a core from the next


def alternate(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Call each in turn, `rounds` times, beginning with another one each round; gives median milliseconds by name.

    A machine that slows down in the middle slows all of them down, so their ratios hold. Each turn is a pause, a call
    that wakes the processor, and the call that is timed.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + WARM_UP):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            time.sleep(PAUSE)
            calls[name]()
            begin = time.perf_counter()
            calls[name]()
            if turn >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in times.items()}


def machine(threads: int) -> str:
    """Name the processor, the system and the threads that were used."""
    processor = platform.processor() or platform.machine()
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    flags = next((line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("flags")), "").split()
    known = ", ".join(name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if name in flags)
    return f"{processor} ({known or platform.machine()}), {platform.system()}, {threads} threads"


def versions(*names: str) -> dict[str, str]:
    """Give the versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
