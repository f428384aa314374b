"""The state of the service: its installation, its systemd unit, its log, and whether it is ready."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from echoquad_deploy.support_report.log_lines import MAX_LINES
from echoquad_runtime.storage.regular_file import read_regular

__all__ = ["installation", "journal_lines", "ready_status", "unit_state"]

_UNIT: Final = "echoquad.service"
_TIMEOUT_S: Final = 20.0
_PROPERTIES: Final = (
    *("LoadState", "ActiveState", "SubState", "Result", "NRestarts", "ExecMainCode", "ExecMainStatus", "UnitFileState"),
    *("MemoryCurrent", "MemoryMax", "MemoryHigh", "CPUQuotaPerSecUSec", "CPUUsageNSec", "TasksCurrent", "TasksMax"),
    *("WatchdogUSec", "LimitNOFILE"),
)
_MAX_STICK: Final = 1 << 20  # bytes
_RELEASE: Final = re.compile(r"\d+\.\d+\.\d+[a-z0-9.+]{0,20}-[0-9a-f]{12}")
_STICK: Final[Mapping[str, re.Pattern[str]]] = {
    "echoquad": re.compile(r"\d+\.\d+\.\d+[a-z0-9.+]{0,20}"),
    "target": re.compile("x86_64|aarch64"),
    "python": re.compile(r"3\.\d{1,2}"),
    "bundle_sha256": re.compile("[0-9a-f]{64}"),
    "created": re.compile(r"20[2-9]\d-\d\d-\d\dT\d\d:\d\d:\d\d(\+00:00|Z)"),
}
_VALUE: Final = re.compile(r"[a-z0-9.-]{1,40}|\[not set\]")


def installation(folder: Path) -> dict[str, Any]:
    """Return the releases that ``install.sh`` has put into a folder, and facts of the stick of the current one."""
    releases = {name: _release(folder / name) for name in ("current", "previous")}
    found: dict[str, Any] = {name: release for name, release in releases.items() if release}
    try:
        stick = json.loads(read_regular(folder / "current" / "stick.json", _MAX_STICK))
    except (OSError, ValueError, RecursionError):
        return found
    facts = {name: stick.get(name) for name in _STICK} if isinstance(stick, dict) else {}
    shown = {name: value for name, value in facts.items() if isinstance(value, str) and _STICK[name].fullmatch(value)}
    return {**found, "stick": shown}


def _release(link: Path) -> str:
    """Return the name of the folder that a link leads to, if it is that of a release."""
    try:
        name = link.resolve().name if link.is_symlink() else ""
    except (OSError, RuntimeError):  # a loop
        return ""
    return name if _RELEASE.fullmatch(name) else ""


def unit_state() -> dict[str, str]:
    """Return numbers and states of the unit; empty without systemd."""
    if (text := _run("systemctl", "show", _UNIT, f"--property={','.join(_PROPERTIES)}")) is None:
        return {}
    pairs = [line.partition("=") for line in text.decode("utf-8", "replace").splitlines()]
    return {name: value for name, _, value in pairs if name in _PROPERTIES and _VALUE.fullmatch(value)}


def journal_lines() -> list[bytes] | None:
    """Return the unit's latest lines in the journal; None if there is no journal that may be read."""
    text = _run("journalctl", "--unit", _UNIT, "--output", "cat", "--no-pager", "--quiet", "--lines", str(MAX_LINES))
    return None if text is None else text.splitlines()


def _run(program: str, *arguments: str) -> bytes | None:
    if (found := shutil.which(program)) is None:
        return None
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        ended = subprocess.run(
            [found, *arguments], check=False, capture_output=True, timeout=_TIMEOUT_S, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ended.stdout if ended.returncode == 0 else None


def ready_status(port: int | None) -> str:
    """Return what ``/api/v1/ready`` of the service on this machine answers: a number of HTTP, or why there is none.

    Parameters
    ----------
    port
        Its port; None if it cannot be asked over a loopback connection without TLS.
    """
    if port is None:
        return "not asked"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/api/v1/ready")
        return str(connection.getresponse().status)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return type(error).__name__
    finally:
        connection.close()
