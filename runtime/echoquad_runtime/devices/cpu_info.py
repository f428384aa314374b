"""CPU information: the number of CPUs that this process may use, the CPU's model and its instruction sets."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

__all__ = ["available_cpus", "cgroup_quotas", "cpu_features", "cpu_model", "schedulable_cpus"]

_CPUINFO = Path("/proc/cpuinfo")


def available_cpus() -> int:
    """Return how many CPUs this process may use: the least of its affinity and its cgroup quotas, at least 1."""
    quotas = cgroup_quotas(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    # Round down: the kernel stops all threads of a cgroup that has used up its quota, in the middle of an inference.
    return max(1, int(min([schedulable_cpus(), *quotas])))


def schedulable_cpus() -> int:
    """Return how many CPUs the scheduler may run this process on (CPU affinity, cpusets)."""
    counts = [os.cpu_count() or 1]
    if (affinity := getattr(os, "sched_getaffinity", None)) is not None:
        counts.append(len(affinity(0)))
    if (process_count := getattr(os, "process_cpu_count", None)) is not None:
        counts.append(process_count() or 1)
    return min(counts)


def cgroup_quotas(root: Path, membership: Path) -> list[float]:
    """Return the CPU quotas, in CPUs, of this process's cgroups (v1 and v2) and of their parents.

    Parameters
    ----------
    root
        Mount point of the cgroup file system.
    membership
        File that lists the cgroups of this process.
    """
    try:
        # A cgroup's name may hold any byte but a slash and a newline.
        lines = membership.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError:
        return []
    quotas: list[float] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if not colon or (controllers and "cpu" not in controllers.split(",")):
            continue
        # v1 mounts a hierarchy under the names of its controllers ("cpu,cpuacct"), usually with a symlink "cpu".
        for mount in dict.fromkeys((root / "cpu", root / controllers)) if controllers else (root,):
            # Read the mount point too: in a container the path may be valid only on the host.
            folder = mount
            quotas += _read_quota(folder, v1=bool(controllers))
            for part in path.split("/"):
                if part:
                    folder = folder / part
                    quotas += _read_quota(folder, v1=bool(controllers))
    return quotas


def _read_quota(folder: Path, *, v1: bool) -> list[float]:
    """Return the quota of one cgroup as a list of one; empty without a limit or without the folder."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # "max" is not a number: no limit
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
    """Return the CPU's model name; on Arm, Linux reports an implementer and a part number instead."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError), cpuinfo.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            key, colon, value = line.partition(":")
            if not colon and not fields.keys().isdisjoint(("model name", "CPU part")):
                break  # the first CPU suffices; a large machine lists hundreds
            fields.setdefault(key.strip(), value.strip())
    if "model name" in fields:
        return fields["model name"]
    if "CPU part" in fields:
        return f"implementer {fields.get('CPU implementer', '?')} part {fields['CPU part']}"
    return platform.processor() or platform.machine()
