"""The machine in numbers: operating system, processor, memory, limits, disks, and versions of packages.

The host's name, users and paths are not read into it.
"""

from __future__ import annotations

import locale
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from echoquad_runtime.devices.host_facts import host_facts
from echoquad_runtime.frames.isolation.limits import missing_limits

__all__ = ["disk_space", "package_versions", "system_facts"]

_WORD: Final = re.compile(r"[\w.+:@ ()/-]{0,80}", re.ASCII)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}")
_VERSION: Final = re.compile(r"[0-9][A-Za-z0-9.!+_-]{0,40}")
_SETTING: Final = re.compile(r"[0-9,]{0,6}|true|false|C\.UTF-8|[a-z]{2}_[A-Z]{2}\.UTF-8|C|POSIX")
_SHOWN: Final = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "ORT_DISABLE_TELEMETRY", "LC_ALL", "LANG", "PYTHONUTF8")
"""Environment variables whose value is shown, if it is a usual one."""
_NAMED: Final = (
    *("TZ", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LD_PRELOAD", "TMPDIR", "ECHOQUAD_CONFIG_DIR"),
    *("ECHOQUAD_CACHE_DIR", "http_proxy", "https_proxy", "container", "INVOCATION_ID"),
)
"""Environment variables of which only whether they are set is shown."""
_LIMITS: Final = ("RLIMIT_NOFILE", "RLIMIT_NPROC", "RLIMIT_AS", "RLIMIT_DATA", "RLIMIT_FSIZE", "RLIMIT_MEMLOCK")
_MEMORY: Final = ("MemTotal", "MemAvailable", "SwapTotal", "SwapFree")
_CGROUP: Final = ("memory.max", "memory.high", "memory.current", "cpu.max", "pids.max")


def package_versions() -> dict[str, str]:
    """Return the version of each installed package, by name; what does not look like one is left out."""
    found = {}
    for distribution in metadata.distributions():
        name, version = distribution.metadata["Name"] or "", distribution.version or ""
        if _NAME.fullmatch(name) and _VERSION.fullmatch(version):
            found[name.lower()] = version
    return dict(sorted(found.items()))


def system_facts() -> dict[str, Any]:
    """Return operating system, Python, processor, memory, limits and settings."""
    release = _os_release()
    return {
        "system": _word(platform.system()),
        "release": _word(platform.release()),
        "distribution": f"{_word(release.get('ID', ''))} {_word(release.get('VERSION_ID', ''))}".strip(),
        "machine": _word(platform.machine()),
        "libc": _word(" ".join(platform.libc_ver())),
        "python": {
            "version": _word(platform.python_version()),
            "implementation": _word(platform.python_implementation()),
            "virtual_environment": sys.prefix != sys.base_prefix,
            "encoding": _word(f"{sys.getfilesystemencoding()} {locale.getpreferredencoding(False)}"),
        },
        "host": {key: _word(value) for key, value in host_facts().items()},
        "processors": os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else [],
        "memory_kb": _numbers(Path("/proc/meminfo"), _MEMORY),
        "uptime_s": _uptime(),
        "utc_offset_s": time.localtime().tm_gmtoff,
        "superuser": hasattr(os, "geteuid") and os.geteuid() == 0,
        "limits": _limits(),
        "cgroup": {name: text for name in _CGROUP if (text := _cgroup(name))},
        "limits_not_enforced_on_readers": [_word(name) for name in missing_limits()],
        "environment": {
            name: value if name in _SHOWN and _SETTING.fullmatch(value) else "set"
            for name in (*_SHOWN, *_NAMED)
            if (value := os.environ.get(name)) is not None
        },
    }


def disk_space(folders: Mapping[str, Path | None]) -> dict[str, Any]:
    """Return the space of the file systems of some folders, by what the folders are for.

    Parameters
    ----------
    folders
        The folders by role, such as ``store``; None for one that is not known. The temporary folder is added.
    """
    found: dict[str, Any] = {}
    for role, folder in {**folders, "temporary": Path(tempfile.gettempdir())}.items():
        if folder is None:
            continue
        try:
            usage = shutil.disk_usage(folder)
            found[role] = {"total_mb": usage.total >> 20, "free_mb": usage.free >> 20}
            if hasattr(os, "statvfs"):
                state = os.statvfs(folder)
                found[role] |= {"free_inodes": state.f_favail, "read_only": bool(state.f_flag & os.ST_RDONLY)}
        except OSError as error:
            found[role] = os.strerror(error.errno or 0)
    return found


def _word(text: str) -> str:
    return text if _WORD.fullmatch(text) else "[withheld]"


def _os_release() -> dict[str, str]:
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}


def _numbers(path: Path, names: tuple[str, ...]) -> dict[str, int]:
    try:
        lines = path.read_text("ascii", "replace").splitlines()
    except OSError:
        return {}
    found = [re.fullmatch(r"(\w+):\s*(\d+) kB", line) for line in lines]
    return {match[1]: int(match[2]) for match in found if match and match[1] in names}


def _uptime() -> int | None:
    try:
        return int(float(Path("/proc/uptime").read_text("ascii").split()[0]))
    except (OSError, ValueError, IndexError):
        return None


def _limits() -> dict[str, list[int]]:
    """Return soft and hard limits of this process; -1 is none."""
    try:
        import resource
    except ImportError:  # Windows
        return {}
    return {name: list(resource.getrlimit(getattr(resource, name))) for name in _LIMITS if hasattr(resource, name)}


def _cgroup(name: str) -> str:
    """Return a limit of this process's control group, version 2: numbers or ``max``; empty if there is none."""
    try:
        group = Path("/proc/self/cgroup").read_text("utf-8", "replace").rpartition("::/")[2].strip()
        text = (Path("/sys/fs/cgroup") / group / name).read_text("ascii", "replace").strip()
    except (OSError, ValueError):
        return ""
    return text if re.fullmatch(r"(\d+|max)( \d+)?", text) else ""
