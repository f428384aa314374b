"""The processor: how many CPUs this process may keep busy, and what kind they are."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

__all__ = ["available_cpus", "cgroup_quotas", "cpu_features", "cpu_model", "schedulable_cpus"]

_CPUINFO = Path("/proc/cpuinfo")


def available_cpus() -> int:
    """Count the CPUs this process may use: its affinity and its cgroup's quota, rounded down, at least 1."""
    quotas = cgroup_quotas(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    # Down, not up: threads that have used up the quota are stopped together, in the middle of an inference.
    return max(1, int(min([schedulable_cpus(), *quotas])))


def schedulable_cpus() -> int:
    """Count the CPUs that this process may be scheduled on: cpusets and containers' pinning are in its affinity."""
    counts = [os.cpu_count() or 1]
    if (affinity := getattr(os, "sched_getaffinity", None)) is not None:
        counts.append(len(affinity(0)))
    if (process_count := getattr(os, "process_cpu_count", None)) is not None:
        counts.append(process_count() or 1)
    return min(counts)


def cgroup_quotas(root: Path, membership: Path) -> list[float]:
    """Return the CPU quotas, in CPUs, of this process's cgroups (v2 and v1) and of those that they lie in.

    Parameters
    ----------
    root
        Where cgroups are mounted.
    membership
        The file that names this process's cgroups.
    """
    try:
        # A cgroup may be called by any bytes but a slash and a line's end.
        lines = membership.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError:
        return []
    quotas: list[float] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if not colon or (controllers and "cpu" not in controllers.split(",")):
            continue
        # v1 is mounted by the name of its controllers, "cpu,cpuacct", and mostly has a link "cpu" to that.
        for mount in dict.fromkeys((root / "cpu", root / controllers)) if controllers else (root,):
            # The mount itself is read too: a container may be told a path that only its host has.
            folder = mount
            quotas += _quota(folder, v1=bool(controllers))
            for part in path.split("/"):
                if part:
                    folder = folder / part
                    quotas += _quota(folder, v1=bool(controllers))
    return quotas


def _quota(folder: Path, *, v1: bool) -> list[float]:
    """Read one cgroup's quota: none where there is no limit, or no such folder."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # "max" is no number: no limit
        if v1:
            texts = [(folder / f"cpu.cfs_{name}_us").read_text("ascii") for name in ("quota", "period")]
        else:
            texts = (folder / "cpu.max").read_text("ascii").split()
        quota, period = (int(text) for text in texts)
        if quota > 0:
            return [quota / period]
    return []


def cpu_features(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """Return the instruction sets that Linux lists for the first CPU, such as ``amx_int8``; empty on other systems."""
    with contextlib.suppress(OSError), cpuinfo.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):  # x86, Arm
                return frozenset(value.split())
    return frozenset()


def cpu_model(cpuinfo: Path = _CPUINFO) -> str:
    """Name the CPU as the system does; on Arm, Linux gives numbers of maker and part in place of a name."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError), cpuinfo.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            key, colon, value = line.partition(":")
            if not colon and not found.keys().isdisjoint(("model name", "CPU part")):
                break  # one CPU's lines are enough, and on a large machine they are few of all
            found.setdefault(key.strip(), value.strip())
    if "model name" in found:
        return found["model name"]
    if "CPU part" in found:
        return f"implementer {found.get('CPU implementer', '?')} part {found['CPU part']}"
    return platform.processor() or platform.machine()
