"""Debian systems and the wheels of the service, for tests that run it in a container or under systemd."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MIRROR = "http://deb.debian.org/debian"

# What the image debian:bookworm-slim leaves out, too.
_SLIM = [
    f"--dpkgopt={rule}"
    for rule in (
        "path-exclude=/usr/share/doc/*",
        "path-include=/usr/share/doc/*/copyright",
        *(f"path-exclude=/usr/share/{name}/*" for name in ("man", "locale", "info", "lintian", "groff")),
    )
]


def need(*programs: str) -> None:
    """Skip the test if a program is missing, or if this user may not make containers."""
    for program, package in (one.split("=") for one in programs):
        if shutil.which(program) is None:
            pytest.skip(f"needs Debian's {package}")
    if sys.platform == "win32" or os.geteuid() != 0:
        pytest.skip("needs root")


def run(*command: str | Path, timeout: float = 300.0, cwd: Path | None = None, code: int | None = 0) -> str:
    """Run a program; check its exit code unless it is None, and return what it printed."""
    words = [str(word) for word in command]
    ended = subprocess.run(
        words, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, cwd=cwd
    )
    assert code is None or ended.returncode == code, f"{words}\n{ended.stdout[-4000:]}"
    return ended.stdout


def make_debian(target: Path, packages: Iterable[str] = ()) -> None:
    """Make a small Debian 12, as a folder or a tar file; skip the test without a mirror."""
    command = ["mmdebstrap", "--quiet", "--variant=minbase", "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr"]
    command += ["--aptopt=Apt::Install-Recommends 0", *_SLIM, f"--include={','.join(['usr-is-merged', *packages])}"]
    output = run(*command, "bookworm", target, MIRROR, code=None)
    if "Could not resolve" in output or "Cannot initiate the connection" in output:
        pytest.skip("no Debian mirror can be reached")
    assert target.exists(), output[-4000:]


def collect_wheels(folder: Path, extras: str) -> None:
    """Build the wheel, and collect what its extras need for Debian 12; skip the test without a package index."""
    built = folder.with_name("built")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", built, cwd=ROOT)
    (wheel,) = built.glob("*.whl")
    target = ["--only-binary=:all:", "--python-version=3.11", "--implementation=cp"]
    target += [f"--platform=manylinux{tag}_x86_64" for tag in ("2014", "_2_17", "_2_27", "_2_28")]
    output = run(
        *(sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder, *target, f"{wheel}[{extras}]"),
        code=None,
    )
    if "NewConnectionError" in output or "name resolution" in output:
        pytest.skip("no package index can be reached")
    assert list(folder.glob("onnxruntime-*.whl")), output


def write_lock(folder: Path) -> None:
    """Write ``requirements.lock`` for the wheels of a stick: a version and a hash for each."""
    lines = []
    for wheel in sorted((folder / "wheels").glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        lines.append(f"{name.replace('_', '-')}=={version} --hash=sha256:{digest}\n")
    (folder / "requirements.lock").write_text("".join(lines), "ascii")
