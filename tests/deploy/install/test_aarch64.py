"""On 64-bit Arm, emulated by qemu: the script installs, and the real wheels pass doctor and verify there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .emulation import make_root, run_in
from .sticks import Key, make_stick, pack_real_stick

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500), pytest.mark.usefixtures("as_root")]
FACTS = {"target": "aarch64", "python": "3.11"}


@pytest.fixture(scope="session")
def arm(open_folder: Path, key: Key) -> Path:
    root = make_root(open_folder / "arm")
    shutil.copy(key.public, root / "root" / "pub.pem")
    (root / "media").mkdir(exist_ok=True)
    return root


def test_script_installs_upgrades_rolls_back_and_removes(arm: Path, key: Key) -> None:
    for number in (1, 2):
        make_stick(arm / "media" / f"stick{number}", f"{number}.0", key, facts=FACTS)
    life = """
set -e
uname -m
bash /media/stick1/install.sh --key /root/pub.pem --no-service
bash /media/stick2/install.sh --no-service
/opt/echoquad/current/venv/bin/echoquad --version
bash /opt/echoquad/current/install.sh --rollback --no-service
/opt/echoquad/current/venv/bin/echoquad --version
echo x >>/media/stick2/README.txt
! bash /media/stick2/install.sh --no-service
bash /opt/echoquad/current/install.sh --remove --purge --no-service
test ! -e /opt/echoquad
"""
    ended = run_in(arm, "bash", "-c", life)
    assert ended.code == 0, ended.out + ended.err
    lines = ended.out.splitlines()
    assert lines[0] == "aarch64"
    assert [line for line in lines if line in ("1.0", "2.0")] == ["2.0", "1.0"]
    assert "README.txt was damaged or changed" in ended.err


def test_stick_of_another_processor_is_refused(arm: Path, key: Key) -> None:
    make_stick(arm / "media" / "foreign", "1.0", key, facts={"target": "x86_64", "python": "3.11"})
    ended = run_in(arm, "bash", "/media/foreign/install.sh", "--key", "/root/pub.pem", "--no-service")
    assert ended.code == 1
    assert "--target aarch64" in ended.err


def test_real_stick_passes_its_checks_there(arm: Path, tiny_bundle: Path, key: Key) -> None:
    pack_real_stick(arm / "media" / "real", tiny_bundle, key, "aarch64")
    ended = run_in(arm, "bash", "/media/real/install.sh", "--key", "/root/pub.pem", "--no-service")
    assert ended.code == 0, ended.out + ended.err
    (proof,) = [line for line in ended.out.splitlines() if line.startswith("PASS ")]
    assert "Linux aarch64" in proof
