"""A service that invents its results: for tests of the API, of the page and of the KServe routes.

As a program it serves the application: ``python tests/serve/http/fake_backend.py --port 8770 --results 20 --live``.
Faults are switched on by files in its ``--control`` folder: ``touch FOLDER/not-ready`` (removed: off), and so on for
each field of `Faults`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from echoquad_runtime.errors import BundleError, FrameReadError
from echoquad_serve.config import HttpConfig
from echoquad_serve.errors import QueueFullError, StorageFullError
from echoquad_serve.records import IncomingObject, Job, Result

QUADRANTS = ("LA", "RA", "LV", "RV")
SHA256 = hashlib.sha256(b"fake bundle").hexdigest()


@dataclass
class Faults:
    """What goes wrong; everything is off at first."""

    not_ready: bool = False
    queue_full: bool = False
    disk_full: bool = False
    hang: bool = False
    crash: bool = False
    frames_gone: bool = False
    bundle_refused: bool = False
    destination_down: bool = False
    live_frozen: bool = False
    live_lost: bool = False


def invent_row(name: str, seed: int, *, abstain: bool = False, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Return a row as `echoquad predict` writes it, the same for the same seed."""
    p = 0.5 + (seed * 37 % 50) / 100
    asd = seed % 3 == 0
    label = "ASD" if asd else "NORM"
    row: dict[str, Any] = {"file": name, "method": "majority", "pred_image": "INDETERMINATE" if abstain else label}
    row |= {"prob_ASD": p if asd else 1 - p, "prob_NORM": 1 - p if asd else p}
    for index, quadrant in enumerate(QUADRANTS):
        other = (seed + index) % 4 == 3
        row[f"pred_{quadrant}"] = {True: "NORM", False: "ASD"}[asd == other]
        row[f"p_{quadrant}_ASD"] = 1 - p if asd == other else p
        row[f"p_{quadrant}_NORM"] = p if asd == other else 1 - p
    row |= {"flags": list(flags), "device": "cpu", "precision": "int8", "typicality": 0.8, "confidence": p}
    row |= {"bundle_sha256": SHA256, "provider": "CPUExecutionProvider"}
    if abstain:
        row["abstained_because"] = "the confidence is below 0.6"
    return row


