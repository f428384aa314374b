"""A fresh Debian in podman, with systemd as init and without a network."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from .sticks import Ran

IMAGE = "localhost/echoquad-test-debian"
PACKAGES = "python3,openssl,systemd"  # no pip and no python3-venv
# crun refuses cgroups in hybrid mode; in a mount namespace of its own, podman does not see the second hierarchy.
PODMAN = ["unshare", "--mount", "sh", "-c", 'umount /sys/fs/cgroup/unified 2>/dev/null; exec podman "$@"', "podman"]
# Programs of a real start-up write this; a line tells whether the system runs.
BOOTED = ("running", "degraded")


def podman(*arguments: str | Path, code: int | None = 0, stdin: str | None = None, timeout: float = 300.0) -> Ran:
    command = [*PODMAN, *map(str, arguments)]
    ended = subprocess.run(
        command, check=False, capture_output=True, encoding="utf-8", errors="replace", input=stdin, timeout=timeout
    )
    assert code is None or ended.returncode == code, (arguments, ended.stdout + ended.stderr)
    return Ran(ended.returncode, ended.stdout, ended.stderr)


def build_image(folder: Path) -> str:
    """Make the image of a fresh Debian 12; skip the test where that cannot be done."""
    for program in ("podman", "debootstrap", "unshare"):
        if shutil.which(program) is None:
            pytest.skip(f"needs Debian's {program}")
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(folder)],
        check=False,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    if made.returncode:
        pytest.skip(f"debootstrap cannot make a Debian here: {made.stdout[-200:]}")
    archive = folder.with_suffix(".tar")
    subprocess.run(["tar", "-C", str(folder), "-cf", str(archive), "."], check=True)
    shutil.rmtree(folder)
    podman("import", archive, IMAGE)
    archive.unlink()
    return IMAGE


class DebianBox:
    """A running container."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, *command: str | Path, code: int | None = 0, stdin: str | None = None) -> Ran:
        """Run a command as root."""
        interactive = [] if stdin is None else ["-i"]
        return podman("exec", *interactive, self.name, *command, code=code, stdin=stdin)

    def python(self, program: str, *arguments: str) -> str:
        """Run a program with the system's Python, and return what it prints."""
        return self.run("python3", "-", *arguments, stdin=program).out

    def get(self, target: str, port: int = 8770) -> str:
        """Return the body of an answer of the service; empty if there is none."""
        program = """
import sys, urllib.request
try:
    sys.stdout.write(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())
except OSError:
    pass
"""
        return self.python(program, f"http://127.0.0.1:{port}{target}")

    def wait_for(self, target: str, seconds: float = 60.0) -> str:
        end = time.monotonic() + seconds
        while not (body := self.get(target)):
            assert time.monotonic() < end, self.run("journalctl", "--no-pager", "-n", "40", code=None).out
            time.sleep(0.3)
        return body

    def property(self, name: str) -> str:
        return self.run("systemctl", "show", "--property", name, "--value", "echoquad").out.strip()


@contextmanager
def debian(image: str, name: str, mounts: Mapping[Path, str]) -> Iterator[DebianBox]:
    """Start a container with folders of this machine, read-only."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limits = ["--ulimit", f"nofile={files}:{files}", "--ulimit", "nproc=4096:4096"]  # as root without CAP_SYS_RESOURCE
    volumes = [word for source, target in mounts.items() for word in ("--volume", f"{source}:{target}:ro")]
    options = ["--systemd=always", "--network=none", *limits, *volumes]
    podman("rm", "--force", "--time", "1", name, code=None)
    started = podman("run", "--detach", "--name", name, *options, image, "/lib/systemd/systemd", code=None)
    try:
        if started.code:
            pytest.skip(f"podman cannot start systemd here: {started.err.strip()[-200:]}")
        box = DebianBox(name)
        for _ in range(100):
            if box.run("systemctl", "is-system-running", code=None).out.strip() in BOOTED:
                break
            time.sleep(0.3)
        else:
            pytest.skip("systemd does not start in podman here")
        yield box
    finally:
        podman("rm", "--force", "--time", "1", name, code=None)


LOAD = r"""
'''Send frames until a file appears; print each key with the id that was acknowledged, and the attempts, as JSON.'''
import json, os, sys, threading, time, urllib.error, urllib.request

frame, stop, senders = open(sys.argv[1], "rb").read(), sys.argv[2], int(sys.argv[3])
acknowledged, attempts, lock = {}, [0], threading.Lock()

def send(key):
    url = f"http://127.0.0.1:8770/api/v1/predict?wait=0&name={key}.png"
    headers = {"Content-Type": "image/png", "Idempotency-Key": key}
    while True:
        with lock:
            attempts[0] += 1
        try:
            with urllib.request.urlopen(urllib.request.Request(url, frame, headers), timeout=10) as answer:
                return json.load(answer)["id"]
        except (OSError, ValueError):
            time.sleep(0.05)

def work(sender):
    end, number = time.monotonic() + 240, 0
    while not os.path.exists(stop) and time.monotonic() < end:
        key = f"{sender}-{number}"
        found = send(key)
        with lock:
            acknowledged[key] = found
        number += 1
        time.sleep(0.02)

threads = [threading.Thread(target=work, args=(sender,)) for sender in range(senders)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps({"acknowledged": acknowledged, "attempts": attempts[0]}))
"""

RESULTS = r"""
'''Wait until nothing waits, and print all results as JSON.'''
import json, time, urllib.request

def get(target):
    return json.load(urllib.request.urlopen("http://127.0.0.1:8770" + target, timeout=10))

for _ in range(600):
    queue = get("/api/v1/status")["queue"]
    if not queue["waiting"] and not queue["in_progress"]:
        break
    time.sleep(0.2)
found, after = [], 0
while page := get(f"/api/v1/results?after={after}&limit=500")["results"]:
    found += [{key: one[key] for key in ("id", "number", "name", "status")} for one in page]
    after = max(one["number"] for one in page)
print(json.dumps(found))
"""


@contextmanager
def load(box: DebianBox, frame: str, senders: int = 3) -> Iterator[dict[str, object]]:
    """Send frames to the service for the time of a block; the dictionary has the counts after it."""
    box.run("rm", "-f", "/tmp/stop")
    command = [*PODMAN, "exec", "-i", box.name, "python3", "-", frame, "/tmp/stop", str(senders)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdin is not None
    process.stdin.write(LOAD)
    process.stdin.close()
    process.stdin = None
    counts: dict[str, object] = {}
    try:
        yield counts
    finally:
        box.run("touch", "/tmp/stop")
        out, _ = process.communicate(timeout=300)
    counts.update(json.loads(out))
