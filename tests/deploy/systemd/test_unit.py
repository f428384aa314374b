"""The systemd unit: how far it confines the service, with each drop-in too, and what the other parts rely on."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest

UNIT = Path(str(resources.files("echoquad_deploy.systemd"))) / "echoquad.service"
DROP_INS = sorted((UNIT.parent / "drop_ins").glob("*.conf"))
GUIDE = Path(__file__).parents[3] / "docs/how-to/service.md"
MOST_EXPOSED = 2.0

Analyze = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def analyze() -> Analyze:
    """Return a function that runs ``systemd-analyze``."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("needs Debian's systemd")

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [program, "--no-pager", *map(str, words)]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)

    return run


def settings(path: Path, section: str = "Service") -> dict[str, list[str]]:
    """Return the settings of a section of a unit file: the values of each, in order."""
    found: dict[str, list[str]] = {}
    current = ""
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("["):
            current = line.strip("[]")
        elif "=" in line and not line.startswith("#") and current == section:
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def copy_unit(folder: Path, drop_in: Path | None = None) -> Path:
    """Return a copy of the unit whose program exists, with a drop-in."""
    folder.mkdir(exist_ok=True)
    program = folder / "echoquad"
    program.write_text("#!/bin/sh\n", "ascii")
    program.chmod(0o755)
    unit = folder / UNIT.name
    unit.write_text(UNIT.read_text("utf-8").replace("/opt/echoquad/current/venv/bin/echoquad", str(program)), "utf-8")
    if drop_in is not None:
        (folder / f"{UNIT.name}.d").mkdir()
        shutil.copy(drop_in, folder / f"{UNIT.name}.d")
    return unit


@pytest.mark.parametrize("drop_in", [None, *DROP_INS], ids=lambda one: "alone" if one is None else one.stem)
def test_systemd_finds_no_fault_and_an_exposure_of_at_most_two(
    analyze: Analyze, tmp_path: Path, drop_in: Path | None
) -> None:
    unit = copy_unit(tmp_path / "units", drop_in)
    verified = analyze("verify", unit)
    assert verified.returncode == 0 and not verified.stderr, verified.stderr
    rated = analyze("security", "--offline=true", f"--threshold={MOST_EXPOSED * 10:.0f}", unit)
    assert rated.returncode == 0, rated.stdout
    exposure = re.search(r"Overall exposure level for echoquad.service: (\d+\.\d)", rated.stdout)
    assert exposure and float(exposure[1]) <= MOST_EXPOSED, rated.stdout


def test_a_looser_unit_would_be_noticed(analyze: Analyze, tmp_path: Path) -> None:
    unit = copy_unit(tmp_path / "units")
    unit.write_text(unit.read_text("utf-8").replace("CapabilityBoundingSet=\n", "").replace("User=echoquad\n", ""))
    assert analyze("security", "--offline=true", f"--threshold={MOST_EXPOSED * 10:.0f}", unit).returncode != 0


def test_unit_names_the_paths_that_the_installer_makes() -> None:
    service = settings(UNIT)
    assert service["ExecStart"] == [
        "/opt/echoquad/current/venv/bin/echoquad serve /opt/echoquad/current/bundle --config /etc/echoquad/service.toml"
    ]
    assert service["User"] == service["Group"] == ["echoquad"]
    assert service["WorkingDirectory"] == ["/var/lib/echoquad"] and service["StateDirectory"] == ["echoquad"]


def test_unit_restarts_what_hangs_or_crashes_and_not_what_stays_wrong() -> None:
    service, unit = settings(UNIT), settings(UNIT, "Unit")
    assert service["Type"] == ["notify"] and service["NotifyAccess"] == ["main"] and service["WatchdogSec"] == ["30"]
    assert service["Restart"] == ["on-failure"] and service["RestartPreventExitStatus"] == ["2 3"]
    # Five hangs in a row still fit into the interval: a service that never works ends as failed.
    cycle = int(service["WatchdogSec"][0]) + int(service["RestartSec"][0]) + int(service["TimeoutAbortSec"][0])
    assert int(unit["StartLimitBurst"][0]) * cycle < int(unit["StartLimitIntervalSec"][0])


def test_unit_keeps_frames_out_of_core_dumps_and_swap() -> None:
    service = settings(UNIT)
    assert service["LimitCORE"] == ["0"] and service["MemorySwapMax"] == ["0"]


def test_guide_shows_each_drop_in_as_it_is_and_no_second_unit() -> None:
    text = GUIDE.read_text("utf-8")
    shown = re.findall(r"```ini\n(.*?)```", text, re.DOTALL)
    assert {block.strip() for block in shown} == {path.read_text("utf-8").strip() for path in DROP_INS}
    assert "ExecStart=" not in text
    (included,) = re.findall(r"```\{literalinclude\} (\S+)", text)
    assert (GUIDE.parent / included).resolve() == (
        Path(__file__).parents[3] / "export/echoquad_deploy/systemd" / UNIT.name
    )


def test_drop_ins_parse_and_name_only_what_they_change() -> None:
    for path in DROP_INS:
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        parser.read(path)
        assert "Service" in parser.sections() and set(parser.sections()) <= {"Unit", "Service"}, path
