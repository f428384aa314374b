"""The outbox: which results a destination does not have yet. A delivery that succeeds leaves the table."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from echoquad_serve.queue.database import Database
from echoquad_serve.queue.rows import RESULT_COLUMNS, result_of
from echoquad_serve.queue.spool import Spool
from echoquad_serve.records import Delivery

__all__ = ["OutboxTable"]

_LONGEST_ERROR: Final = 500  # characters


@dataclass(slots=True)
class _Count:
    waiting: int = 0
    refused: int = 0


class OutboxTable:
    """Deliveries to all destinations.

    Parameters
    ----------
    database
        Its database. All postponed deliveries are made due: a restart may have cured what failed, and the clock of a
        cart may have been wrong when they were postponed.
    spool
        Where the objects' files are.
    destinations
        Names of the configured destinations.

    Raises
    ------
    StorageFullError, StoreError
        If the database cannot be used.
    """

    def __init__(self, database: Database, spool: Spool, destinations: Sequence[str]) -> None:
        self._database = database
        self._spool = spool
        self._destinations = destinations
        self._changed = threading.Condition(database.lock)
        self._closed = False
        self._last_errors: dict[str, str] = {}
        self._counts: dict[str, _Count] = {}  # in memory, since a destination that is away has very many deliveries
        with database.transaction() as connection:
            connection.execute("UPDATE deliveries SET retry_at = 0 WHERE refused = 0 AND retry_at > 0")
        self._last_errors.update(
            database.read("SELECT destination, error FROM deliveries WHERE error <> '' ORDER BY number")
        )
        self._count()

    def _count(self) -> None:
        rows = self._database.read(
            "SELECT destination, sum(refused = 0), sum(refused) FROM deliveries GROUP BY destination"
        )
        self._counts = {name: _Count() for name in self._destinations}
        self._counts.update((destination, _Count(waiting, refused)) for destination, waiting, refused in rows)

    def add(self, connection: sqlite3.Connection, number: int) -> None:
        """Add the deliveries of a result, in a transaction. After its commit call `added`."""
        connection.executemany(
            "INSERT INTO deliveries (destination, number) VALUES (?, ?)",
            [(destination, number) for destination in self._destinations],
        )

    def added(self) -> None:
        """Count the deliveries of a result, and wake the senders."""
        with self._changed:
            for destination in self._destinations:
                self._counts[destination].waiting += 1
            self._changed.notify_all()

    def due(self, destination: str, now: float, limit: int) -> list[Delivery]:
        """Return deliveries that are due at the Unix time `now`, oldest result first."""
        rows = self._database.read(
            f"SELECT deliveries.attempts, jobs.file, {RESULT_COLUMNS} FROM deliveries "
            "JOIN results ON results.number = deliveries.number JOIN jobs ON jobs.seq = results.seq "
            "WHERE deliveries.destination = ? AND deliveries.refused = 0 AND deliveries.retry_at <= ? "
            "ORDER BY deliveries.number LIMIT ?",
            destination,
            now,
            limit,
        )
        deliveries = []
        for attempts, file, *row in rows:
            source = self._spool.path(file)
            deliveries.append(Delivery(result_of(tuple(row)), source if source.exists() else None, attempts))
        return deliveries

    def wait_due(self, destination: str, timeout: float) -> None:
        """Wait until a delivery may be due, at most `timeout` seconds; return at once if the store is closed."""
        end = time.monotonic() + timeout
        with self._changed:
            while not self._closed:
                pause = end - time.monotonic()
                rows = self._database.read(
                    "SELECT retry_at FROM deliveries WHERE destination = ? AND refused = 0 ORDER BY retry_at LIMIT 1",
                    destination,
                )
                if rows:
                    pause = min(pause, rows[0][0] - time.time())
                if pause <= 0:
                    return
                self._changed.wait(pause)

    def delivered(self, destination: str, result_id: str) -> None:
        """Record that a destination has a result; the last one settles the result."""

        def apply(connection: sqlite3.Connection) -> bool | None:
            if (found := self._find(destination, result_id)) is None:
                return None
            number, refused = found
            connection.execute("DELETE FROM deliveries WHERE destination = ? AND number = ?", (destination, number))
            _settle(connection, number)
            return refused

        def committed(refused: bool | None) -> None:
            if refused is None:
                return
            count = self._counts[destination]
            count.waiting, count.refused = count.waiting - (not refused), count.refused - refused
            if not count.refused:
                self._last_errors.pop(destination, None)

        self._database.write(apply, committed)

    def failed(self, destination: str, result_id: str, retry_at: float, error: str, *, refused: bool) -> None:
        """Record an attempt that failed, until the Unix time `retry_at` or for good."""
        error = error[:_LONGEST_ERROR].encode("ascii", "backslashreplace").decode()

        def apply(connection: sqlite3.Connection) -> int | None:
            if (found := self._find(destination, result_id)) is None:
                return None
            number, before = found
            connection.execute(
                "UPDATE deliveries SET attempts = attempts + 1, retry_at = ?, error = ?, refused = ? "
                "WHERE destination = ? AND number = ?",
                (retry_at, error, refused, destination, number),
            )
            return refused - before

        def committed(change: int | None) -> None:
            if change is None:
                return
            count = self._counts[destination]
            count.waiting, count.refused = count.waiting - change, count.refused + change
            self._last_errors[destination] = error

        self._database.write(apply, committed)

    def _find(self, destination: str, result_id: str) -> tuple[int, bool] | None:
        """Return number and refusal of a delivery that is outstanding."""
        rows = self._database.read(
            "SELECT deliveries.number, refused FROM jobs JOIN results ON results.seq = jobs.seq "
            "JOIN deliveries ON deliveries.number = results.number AND deliveries.destination = ? WHERE jobs.id = ?",
            destination,
            result_id,
        )
        return (rows[0][0], bool(rows[0][1])) if rows else None

    def send_again(self, destination: str) -> int:
        """Make postponed and refused deliveries due now; return their number."""
        with self._changed:
            with self._database.transaction() as connection:
                changed = connection.execute(
                    "UPDATE deliveries SET retry_at = 0, refused = 0 "
                    "WHERE destination = ? AND (refused = 1 OR retry_at > 0)",
                    (destination,),
                ).rowcount
            self._count()
            self._changed.notify_all()
        return changed

    def discard(self, destination: str) -> int:
        """Remove all deliveries to a destination; return their number."""
        with self._changed:
            with self._database.transaction() as connection:
                rows = self._database.read("SELECT number FROM deliveries WHERE destination = ?", destination)
                connection.execute("DELETE FROM deliveries WHERE destination = ?", (destination,))
                for (number,) in rows:
                    _settle(connection, number)
            self._last_errors.pop(destination, None)
            self._count()
        return len(rows)

    def status(self, now: float) -> dict[str, dict[str, Any]]:
        """Return ``waiting``, ``refused``, ``oldest_s`` (age of the oldest result that waits) and ``last_error``."""
        status = {}
        for destination, count in self._counts.items():
            rows = self._database.read(
                "SELECT finished FROM deliveries JOIN results ON results.number = deliveries.number "
                "WHERE destination = ? AND refused = 0 ORDER BY deliveries.number LIMIT 1",
                destination,
            )
            status[destination] = {
                "waiting": count.waiting,
                "refused": count.refused,
                "oldest_s": max(0.0, now - rows[0][0]) if rows else 0.0,
                "last_error": self._last_errors.get(destination, ""),
            }
        return status

    def close(self) -> None:
        """End every `wait_due`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _settle(connection: sqlite3.Connection, number: int) -> None:
    """Note that every destination has a result, if that is so."""
    connection.execute(
        "UPDATE results SET settled = ? WHERE number = ? "
        "AND NOT EXISTS (SELECT 1 FROM deliveries WHERE deliveries.number = results.number)",
        (time.time(), number),
    )
