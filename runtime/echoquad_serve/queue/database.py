"""The SQLite database of the queue: one connection, one lock, and durable transactions.

Several connections to a database in WAL mode can corrupt it in SQLite 3.7.0 to 3.51.2. Here is one connection, with a
rollback journal. A commit that deletes the journal is durable with ``synchronous=EXTRA`` alone; in the journal mode
TRUNCATE ``synchronous=FULL`` flushes the end of the journal too.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from echoquad_serve.errors import StorageFullError, StoreError

__all__ = ["STORAGE_RETRY_S", "Database"]

STORAGE_RETRY_S: Final = 60.0
"""Seconds after which a sender may ask whether the disk has space again."""

_APPLICATION_ID: Final = 0x45515356  # "EQSV"
_VERSION: Final = 1

_SCHEMA: Final = """
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order of acceptance
    id TEXT NOT NULL UNIQUE,
    key BLOB UNIQUE,                        -- digest of origin and key; NULL without a key
    file TEXT NOT NULL,
    received REAL NOT NULL,
    deadline REAL,
    sop_instance_uid TEXT NOT NULL,         -- empty for what is not DICOM
    about TEXT NOT NULL,                    -- JSON: origin, name and sender of the object, SOP class UID
    interrupted INTEGER NOT NULL DEFAULT 0, -- crashes of the service while it decided the job
    done INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX jobs_open ON jobs (seq) WHERE done = 0;
