"""The outbox's part of the job store, in memory."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echoquad_serve.records import Delivery, Result


@dataclass
class Entry:
    result: Result
    source: Path | None
    attempts: int = 0
    retry_at: float = 0.0
    error: str = ""
    refused: bool = False


class FakeStore:
    def __init__(self, *destinations: str) -> None:
        self.entries: dict[str, dict[str, Entry]] = {name: {} for name in destinations}
        self.changed = threading.Condition()
        self.fail: Exception | None = None

    def add(self, result: Result, source: Path | None = None) -> None:
        with self.changed:
            for entries in self.entries.values():
                entries[result.id] = Entry(result, source)
            self.changed.notify_all()

    def due(self, destination: str, now: float, limit: int) -> list[Delivery]:
        with self.changed:
            if self.fail is not None:
                raise self.fail
            entries = sorted(self.entries[destination].values(), key=lambda entry: entry.result.number)
            ready = [entry for entry in entries if not entry.refused and entry.retry_at <= now]
            return [Delivery(entry.result, entry.source, entry.attempts) for entry in ready[:limit]]

    def delivered(self, destination: str, result_id: str) -> None:
        with self.changed:
            self.entries[destination].pop(result_id, None)
            self.changed.notify_all()

    def postpone(self, destination: str, result_id: str, retry_at: float, error: str) -> None:
        self._failed(destination, result_id, retry_at, error, refused=False)

    def refused(self, destination: str, result_id: str, error: str) -> None:
        self._failed(destination, result_id, 0.0, error, refused=True)

    def _failed(self, destination: str, result_id: str, retry_at: float, error: str, *, refused: bool) -> None:
        with self.changed:
            entry = self.entries[destination][result_id]
            entry.attempts += 1
            entry.retry_at, entry.error, entry.refused = retry_at, error, refused
            self.changed.notify_all()

    def send_again(self, destination: str) -> int:
        with self.changed:
            chosen = [entry for entry in self.entries[destination].values() if entry.refused or entry.retry_at]
            for entry in chosen:
                entry.refused, entry.retry_at = False, 0.0
            self.changed.notify_all()
            return len(chosen)

    def wait_due(self, destination: str, timeout: float) -> None:
        with self.changed:
            if not self.due(destination, time.time(), 1):
                self.changed.wait(timeout)

    def wait_until(self, condition: Any, timeout: float = 60.0) -> None:
        """Wait until `condition()` is true; fail otherwise."""
        with self.changed:
            end = time.monotonic() + timeout
            while not condition():
                assert time.monotonic() < end, "the condition has not come true"
                self.changed.wait(0.05)

    def status(self) -> dict[str, Any]:
        with self.changed:
            return {
                "destinations": {
                    name: {
                        "waiting": sum(not entry.refused for entry in entries.values()),
                        "refused": sum(entry.refused for entry in entries.values()),
                        "oldest_s": 0.0,
                        "last_error": next((entry.error for entry in entries.values() if entry.error), ""),
                    }
                    for name, entries in self.entries.items()
                }
            }
