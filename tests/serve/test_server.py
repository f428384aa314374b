"""The server as a process: its address, what it tells systemd, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs systemd's kind of sockets, and signals")

Serve = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def serve(tiny_bundle: Path, tmp_path: Path) -> Iterator[Serve]:
    """Return a function that starts ``echoquad serve`` with these options."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "echoquad", "serve", str(tiny_bundle), "--store", str(tmp_path / "store")]
        process = subprocess.Popen(
            [*command, *options], stderr=subprocess.PIPE, text=True, env=os.environ | environment, cwd=tmp_path
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_port_that_is_taken_is_one_line_and_touches_no_store(serve: Serve, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = serve("--port", str(taken.getsockname()[1]))
        _, text = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = text.strip().splitlines()
    assert "cannot listen on 127.0.0.1:" in line and "choose a free port" in line
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_systemd_is_told_ready_and_stopping(serve: Serve, tmp_path: Path, number: signal.Signals, code: int) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver, socket.create_server(("127.0.0.1", 0)) as free:
        receiver.bind(address)
        receiver.settimeout(60)
        port = free.getsockname()[1]
        free.close()
        process = serve("--port", str(port), NOTIFY_SOCKET=address)
        assert receiver.recv(1000) == b"STATUS=checking and testing the bundle"
        ready = receiver.recv(1000).decode().splitlines()
        assert ready == ["READY=1", f"STATUS=ready: http://127.0.0.1:{port}/"]
        process.send_signal(number)
        assert receiver.recv(1000) == b"STOPPING=1\nSTATUS=stopping"
    assert process.wait(60) == code
