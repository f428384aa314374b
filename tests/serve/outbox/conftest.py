"""Results, a store in memory, and HTTP servers that behave as a test says."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.results.row_formats import JSON_LINES
from echoquad_serve.records import Delivery, Result

_spec = importlib.util.spec_from_file_location("fake_store", Path(__file__).with_name("fake_store.py"))
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules["fake_store"] = _module  # dataclasses look their module up
_spec.loader.exec_module(_module)

_numbers = itertools.count(1)


@pytest.fixture
def make_store() -> Callable[..., Any]:
    """Return `FakeStore(*destinations)`."""
    return _module.FakeStore  # type: ignore[no-any-return]


def prediction(name: str, classes: tuple[str, ...] = ("ASD", "NORM"), **values: Any) -> Prediction:
    share = 1 / len(classes)
    filled: dict[str, Any] = {
        "file": name,
        "classes": classes,
        "method": "plurality",
        "label": classes[0],
        "probabilities": (share,) * len(classes),
        "quadrant_labels": (classes[0],) * 4,
        "quadrant_probabilities": ((share,) * len(classes),) * 4,
        "flags": ("too dark", "tie"),
        "device": "cpu",
        "precision": "int8",
        "typicality": 0.98765,
    }
    return Prediction(**filled | values)


@pytest.fixture
def make_prediction() -> Callable[..., Prediction]:
    """Return `prediction(name, classes, **values)`."""
    return prediction


def row(name: str, **values: Any) -> dict[str, Any]:
    extra = {"confidence": 0.9, "bundle_sha256": "0" * 64, "provider": "CPUExecutionProvider"}
    return json.loads(JSON_LINES.row(prediction(name, **values))) | extra


@pytest.fixture
def make_row() -> Callable[..., dict[str, Any]]:
    """Return `row(name, **values)`, a JSON row of a result."""
    return row


@pytest.fixture
def make_result() -> Callable[..., Result]:
    """Make a result with one row; each has the next number."""

    def make(**values: Any) -> Result:
        number = next(_numbers)
        filled: dict[str, Any] = {
            "id": f"{number:032x}",
            "status": "done",
            "origin": "http",
            "name": f"{number}.png",
            "received": 1.0,
            "finished": 1_795_737_600.0 + number,  # 2026-11-27 00:00 UTC
            "rows": (row(f"{number}.png"),),
            "bundle": {"name": "b", "sha256": "0" * 64, "contract_hash": "1" * 64},
            "number": number,
        }
        return Result(**filled | values)

    return make


@pytest.fixture
def delivery(make_result: Callable[..., Result]) -> Delivery:
    return Delivery(make_result(), None)


class RawServer:
    """Accepts connections, and runs `behave(connection, number)` for each in a thread; `number` is from 0."""

    def __init__(self, behave: Callable[[socket.socket, int], None]) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/hook?a=1"
        self.ended = threading.Event()  # for behaviours that hang
        self.requests: list[tuple[dict[str, str], Any]] = []
        self.connections = 0
        self._behave = behave
        self._sockets: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            number, self.connections = self.connections, self.connections + 1
            self._sockets.append(connection)
            threading.Thread(target=self._serve, args=(connection, number), daemon=True).start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError), connection:
            self._behave(connection, number)

    def read(self, connection: socket.socket) -> tuple[dict[str, str], Any]:
        """Read a request; return its headers, by lower-case name, and its JSON."""
        stream = connection.makefile("rb")
        headers = {"": stream.readline().decode().strip()}
        while line := stream.readline().decode().strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        size = int(headers.get("content-length", -1))
        data = stream.read(max(0, size))
        if len(data) != size:
            raise ConnectionResetError  # the client was killed
        body = json.loads(data)
        self.requests.append((headers, body))
        return headers, body

    def close(self) -> None:
        self.ended.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._thread.join(5)


@pytest.fixture
def serve() -> Iterator[Callable[..., RawServer]]:
    """Start a `RawServer`; `serve(answer)` with bytes reads each request and sends these."""
    servers = []

    def serve_(behave: Callable[[RawServer, socket.socket, int], None] | bytes) -> RawServer:
        def run(connection: socket.socket, number: int) -> None:
            if isinstance(behave, bytes):
                server.read(connection)
                connection.sendall(behave)
            else:
                behave(server, connection, number)

        server = RawServer(run)
        servers.append(server)
        return server

    yield serve_
    for server in servers:
        server.close()
