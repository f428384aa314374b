"""Host facts: the properties of this machine that a measurement or a self-test result depends on."""

from __future__ import annotations

import platform
from pathlib import Path

from echoquad_runtime._version import __version__
from echoquad_runtime.devices.cpu_info import available_cpus, cpu_model
from echoquad_runtime.devices.onnxruntime_loader import format_versions, installed_wheels

__all__ = ["host_facts"]


def host_facts(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Return the host's properties; a saved tuning or self-test result is valid only while all of them are equal."""
    return {
        "CPU": cpu_model(cpuinfo),
        "CPUs to use": str(available_cpus()),
        "platform": f"{platform.system()} {platform.machine()}",
        "onnxruntime": format_versions(installed_wheels()),
        "echoquad": __version__,
    }
