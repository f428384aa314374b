"""A real server of a whole service, for the tests of the KServe routes."""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass, field

import uvicorn

from echoquad_serve.config import HttpConfig
from echoquad_serve.http.app import create_app
from echoquad_serve.http.context import Context
from echoquad_serve.http.limits import Limits
from echoquad_serve.http.listener import uvicorn_config
from echoquad_serve.service import BedsideService

LIMITS = Limits(
    tensor_bytes=300_000, tensor_json_bytes=100_000, tensor_arrays=10_000, tensor_frames=8, tensors=4, linger_s=0.5
)
"""Limits that a test reaches with little data."""


@dataclass
class Served:
    """A service and its server."""

    service: BedsideService
    port: int
    seen: list[tuple[str, str, int]] = field(default_factory=list)
    context: Context | None = None

    @property
    def tensors_in_flight(self) -> int:
        assert self.context is not None
        return self.context.tensors._held

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


class Running:
    """A server in a thread."""

    def __init__(self, service: BedsideService, limits: Limits, config: HttpConfig) -> None:
        # asyncio sets TCP_NODELAY only on sockets that name the protocol, as those that uvicorn opens itself do.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(100)
        self.served = Served(service, self._socket.getsockname()[1])
        self.app = create_app(
            service,
            config,
            limits=limits,
            observe=lambda method, route, status, _: self.served.seen.append((method, route, status)),
        )
        self.served.context = self.app.state.context
        self._server = uvicorn.Server(uvicorn_config(self.app, config))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        for _ in range(500):
            if self._server.started:
                return
            self._thread.join(0.01)
        raise AssertionError("the server does not start")

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._socket.close()