CREATE INDEX jobs_sop ON jobs (sop_instance_uid) WHERE sop_instance_uid <> '';
CREATE TABLE results (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    seq INTEGER NOT NULL UNIQUE,            -- the job
    finished REAL NOT NULL,
    settled REAL,                           -- when the last destination had it; NULL before
    body TEXT NOT NULL                      -- JSON: status, rows, failures, bundle, timings
);
CREATE INDEX results_settled ON results (settled) WHERE settled IS NOT NULL;
CREATE TABLE deliveries (                   -- what a destination does not have yet
    destination TEXT NOT NULL,
    number INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    retry_at REAL NOT NULL DEFAULT 0,
    refused INTEGER NOT NULL DEFAULT 0,
    error TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (destination, number)
) WITHOUT ROWID;
CREATE INDEX deliveries_number ON deliveries (number);
CREATE INDEX deliveries_due ON deliveries (destination, retry_at) WHERE refused = 0;
"""


_Value = TypeVar("_Value")
_Answer = TypeVar("_Answer")


@dataclass(slots=True)
class _Write:
    apply: Callable[[sqlite3.Connection], Any]
    committed: Callable[[Any], Any]
    answer: object = None
    error: BaseException | None = None
    ended: bool = False


class Database:
    """The database, which only this process opens.

    Parameters
    ----------
    path
        Its file.
    create
        Whether an empty database is created if the file is missing or empty.

    Attributes
    ----------
    lock
        Guards the connection. Hold it where what is in memory must match the database.

    Raises
    ------
    StoreError
        If the file is damaged, belongs to another program or a newer version, or is missing and must not be created.
    StorageFullError
        If the disk is full.
    """

    def __init__(self, path: Path, *, create: bool) -> None:
        self.path = path
        self.lock = threading.RLock()
        self._inside = False  # a transaction
        self._writes: list[_Write] = []  # of the next group
        self._writes_lock = threading.Lock()
        if not create and not (path.exists() and path.stat().st_size):
            raise StoreError(
                f"{path.as_posix()}: the database is missing, but the spool beside it holds objects; restore the "
                "database, or move the whole folder away to start with an empty one"
            )
        with self._one_line():
            self._connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            with self._one_line():
                self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        run = self._connection.execute
        run("PRAGMA locking_mode = EXCLUSIVE")
        mode = run("PRAGMA journal_mode = TRUNCATE").fetchone()[0]
        run("PRAGMA synchronous = FULL")
        version, application = (run(f"PRAGMA {name}").fetchone()[0] for name in ("user_version", "application_id"))
        if version > _VERSION and application == _APPLICATION_ID:
            raise StoreError(
                f"{self.path.as_posix()}: its schema has version {version}, and this version of EchoQuad reads "
                f"{_VERSION}; install a newer EchoQuad, or configure another folder"
            )
        empty = run("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if mode != "truncate" or (not empty and (application != _APPLICATION_ID or version != _VERSION)):
            raise StoreError(f"{self.path.as_posix()}: is no database of this service; configure another folder")
        if empty:
            with self.transaction() as connection:
                for statement in _SCHEMA.split(";\n"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {_VERSION}")
        elif (verdict := run("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise self._damaged(" ".join(str(verdict).split()))

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block as one transaction, which is on the disk at the end, or undone if anything raises.

        Raises
        ------
        StorageFullError
            If the disk is full.
        StoreError
            If the database cannot be used.
        """
        with self.lock, self._one_line():
            self._roll_back()
            self._inside = True
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # it is repeated before the next access
                    self._roll_back()
                raise
            finally:
                self._inside = False

    def write(self, apply: Callable[[sqlite3.Connection], _Value], committed: Callable[[_Value], _Answer]) -> _Answer:
        """Run a write, which is on the disk on return, in one transaction with those of other threads.

        What other threads want to write while a commit is flushed to the disk goes into the next commit together. If a
        write of a group fails, each is tried alone.

        Parameters
        ----------
        apply
            Executes the statements. It raises before the first one that changes anything, or leaves that to SQLite.
        committed
            Called with what `apply` has returned, after the commit, in the order of the writes, by any thread, with
            `lock` held. It must not raise.

        Returns
        -------
        object
            What `committed` has returned.

        Raises
        ------
        StorageFullError
            If the disk is full.
        StoreError
            If the database cannot be used.
        Exception
            What `apply` raises.
        """
        write = _Write(apply, committed)
        with self._writes_lock:
            self._writes.append(write)
        with self.lock:
            if not write.ended:
                with self._writes_lock:
                    group, self._writes = self._writes, []
                self._commit(group)
        if write.error is not None:
            raise write.error
        return cast("_Answer", write.answer)

    def _commit(self, group: list[_Write]) -> None:
        try:
            with self.transaction() as connection:
                values = [write.apply(connection) for write in group]
        except BaseException as error:
            if isinstance(error, Exception) and len(group) > 1:
                for write in group:
                    self._commit([write])
                return
            for write in group:
                write.error, write.ended = error, True
            return
        for write, value in zip(group, values, strict=True):
            write.answer, write.ended = write.committed(value), True

    def _roll_back(self) -> None:
        """Undo what is left of a transaction that has failed: no query may see it. A full disk may have undone it."""
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Return the rows of a query.

        Raises
        ------
        StoreError
            If the database cannot be used.
        """
        with self.lock, self._one_line():
            if not self._inside:
                self._roll_back()
            return self._connection.execute(query, values).fetchall()

    def close(self) -> None:
        """Close the connection. Every later call raises `StoreError`."""
        with self.lock:
            self._connection.close()

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """Raise the errors of SQLite as errors of one line."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # without the extended code
            where, reason = self.path.as_posix(), " ".join(str(error).split())
            if code == sqlite3.SQLITE_FULL:
                message = f"{where}: the disk is full; delete other files, or use a larger disk"
                raise StorageFullError(message, STORAGE_RETRY_S) from error
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise self._damaged(reason) from error
            raise StoreError(
                f"{where}: cannot be read or written ({reason}); check the disk and permissions"
            ) from error

    def _damaged(self, reason: str) -> StoreError:
        return StoreError(
            f"{self.path.as_posix()}: the database is damaged ({reason}); restore it from a copy, or move the whole "
            "folder away to start with an empty one"
        )
