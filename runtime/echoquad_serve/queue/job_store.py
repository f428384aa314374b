"""The job store: what is accepted is on the disk, waits in order, ends in one result, and reaches every destination.

A job goes through three durable steps, each of which is one commit:

1. `JobStore.accept`: the object's file is in the spool, and a row says so. Only then is it acknowledged. It may be
   taken a moment earlier.
2. `JobStore.finish`: its result, a delivery for each destination, and the end of the job.
3. `JobStore.delivered`, once for each destination. After the last one, `JobStore.prune` may remove job and result.

Jobs that are being decided when the service ends wait again at its next start, in their old order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from echoquad_runtime.errors import EchoQuadError
from echoquad_runtime.storage.atomic import make_folder
from echoquad_runtime.storage.file_lock import FileLock, LockedError
from echoquad_serve.config import StoreConfig
from echoquad_serve.errors import StoreError
from echoquad_serve.queue.database import Database
from echoquad_serve.queue.job_queue import MIB, JobQueue
from echoquad_serve.queue.outbox_table import OutboxTable
from echoquad_serve.queue.rows import JOB_COLUMNS, RESULT_COLUMNS, body, job_of, result_of
from echoquad_serve.queue.spool import Spool
from echoquad_serve.queue.taken_file import TakenFile
from echoquad_serve.records import Delivery, IncomingObject, Job, Result

__all__ = ["JobStore"]

logger = logging.getLogger(__name__)

_DAY_S: Final = 86400.0
_MOST: Final = (1 << 63) - 1  # the largest number of SQLite
_PRUNE_BATCH: Final = 100  # results that one transaction removes, so that it does not keep others waiting


class JobStore:
    """The queue, the results and the outbox, in a folder that one process at a time opens.

    Every method may be called from any thread.

    Parameters
    ----------
    config
        The folder and its limits.
    destinations
        Names of the destinations that get each result from now on.

    Attributes
    ----------
    on_result
        Called with each new result, in the thread of `finish`, once the result is recorded.

    Raises
    ------
    StoreError
        If another process holds the folder, it cannot be used, or its database is damaged or newer.
    StorageFullError
        If the disk is full.
    """

    def __init__(self, config: StoreConfig, destinations: Sequence[str] = ()) -> None:
        self.on_result: list[Callable[[Result], None]] = []
        self._config = config
        self._destinations = tuple(destinations)
        self._futures: dict[str, list[Future[Result]]] = {}
        self._futures_lock = threading.Lock()  # not the database's: who cancels a future does not wait for a commit
        self._closed = False
        with contextlib.ExitStack() as undo, _one_line(config.folder):
            if not config.folder.is_dir():
                make_folder(config.folder.parent)
                config.folder.mkdir(mode=0o700, exist_ok=True)
            self._file_lock = _lock(config.folder)
            undo.callback(self._file_lock.release)
            self._spool = Spool(config.folder)
            self._database = Database(config.folder / "queue.sqlite3", create=not self._spool.holds_files())
            undo.callback(self._database.close)
            self._lock = self._database.lock
            self._outbox = OutboxTable(self._database, self._spool, self._destinations)
            taken_file = TakenFile(config.folder / "taken")
            undo.callback(taken_file.release)
            self._queue = self._recover(taken_file)
            self._results: int = self._database.read("SELECT count(*) FROM results")[0][0]
            undo.pop_all()

    def _recover(self, taken_file: TakenFile) -> JobQueue:
        """Bring files and memory in line with the database; return the queue with the jobs that wait from before."""
        missing = self._spool.reconcile({name for (name,) in self._database.read("SELECT file FROM jobs")})
        queue = JobQueue(self._config, self._database, self._spool, taken_file)
        if lost := sum(job.path.name in missing for job in queue.waiting):
            logger.error("%d jobs have no file any more; each ends as failed", lost)
        return queue

    @property
    def incoming(self) -> Path:
        """Folder for files that are being received."""
        return self._spool.incoming

    def accept(self, incoming: IncomingObject) -> Job:
        """Accept an object: on return it is in the queue, and outlasts a crash and a power failure.

        See `JobQueue.accept`, which also says what it raises.
        """
        return self._queue.accept(incoming)

    def check_room(self, bytes_expected: int = 0) -> None:
        """Check whether an object of `bytes_expected` bytes would be accepted, before it is received.

        Raises
        ------
        QueueFullError, StorageFullError
            If the queue or the disk is full.
        """
        self._queue.check_room(bytes_expected)

    def take(self, count: int, timeout: float) -> list[Job]:
        """Return the jobs that wait longest, at most `count`; wait `timeout` seconds for the first.

        Each must end in `finish`. See `JobQueue.take`.
        """
        return self._queue.take(count, timeout)

    def finish(self, result: Result) -> Result:
        """Record the result of a job: in one transaction the result, its deliveries, and the end of the job.

        Raises nothing half-done: after an error the job is as before, and the call may be repeated. A result waits
        until the acceptance of its job is on the disk.

        Returns
        -------
        Result
            With its number, and with the job's own origin, name, sender and UIDs. If the job has a result already, that
            first result.

        Raises
        ------
        KeyError
            If there is no such job, or its object could not be accepted after all. Nobody waits for its result.
        StorageFullError, StoreError
            If the disk is full, or the database cannot be used.
        TypeError
            If a row holds a value that is not of JSON.
        """
        text = body(result)
        self._queue.check_accepted(result.id)
        recorded, first, futures = self._database.write(
            lambda connection: self.result(result.id) or self._record(connection, result, text), self._recorded
        )
        if not first:
            return recorded
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_result(recorded)
        for listener in tuple(self.on_result):
            try:
                listener(recorded)
            except Exception:  # the result is recorded, whatever a listener does
                logger.exception("a listener for results failed")
        return recorded

    def _record(self, connection: sqlite3.Connection, result: Result, text: str) -> Result:
        rows = self._database.read(f"SELECT jobs.seq, {JOB_COLUMNS} FROM jobs WHERE id = ?", result.id)
        if not rows:
            raise KeyError(result.id)
        seq, job = rows[0][0], job_of(rows[0][1:], self._spool.accepted)
        number = connection.execute(
            "INSERT INTO results (seq, finished, settled, body) VALUES (?, ?, ?, ?)",
            (seq, result.finished, None if self._destinations else time.time(), text),
        ).lastrowid
        assert number is not None
        self._outbox.add(connection, number)
        connection.execute("UPDATE jobs SET done = 1 WHERE seq = ?", (seq,))
        return dataclasses.replace(
            result,
            number=number,
            origin=job.origin,
            name=job.name,
            received=job.received,
            sender=job.sender,
            sop_class_uid=job.sop_class_uid,
            sop_instance_uid=job.sop_instance_uid,
        )

    def _recorded(self, result: Result) -> tuple[Result, bool, list[Future[Result]]]:
        """Bring memory in line with a result; return whether it is the job's first, and who waits for it."""
        # Not whether it was just recorded: a commit of which the disk reported an error may have succeeded.
        first = self._queue.end(result.id)
        if first:
            self._results += 1
            self._outbox.added()
        with self._futures_lock:
            return result, first, self._futures.pop(result.id, [])

    def future(self, job_id: str) -> Future[Result]:
        """Return the future of a job's result.

        It raises TimeoutError if the store is closed before there is one. Cancel it if nobody waits any more.

        Raises
        ------
        KeyError
            If there is no such job.
        """
        future: Future[Result] = Future()
        with self._lock:
            if (result := self.result(job_id)) is not None:
                future.set_result(result)
                return future
            if not self._database.read("SELECT 1 FROM jobs WHERE id = ?", job_id):
                raise KeyError(job_id)
            with self._futures_lock:
                self._futures.setdefault(job_id, []).append(future)
        future.add_done_callback(lambda _: self._forget(job_id, future))
        return future

    def _forget(self, job_id: str, future: Future[Result]) -> None:
        with self._futures_lock:
            futures = self._futures.get(job_id, [])
            if future in futures:  # it is cancelled
                futures.remove(future)
            if not futures:
                self._futures.pop(job_id, None)

    def result(self, identifier: str) -> Result | None:
        """Return the result of a job; None if there is none, or it was pruned."""
        found = self._select_results("WHERE jobs.id = ?", identifier)
        return found[0] if found else None

    def results(self, *, before: int | None = None, after: int = 0, limit: int = 100) -> list[Result]:
        """Return results by number.

        Parameters
        ----------
        before
            Only results with a smaller number; None for all.
        after
            Only results with a larger number, in ascending order; 0 for the latest results, latest first.
        limit
            Largest number of results.
        """
        where = "WHERE results.number > ? AND results.number < ? ORDER BY results.number " + (
            "ASC" if after else "DESC"
        )
        return self._select_results(f"{where} LIMIT ?", after, _MOST if before is None else before, limit)

    def _select_results(self, clauses: str, *values: object) -> list[Result]:
        rows = self._database.read(
            f"SELECT {RESULT_COLUMNS} FROM results JOIN jobs ON jobs.seq = results.seq {clauses}", *values
        )
        return [result_of(row) for row in rows]

    def source(self, result_id: str) -> Path | None:
        """Return the file of a job's object; None if it is not kept any more."""
        rows = self._database.read("SELECT file FROM jobs WHERE id = ?", result_id)
        path = self._spool.path(rows[0][0]) if rows else None
        return path if path is not None and path.exists() else None

    def holds(self, sop_instance_uid: str) -> bool:
        """Return whether the object of a SOP instance UID was accepted, and its file is kept."""
        rows = self._database.read("SELECT file FROM jobs WHERE sop_instance_uid = ?", sop_instance_uid)
        return bool(sop_instance_uid) and any(self._spool.path(file).exists() for (file,) in rows)

    def due(self, destination: str, now: float, limit: int) -> list[Delivery]:
        """Return deliveries to a destination whose time has come at the Unix time `now`, oldest result first."""
        return self._outbox.due(destination, now, limit)

    def wait_due(self, destination: str, timeout: float) -> None:
        """Wait until a delivery to a destination may be due, the store is closed, or `timeout` seconds have passed."""
        self._outbox.wait_due(destination, timeout)

    def delivered(self, destination: str, result_id: str) -> None:
        """Record that a destination has a result for good. Without effect if that is recorded already.

        Raises
        ------
        StorageFullError, StoreError
            If it cannot be recorded: the result is sent again.
        """
        self._outbox.delivered(destination, result_id)

    def postpone(self, destination: str, result_id: str, retry_at: float, error: str) -> None:
        """Record a failed attempt; the delivery is due again at the Unix time `retry_at`, or after a restart.

        Raises
        ------
        StorageFullError, StoreError
            If it cannot be recorded: the delivery stays due.
        """
        self._outbox.failed(destination, result_id, retry_at, error, refused=False)

    def refused(self, destination: str, result_id: str, error: str) -> None:
        """Record that a destination refuses a result for good. It is kept, and not sent until `send_again`.

        Raises
        ------
        StorageFullError, StoreError
            If it cannot be recorded: the delivery stays due.
        """
        self._outbox.failed(destination, result_id, 0.0, error, refused=True)

    def send_again(self, destination: str) -> int:
        """Make every delivery that a destination has postponed or refused due now; return their number."""
        return self._outbox.send_again(destination)

    def discard(self, destination: str) -> int:
        """Discard all that a destination has not received; return how many results that is.

        Raises
        ------
        StorageFullError, StoreError
            If it cannot be recorded.
        """
        return self._outbox.discard(destination)

    def status(self) -> dict[str, Any]:
        """Return the state of queue, disk and outbox.

        Returns
        -------
        dict
            ``waiting``, ``oldest_waiting_s``, ``in_progress``, ``results``, ``free_mb``, ``full`` (whether intake stops
            for want of space), and ``destinations``: by name ``waiting``, ``refused``, ``oldest_s`` and ``last_error``,
            also of a destination that is not configured any more and has results outstanding.
        """
        now, free_mb = time.time(), 0
        with contextlib.suppress(OSError):  # a disk that cannot be asked takes nothing
            free_mb = self._spool.free_bytes() // MIB
        with self._lock:
            return {
                **self._queue.status(now),
                "results": self._results,
                "free_mb": free_mb,
                "full": free_mb < self._config.min_free_mb,
                "destinations": self._outbox.status(now),
            }

    def prune(self, now: float) -> int:
        """Remove results, with the files of their objects, `keep_days` after the last destination has them.

        Parameters
        ----------
        now
            Unix time.

        Returns
        -------
        int
            How many results were removed.
        """
        removed = 0
        while True:
            with self._lock:
                rows = self._database.read(
                    "SELECT results.number, jobs.seq, jobs.file FROM results JOIN jobs ON jobs.seq = results.seq "
                    "WHERE results.settled < ? AND NOT EXISTS "
                    "(SELECT 1 FROM deliveries WHERE deliveries.number = results.number) LIMIT ?",
                    now - self._config.keep_days * _DAY_S,
                    _PRUNE_BATCH,
                )
                if not rows:
                    return removed
                for _, _, file in rows:  # before their rows, so that no file is left without a row
                    self._spool.remove(file)
                with self._database.transaction() as connection:
                    connection.executemany("DELETE FROM results WHERE number = ?", [row[:1] for row in rows])
                    connection.executemany("DELETE FROM jobs WHERE seq = ?", [row[1:2] for row in rows])
                self._results -= len(rows)
            removed += len(rows)

    def close(self) -> None:
        """End every wait, close the database and unlock the folder. Later calls raise `StoreError`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._queue.close()
            self._outbox.close()
            self._database.close()
        with self._futures_lock:
            futures = [future for waiting in self._futures.values() for future in waiting]
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(TimeoutError("the store is closed; the object stays in the queue"))
        self._file_lock.release()


@contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """Raise what the system refuses about a folder as an error of one line."""
    try:
        yield
    except EchoQuadError:
        raise
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StoreError(f"{folder.as_posix()}: cannot be used ({reason}); check space and permissions") from error


def _lock(folder: Path) -> FileLock:
    try:
        lock = FileLock(folder / "lock")
    except LockedError as error:
        raise StoreError(
            f"{folder.as_posix()}: another service uses this folder; stop it, or configure another folder"
        ) from error
    if not lock.certain:
        logger.warning("the file system has no locks: nothing keeps a second service from using the folder")
    return lock
