"""On a fresh Debian with systemd and without a network, as a new user: README's command, then the stick's life."""

from __future__ import annotations

import json
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from .debian import PODMAN, RESULTS, DebianBox, build_image, debian, load, podman
from .sticks import Key, make_stick, pack_real_stick, seal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.usefixtures("as_root")]
READY_S = 60.0


@pytest.fixture(scope="session")
def image(open_folder: Path) -> Iterator[str]:
    yield build_image(open_folder / "debian")
    podman("rmi", "--force", "localhost/echoquad-test-debian", code=None)


@pytest.fixture
def fresh(image: str, open_folder: Path, stick_1: Path, stick_2: Path, key: Key) -> Iterator[DebianBox]:
    """A Debian with the sticks below /media/usb, and the key in /root as if typed in by its owner."""
    with debian(image, "echoquad-test", {open_folder: "/media/usb"}) as box:
        box.run("cp", f"/media/usb/{key.public.name}", "/root/pub.pem")
        yield box


def test_new_user_installs_upgrades_rolls_back_and_removes(fresh: DebianBox, open_folder: Path, key: Key) -> None:
    routes = fresh.run("cat", "/proc/net/route").out.splitlines()
    assert len(routes) == 1, "only the heading: no route"
    first = fresh.run("sh", "/media/usb/stick 1/install.sh", "--key", "/root/pub.pem")
    assert "http://127.0.0.1:8770/" in first.out
    assert fresh.get("/api/v1/ready") == "1.0"
    started = fresh.property("ExecMainStartTimestampMonotonic")
    fresh.run("sh", "/media/usb/stick 1/install.sh")
    assert fresh.property("ExecMainStartTimestampMonotonic") == started, "a repeated installation restarts nothing"
    assert fresh.run("stat", "-c", "%U", f"/proc/{fresh.property('MainPID')}").out.strip() == "echoquad"
    assert fresh.run("getent", "passwd", "echoquad").out.strip().endswith("/usr/sbin/nologin")
    assert fresh.run("systemctl", "is-enabled", "echoquad").out.strip() == "enabled"
    fresh.run("sh", "-c", "echo result >/var/lib/echoquad/result && chown echoquad: /var/lib/echoquad/result")

    fresh.run("sh", "/media/usb/stick 2/install.sh")
    assert fresh.get("/api/v1/ready") == "2.0"
    bad = make_stick(open_folder / "bad", "3.0", key, faults=["serve"])
    failed = fresh.run("sh", f"/media/usb/{bad.name}/install.sh", code=1)
    assert "2.0" in failed.err and "runs again" in failed.err
    assert fresh.wait_for("/api/v1/ready") == "2.0"
    fresh.run("sh", "/opt/echoquad/current/install.sh", "--rollback")
    assert fresh.get("/api/v1/ready") == "1.0"

    fresh.run("sh", "/opt/echoquad/current/install.sh", "--remove")
    assert fresh.get("/api/v1/ready") == ""
    assert fresh.run("cat", "/var/lib/echoquad/result").out == "result\n"
    fresh.run("sh", "/media/usb/stick 2/install.sh", "--key", "/root/pub.pem")
    assert fresh.get("/api/v1/ready") == "2.0"
    fresh.run("sh", "/opt/echoquad/current/install.sh", "--remove", "--purge")
    for path in ("/opt/echoquad", "/etc/echoquad", "/var/lib/echoquad", "/etc/systemd/system/echoquad.service"):
        fresh.run("test", "-e", path, code=1)
    fresh.run("getent", "passwd", "echoquad", code=2)


def test_first_service_that_does_not_start_says_where_to_look(fresh: DebianBox, open_folder: Path, key: Key) -> None:
    broken = make_stick(open_folder / "broken", "1.0", key, config="[http\n")
    failed = fresh.run("sh", f"/media/usb/{broken.name}/install.sh", "--key", "/root/pub.pem", code=1)
    assert "/etc/echoquad/service.toml" in failed.err and "journalctl" in failed.err
    fresh.run("sh", "-c", "printf '[http]\\nport = 8770\\n' >/etc/echoquad/service.toml")
    fresh.run("sh", f"/media/usb/{broken.name}/install.sh")
    assert fresh.get("/api/v1/ready") == "1.0"


