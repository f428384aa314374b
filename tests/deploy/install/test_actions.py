"""install.sh installs, repeats, upgrades, rolls back and removes; refused and failed versions leave the old one."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from .sticks import INSTALLERS, Box, Key, make_stick, seal


def test_install_repeat_upgrade_rollback_and_remove(box: Box, stick_1: Path, stick_2: Path, key: Key) -> None:
    first = box.run(stick_1, "--key", key.public)
    assert box.check_whole() == "1.0"
    assert "verify" in first.out and "--public-key" in first.out and "PIP_INDEX_URL" not in first.out
    assert os.geteuid() != 0 or "as 65534" in first.out  # nobody
    installed = box.tree()

    box.run(stick_1)  # the key is known now
    box.run(None, "--remove", "--purge", "--dry-run")
    assert box.tree() == installed

    config = box.etc / "service.toml"
    config.write_text(config.read_text() + "# site\n")
    box.run(stick_2)
    assert (box.check_whole(), box.version("previous")) == ("2.0", "1.0")
    assert config.read_text().endswith("# site\n")
    assert "8771" in (box.etc / "service.toml.new").read_text()

    box.run(None, "--rollback")  # without a stick
    assert (box.check_whole(), box.version("previous")) == ("1.0", "2.0")
    box.run(None, "--rollback")
    assert (box.check_whole(), box.version("previous")) == ("2.0", "1.0")

    data = box.root / "var" / "lib" / "echoquad" / "queue.sqlite"
    data.write_text("results")
    box.run(None, "--remove")
    assert not box.opt.exists() and not (box.root / "etc/systemd/system/echoquad.service").exists()
    assert data.read_text() == "results" and config.exists()
    box.run(stick_1, "--remove", "--purge")
    assert not data.exists() and not box.etc.exists()
    box.run(stick_1, "--remove")  # nothing is there any more


@pytest.mark.slow
def test_damaged_version_is_installed_again_beside_it(box: Box, copied: Path, key: Key) -> None:
    copied.chmod(0o700)  # a stick that was made with a strict umask
    box.run(copied, "--key", key.public)
    program = next((box.opt / "current" / "venv").rglob("echoquad_stand_in.py"))
    assert stat.S_IMODE(program.stat().st_mode) == 0o644
    program.write_text("damaged")
    ended = box.run(copied)
    assert "is damaged" in ended.out
    assert box.check_whole() == "1.0" and box.releases()[0].endswith(".2") and len(box.releases()) == 1


@pytest.mark.parametrize("fault", [pytest.param("doctor", marks=pytest.mark.slow), "verify"])
def test_version_that_fails_its_checks_is_not_switched_to(
    box: Box, stick_1: Path, tmp_path: Path, key: Key, fault: str
) -> None:
    box.run(stick_1, "--key", key.public)
    before = box.tree()
    bad = make_stick(tmp_path / "bad", "3.0", key, faults=[fault])
    ended = box.run(bad, code=3)
    assert "E_STAND_IN" in ended.err and fault in ended.err.splitlines()[-1]
    assert box.tree() == before


@pytest.mark.slow
def test_packages_that_do_not_resolve_leave_the_old_version(box: Box, stick_1: Path, tmp_path: Path, key: Key) -> None:
    box.run(stick_1, "--key", key.public)
    before = box.tree()
    bad = make_stick(tmp_path / "bad", "3.0", key)
    lock = bad / "requirements.lock"
    lock.write_text(lock.read_text().replace("sha256:", "sha256:0")[:-2] + "\n")
    seal(bad, key)  # by the right key: pip refuses the wheel
    box.run(bad, code=1)
    assert box.tree() == before


def test_dry_run_changes_nothing(box: Box, stick_1: Path, key: Key) -> None:
    assert "nothing" in box.run(stick_1, "--key", key.public, "--dry-run").out
    assert box.tree() == []


@pytest.mark.slow
def test_pip_of_the_python_serves_where_the_stick_has_none(box: Box, tmp_path: Path, key: Key) -> None:
    box.run(make_stick(tmp_path / "stick", "1.0", key, pip=False), "--key", key.public)
    assert box.check_whole() == "1.0"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"python": "3.99"}, ["Python 3.99", "--python"]),
        ({"target": "riscv64"}, ["riscv64", "--target"]),
        ({"format": 2}, ["format"]),
        ({"echoquad": "../../x"}, ["'echoquad'"]),
    ],
)
def test_stick_for_another_box_is_refused(
    box: Box, tmp_path: Path, key: Key, facts: dict[str, object], words: list[str]
) -> None:
    stick = make_stick(tmp_path / "stick", "1.0", key, facts=facts)
    ended = box.run(stick, "--key", key.public, code=1)
    assert all(word in ended.err for word in words)
    assert not box.opt.exists()


@pytest.mark.usefixtures("as_root")
def test_full_disk_is_found_before_anything_is_installed(box: Box, stick_1: Path, key: Key) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m,mode=755", "tmpfs", str(box.root)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("cannot mount here")
    try:
        assert "MiB free" in box.run(stick_1, "--key", key.public, code=1).err
        assert not box.opt.exists()
    finally:
        subprocess.run(["umount", str(box.root)], check=True)


@pytest.mark.parametrize(
    "options",
    [["--frob"], ["--key"], ["--purge"], ["--rollback", "--remove"], ["--unsigned", "--trust-stick"]],
    ids=" ".join,
)
def test_wrong_options_are_a_usage_error(box: Box, stick_1: Path, options: list[str]) -> None:
    box.run(stick_1, *options, code=2)
    assert box.tree() == []


def test_rollback_without_an_earlier_version_is_refused(box: Box, stick_1: Path) -> None:
    assert "no version before" in box.run(stick_1, "--rollback", code=1).err


def test_scripts_are_clean_for_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("needs Debian's shellcheck")
    ended = subprocess.run(
        ["shellcheck", str(INSTALLERS / "install.sh")], check=False, capture_output=True, encoding="utf-8"
    )
    assert ended.returncode == 0, ended.stdout
