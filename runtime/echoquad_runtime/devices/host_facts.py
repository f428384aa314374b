"""Host facts: what a measurement or a test result on this machine depends on."""

from __future__ import annotations

import platform
from pathlib import Path

from echoquad_runtime._version import __version__
from echoquad_runtime.devices.cpu_info import available_cpus, cpu_model
from echoquad_runtime.devices.onnxruntime_loader import installed_wheels

__all__ = ["host_facts"]


def host_facts(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Return what a tuning or a self-test holds for, beside the bundle: it holds while all of this is the same."""
    return {
        "CPU": cpu_model(cpuinfo),
        "CPUs to use": str(available_cpus()),
        "platform": f"{platform.system()} {platform.machine()}",
        "onnxruntime": " and ".join(f"{name} {version}" for name, version in installed_wheels().items()),
        "echoquad": __version__,
    }
