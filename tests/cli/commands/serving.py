"""A command that serves, as a process: its lines up to the address of the page, requests to it, and its end."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Serving:
    """A started `echoquad serve`, or `echoquad demo --serve`.

    Attributes
    ----------
    lines
        What it has printed on stderr.
    """

    process: subprocess.Popen[bytes]
    lines: list[str] = field(default_factory=list)

    def address(self) -> str:
        """Return the address of the page, once the service is ready."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.decode().rstrip())
            if found := re.search(r"ready.*: (http://127\.0\.0\.1:\d+/)", self.lines[-1]):
                return found[1]
        raise AssertionError("\n".join(self.lines))

    def end(self, number: signal.Signals) -> tuple[int, list[str]]:
        """Send a signal; return the exit code and the lines after the address, without those of the log."""
        self.process.send_signal(number)
        assert self.process.stderr is not None
        rest = self.process.stderr.read()  # not communicate(), which misses what was read ahead with the lines
        return self.process.wait(timeout=30), [line for line in rest.decode().splitlines() if not line.startswith("{")]


def get(address: str) -> bytes:
    """Return the body of an answer that has status 200."""
    with urllib.request.urlopen(address, timeout=30) as answer:
        return bytes(answer.read())


def predict(address: str, frame: Path) -> Any:
    """Return the result of a frame."""
    url = f"{address}api/v1/predict?name={frame.name}"
    request = urllib.request.Request(url, frame.read_bytes(), {"Content-Type": "image/png"})
    return json.loads(get(request))  # type: ignore[arg-type]
