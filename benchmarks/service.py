"""The bedside service: latency of a request above the engine's own time, live age, idle processor time, start, size.

    python benchmarks/service.py BUNDLE [--frames FOLDER] [--precision int8] [--count 200] [--seconds 20] [--install]

A request posts a frame over a kept connection and waits for its result, which by then is on the disk, with its entries
in the audit log. The engine's own time is that of the same frame's file in `Predictor`, from the file to the decision,
in a process without a service; both alternate. The row in memory is of a service whose store is on no disk: the
difference is what syncs take here. The age of a live frame is from its capture to the event that a client reads.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from common import PAUSE, WARM_UP, arguments, make_frames, quantiles, report

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.predict.predictor import Predictor

ABOVE_MS, LIVE_MS, IDLE_PERCENT, INSTALL_MB = 3.0, 33.0, 1.0, 25.0  # aims
STARTS = 5
READY_S = 60.0
LIVE = "lavfi:testsrc=size=800x600:rate=30"
MEMORY = Path("/dev/shm")  # a file system without a disk, on Linux


class Service:
    """A service in a process of its own, ready when the object exists; `ready_s` is how long that took."""

    def __init__(
        self, bundle: Path, folder: Path, tables: str = "", precision: str = "", store: Path | None = None
    ) -> None:
        folder.mkdir()
        self.port = free_port()
        model = f'[model]\nprecision = "{precision}"\n' if precision else ""
        config = folder / "service.toml"
        head = f'[http]\nport = {self.port}\n[store]\nfolder = "{store or folder / "store"}"\nmin_free_mb = 0\n'
        config.write_text(f"{head}{model}{tables}")
        begin = time.perf_counter()
        with (folder / "log.txt").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "echoquad", "serve", str(bundle), "--config", str(config)],
                stdout=log,
                stderr=log,
            )
        while not self._is_ready():
            if self._process.poll() is not None or time.perf_counter() - begin > READY_S:
                raise SystemExit((folder / "log.txt").read_text("utf-8", "replace"))
            time.sleep(0.005)
        self.ready_s = time.perf_counter() - begin

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.connect()
        assert connection.sock is not None
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def get(self, path: str) -> Any:
        connection = self.connect()
        try:
            connection.request("GET", path)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def cpu_s(self) -> float:
        """Return the processor seconds of the process and of its live children, on Linux."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return sum(map(process_cpu_s, [str(self._process.pid), *children]))

    def _is_ready(self) -> bool:
        try:
            return bool(self.get("/api/v1/ready").get("ready"))
        except OSError:
            return False


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--precision", help="comma-separated, such as fp32,int8 (default: that of the bundle)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each live and idle run (default %(default)s)")
    parser.add_argument("--install", action="store_true", help="measure what the extra serve adds, over the network")
    options = parser.parse_args()
    precisions = (options.precision or next(iter(Bundle(options.bundle).precisions))).split(",")
    rows = [["", "fastest", "median", "p95", "p99", "aim"]]
    record: dict[str, Any] = {"frames": options.count, "seconds": options.seconds}
    with tempfile.TemporaryDirectory(prefix="echoquad-") as name:
        work = Path(name)
        frames = make_frames(work / "frames", "rgb-png", options.count, options.frames)
        for precision in precisions:
            found = requests(options.bundle, precision, frames, work / f"requests-{precision}")
            record[f"{precision}, requests"] = found
            rows += [
                [f"{precision}: {label}, ms", *cells(found[key]), f"{ABOVE_MS:g}" if key.startswith("above") else ""]
                for label, key in (
                    ("engine, file to decision", "engine"),
                    ("request", "service"),
                    ("above the engine", "above"),
                    ("above the engine, store in memory", "above_in_memory"),
                )
            ]
            found = live(options.bundle, precision, options.seconds, work / f"live-{precision}")
            record[f"{precision}, live"] = found
            rows.append([f"{precision}: live age at 30/s, ms", *cells(found["age"]), f"p99 {LIVE_MS:g}"])
            share = f"{found['events']} of {found['captured']} frames, {found['dropped']} dropped"
            rows.append([f"{precision}: live, {share}: cores", "", f"{found['cores']:.2f}", "", "", ""])
        found = idle(options.bundle, precisions[-1], options.seconds, work)
        record["idle_percent"] = found
        for label, value in found.items():
            rows.append([f"idle, {label}: % of a core", "", f"{value:.2f}", "", "", f"{IDLE_PERCENT:g}"])
        starts = []
        for number in range(STARTS):
            with Service(options.bundle, work / f"start-{number}", precision=precisions[-1]) as service:
                starts.append(1e3 * service.ready_s)
        record["start_ms"] = starts
        rows.append(
            [
                f"{precisions[-1]}: start to ready, ms",
                f"{min(starts):.0f}",
                f"{statistics.median(starts):.0f}",
                "",
                "",
                "",
            ]
        )
        if options.install:
            record["install_mb"] = installed = added_mb(work)
            rows.append(["extra serve over cpu, MB", "", f"{installed:.1f}", "", "", f"{INSTALL_MB:g}"])
    report("service", rows, record, options.results, threads=options.threads, notes=[note(options)])


