"""The watchdog: a real service process, a socket in the place of systemd's, and a service that hangs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs systemd's kind of sockets, and signals")

LIMIT_S = 1.0
"""WatchdogSec= of these tests."""

# The program, with faults: SIGUSR1 stops the event loop, whose thread runs the handler, and no other thread; SIGUSR2
# lets it turn again. A frame whose file is named so decides for ever, or slowly.
PROGRAM = """
import signal, sys, time

from echoquad.cli.framework.main import main
from echoquad_serve.inference import inference_worker as worker
from echoquad_runtime.predict.predictor import Predictor

stopped = False
def stop(*_):
    global stopped
    stopped = True
    while stopped:
        time.sleep(0.05)
def go_on(*_):
    global stopped
    stopped = False

signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGUSR2, go_on)
worker._stall_limit_s = lambda batch_size: 1.0
listing = worker.frames_in
def frames_in(path, name, options):
    if name == "hangs.png":
        time.sleep(1e6)
    if name == "dies.png":
        raise SystemExit
    yield from listing(path, name, options)
    if name == "slow.png":
        for _ in range(7):
            time.sleep(0.4)
            yield from listing(path, name, options)
worker.frames_in = frames_in
main()
"""


class Service:
    """A service, and the messages that it sends to systemd."""

    def __init__(self, bundle: Path, folder: Path, watchdog_pid: int | None) -> None:
        self.messages: list[tuple[float, str]] = []
        self._receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._receiver.bind(str(folder / "notify"))
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        names = {"NOTIFY_SOCKET": str(folder / "notify"), "WATCHDOG_USEC": f"{LIMIT_S * 1e6:.0f}"}
        if watchdog_pid is not None:
            names["WATCHDOG_PID"] = str(watchdog_pid)
        command = [sys.executable, "-c", PROGRAM, "serve", str(bundle), "--store", "store", "--port", str(self.port)]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=folder, env={**os.environ, **names, "OMP_NUM_THREADS": "1"}
        )
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        while message := self._receiver.recv(4096).decode():
            self.messages += [(time.monotonic(), line) for line in message.splitlines()]

    def wait_for(self, text: str, seconds: float = 60.0) -> float:
        """Return when a message with this text came."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for moment, message in list(self.messages):
                if text in message:
                    return moment
            assert self.process.poll() is None, self.messages
            time.sleep(0.02)
        raise AssertionError(f"no {text!r} in {self.messages}")

    def fed(self, since: float, seconds: float) -> list[float]:
        """Return when the watchdog was fed between these times, which are awaited."""
        time.sleep(max(0.0, since + seconds - time.monotonic()))
        return [at for at, message in list(self.messages) if message == "WATCHDOG=1" and since < at <= since + seconds]

    def post(self, frame: Path, name: str, *, wait: bool) -> int:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/v1/predict?name={name}&wait={wait:d}",
            data=frame.read_bytes(),
            headers={"Content-Type": "image/png"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)

    def ready(self) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/ready", timeout=30) as answer:
                return int(answer.status), answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def close(self) -> str:
        """End the process, and return its log."""
        self.process.kill()
        log = self.process.communicate()[1]
        self._receiver.close()
        return log


Start = Callable[..., Service]


@pytest.fixture
def start(tiny_bundle: Path, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a service, ready."""
    started: list[Service] = []

    def begin(watchdog_pid: int | None = None) -> Service:
        started.append(Service(tiny_bundle, tmp_path, watchdog_pid))
        started[-1].wait_for("READY=1")
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            one.close()


@pytest.fixture
def frame(frames_folder: Path) -> Path:
    return frames_folder / "b/5.png"


def test_a_stopped_event_loop_feeds_no_watchdog_and_one_that_turns_again_does(start: Start) -> None:
    service = start()
    begin = time.monotonic()
    times = service.fed(begin, 2.0)
    gaps = [after - before for before, after in zip([begin, *times], times, strict=False)]
    assert len(times) >= 2 and max(gaps) < LIMIT_S  # systemd restarts a service whose gap is longer
    service.process.send_signal(signal.SIGUSR1)
    stopped = time.monotonic() + 0.3
    assert not service.fed(stopped, 1.5 * LIMIT_S)
    assert service.process.poll() is None
    service.process.send_signal(signal.SIGUSR2)
    assert service.fed(time.monotonic(), LIMIT_S)


def test_a_thread_that_is_stuck_ends_the_feeding_and_states_why(start: Start, frame: Path) -> None:
    service = start()
    assert service.post(frame, "hangs.png", wait=False) == 202
    service.wait_for("STATUS=hangs: no frame was read or decided for 1 seconds")
    assert not service.fed(time.monotonic(), 1.5 * LIMIT_S)
    status, text = service.ready()
    assert status == 503 and "no frame was read or decided" in text
    assert "the service hangs" in service.close()


@pytest.mark.slow
def test_a_thread_that_has_died_ends_the_feeding(start: Start, frame: Path) -> None:
    service = start()
    service.post(frame, "dies.png", wait=False)
    service.wait_for("STATUS=hangs: no thread decides any more")
    assert not service.fed(time.monotonic(), 1.5 * LIMIT_S)


def test_an_object_that_decides_for_longer_than_all_limits_is_no_hang(start: Start, frame: Path) -> None:
    service = start()
    begin = time.monotonic()
    assert service.post(frame, "slow.png", wait=True) == 200
    took = time.monotonic() - begin
    assert took > 2.5 * LIMIT_S
    assert len(service.fed(begin, took)) >= 4
    assert service.ready()[0] == 200


@pytest.mark.slow
def test_a_watchdog_that_is_meant_for_another_process_is_not_fed(start: Start) -> None:
    service = start(watchdog_pid=os.getpid())
    assert not service.fed(time.monotonic(), LIMIT_S)
