"""Real servers of the service's API with invented figures, peers that misbehave, and the command."""

from __future__ import annotations

import copy
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")

import uvicorn

from echoquad.cli.framework.main import main
from echoquad_serve.config import HttpConfig
from echoquad_serve.http.app import create_app
from echoquad_serve.http.listener import uvicorn_config

from ...serve.http.fake_backend import FakeBackend

OTHER_SHA256 = "0123456789ab" + "c" * 52


class Cart(FakeBackend):
    """A service with a real API and figures that a test changes.

    Attributes
    ----------
    figures
        What `status` answers.
    drift
        What the metric of the drift alert is; None for none.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, results=3)
        self.figures: dict[str, Any] = super().status()
        self.drift: int | None = None

    def status(self) -> dict[str, Any]:
        reasons = [*self.unready_reasons()]
        return copy.deepcopy(self.figures) | {"ready": not reasons, "reasons": reasons}

    def metrics(self) -> bytes:
        drift = f"echoquad_drift_alert {self.drift}.0\nechoquad_drift_frames 412.0\n"
        return super().metrics() + b"" if self.drift is None else drift.encode()


class Served:
    """A running server of a `Cart`; `urls` has one for each of its sockets."""

    def __init__(self, cart: Cart, config: HttpConfig, sockets: int, client: str | None) -> None:
        self.cart = cart
        app = create_app(cart, config)
        server_config = uvicorn_config(app, config)
        if client is not None:
            server_config.app = _seen_from(app, client)
        self._server = uvicorn.Server(server_config)
        self._sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(sockets)]
        scheme = "http" if config.tls is None else "https"
        self.urls = [f"{scheme}://127.0.0.1:{one.getsockname()[1]}" for one in self._sockets]
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": self._sockets}, daemon=True)
        self._thread.start()
        end = time.monotonic() + 10
        while not self._server.started:
            assert time.monotonic() < end and self._thread.is_alive()
            time.sleep(0.005)

    @property
    def url(self) -> str:
        return self.urls[0]

    def stop(self) -> None:
        self._server.should_exit = True

    def join(self) -> None:
        self._thread.join(10)
        self.cart.close()
        for one in self._sockets:
            one.close()


def _seen_from(app: Any, address: str) -> Any:
    """Return an application for which every request comes from another address."""

    async def seen(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            scope = scope | {"client": (address, 50000)}
        await app(scope, receive, send)

    return seen


_STOPPING: list[Served] = []


@pytest.fixture(scope="session", autouse=True)
def _servers_stop() -> Iterator[None]:
    """Wait for servers at the end: each takes 0.2 s to stop, and no test waits for that of another."""
    yield
    for one in _STOPPING:
        one.join()


ServeCart = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[ServeCart]:
    """Return a function that starts a server: of its figures, `config`, number of sockets, and address of clients."""
    started: list[Served] = []

    def start(config: HttpConfig | None = None, *, sockets: int = 1, client: str | None = None) -> Served:
        cart = Cart(tmp_path / f"incoming-{len(started)}")
        started.append(Served(cart, config or HttpConfig(), sockets, client))
        return started[-1]

    yield start
    for one in started:
        one.stop()
    _STOPPING.extend(started)


@contextmanager
def peer(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """Run a server that calls `behave` with each connection in a thread, and yield its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)
    closing = threading.Event()

    def handle(connection: socket.socket) -> None:
        connection.settimeout(5)
        with connection, suppress(OSError):  # the other side has gone
            behave(connection)

    def accept() -> None:
        while not closing.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            threading.Thread(target=handle, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        closing.set()
        thread.join(5)
        listener.close()


@pytest.fixture
def peers() -> Iterator[Callable[[Callable[[socket.socket], None]], str]]:
    with ExitStack() as stack:
        yield lambda behave: stack.enter_context(peer(behave))


@contextmanager
def hang_listener(count: int) -> Iterator[list[str]]:
    """Yield URLs whose connections the system accepts, and that nobody serves."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        yield [f"http://127.0.0.1:{one.getsockname()[1]}" for one in sockets]


def answering(answer: bytes, seen: list[bytes] | None = None) -> Callable[[socket.socket], None]:
    """Return a behaviour: read a request, send `answer` and close."""

    def behave(connection: socket.socket) -> None:
        request = connection.recv(65536)
        if seen is not None:
            seen.append(request)
        connection.sendall(answer)

    return behave


def http_answer(body: bytes, kind: str = "application/json", status: str = "200 OK", headers: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{headers}Connection: close\r\n"
    return f"{head}\r\n".encode() + body


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Ran:
    """A command that has ended. `rows` are those of the table, by the name of the box."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> dict[str, str]:
        return {line.split()[0]: line for line in self.out.splitlines()[1:]}

    @property
    def codes(self) -> list[str]:
        return [line.partition("]")[0][6:] for line in self.err.splitlines() if line.startswith("error[")]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ran]]:
    """Return a function that runs ``echoquad fleet check`` with these arguments, in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["echoquad", "fleet", "check", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err and "fault in EchoQuad" not in err, err
        return Ran(int(ended.value.code or 0), out, err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