def note(options: Any) -> str:
    return (
        f"{options.count} frames of 800x600, one after another; live and idle runs of {options.seconds:g} s. The rows "
        "above the engine are differences of the same frame."
    )


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return the fastest, which other work on the machine does not change, and quantiles, in ms."""
    return {"fastest": min(values)} | quantiles(values)


def cells(found: dict[str, float]) -> list[str]:
    return [f"{found[name]:.2f}" for name in ("fastest", "p50", "p95", "p99")]


def requests(bundle: Path, precision: str, frames: Sequence[Path], folder: Path) -> dict[str, dict[str, float]]:
    """Time each frame in the engine and over HTTP, one after another; see `summary`."""
    folder.mkdir()
    predictor = Predictor(bundle, device="cpu", precision=precision, spinning=False)
    times: dict[str, list[float]] = {"engine": [], "service": [], "in_memory": []}
    with (
        tempfile.TemporaryDirectory(prefix="echoquad-", dir=MEMORY if MEMORY.is_dir() else None) as memory,
        Service(bundle, folder / "disk", precision=precision) as service,
        Service(bundle, folder / "memory", precision=precision, store=Path(memory)) as free,
    ):
        posts = {"service": service.connect(), "in_memory": free.connect()}
        for turn, frame in enumerate([*frames[:WARM_UP], *frames]):
            data = frame.read_bytes()
            calls = {"engine": partial(decide, predictor, frame)}
            calls |= {name: partial(post, connection, data) for name, connection in posts.items()}
            found = {name: timed(call) for name, call in calls.items()}
            if turn >= WARM_UP:
                for name, milliseconds in found.items():
                    times[name].append(milliseconds)
    above = {
        label: [b - a for a, b in zip(times["engine"], times[name], strict=True)]
        for label, name in (("above", "service"), ("above_in_memory", "in_memory"))
    }
    return {name: summary(found) for name, found in (times | above).items()}


def timed(call: Callable[[], object]) -> float:
    """Return the milliseconds of a call, after a pause and a call that wakes the processor, as `time_interleaved`."""
    time.sleep(PAUSE)
    call()
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def decide(predictor: Predictor, frame: Path) -> None:
    list(predictor.predict(frame))


def post(connection: http.client.HTTPConnection, data: bytes) -> None:
    connection.request("POST", "/api/v1/predict?name=frame.png", data, {"Content-Type": "image/png"})
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise SystemExit(f"the service answers {answer.status}: {body.decode()}")


def live(bundle: Path, precision: str, seconds: float, folder: Path) -> dict[str, Any]:
    """Follow the events of a live source, and return the age of each frame when its event arrives."""
    with Service(bundle, folder, f'[live]\nsource = "{LIVE}"\n', precision) as service:
        connection = service.connect()
        connection.request("GET", "/api/v1/events")
        ages: list[float] = []
        events = live_events(connection.getresponse())
        for _ in range(60):  # two seconds in which it starts
            next(events)
        before, cpu, begin = service.get("/api/v1/status")["live"], service.cpu_s(), time.monotonic()
        while time.monotonic() - begin < seconds:
            event = next(events)
            ages.append(1e3 * (time.time() - event["captured"]))
        elapsed, after = time.monotonic() - begin, service.get("/api/v1/status")["live"]
        cores = (service.cpu_s() - cpu) / elapsed
        connection.close()
    return {
        "age": summary(ages),
        "events": len(ages),
        "captured": after["captured"] - before["captured"],
        "dropped": after["dropped"] - before["dropped"],
        "cores": cores,
    }


def live_events(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    name = ""
    while line := answer.readline():
        key, _, value = line.decode().rstrip("\n").partition(": ")
        if key == "event":
            name = value
        elif key == "data" and name == "live":
            yield json.loads(value)


def idle(bundle: Path, precision: str, seconds: float, work: Path) -> dict[str, float]:
    """Return the processor time of services without work, in percent of a core."""
    (work / "watched").mkdir()
    parts = {
        "HTTP alone": "",
        "all parts and an open page": f"""
[dicom]
port = {free_port()}
[[folder]]
path = "{work / "watched"}"
[[destination]]
name = "files"
type = "folder"
path = "{work / "out"}"
[[destination]]
name = "hook"
type = "webhook"
url = "http://127.0.0.1:{free_port()}/"
[[destination]]
name = "pacs"
type = "dicom"
host = "127.0.0.1"
port = {free_port()}
ae_title = "PACS"
""",
    }
    found = {}
    for number, (label, tables) in enumerate(parts.items()):
        with Service(bundle, work / f"idle-{number}", tables, precision) as service, page(service, opened=number > 0):
            time.sleep(2.0)
            cpu = service.cpu_s()
            time.sleep(seconds)
            found[label] = 100 * (service.cpu_s() - cpu) / seconds
    return found


@contextmanager
def page(service: Service, *, opened: bool) -> Iterator[None]:
    """Hold the event stream open, as a page does."""
    if not opened:
        yield
        return
    with socket.create_connection(("127.0.0.1", service.port)) as stream:
        stream.sendall(b"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        yield


def added_mb(work: Path) -> float:
    """Return how many megabytes (10^6 bytes) the extra serve adds to an installation with the extra cpu."""
    root, sizes = Path(__file__).parents[1], {}
    for extras in ("cpu", "cpu,serve"):
        folder = work / extras.replace(",", "-")
        target = ["--quiet", "--disable-pip-version-check", "--target", str(folder), f"{root}[{extras}]"]
        subprocess.run([sys.executable, "-m", "pip", "install", *target], check=True)
        sizes[extras] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    return sizes["cpu,serve"] - sizes["cpu"]


def process_cpu_s(pid: str) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
