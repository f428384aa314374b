"""The audit log: what the service accepted, decided and sent, in files to which entries are only appended.

`echoquad_serve.monitoring.audit_entry` has the form of an entry, and ``docs/reference/audit-log.md`` what the log
proves and what it cannot.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from io import FileIO
from pathlib import Path
from typing import Any, Final, Self

from echoquad_runtime.errors import OutputError
from echoquad_runtime.storage.atomic import make_folder, output_errors, sync_folder
from echoquad_runtime.storage.file_lock import LockedError, lock_descriptor
from echoquad_runtime.storage.regular_file import refuse_link, write_all
from echoquad_serve.monitoring.audit_entry import encode_entry, prepare_fields, site_key
from echoquad_serve.monitoring.audit_head import HEAD, HEAD_BYTES, Head, encode_head, log_file
from echoquad_serve.monitoring.audit_recovery import recover
from echoquad_serve.records import IncomingObject, Job, Result

__all__ = ["AuditLog", "site_key"]

MAX_FILE_BYTES: Final = 1 << 24
MAX_PENDING: Final = 10_000
"""Entries that may wait for a disk that refuses them."""

CLOCK_TOLERANCE_S: Final = 2.0
"""A clock that differs by more from a steady one has been set, or the machine slept: that is an entry too."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Pending:
    ticket: int
    time: float
    steady: float
    event: str
    fields: dict[str, Any]


