"""Fixtures: keys, two sticks, and a folder that stands for a box."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .sticks import PYTHON, Box, Key, make_key, make_stick


@pytest.fixture(scope="session", autouse=True)
def _needs_linux() -> None:
    if sys.platform != "linux":
        pytest.skip("install.sh is for Linux")
    for program in ("bash", "openssl", "flock", "setpriv", "unshare", PYTHON):
        if shutil.which(program) is None:
            pytest.skip(f"needs Debian's {program}")


@pytest.fixture(scope="session")
def open_folder() -> Iterator[Path]:
    """A folder that every user can read: pytest's own are closed to the user of the checks."""
    with tempfile.TemporaryDirectory(prefix="echoquad-install-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="session")
def key(open_folder: Path) -> Key:
    return make_key(open_folder, "key")


@pytest.fixture(scope="session")
def other_key(open_folder: Path) -> Key:
    return make_key(open_folder, "other")


@pytest.fixture(scope="session")
def stick_1(open_folder: Path, key: Key) -> Path:
    """Version 1. Shared: a test must not change it."""
    return make_stick(open_folder / "stick 1", "1.0", key)


@pytest.fixture(scope="session")
def stick_2(open_folder: Path, key: Key) -> Path:
    """Version 2, with another default configuration. Shared: a test must not change it."""
    return make_stick(open_folder / "stick 2", "2.0", key, config="[http]\nport = 8771\n")


@pytest.fixture
def box(open_folder: Path) -> Iterator[Box]:
    root = Path(tempfile.mkdtemp(prefix="box-", dir=open_folder))
    root.chmod(0o755)
    yield Box(root)
    shutil.rmtree(root)


@pytest.fixture
def copied(stick_1: Path, tmp_path: Path) -> Path:
    """A stick of version 1 that the test may change."""
    return Path(shutil.copytree(stick_1, tmp_path / "stick"))


@pytest.fixture(scope="session")
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