def test_kills_during_upgrade_and_rollback_leave_a_service_that_answers(fresh: DebianBox) -> None:
    chance = random.Random(3)
    fresh.run("sh", "/media/usb/stick 1/install.sh", "--key", "/root/pub.pem")
    begin = time.monotonic()
    fresh.run("sh", "/media/usb/stick 2/install.sh")
    longest = time.monotonic() - begin
    for number in range(15):
        script = "/media/usb/stick 1/install.sh" if number % 2 else "/opt/echoquad/current/install.sh"
        options = [] if number % 2 else ["--rollback"]
        limit = f"{chance.uniform(0.05, longest):.2f}"
        fresh.run("timeout", "--signal=KILL", limit, "bash", script, *options, code=None)
        assert fresh.wait_for("/api/v1/ready") in ("1.0", "2.0")
        fresh.run("/opt/echoquad/current/venv/bin/echoquad", "--version")
    for number in (1, 2):
        fresh.run("sh", f"/media/usb/stick {number}/install.sh")
        assert fresh.get("/api/v1/ready") == f"{number}.0"


def test_upgrade_and_rollback_under_load_lose_no_object(
    image: str, open_folder: Path, tiny_bundle: Path, key: Key
) -> None:
    real_stick = pack_real_stick(open_folder / "real", tiny_bundle, key, platform.machine())
    newer = Path(shutil.copytree(real_stick, open_folder / "newer"))
    (newer / "README.txt").write_text("another stick\n")
    seal(newer, key)
    Image.linear_gradient("L").save(open_folder / "frame.png")
    with debian(image, "echoquad-test", {open_folder: "/media/usb"}) as box:
        box.run("cp", f"/media/usb/{key.public.name}", "/root/pub.pem")
        begin = time.monotonic()
        box.run("sh", f"/media/usb/{real_stick.name}/install.sh", "--key", "/root/pub.pem")
        sys.stdout.write(f"installed in {time.monotonic() - begin:.0f} s\n")
        assert '"ready":true' in box.wait_for("/api/v1/ready").replace(" ", "")
        first = box.run("readlink", "/opt/echoquad/current").out
        with load(box, "/media/usb/frame.png") as counts:
            box.run("sh", f"/media/usb/{newer.name}/install.sh")
            second = box.run("readlink", "/opt/echoquad/current").out
            assert second != first
            for expected in (first, second):
                box.run("sh", "/opt/echoquad/current/install.sh", "--rollback")
                assert box.run("readlink", "/opt/echoquad/current").out == expected
            # Killed between two links or in a restart: the service must come back, and with it all objects.
            command = [*PODMAN, "exec", box.name, "timeout", "--signal=KILL", "4"]
            subprocess.run([*command, "bash", "/opt/echoquad/current/install.sh", "--rollback"], check=False)
            time.sleep(2)
        results = json.loads(box.python(RESULTS))
        security = box.run("systemd-analyze", "security", "--no-pager", "echoquad", code=None).out.splitlines()[-1]
        box.run("sh", "/opt/echoquad/current/install.sh", "--remove")
        box.run("test", "-e", "/var/lib/echoquad/store")
    acknowledged = counts["acknowledged"]
    assert isinstance(acknowledged, dict) and len(acknowledged) > 100
    sys.stdout.write(f"{len(acknowledged)} acknowledged in {counts['attempts']} attempts; {security}\n")
    assert counts["attempts"] != len(acknowledged), "the service was away at times, and the senders repeated"
    assert sorted(one["id"] for one in results) == sorted(acknowledged.values()), "each object has one result"
    assert {one["status"] for one in results} == {"done"}