class FakeBackend:
    """A `Backend` in memory; an object whose bytes begin with ``bad`` fails.

    Attributes
    ----------
    faults
        What goes wrong.
    delay
        Seconds that a decision takes.
    accepted
        Names, keys and contents of the accepted objects.
    """

    def __init__(self, incoming: Path, *, results: int = 0, live: bool = False, delay: float = 0.0) -> None:
        self._incoming = incoming
        incoming.mkdir(parents=True, exist_ok=True)
        self.faults = Faults()
        self.delay = delay
        self.live = live
        self.accepted: list[tuple[str, str, bytes]] = []
        self.loaded: list[str] = []
        self.dropped = 0
        self._listeners: dict[object, Callable[[str, dict[str, Any]], None]] = {}
        self._results: list[Result] = []
        self._by_id: dict[str, Result] = {}
        self._keys: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.hangs = threading.Event()  # set while a change of the bundle hangs
        self._frame = threading.Condition()
        self._frame_number = 0
        for number in range(results):
            self.invent_result(f"frame-{number:05d}.png", received=time.time() - results + number)

    @property
    def incoming(self) -> Path:
        return self._incoming

    @property
    def listeners(self) -> int:
        return len(self._listeners)

    # Readiness and state

    def unready_reasons(self) -> Sequence[str]:
        if self.faults.crash:
            raise RuntimeError("Doe^Jane 1970-01-01")
        return ["the bundle is being tested"] if self.faults.not_ready else []

    def info(self) -> dict[str, Any]:
        return {
            "bundle": {"name": "fake", "sha256": SHA256, "contract_hash": SHA256[::-1]},
            "classes": ["ASD", "NORM"],
            "positive": "ASD",
            "device": "cpu",
            "provider": "CPUExecutionProvider",
            "precision": "int8",
            "self_test": {"passed": True, "frames": 8},
            "intended_use": "Research use only.",
            "versions": {"echoquad": "0", "onnxruntime": "0"},
        }

    def status(self) -> dict[str, Any]:
        down = self.faults.destination_down
        reasons = [*self.unready_reasons()]
        return {
            "intake": {"http": {"accepted": len(self.accepted), "refused": 0}, "folder": None, "dicom": None},
            "queue": {
                "waiting": 0,
                "oldest_waiting_s": 0.0,
                "in_progress": 0,
                "results": len(self._results),
                "free_mb": 100 if self.faults.disk_full else 20_000,
                "full": self.faults.disk_full or self.faults.queue_full,
                "destinations": {},
            },
            "destinations": [
                {
                    "name": "pacs",
                    "type": "dicom",
                    "waiting": 3 if down else 0,
                    "refused": 0,
                    "last_error": "connection refused" if down else "",
                    "note": "",
                    "ok": not down,
                }
            ],
            "bundle": {
                "name": "fake",
                "sha256": SHA256,
                "device": "cpu",
                "provider": "CPUExecutionProvider",
                "precision": "int8",
                "self_test": "passed",
            },
            "live": {"source": "lavfi:testsrc", "state": self._live_state()} if self.live else None,
            "ready": not reasons,
            "reasons": reasons,
        }

    def metrics(self) -> bytes:
        return b"# TYPE echoquad_results_total counter\nechoquad_results_total %d\n" % len(self._results)

    # Objects

    def check_room(self, bytes_expected: int = 0) -> None:
        if self.faults.queue_full:
            raise QueueFullError("1000 objects wait; repeat the request later", retry_after=3.0)
        if self.faults.disk_full:
            raise StorageFullError("the disk has 100 MiB; expected 1024 MiB", retry_after=60.0)

    def submit(self, incoming: IncomingObject) -> Job:
        self.check_room()
        content = incoming.path.read_bytes()
        with self._lock:
            if incoming.key and incoming.key in self._keys:
                return self._keys[incoming.key]
            incoming.path.unlink()
            job = Job(secrets.token_hex(16), incoming.path, time.time(), "http", incoming.name, incoming.sender)
            self._keys[incoming.key] = job
            self.accepted.append((incoming.name, incoming.key, content))
        self._decide(job, content)
        return job

    def predict(self, incoming: IncomingObject) -> Future[Result]:
        future = Future[Result]()
        job = self.submit(incoming)
        if not self.faults.hang:
            threading.Timer(self.delay, lambda: future.cancelled() or future.set_result(self._by_id[job.id])).start()
        return future

    def _decide(self, job: Job, content: bytes) -> None:
        if content.startswith(b"bad"):
            failure = {"file": job.name, "code": "E_FRAME_FORMAT", "message": "the file is no image"}
            self._finish(Result(job.id, "failed", "http", job.name, job.received, time.time(), failures=(failure,)))
        else:
            self.invent_result(job.name, identifier=job.id, received=job.received)

    def invent_result(self, name: str, *, identifier: str = "", received: float = 0.0) -> Result:
        """Record a result, and send its event."""
        seed = len(self._results)
        flags = ("low-contrast",) if seed % 7 == 6 else ()
        row = invent_row(name, seed, abstain=seed % 5 == 4, flags=flags)
        return self._finish(
            Result(
                identifier or secrets.token_hex(16),
                "done",
                "http",
                name,
                received or time.time(),
                (received or time.time()) + 0.01,
                rows=(row,),
                bundle={"name": "fake", "sha256": SHA256, "contract_hash": SHA256[::-1]},
                timings_ms={"queue": 0.4, "predict": 9.1},
            )
        )

    def _finish(self, result: Result) -> Result:
        with self._lock:
            result = replace(result, number=len(self._results) + 1)
            self._results.append(result)
            self._by_id[result.id] = result
        self.emit("result", result.to_dict())
        return result

    def result(self, identifier: str) -> Result | None:
        return self._by_id.get(identifier)

    def results(self, *, before: int | None = None, after: int = 0, limit: int = 100) -> list[Result]:
        found = [one for one in self._results if one.number > after and (before is None or one.number < before)]
        return (found if after else found[::-1])[:limit]

    def overlay(self, identifier: str, row: int, *, cam: bool) -> bytes:
        if row >= len(self._by_id[identifier].rows):
            raise KeyError(row)
        if self.faults.frames_gone:
            raise FrameReadError("the frame is not kept any more")
        return self._picture(self._by_id[identifier].number, "PNG", red=cam)

    # Events and the live view

    def subscribe(self, listener: Callable[[str, dict[str, Any]], None]) -> Callable[[], None]:
        key = object()
        self._listeners[key] = listener

        def unsubscribe() -> None:
            self._listeners.pop(key, None)

        return unsubscribe

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Send an event to all clients."""
        for listener in list(self._listeners.values()):
            listener(name, data)

    def _live_state(self) -> str:
        return "no signal" if self.faults.live_lost else "frozen" if self.faults.live_frozen else "ok"

    def live_frames(self) -> Iterator[bytes]:
        if not self.live:
            return
        seen = 0
        while not self._closed.is_set():
            with self._frame:
                if not self._frame.wait_for(lambda last=seen: self._frame_number > last or self._closed.is_set(), 1.0):
                    continue
                seen = self._frame_number
            yield self._picture(seen, "JPEG")

    def next_live_frame(self) -> None:
        """InferenceWorker one live frame, and send its event."""
        state = self._live_state()
        if state == "ok":
            with self._frame:
                self._frame_number += 1
                self._frame.notify_all()
        row = None if state == "no signal" else invent_row("live", self._frame_number // 30)
        now = time.time()
        self.emit("live", {"row": row, "captured": now - 0.02, "age_ms": 20.0, "dropped": self.dropped, "state": state})

    @staticmethod
    def _picture(number: int, kind: str, *, red: bool = False) -> bytes:
        image = Image.new("RGB", (640, 480), (30, 30, 30))
        draw = ImageDraw.Draw(image)
        for index, (x, y) in enumerate(((0, 0), (320, 0), (0, 240), (320, 240))):
            draw.rectangle((x + 8, y + 8, x + 311, y + 231), outline=(200, 60, 60) if red else (90, 160, 230), width=4)
            draw.text((x + 20, y + 20), QUADRANTS[index], fill=(255, 255, 255))
        at = number * 5 % 560
        draw.ellipse((at, 200, at + 80, 280), fill=(160, 160, 160))
        draw.text((300, 235), str(number), fill=(255, 255, 255))
        out = io.BytesIO()
        image.save(out, kind)
        return out.getvalue()

    # The bundle

    def predictor(self) -> Any:
        raise NotImplementedError

    def load_bundle(self, folder: Path) -> dict[str, Any]:
        if self.faults.hang:
            self.hangs.set()
            self._closed.wait(30.0)
        if self.faults.bundle_refused:
            raise BundleError("bundle.json: the self-test failed")
        self.loaded.append(folder.name)
        return self.info()

    def roll_back(self) -> dict[str, Any]:
        if not self.loaded:
            raise BundleError("there is no bundle before the one in use")
        self.loaded.pop()
        return self.info()

    def record(self, predictor: Any, predictions: Any, sender: str) -> None:
        """Keep nothing."""

    def retry(self, destination: str) -> int:
        return {"pacs": 3}[destination]

    def close(self) -> None:
        """End what waits."""
        self._closed.set()
        with self._frame:
            self._frame.notify_all()


def main() -> None:
    """Serve the application with invented results until a signal comes."""
    import uvicorn

    from echoquad_serve.http.app import create_app
    from echoquad_serve.http.listener import uvicorn_config

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8770, help="0 takes a free one; it is printed")
    parser.add_argument("--results", type=int, default=20, help="results at the start")
    parser.add_argument("--every", type=float, default=0.0, help="a new result every so many seconds; 0 for none")
    parser.add_argument("--live", action="store_true", help="a live source of 30 frames a second")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that a decision takes")
    parser.add_argument("--control", type=Path, help="folder whose files switch faults on")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        backend = FakeBackend(Path(folder), results=options.results, live=options.live, delay=options.delay)
        config = HttpConfig(port=options.port)
        server = uvicorn.Server(uvicorn_config(create_app(backend, config, bundle_folder=Path(folder)), config))

        def act() -> None:
            next_result = next_status = time.monotonic() + options.every
            while not server.should_exit:
                time.sleep(1 / 30)
                if options.control:
                    for fault in fields(Faults):
                        on = options.control.joinpath(fault.name.replace("_", "-")).exists()
                        setattr(backend.faults, fault.name, on)
                if options.live:
                    backend.next_live_frame()
                if options.every and time.monotonic() > next_result:
                    next_result += options.every
                    backend.invent_result("invented.png")
                if time.monotonic() > next_status and not backend.faults.crash:
                    next_status = time.monotonic() + 1.0
                    backend.emit("status", backend.status())
            backend.close()

        def announce() -> None:
            while not server.started:
                time.sleep(0.02)
            port = server.servers[0].sockets[0].getsockname()[1]
            sys.stdout.write(f"http://127.0.0.1:{port}/\n")
            sys.stdout.flush()

        for target in (act, announce):
            threading.Thread(target=target, name=f"echoquad-fake-{target.__name__}", daemon=True).start()
        server.run()


if __name__ == "__main__":
    main()
