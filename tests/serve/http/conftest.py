"""The fake service, and a real server on a free port of the loopback interface."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from echoquad_serve.config import HttpConfig
from echoquad_serve.http.app import create_app
from echoquad_serve.http.limits import Limits
from echoquad_serve.http.listener import uvicorn_config

from .fake_backend import FakeBackend

FAST = Limits(
    header_s=0.3,
    body_grace_s=0.3,
    body_bytes_per_s=1_000_000,
    body_s=2.0,
    write_stall_s=0.5,
    linger_s=0.3,
    predictions=4,
    predict_s=0.5,
    event_streams=3,
    live_streams=2,
    heartbeat_s=0.1,
    live_start_s=0.3,
    shutdown_s=5,
)
"""Limits that a test does not wait for."""


class RunningServer:
    """A real server in a thread, and what it serves."""

    def __init__(self, backend: FakeBackend, config: HttpConfig, limits: Limits, bundle_folder: Path) -> None:
        self.backend = backend
        self.seen: list[tuple[str, str, int]] = []
        self.app = create_app(
            backend,
            config,
            bundle_folder=bundle_folder,
            limits=limits,
            observe=lambda method, route, status, _: self.seen.append((method, route, status)),
        )
        self.uvicorn = uvicorn.Server(uvicorn_config(self.app, config))
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def start(self) -> None:
        self._thread.start()
        for _ in range(500):
            if self.uvicorn.started:
                return
            self._thread.join(0.01)
        raise AssertionError("the server does not start")

    def stop(self, timeout: float = 10.0) -> None:
        self.uvicorn.should_exit = True
        self._thread.join(timeout)
        assert not self._thread.is_alive()
        self._socket.close()
        self.backend.close()

    def connect(self, timeout: float = 10.0) -> socket.socket:
        """Return a connection, for what no client library sends."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)

    def exchange(self, data: bytes, timeout: float = 10.0) -> bytes:
        """Send bytes, and return all that comes until the server closes."""
        with self.connect(timeout) as connection:
            connection.sendall(data)
            return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while data := connection.recv(65536):
        received += data
    return received


_STOPPING: list[RunningServer] = []


@pytest.fixture(scope="session", autouse=True)
def _servers_stop() -> Iterator[None]:
    """Wait for servers at the end: each takes 0.2 s to stop, and no test waits for that of another."""
    yield
    for server in _STOPPING:
        server.stop()


ServerFactory = Callable[..., RunningServer]


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[FakeBackend]:
    service = FakeBackend(tmp_path / "incoming", results=5)
    yield service
    service.close()


@pytest.fixture
def serve(tmp_path: Path, backend: FakeBackend) -> Iterator[ServerFactory]:
    """Return a function that starts a server with other settings than the default."""
    servers: list[RunningServer] = []

    def start(config: HttpConfig | None = None, limits: Limits = FAST) -> RunningServer:
        bundles = tmp_path / "bundles"
        bundles.mkdir(exist_ok=True)
        server = RunningServer(backend, config or HttpConfig(max_body_mb=1), limits, bundles)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.uvicorn.should_exit = True
        server.backend.close()
    _STOPPING.extend(servers)


@pytest.fixture
def server(serve: ServerFactory) -> RunningServer:
    return serve()


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10.0, trust_env=False) as client:
        yield client
