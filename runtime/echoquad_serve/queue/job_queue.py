"""The queue: objects are accepted into it, and jobs are taken from it, first in, first out.

A job may be taken while its acceptance is still being flushed to the disk, since both take milliseconds, and a sender
waits for both. `JobQueue.check_accepted` keeps its result back until the acceptance is on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Final

from echoquad_serve.config import StoreConfig
from echoquad_serve.errors import IntakeError, QueueFullError, StorageFullError, StoreError
from echoquad_serve.queue.database import STORAGE_RETRY_S, Database
from echoquad_serve.queue.rows import JOB_COLUMNS, about, job_of, key_digest
from echoquad_serve.queue.spool import Spool
from echoquad_serve.queue.taken_file import TakenFile
from echoquad_serve.records import IncomingObject, Job

__all__ = ["MIB", "JobQueue"]

MIB: Final = 1 << 20
"""Bytes of a MiB."""

_FULL_ERRNOS: Final = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})


class JobQueue:
    """Jobs that wait, and jobs that are being decided. After a crash the latter wait again, in their old order.

    Parameters
    ----------
    config
        Limits of the queue.
    database
        Where the jobs are.
    spool
        Where their files are.
    taken_file
        Where it is noted which are being decided. Those of a process that has crashed count as interrupted.

    Raises
    ------
    StorageFullError, StoreError
        If the disk is full, or the database cannot be used.
    """

    def __init__(self, config: StoreConfig, database: Database, spool: Spool, taken_file: TakenFile) -> None:
        self._config = config
        self._database = database
        self._spool = spool
        # Guards what is in memory. A thread that holds it does not use the database, whose commits take long.
        self._lock = threading.RLock()
        self._arrived = threading.Condition(self._lock)
        self._taken_file = taken_file
        with database.transaction() as connection:
            connection.executemany(
                "UPDATE jobs SET interrupted = interrupted + 1 WHERE id = ? AND done = 0",
                [(identifier,) for identifier in taken_file.from_before],
            )
        taken_file.write(())
        rows = database.read(f"SELECT {JOB_COLUMNS} FROM jobs WHERE done = 0 ORDER BY seq")
        self._waiting = deque(job_of(row, spool.accepted) for row in rows)
        last = database.read("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'")
        self._seq = itertools.count(last[0][0] + 1 if last else 1)
        self._taken: dict[str, Job] = {}
        self._arriving = 0  # objects on their way into the queue, which have a place in it
        self._acceptances: dict[str, Future[bool]] = {}  # of jobs that are in the queue, but not yet on the disk
        self._closed = False

    @property
    def waiting(self) -> Sequence[Job]:
        """Jobs that wait, in their order."""
        with self._lock:
            return tuple(self._waiting)

    def status(self, now: float) -> dict[str, Any]:
        """Return ``waiting``, ``oldest_waiting_s`` at the Unix time `now`, and ``in_progress``."""
        with self._lock:
            return {
                "waiting": len(self._waiting),
                "oldest_waiting_s": max(0.0, now - self._waiting[0].received) if self._waiting else 0.0,
                "in_progress": len(self._taken),
            }

    def accept(self, incoming: IncomingObject) -> Job:
        """Accept an object: on return it is in the queue, and outlasts a crash and a power failure.

        Its file leaves the folder `incoming` in any case: it moves into the spool, or is removed if the object is
        refused or was accepted before.

        Returns
        -------
        Job
            The new job, or the first one with the same origin and key, which may be finished.

        Raises
        ------
        QueueFullError, StorageFullError
            If the queue or the disk is full.
        IntakeError
            If the object cannot be stored for another reason. Like the two above it leaves nothing behind.
        ValueError
            If the file is not in `incoming`. It is not touched.
        """
        if incoming.path.parent != self._spool.incoming:
            raise ValueError("the file is not in the store's folder for incoming files")
        try:
            return self._accept(incoming)
        except IntakeError:
            raise
        except (OSError, StoreError) as error:
            if isinstance(error, OSError) and error.errno in _FULL_ERRNOS:
                raise StorageFullError("the disk is full; try again later", STORAGE_RETRY_S) from error
            reason = (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
            raise IntakeError(f"the object cannot be stored ({reason}); try again later", STORAGE_RETRY_S) from error
        finally:
            with contextlib.suppress(OSError):
                incoming.path.unlink()

    def _accept(self, incoming: IncomingObject) -> Job:
        key = key_digest(incoming)
        if (known := self._job_with_key(key)) is not None:
            return known
        with self._lock:
            self._check_queue()
            self._arriving += 1
        job = self._new_job(incoming)
        try:
            self._check_disk(0)
            self._spool.move_in(incoming.path, job.path.name)
            seq = self._offer(job)
            self._spool.sync(job.path.name)
            self._check_disk(0)
            recorded = self._record(job, seq, key, about(incoming))
        except BaseException:
            self._withdraw(job)
            self._undo(job)
            raise
        if recorded is not job:  # another thread was faster with the same key
            self._withdraw(job)
            self._spool.remove(job.path.name)
        return recorded

    def _offer(self, job: Job) -> int:
        """Offer a job to `take`, before it is on the disk; return its place in the order."""
        with self._arrived:
            self._arriving -= 1
            self._acceptances[job.id] = Future()
            self._waiting.append(job)
            self._arrived.notify()
            return next(self._seq)

    def _withdraw(self, job: Job) -> None:
        """Take a job back that is not accepted after all. If it is being decided, it gets no result."""
        with self._lock:
            acceptance = self._acceptances.pop(job.id, None)
            if acceptance is None:  # not offered yet
                self._arriving -= 1
            else:
                self.end(job.id)
                acceptance.set_result(False)

    def check_accepted(self, job_id: str) -> None:
        """Wait until the acceptance of a job is on the disk.

        Raises
        ------
        KeyError
            If it could not be brought there, and the object was refused.
        """
        with self._lock:
            acceptance = self._acceptances.get(job_id)
        if acceptance is not None and not acceptance.result():
            raise KeyError(job_id)

    def _new_job(self, incoming: IncomingObject) -> Job:
        identifier, now = os.urandom(16).hex(), time.time()
        limits = [incoming.deadline, None if self._config.deadline_s is None else now + self._config.deadline_s]
        return Job(
            id=identifier,
            path=self._spool.path(self._spool.name(identifier, incoming.path)),
            received=now,
            origin=incoming.origin,
            name=incoming.name,
            sender=incoming.sender,
            sop_class_uid=incoming.sop_class_uid,
            sop_instance_uid=incoming.sop_instance_uid,
            deadline=min((limit for limit in limits if limit is not None), default=None),
        )

    def _record(self, job: Job, seq: int, key: bytes | None, text: str) -> Job:
        """Commit the row of a job; return the job that has its key already instead, if there is one."""

        def apply(connection: sqlite3.Connection) -> Job:
            if (known := self._job_with_key(key)) is not None:
                return known
            connection.execute(
                "INSERT INTO jobs (seq, id, key, file, received, deadline, sop_instance_uid, about) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (seq, job.id, key, job.path.name, job.received, job.deadline, job.sop_instance_uid, text),
            )
            return job

        def committed(recorded: Job) -> Job:
            if recorded is job:
                with self._lock:
                    self._acceptances.pop(job.id).set_result(True)
            return recorded

        return self._database.write(apply, committed)

    def _undo(self, job: Job) -> None:
        """Remove what there is of a job that is not accepted."""
        # A commit of which the disk reported an error may have succeeded.
        with contextlib.suppress(StoreError, StorageFullError):
            if self._database.read("SELECT 1 FROM jobs WHERE id = ?", job.id):
                with self._database.transaction() as connection:
                    connection.execute("DELETE FROM jobs WHERE id = ?", (job.id,))
        self._spool.remove(job.path.name)

    def _job_with_key(self, key: bytes | None) -> Job | None:
        if key is None:
            return None
        rows = self._database.read(f"SELECT {JOB_COLUMNS} FROM jobs WHERE key = ?", key)
        return job_of(rows[0], self._spool.accepted) if rows else None

    def check_room(self, bytes_expected: int = 0) -> None:
        """Check whether an object would be accepted, before it is received.

        Parameters
        ----------
        bytes_expected
            Its size in bytes.

        Raises
        ------
        QueueFullError, StorageFullError
            If the queue or the disk is full.
        """
        self._check_queue()
        try:
            self._check_disk(bytes_expected)
        except OSError as error:
            if isinstance(error, IntakeError):
                raise
            raise IntakeError(f"the disk cannot be read ({error.strerror}); try again later") from error

    def _check_queue(self) -> None:
        with self._lock:
            waiting = len(self._waiting) + self._arriving
        if waiting >= self._config.max_waiting:
            raise QueueFullError(f"{waiting} objects wait, as many as the queue may hold; try again later")

    def _check_disk(self, bytes_expected: int) -> None:
        free = (self._spool.free_bytes() - bytes_expected) // MIB
        if free < self._config.min_free_mb:
            message = f"{max(free, 0)} MiB of the disk would be free, and intake needs {self._config.min_free_mb} MiB"
            raise StorageFullError(f"{message}; try again later", STORAGE_RETRY_S)

    def take(self, count: int, timeout: float) -> list[Job]:
        """Return the jobs that wait longest, and mark them as being decided.

        Each must end in `JobStore.finish`. A job whose deadline has passed is among them: `Job.expired` says so, and it
        ends with the status ``expired``, unread. A job during which the service has crashed is taken alone, so that a
        second crash counts against it alone.

        Parameters
        ----------
        count
            Largest number of jobs.
        timeout
            Seconds to wait for the first.

        Returns
        -------
        list of Job
            In the order of acceptance; empty after `timeout` seconds, or once the store is closed.
        """
        with self._arrived:
            self._arrived.wait_for(lambda: self._waiting or self._closed, timeout)
            if self._closed:
                return []
            jobs: list[Job] = []
            while len(jobs) < count and self._waiting:
                alone = self._waiting[0].interrupted > 0
                if alone and jobs:
                    break
                jobs.append(self._waiting.popleft())
                if alone:
                    break
            if jobs:
                self._taken.update((job.id, job) for job in jobs)
                self._taken_file.write(self._taken)
            return jobs

    def end(self, job_id: str) -> bool:
        """Forget a job, which has its result; return False if that was done before."""
        with self._lock:
            if self._taken.pop(job_id, None) is not None:
                return True
            if (job := next((job for job in self._waiting if job.id == job_id), None)) is not None:  # it was not taken
                self._waiting.remove(job)
            return job is not None

    def close(self) -> None:
        """End every `take`."""
        with self._arrived:
            self._closed = True
            self._taken_file.close()
            self._arrived.notify_all()
