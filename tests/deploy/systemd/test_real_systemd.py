"""The unit under a real systemd: Debian boots in a container of systemd-nspawn, with the service as on a box."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from ..debian import collect_wheels, make_debian, need, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

UNITS = Path(str(resources.files("echoquad_deploy.systemd")))
PACKAGES = ("python3", "python3-venv", "systemd", "systemd-sysv", "dbus")
WATCHDOG_S = 5

# Python runs this line at its start: SIGUSR1 stops the main thread, which is the event loop's, and no other.
HANG = "import signal; signal.signal(signal.SIGUSR1, lambda *_: __import__('time').sleep(1e6))\n"

CONFIGURATION = """
[store]
folder = "/var/lib/echoquad/store"
min_free_mb = 0
[dicom]
port = 104
[[folder]]
path = "/srv/inbox"
poll_s = 0.2
[[destination]]
name = "files"
type = "folder"
path = "/srv/results"
"""


class Box:
    """A booted Debian."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # Without a running systemd of the host: no registration, no unit of its own.
        command = ["systemd-nspawn", "--register=no", "--keep-unit", "--private-network", "--console=read-only"]
        self._log = (root.parent / "boot.log").open("wb")
        self._nspawn = subprocess.Popen(
            [*command, "--boot", "--directory", str(root)], stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        self._init = self._find_init()

    def _find_init(self) -> int:
        for _ in range(600):
            children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
            for child in children:
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{child}/exe").readlink().match("*/systemd/systemd"):
                        return int(child)
            if self._nspawn.poll() is not None:
                break
            time.sleep(0.1)
        pytest.skip("systemd does not start in a container here")

    def run(self, *command: str, code: int | None = 0, timeout: float = 120.0) -> str:
        inside = ["nsenter", "-t", str(self._init), "-m", "-u", "-i", "-n", "-p", "--root", "--wd", "--"]
        return run(*inside, *command, code=code, timeout=timeout)

    def show(self, name: str) -> str:
        # Without an exit code: the bus of a system that boots is not there yet.
        return self.run("systemctl", "show", "--property", name, "--value", "echoquad", code=None).strip()

    def wait_for(self, name: str, *values: str, seconds: float = 90.0) -> None:
        end = time.monotonic() + seconds
        while (value := self.show(name)) not in values:
            assert time.monotonic() < end, f"{name} is {value}\n{self.journal()}"
            time.sleep(0.2)

    def journal(self) -> str:
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--no-pager", "--unit", "echoquad", code=None)

    def close(self) -> None:
        self._nspawn.terminate()
        try:
            self._nspawn.wait(30)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            self._nspawn.wait(30)
        self._log.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a Debian with the service as the installer leaves it."""
    need("mmdebstrap=mmdebstrap", "systemd-nspawn=systemd-container", "nsenter=util-linux")
    folder = tmp_path_factory.mktemp("box")
    root = folder / "root"
    make_debian(root, PACKAGES)
    collect_wheels(root / "root/wheels", "cpu,serve,dicom,pacs")
    release = root / "opt/echoquad/releases/1"
    release.mkdir(parents=True)
    (root / "opt/echoquad/current").symlink_to("releases/1")
    chroot = ("chroot", root)
    run(*chroot, "python3", "-m", "venv", "/opt/echoquad/releases/1/venv")
    pip = ("/opt/echoquad/releases/1/venv/bin/pip", "install", "--quiet", "--no-index", "--find-links", "/root/wheels")
    run(*chroot, *pip, "echoquad[cpu,serve,dicom,pacs]")
    user = ("--system", "--user-group", "--home-dir", "/var/lib/echoquad", "--shell", "/usr/sbin/nologin")
    run(*chroot, "useradd", *user, "echoquad")
    yield root
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def box(root: Path, tiny_bundle: Path) -> Iterator[Box]:
    """Boot it: the unit as it is, with two drop-ins of the guide, and a shorter watchdog."""
    release = root / "opt/echoquad/releases/1"
    shutil.copytree(tiny_bundle, release / "bundle")
    for path in (release / "bundle", *(release / "bundle").iterdir()):
        path.chmod(0o755)
    (release / "venv/lib/python3.11/site-packages/hang.pth").write_text(HANG, "ascii")
    (root / "etc/echoquad").mkdir()
    (root / "etc/echoquad/service.toml").write_text(CONFIGURATION, "utf-8")
    for name in ("inbox", "results"):
        (root / "srv" / name).mkdir()
        run("chroot", root, "chown", "echoquad:", f"/srv/{name}")
    units = root / "etc/systemd/system"
    shutil.copy(UNITS / "echoquad.service", units)
    (units / "echoquad.service.d").mkdir()
    for name in ("folders.conf", "dicom-port.conf"):
        shutil.copy(UNITS / "drop_ins" / name, units / "echoquad.service.d")
    (units / "echoquad.service.d/test.conf").write_text(f"[Service]\nWatchdogSec={WATCHDOG_S}\nRestartSec=1\n", "ascii")
    run("chroot", root, "systemctl", "enable", "echoquad")
    booted = Box(root)
    try:
        booted.wait_for("ActiveState", "active")
        yield booted
    finally:
        booted.close()


def drop_frame(box: Box, frame: Path, name: str) -> None:
    """Put a frame into the watched folder, as a user of the box does."""
    shutil.copy(frame, box.root / "srv" / f"{name}.part")
    (box.root / "srv" / f"{name}.part").rename(box.root / "srv/inbox" / name)


def wait_for_results(box: Box, count: int, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while len(list((box.root / "srv/results").glob("*/*.json"))) < count:
        assert time.monotonic() < end, box.journal()
        time.sleep(0.2)


def test_service_decides_from_a_watched_folder_under_the_restrictions_of_the_unit(
    box: Box, frames_folder: Path
) -> None:
    assert box.show("StatusText") == "ready: http://127.0.0.1:8770/"
    drop_frame(box, frames_folder / "b/5.png", "one.png")
    wait_for_results(box, 1)
    process = box.show("MainPID")
    status = box.run("cat", f"/proc/{process}/status")
    assert "NoNewPrivs:\t1" in status and "Seccomp:\t2" in status
    assert "CapEff:\t0000000000000400" in status  # the port of the drop-in, and nothing else
    for path in ("/opt/echoquad/x", "/etc/x", "/usr/x"):
        inside = ("nsenter", "-t", process, "-m", "touch", path)
        assert "Read-only file system" in box.run(*inside, code=1)
    assert not box.run("nsenter", "-t", process, "-m", "find", "/dev/", "-name", "video*", "-o", "-name", "kmsg")


def test_a_hung_event_loop_is_restarted_and_what_it_had_accepted_is_decided(box: Box, frames_folder: Path) -> None:
    before = len(list((box.root / "srv/results").glob("*/*.json")))
    process, restarts = box.show("MainPID"), int(box.show("NRestarts"))
    box.run("systemctl", "kill", "--kill-whom=main", "--signal=USR1", "echoquad")
    begin = time.monotonic()
    drop_frame(box, frames_folder / "b/3.tif", "two.tif")
    box.wait_for("NRestarts", str(restarts + 1), seconds=60)
    assert time.monotonic() - begin < 30
    box.wait_for("ActiveState", "active")
    assert box.show("MainPID") != process
    journal = box.journal()
    assert "Watchdog timeout" in journal and "Failed with result 'watchdog'" in journal, journal
    assert "Fatal Python error: Aborted" in journal  # with the stacks of all threads
    wait_for_results(box, before + 1)


def test_a_stopped_process_is_restarted_too(box: Box) -> None:
    box.wait_for("ActiveState", "active")
    restarts = int(box.show("NRestarts"))
    box.run("systemctl", "kill", "--kill-whom=main", "--signal=STOP", "echoquad")
    box.wait_for("NRestarts", str(restarts + 1), seconds=60)
    box.wait_for("ActiveState", "active")


def test_a_stop_in_good_order_is_no_failure(box: Box) -> None:
    box.run("systemctl", "stop", "echoquad")
    assert (box.show("ActiveState"), box.show("Result")) == ("inactive", "success")
    assert box.show("ExecMainStatus") == "143"
    box.run("systemctl", "start", "echoquad")  # returns when the service is ready
    assert box.show("StatusText").startswith("ready: ")


def test_a_bundle_that_fails_its_verification_is_not_tried_again(box: Box) -> None:
    graph = next((box.root / "opt/echoquad/releases/1/bundle").glob("model.*.onnx"))
    kept = graph.read_bytes()
    box.run("systemctl", "stop", "echoquad")
    try:
        graph.write_bytes(kept + b"x")
        box.run("systemctl", "start", "echoquad", code=1)
        box.wait_for("ActiveState", "failed", seconds=10)
        assert box.show("ExecMainStatus") == "3"
    finally:
        graph.write_bytes(kept)
    box.run("systemctl", "reset-failed", "echoquad")  # these tests start it more often than the unit allows
    box.run("systemctl", "start", "echoquad")
