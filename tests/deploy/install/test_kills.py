"""kill -9 at any moment leaves a version that works, and the next run completes the work and sweeps the rest."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from .sticks import Box, Key


def run_and_kill(box: Box, stick: Path | None, *options: str | Path, after_s: float, whole_group: bool) -> bool:
    """Run install.sh, and kill it after a time, with or without its children; return whether it was killed."""
    process = subprocess.Popen(
        box.command(stick, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        process.wait(10)
    return process.returncode == -signal.SIGKILL


def run_and_kill_at_command(box: Box, number: int, stick: Path | None, *options: str | Path) -> bool:
    """Run install.sh, and let it kill itself before its command of this number; return whether it came so far."""
    trap = box.root.parent / f"{box.root.name}-trap.sh"
    trap.write_text(f"set -T; count=0; trap '[ $((count += 1)) -ne {number} ] || kill -9 $BASHPID' DEBUG\n")
    ended = subprocess.run(
        box.command(stick, *options), check=False, capture_output=True, env=os.environ | {"BASH_ENV": str(trap)}
    )
    return ended.returncode == -signal.SIGKILL


def count_commands(box: Box, stick: Path | None, *options: str | Path) -> int:
    """Run install.sh to its end, and return how many commands it runs."""
    trap = box.root.parent / f"{box.root.name}-trap.sh"
    count = box.root.parent / f"{box.root.name}-count"
    trap.write_text(f"set -T; count=0; trap ': $((count += 1)); echo $count >{count}' DEBUG\n")
    subprocess.run(
        box.command(stick, *options), check=True, capture_output=True, env=os.environ | {"BASH_ENV": str(trap)}
    )
    return int(count.read_text())


def check_swept(box: Box) -> None:
    """Check that nothing of an interrupted run is left."""
    links = {str((box.opt / name).readlink()) for name in ("current", "previous") if (box.opt / name).is_symlink()}
    assert {f"releases/{name}" for name in box.releases()} == links
    assert {path.name for path in box.opt.iterdir()} <= {"releases", "current", "previous"}
    assert {path.name for path in box.etc.iterdir()} <= {"service.toml", "service.toml.new", "bundle.pub"}


def duration_s(box: Box, stick: Path | None, *options: str | Path) -> float:
    begin = time.monotonic()
    box.run(stick, *options)
    return time.monotonic() - begin


def kill_everything(box: Box, stick_1: Path, stick_2: Path, key: Key, kills: int, complete_every: int) -> None:
    """Kill installations, upgrades and rollbacks at random moments, each as many times."""
    chance = random.Random(16)
    options = ("--key", key.public)
    longest = duration_s(box, stick_1, *options)
    for number in range(kills):
        killed = False
        while not killed:  # a moment after the end kills nothing
            box.run(stick_1, "--remove", "--purge")
            moment = chance.uniform(0, longest)
            killed = run_and_kill(box, stick_1, *options, after_s=moment, whole_group=number % 2 == 0)
            assert box.check_whole() in (None, "1.0")
        if number % complete_every == 0:
            box.run(stick_1, *options)
            assert box.check_whole() == "1.0"
            check_swept(box)
    box.run(stick_1, *options)
    sticks = {"1.0": stick_2, "2.0": stick_1}
    for number in range(kills):
        killed = False
        while not killed:
            forget_other_release(box)  # so that the upgrade builds it
            stick = sticks[box.version() or ""]
            moment = chance.uniform(0, longest)
            killed = run_and_kill(box, stick, *options, after_s=moment, whole_group=number % 2 == 0)
            assert box.check_whole() in sticks
        if number % complete_every == 0:
            box.run(stick, *options)
            assert box.check_whole() == ("2.0" if stick is stick_2 else "1.0")
            check_swept(box)
    box.run(stick_1, *options)
    box.run(stick_2, *options)
    longest = duration_s(box, None, "--rollback")
    for number in range(kills):
        killed = False
        while not killed:
            killed = run_and_kill(
                box, None, "--rollback", after_s=chance.uniform(0, longest), whole_group=number % 2 == 0
            )
            assert box.check_whole() in sticks
        if number % complete_every == 0:
            box.run(None, "--rollback")
            assert box.check_whole() in sticks
            assert box.version("previous") in sticks


def forget_other_release(box: Box) -> None:
    """Remove all releases but the current one."""
    (box.opt / "previous").unlink(missing_ok=True)
    for name in box.releases():
        if f"releases/{name}" != str((box.opt / "current").readlink()):
            shutil.rmtree(box.opt / "releases" / name)


def test_kill_at_a_random_moment_of_an_upgrade_leaves_a_version_that_works(
    box: Box, stick_1: Path, stick_2: Path, key: Key
) -> None:
    longest = duration_s(box, stick_1, "--key", key.public)
    for part in (0.3, 0.6):
        run_and_kill(box, stick_2, after_s=part * longest, whole_group=part > 0.5)
        assert box.check_whole() in ("1.0", "2.0")
    box.run(stick_2)
    assert box.check_whole() == "2.0"
    check_swept(box)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_thirty_kills_each_leave_a_version_that_works(box: Box, stick_1: Path, stick_2: Path, key: Key) -> None:
    kill_everything(box, stick_1, stick_2, key, kills=30, complete_every=3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kill_before_each_command_of_the_switch_leaves_a_version_that_works(
    box: Box, stick_1: Path, stick_2: Path, key: Key
) -> None:
    """The releases are there already, so that all of the run is the check and the switch."""
    box.run(stick_1, "--key", key.public)
    box.run(stick_2)
    for options in ([], ["--rollback"]):
        stick = None if options else stick_1
        commands = count_commands(box, stick, *options)
        for number in range(commands - 40, commands + 1):
            version = box.version()
            if not options:
                stick = stick_2 if version == "1.0" else stick_1
            run_and_kill_at_command(box, number, stick, *options)
            assert box.check_whole() in ("1.0", "2.0"), number
            assert box.version("previous") in ("1.0", "2.0"), number
            if len({box.version(), box.version("previous")}) == 1:  # killed between the two links
                box.run(stick_1 if box.version() == "2.0" else stick_2)
        box.run(stick_1)
        box.run(stick_2)
        check_swept(box)
