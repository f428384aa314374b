"""The health check of the container, against a server that is ready, is not, hangs, or is away."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from echoquad_deploy.container import health_check
from echoquad_deploy.container.health_check import unready_reason


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        ready = self.path.endswith("/ready")
        body = b"ok" if ready else b'{"error": "the bundle is\nbeing tested"}'
        self.send_response(200 if ready else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def check(url: str) -> subprocess.CompletedProcess[str]:
    """Run the check as the container does; a proxy of the environment must not be asked."""
    names = {"ECHOQUAD_READY_URL": url, "http_proxy": "http://127.0.0.1:1"}
    command = [sys.executable, "-m", "echoquad_deploy.container.health_check"]
    return subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **names}, timeout=30)


def test_ready_service_is_healthy_and_the_check_is_silent(address: str) -> None:
    ended = check(f"{address}/api/v1/ready")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_service_that_is_not_ready_is_unhealthy_and_says_why_in_one_line(address: str) -> None:
    ended = check(f"{address}/other")
    assert ended.returncode == 1
    assert ended.stderr == 'HTTP 503: {"error": "the bundle is being tested"}\n'


def test_no_service_is_unhealthy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert "no answer from" in (unready_reason(f"http://127.0.0.1:{port}/") or "")
    assert "no answer from" in (unready_reason("no address") or "")


def test_service_that_hangs_is_unhealthy_before_the_container_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert health_check._TIMEOUT_S < 5
    monkeypatch.setattr(health_check, "_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        reason = unready_reason(f"http://127.0.0.1:{silent.getsockname()[1]}/")
    assert reason and "timed out" in reason
