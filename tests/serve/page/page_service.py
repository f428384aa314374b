"""The real HTTP application with invented results, behind a line that can be cut or silenced."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn

from echoquad_serve.config import HttpConfig
from echoquad_serve.http.app import create_app
from echoquad_serve.http.limits import Limits
from echoquad_serve.http.listener import uvicorn_config
from echoquad_serve.records import Job, Result

from ..http.fake_backend import SHA256, FakeBackend

BUNDLE = {"name": "demo", "sha256": SHA256, "contract_hash": SHA256[::-1]}
DAMAGED = {"code": "E_FRAME_DAMAGED", "message": "the image is truncated; copy the file again"}


def decision(name: str, label: str = "ASD", share: float = 0.93, **others: Any) -> dict[str, Any]:
    """Return a row as `echoquad predict` writes it; `share` is the mean probability of ASD."""
    row: dict[str, Any] = {"file": name, "method": "average", "pred_image": label}
    row |= {"prob_ASD": share, "prob_NORM": 1 - share}
    for place, shift in (("LA", 0.03), ("RA", -0.02), ("LV", -0.05), ("RV", 0.04)):
        p = min(0.999, max(0.001, share + shift))
        row |= {f"pred_{place}": "ASD" if p > 0.5 else "NORM", f"p_{place}_ASD": p, f"p_{place}_NORM": 1 - p}
    row |= {"flags": [], "device": "cpu", "precision": "fp32", "typicality": 0.82, "provider": "CPUExecutionProvider"}
    return row | {"confidence": max(share, 1 - share), "bundle_sha256": SHA256} | others


class PageBackend(FakeBackend):
    """Results by the name of the object: damaged, unsure, flagged, clip, and ASD for all others."""

    def _decide(self, job: Job, content: bytes) -> None:
        name = job.name
        if "damaged" in name:
            self.add(name, identifier=job.id, failures=({"file": name, **DAMAGED},), origin="http")
            return
        rows = [decision(name)]
        if "unsure" in name:
            rows = [decision(name, "INDETERMINATE", 0.56, abstained_because="the confidence is below 0.6")]
        elif "flagged" in name:
            rows = [decision(name, "NORM", 0.21, flags=["screen", "saturated"])]
        elif "clip" in name:
            rows = [decision(f"{name}#{n + 1}", *(("ASD", 0.9) if n % 3 else ("NORM", 0.2))) for n in range(12)]
        self.add(name, *rows, identifier=job.id, origin="http")

    def add(
        self,
        name: str,
        *rows: dict[str, Any],
        identifier: str = "",
        failures: tuple[Any, ...] = (),
        origin: Any = "dicom",
    ) -> Result:
        """Record a result, and send its event."""
        identifier, now = identifier or secrets.token_hex(16), time.time()
        status: Any = "done" if rows else "failed"
        times = {"queue": 1.4, "predict": 11.2}
        return self._finish(Result(identifier, status, origin, name, now - 0.02, now, rows, failures, BUNDLE, times))

    def show_live(self, state: str = "ok", **others: Any) -> None:
        """Send a picture, and the event of its decision."""
        if state == "ok":
            with self._frame:
                self._frame_number += 1
                self._frame.notify_all()
        row = decision("live", "NORM", 0.08) if state == "ok" else None
        event = {"row": row, "captured": time.time(), "age_ms": 23.4, "dropped": 2, "state": state} | others
        self.emit("live", event)


class Line:
    """A connection between the browser and the service, for the faults of a network.

    Attributes
    ----------
    port
        Where the browser connects; it stays the same.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._open = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._start()
        self._open.set()

    def _start(self) -> None:
        threading.Thread(target=self._accept, args=(self._listener,), name="echoquad-test-line", daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near = listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self._sockets |= {near, far}
            for one, other in ((near, far), (far, near)):
                threading.Thread(
                    target=self._forward, args=(one, other), name="echoquad-test-line", daemon=True
                ).start()

    def _forward(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(65536):
                self._open.wait()
                other.sendall(data)
        except OSError:
            pass
        for end in (one, other):
            self._end(end)

    def _end(self, end: socket.socket) -> None:
        self._sockets.discard(end)
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()

    @property
    def connections(self) -> int:
        """Number of open connections of the browser."""
        return len(self._sockets) // 2

    def cut(self) -> None:
        """Close every connection and refuse new ones, as a machine does whose service ended."""
        self._end(self._listener)
        for end in list(self._sockets):
            self._end(end)

    def mend(self) -> None:
        """Listen again."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._start()

    def silence(self) -> None:
        """Keep connections and pass nothing on, as a cable does that was pulled."""
        self._open.clear()

    def restore(self) -> None:
        """Pass on again."""
        self._open.set()


class PageService:
    """The application in a thread, its backend, and the line to it."""

    def __init__(self, folder: Path, *, live: bool = False) -> None:
        self.backend = PageBackend(folder / "incoming", live=live)
        config = HttpConfig(max_body_mb=16)
        app = create_app(self.backend, config, limits=Limits(shutdown_s=1, live_start_s=0.5))
        self._server = uvicorn.Server(uvicorn_config(app, config))
        self._socket = socket.create_server(("127.0.0.1", 0))
        arguments = {"sockets": [self._socket]}
        self._thread = threading.Thread(
            target=self._server.run, kwargs=arguments, name="echoquad-test-http", daemon=True
        )
        self._thread.start()
        deadline = time.monotonic() + 10
        while not self._server.started:
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.01)
        self.line = Line(self._socket.getsockname()[1])
        self.address = f"http://127.0.0.1:{self.line.port}/"

    def close(self) -> None:
        self.line.restore()
        self.line.cut()
        self.backend.close()
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()
        assert not self._thread.is_alive()
