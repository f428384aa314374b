"""`echoquad serve` as a process of its own: started, asked, measured, stopped, and killed."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

READY_S = 60.0
PAGE = 500  # results in one answer


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], Any], seconds: float = 60.0, what: str = "it") -> Any:
    """Return the first true value of `condition`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} has not happened within {seconds:g} s"
        time.sleep(0.03)
    return value


def destination_tables(hook: str, archive_port: int, *, hook_options: str = "", archive_options: str = "") -> str:
    """Return the tables of three destinations: a folder, a webhook at a URL, and an archive."""
    return f"""
[[destination]]
name = "files"
type = "folder"
path = "out"
[[destination]]
name = "hook"
type = "webhook"
url = "{hook}"
{hook_options}
[[destination]]
name = "pacs"
type = "dicom"
host = "127.0.0.1"
port = {archive_port}
ae_title = "PACS"
{archive_options}
"""


COMMITTED = 'commitment = true\norigins = ["dicom"]'
"""Options of an archive that confirms what it keeps."""


class ServiceProcess:
    """The service of a bundle.

    Parameters
    ----------
    bundle
        The bundle.
    folder
        For its configuration, its store ``store`` and its log.
    tables
        Further tables of the configuration, TOML.
    store
        Further lines of ``[store]``.
    """

    def __init__(self, bundle: Path, folder: Path, tables: str = "", store: str = "min_free_mb = 0") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.bundle, self.folder = bundle, folder
        self.store, self.log = folder / "store", folder / "log.txt"
        self.port = free_port()
        self.starts = 0
        self.extra_environment: dict[str, str] = {}
        self._config = folder / "service.toml"
        self.process: subprocess.Popen[bytes] | None = None
        self.configure(tables, store)

    def configure(self, tables: str, store: str = "min_free_mb = 0") -> None:
        """Write the configuration, which the next start reads."""
        where = "" if "folder =" in store else 'folder = "store"\n'
        self._config.write_text(f"[http]\nport = {self.port}\n[store]\n{where}{store}\n{tables}\n", "utf-8")

    def start(self, *, wait: bool = True) -> ServiceProcess:
        command = [sys.executable, "-m", "echoquad", "serve", str(self.bundle), "--config", str(self._config)]
        environment = os.environ | {"PYTHONFAULTHANDLER": "1"} | self.extra_environment
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder, env=environment
            )
        self.starts += 1
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self) -> None:
        wait_until(self.is_ready, READY_S, "readiness")

    def is_ready(self) -> bool:
        assert self.process is not None and self.process.poll() is None, self.log.read_text("utf-8", "replace")[-3000:]
        try:
            return self.request("GET", "/api/v1/ready", timeout=5)[0] == 200
        except OSError:
            return False

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """End the process as a power cut of the process does: SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self, seconds: float = 30.0) -> int:
        """Stop in good order; return the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    # HTTP

    def connect(self, timeout: float = 30.0) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def request(
        self, method: str, target: str, body: bytes | None = None, timeout: float = 30.0, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers with lower-case names, and body; underscores of header names become hyphens."""
        connection = self.connect(timeout)
        try:
            connection.request(method, target, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        except http.client.IncompleteRead as error:  # the service crashed within its answer
            raise ConnectionResetError(str(error)) from error
        finally:
            connection.close()

    def get(self, target: str) -> Any:
        status, _, body = self.request("GET", target)
        assert status == 200, body
        return json.loads(body)

    def predict(self, body: bytes, name: str, key: str = "", *, wait: bool = True) -> tuple[int, Any]:
        headers = {"Idempotency_Key": key} if key else {}
        status, _, answer = self.request("POST", f"/api/v1/predict?name={name}&wait={int(wait)}", body, **headers)
        return status, json.loads(answer)

    def status(self) -> Any:
        return self.get("/api/v1/status")

    def destination(self, name: str) -> Any:
        return next(one for one in self.status()["destinations"] if one["name"] == name)

    def results(self) -> list[dict[str, Any]]:
        """Return all results, in the order of their numbers."""
        return list(self._pages())

    def _pages(self) -> Iterator[dict[str, Any]]:
        after = 0
        while True:
            page = self.get(f"/api/v1/results?after={after}&limit={PAGE}")["results"]
            yield from page
            if len(page) < PAGE:
                return
            after = page[-1]["number"]

    def wait_settled(self, seconds: float = 60.0) -> None:
        """Wait until nothing waits, neither for a decision nor for a destination, as long as there is any progress."""
        least, end = self.outstanding(), time.monotonic() + seconds
        while (now := self.outstanding()) > 0:
            if now < least:
                least, end = now, time.monotonic() + seconds
            assert time.monotonic() < end, f"{now} things wait, without progress: {json.dumps(self.status(), indent=1)}"
            time.sleep(0.05)

    def outstanding(self) -> int:
        """Return how many files, jobs and deliveries wait."""
        status = self.status()
        folders = status["intake"]["folder"] or ()
        waiting = sum(int(one["waiting"]) for one in (*status["destinations"], *folders))
        return waiting + int(status["queue"]["waiting"]) + int(status["queue"]["in_progress"])

    # /proc

    def memory_mb(self) -> float:
        """Return the resident memory."""
        return int(self._proc_status()["VmRSS"].split()[0]) / 1024

    def threads(self) -> int:
        return int(self._proc_status()["Threads"])

    def descriptors(self) -> list[str]:
        """Return what the open descriptors refer to."""
        assert self.process is not None
        found = []
        for path in Path(f"/proc/{self.process.pid}/fd").iterdir():
            try:
                found.append(str(path.readlink()))
            except FileNotFoundError:  # closed meanwhile
                continue
        return sorted(found)

    def cpu_s(self) -> float:
        """Return the processor seconds of the process and of the children that it has waited for."""
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def _proc_status(self) -> dict[str, str]:
        assert self.process is not None
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