class AuditLog:
    """An append-only log that is on the disk when `append` returns. Its methods may be called from any thread.

    Entries that several threads append at the same time share one write and one sync.

    Parameters
    ----------
    folder
        Folder of the log; created if it does not exist. One process at a time writes it.
    key
        The site key, see `site_key`.
    senders
        AE titles of the configuration, which are written as they are; others are hashed.
    max_file_bytes
        Size from which a new file is begun. No file is ever removed or changed.
    clock, steady_clock
        Unix time, and a clock that nobody sets, in seconds.

    Raises
    ------
    OutputError
        If the folder cannot be used, or another process writes this log.
    """

    def __init__(
        self,
        folder: Path,
        key: bytes,
        *,
        senders: Collection[str] = (),
        max_file_bytes: int = MAX_FILE_BYTES,
        clock: Callable[[], float] = time.time,
        steady_clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self._key, self._senders, self._max_file_bytes = key, frozenset(senders), max_file_bytes
        self._clock, self._steady_clock = clock, steady_clock
        self._condition = threading.Condition()
        self._pending: deque[_Pending] = deque()
        self._tickets = self._durable = 0
        self._committing = self._closed = self._dirty = False
        self._stream: FileIO | None = None
        make_folder(folder)
        with output_errors(folder / HEAD):
            self._head_stream = self._open_head()
            try:
                self._begin()
            except BaseException:
                self._head_stream.close()
                raise

    @property
    def head(self) -> Head:
        """The end of the log on the disk: note its hash elsewhere, and a log cut back to an older state is found."""
        return self._head

    def append(self, event: str, **fields: Any) -> int:
        """Append an entry, and return its ticket once it is on the disk.

        Parameters
        ----------
        event
            One of `echoquad_serve.monitoring.audit_entry.EVENTS`.
        **fields
            As `echoquad_serve.monitoring.audit_entry.prepare_fields` takes them.

        Raises
        ------
        ValueError
            If the event or a field is unknown, or a value has not the form of its field.
        OutputError
            If it cannot be written. It is kept, and written with the next entry.
        """
        ticket = self.append_nowait(event, **fields)
        self._wait(ticket)
        return ticket

    def append_nowait(self, event: str, **fields: Any) -> int:
        """Append an entry that the next `append` or `flush`, of any thread, writes; return its ticket.

        Raises
        ------
        ValueError
            As `append`.
        OutputError
            If too many entries wait, since the disk refuses them, or the log is closed.
        """
        prepared = prepare_fields(event, fields, self._key, self._senders)
        with self._condition:
            if self._closed or len(self._pending) >= MAX_PENDING:
                reason = "it is closed" if self._closed else f"{MAX_PENDING} entries wait already"
                raise OutputError(f"{self.folder.as_posix()}: the audit log takes no entry ({reason}); check the disk")
            self._tickets += 1
            self._pending.append(_Pending(self._tickets, self._clock(), self._steady_clock(), event, prepared))
            return self._tickets

    def flush(self) -> None:
        """Return once everything that was appended is on the disk.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        with self._condition:
            ticket = self._tickets
        self._wait(ticket)

    def accepted(self, job: Job) -> None:
        """Append that a job was accepted, as `append_nowait`: its sender does not wait for a second flush.

        The job is on the disk already, and the entry that it was decided names the same object.
        """
        self.append_nowait(
            "accepted", job=job.id, origin=job.origin, sender=job.sender, sop_instance_uid=job.sop_instance_uid
        )

    def refused(self, incoming: IncomingObject, code: str) -> None:
        """Append that an object was not accepted, with the code of the error, as `append`."""
        self.append(
            "refused",
            origin=incoming.origin,
            sender=incoming.sender,
            sop_instance_uid=incoming.sop_instance_uid,
            code=code,
        )

    def decided(self, result: Result) -> None:
        """Append how a job ended: the bundle and what it ran on, and the number of frames of each decision."""
        ran = result.rows[0] if result.rows else {}
        self.append(
            "decided",
            job=result.id,
            origin=result.origin,
            sender=result.sender,
            sop_instance_uid=result.sop_instance_uid,
            status=result.status,
            bundle=result.bundle.get("sha256"),
            **{name: _word(ran.get(name)) for name in ("device", "provider", "precision")},
            decisions=dict(Counter(str(row.get("pred_image", ""))[:64] or "none" for row in result.rows)),
            flags=dict(Counter(str(flag)[:64] for row in result.rows for flag in row.get("flags") or () if flag)),
            failures=dict(Counter(failure.get("code") or "E_UNEXPECTED" for failure in result.failures)),
        )

    def delivered(self, result: Result, destination: str, attempts: int = 1) -> None:
        """Append that a destination has a result, as `append`."""
        self.append("delivered", job=result.id, destination=destination, attempts=attempts)

    def delivery_refused(self, result: Result, destination: str, code: str) -> None:
        """Append that a destination refuses a result for good, as `append`."""
        self.append("delivery_refused", job=result.id, destination=destination, code=code)

    def close(self) -> None:
        """Write what waits, and release the folder. Further calls do nothing."""
        with self._condition:
            if self._closed:
                return
            self._closed = True
        try:
            self.flush()
        finally:
            if self._stream is not None:
                self._stream.close()
            self._head_stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_head(self) -> FileIO:
        stream = _open(self.folder / HEAD, os.O_RDWR | os.O_CREAT)
        try:
            lock_descriptor(stream.fileno(), self.folder / HEAD)
        except LockedError as error:
            stream.close()
            raise OutputError(
                f"{self.folder.as_posix()}: another process writes this audit log; expected one; end it"
            ) from error
        return stream

    def _begin(self) -> None:
        """Read where the log ends, and append what the last process left unfinished."""
        found = recover(self.folder, self._head_stream.read(HEAD_BYTES + 1), self._key)
        self._head = found.head
        self._clock_base = self._clock(), self._steady_clock()
        if found.fresh:  # a head from the beginning: a log without one has lost it
            self._write_head()
            os.fsync(self._head_stream.fileno())
            sync_folder(self.folder)
        path = log_file(self.folder, found.file)
        if found.file == self._head.file and path.exists():
            self._stream = _open(path, os.O_WRONLY | os.O_APPEND)
        else:
            self._open_next(found.file)
        if found.fault:
            logger.error("the audit log is damaged or incomplete: run echoquad audit verify")
            self.append("log_fault", reason=found.fault, entries=self._head.entries)
        elif found.torn:
            logger.warning("the audit log ended in an unfinished write, which is now on record")
            self.append("log_repaired", torn=found.torn)
        if found.last_time:
            back = datetime.fromisoformat(found.last_time).timestamp() - self._clock()
            if back > CLOCK_TOLERANCE_S:
                self.append("clock_jump", seconds=-round(back, 3))

    def _wait(self, ticket: int) -> None:
        """Return once the entry with a ticket is on the disk: write it, or wait for the thread that does."""
        while True:
            with self._condition:
                while self._committing and self._durable < ticket:
                    self._condition.wait()
                if self._durable >= ticket:
                    return
                self._committing = True
                batch = list(self._pending)
            written = False
            try:
                self._commit(batch)
                written = True
            finally:
                with self._condition:
                    self._committing = False
                    if written:
                        self._durable = batch[-1].ticket
                        for _ in batch:
                            self._pending.popleft()
                    self._condition.notify_all()

    def _commit(self, batch: Sequence[_Pending]) -> None:
        """Write entries and sync them. On an error the log ends where it did before."""
        seq, digest, lines = self._head.entries, self._head.hash, []
        base = self._clock_base
        for pending in batch:
            jump = (pending.time - base[0]) - (pending.steady - base[1])
            entries = [(pending.event, pending.fields)]
            if abs(jump) > CLOCK_TOLERANCE_S:
                entries.insert(0, ("clock_jump", {"seconds": round(jump, 3)}))
            base = pending.time, pending.steady
            for event, fields in entries:
                seq += 1
                line, digest = encode_entry(seq, digest, pending.time, event, fields, self._key)
                lines.append(line)
        data = b"".join(lines)
        with output_errors(log_file(self.folder, self._head.file)):
            if self._head.bytes and self._head.bytes + len(data) > self._max_file_bytes:
                self._open_next(self._head.file + 1)
            assert self._stream is not None
            if self._dirty:
                self._stream.truncate(self._head.bytes)  # what a failed write left
            self._dirty = True
            try:
                write_all(self._stream, data)
                _sync(self._stream)
            except OSError:
                with contextlib.suppress(OSError):
                    self._stream.truncate(self._head.bytes)
                raise
            self._dirty = False
        self._head = Head(seq, digest, self._head.file, self._head.bytes + len(data))
        self._clock_base = base
        try:
            self._write_head()
        except OSError:  # the entries are on the disk; the next write states their number
            logger.warning("the head file of the audit log cannot be written")

    def _open_next(self, number: int) -> None:
        stream = _open(log_file(self.folder, number), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL)
        sync_folder(self.folder)
        if self._stream is not None:
            self._stream.close()
        self._stream = stream
        self._head = Head(self._head.entries, self._head.hash, number, 0)

    def _write_head(self) -> None:
        self._head_stream.seek(0)
        write_all(self._head_stream, encode_head(self._head, self._key))


def _open(path: Path, flags: int) -> FileIO:
    """Open a file of the log, readable by its owner alone; refuse links and anything but a regular file."""
    refuse_link(path)
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_CLOEXEC"):
        flags |= getattr(os, name, 0)
    descriptor = os.open(path, flags, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OutputError(f"{path.as_posix()}: is no regular file; remove it")
    return FileIO(descriptor, "r+" if flags & os.O_RDWR else "w")


def _word(value: object) -> str:
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", str(value or ""))[:64]


def _sync(stream: FileIO) -> None:
    getattr(os, "fdatasync", os.fsync)(stream.fileno())
