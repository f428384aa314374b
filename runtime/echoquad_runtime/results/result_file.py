"""Result files with resume: rows that were written survive an interruption, and a later run continues after them.

During a run, rows go to ``FILE.partial``. ``FILE.partial.json``, which is locked, records the run that they belong to.
At the end ``FILE.partial`` is renamed to ``FILE``, and ``FILE.run.json``, the run record, says what made it. Every row
is handed to the operating system complete and at once, so a killed process loses none. About once a second the file is
synced to disk, so a power cut loses at most that much. A torn row is recognized by its form and dropped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from echoquad_runtime._version import __version__
from echoquad_runtime.errors import OutputError, ResultError, UsageError
from echoquad_runtime.results.row_formats import RowReader, columns, format_for
from echoquad_runtime.storage.atomic import output_errors, sync_folder, write_json
from echoquad_runtime.storage.file_lock import FileLock, LockedError
from echoquad_runtime.storage.regular_file import open_nofollow, open_regular, refuse_link, write_all
from echoquad_runtime.storage.row_names import DIGEST_BYTES, name_digest, to_row_name

if TYPE_CHECKING:
    from echoquad_runtime.predict.prediction import Prediction

__all__ = [
    "IDENTITY",
    "ResultFile",
    "RowNames",
    "check_resume",
    "identity_text",
    "is_stream",
    "partial_path",
    "read_run_record",
    "run_record_path",
    "write_run_record",
]

SCHEMA: Final = 1
"""Schema of the run record."""

_SYNC_SECONDS: Final = 1.0
_COPY_BYTES: Final = 1 << 20  # at a time
_SYNC_SHARE: Final = 20  # a slow disk is synced less often: at most this fraction (1/20) of the time
IDENTITY: Final[Mapping[str, str]] = {
    "schema": "record",
    "echoquad": "EchoQuad",
    "bundle": "bundle",
    "method": "vote method",
    "device": "device",
    "precision": "precision",
    "shard": "shard",
    "flip": "matrix orientation (flip)",
    "abstain_below": "abstain_below",
    "abstain_unlike": "abstain_unlike",
}
"""Fields of the run record that must match for rows to go into the same file, and their names in messages."""
_OPTIONAL: Final = ("shard", "flip", "abstain_below", "abstain_unlike")  # a string or null


def is_stream(path: Path) -> bool:
    """Return whether the path exists and is a pipe, a terminal or a device, which cannot be renamed or resumed."""
    with output_errors(path):
        return path.exists() and not path.is_file() and not path.is_dir()


def partial_path(path: Path) -> Path:
    """Return the path of the rows of an unfinished result file."""
    return path.with_name(f"{path.name}.partial")


def run_record_path(path: Path) -> Path:
    """Return the path of the run record of a finished result file."""
    return path.with_name(f"{path.name}.run.json")


def read_run_record(path: Path) -> dict[str, Any] | None:
    """Read the run record of a finished result file; None if it is missing or malformed."""
    try:
        return _parse_record(run_record_path(path).read_bytes())
    except OSError:
        return None


def write_run_record(path: Path, identity: Mapping[str, str | None], rows: int, sha256: str) -> None:
    """Write the run record of a result file: what made it, its number of rows, and the SHA-256 of its bytes."""
    write_json(
        run_record_path(path), {"schema": SCHEMA, "echoquad": __version__, **identity, "rows": rows, "sha256": sha256}
    )


def _parse_record(data: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return None
    valid = isinstance(record, dict) and all(
        isinstance(record.get(name), str) or (name in _OPTIONAL and record.get(name) is None)
        for name in IDENTITY.keys() - {"schema"}
    )
    return record if valid else None


class RowNames:
    """The multiset of names of existing rows, in 17 bytes per row."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._digests = np.empty(0, f"S{DIGEST_BYTES}")
        self._used = np.empty(0, bool)

    def add(self, row_name: str) -> None:
        """Add a name in the form that rows have. Call `sort` after the last one."""
        self._bytes += name_digest(row_name)

    def sort(self) -> None:
        """Prepare for `claim`."""
        self._digests = np.frombuffer(self._bytes, f"S{DIGEST_BYTES}")  # shares the memory, and is sorted in place
        self._digests.sort()
        self._used = np.zeros(len(self._digests), bool)

    def claim(self, name: str) -> bool:
        """Remove one row of a frame; return False if none is left."""
        key = np.frombuffer(name_digest(to_row_name(name)), f"S{DIGEST_BYTES}")
        begin, end = (int(np.searchsorted(self._digests, key, side)[0]) for side in ("left", "right"))
        for index in range(begin, end):
            if not self._used[index]:
                self._used[index] = True
                return True
        return False


class ResultFile:
    """A result file, new or resumed.

    The constructor locks the file and reads the existing rows. After `begin` it takes rows. `finish` renames it to its
    final name. If it is closed before, its rows stay for a later run; without rows, nothing stays.

    Parameters
    ----------
    path
        The file, ``.csv`` or ``.jsonl``; not a pipe.
    resume
        Whether to continue after the rows of an interrupted run, else of the finished file, if there are any.

    Attributes
    ----------
    existing_rows
        Number of rows of earlier runs.
    torn_bytes
        Number of bytes of an incomplete row after them, which are dropped.
    rows
        Number of rows now.
    certain
        False if the file system does not support locks, so that a second process cannot be kept out.

    Raises
    ------
    ResultError
        If another process writes the file, if there are rows and `resume` is False, or if the existing rows cannot be
        resumed.
    UsageError
        If the extension is neither ``.csv`` nor ``.jsonl``.
    OutputError
        If the file cannot be written.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self.path, self.partial = path, partial_path(path)
        self._layout = format_for(path)
        self._stream: FileIO | None = None
        self._names = RowNames()
        self._earlier: dict[str, Any] | None = None  # run record of the existing rows
        self._columns: list[str] | None = None
        self._resumed_from: Path | None = None  # the file with the existing rows
        self._hash = hashlib.sha256()  # of all bytes so far
        self.existing_rows = self.rows = self.torn_bytes = self._size = 0
        self._next_sync = 0.0
        self._recorded = self._finished = False
        with output_errors(path):
            if path.is_dir():
                raise OutputError(f"{path.as_posix()}: is a folder; expected a file name")
            try:
                self._lock = FileLock(path.with_name(f"{self.partial.name}.json"))
            except LockedError as error:
                raise ResultError(
                    f"{path.as_posix()}: another process is writing it; wait until it ends, or name another --out"
                ) from error
            try:
                self._read_existing(resume=resume)
            except BaseException:
                self._lock.release(remove=not self.partial.exists())
                raise
        self.certain = self._lock.certain

    def _read_existing(self, *, resume: bool) -> None:
        if self._has_rows():
            if not resume:
                raise ResultError(
                    f"{self.partial.as_posix()}: the file holds rows of an interrupted run; continue with --resume, or "
                    "delete it"
                )
            self._earlier = _parse_record(self._lock.read())
            if self._earlier is None:
                raise ResultError(
                    f"{self.partial.as_posix()}: {self._lock.path.name} does not identify the run of its rows; delete "
                    "both, or name another --out"
                )
            self._scan(self.partial)
        elif resume and self.path.exists():
            self._earlier = read_run_record(self.path)
            if self._earlier is None:
                raise ResultError(
                    f"{self.path.as_posix()}: {run_record_path(self.path).name} is missing or malformed, so it "
                    "cannot be resumed; leave out --resume to replace it, or name another --out"
                )
            self._scan(self.path)
            if self.torn_bytes or self._hash.hexdigest() != self._earlier.get("sha256"):
                raise ResultError(
                    f"{self.path.as_posix()}: the file has changed since its run; leave out --resume to replace it, or "
                    "name another --out"
                )

    def _has_rows(self) -> bool:
        try:
            refuse_link(self.partial)
            with open_regular(self.partial) as stream:
                return next(iter(RowReader(stream, self._layout)), None) is not None
        except FileNotFoundError:
            return False

    def _scan(self, source: Path) -> None:
        """Read the existing rows, up to the first that is incomplete or belongs to another run."""
        assert self._earlier is not None
        method, device, precision = (str(self._earlier[name]) for name in ("method", "device", "precision"))
        with open_regular(source) as stream:
            reader = RowReader(stream, self._layout, run=(method, device, precision))
            for row in reader:
                if ".." in row.name.split("/"):  # as named before `..` was resolved: the frame would get a second row
                    raise ResultError(
                        f"{source.as_posix()}: a row has a name with '..', from an earlier version of EchoQuad; names "
                        "are without it now, so it cannot be resumed; name another --out"
                    )
                self._names.add(row.name)
                self.existing_rows += 1
            self.torn_bytes = os.fstat(stream.fileno()).st_size - reader.complete_bytes
        self._names.sort()
        self._hash, self._size, self.rows = reader.hash, reader.complete_bytes, self.existing_rows
        self._columns, self._resumed_from = reader.columns, source

    def claim(self, name: str) -> bool:
        """Return whether a frame has an existing row, and mark it as used: a frame given twice has two rows."""
        return self.existing_rows > 0 and self._names.claim(name)

    def begin(self, classes: Sequence[str], identity: Mapping[str, str | None]) -> None:
        """Prepare the file for rows.

        Parameters
        ----------
        classes
            Class names of the model.
        identity
            ``bundle``, ``method``, ``device``, ``precision``, ``shard``, ``abstain_below`` and ``self_test`` of this
            run, ``flip`` if matrices are flipped, and ``abstain_unlike`` if it is requested.

        Raises
        ------
        ResultError
            If the existing rows belong to another run.
        OutputError
            If the file cannot be written.
        """
        self._identity = identity
        record = {"schema": SCHEMA, "echoquad": __version__, **identity}
        if self._earlier is not None and self._resumed_from is not None:
            self._compare(record, classes)
        with output_errors(self.path):
            if self._resumed_from != self.partial:
                self._lock.write(json.dumps(record, indent=2).encode())
                self.partial.unlink(missing_ok=True)
            self._stream = open_nofollow(self.partial, new=self._resumed_from != self.partial)
            if self._resumed_from == self.path:
                with open_regular(self.path) as finished:
                    while block := finished.read(_COPY_BYTES):
                        write_all(self._stream, block)
            self._stream.truncate(self._size)
            self._stream.seek(self._size)
            if self._resumed_from is None:
                self._append(self._layout.header(classes))
            # A run of less than a second syncs only once, at its end.
            self._next_sync = time.monotonic() + _SYNC_SECONDS

    def _compare(self, record: Mapping[str, Any], classes: Sequence[str]) -> None:
        assert self._earlier is not None
        assert self._resumed_from is not None
        for name, label in IDENTITY.items():
            there, here = (identity_text(name, values.get(name)) for values in (self._earlier, record))
            if there != here:
                raise ResultError(
                    f"{self._resumed_from.as_posix()}: its {label} is {there}, this run's is {here}; use the same as "
                    "before, or name another --out"
                )
        if self._columns is not None and self._columns != columns(classes):
            raise ResultError(
                f"{self._resumed_from.as_posix()}: its columns are not those of this bundle in this release; name "
                "another --out"
            )

    def write(self, prediction: Prediction) -> None:
        """Write one row.

        Raises
        ------
        OutputError
            If the row cannot be written; the previous rows stay complete.
        """
        with output_errors(self.path):
            self._append(self._layout.row(prediction))
            self.rows += 1
            if time.monotonic() >= self._next_sync:
                self._sync()

    def _append(self, data: bytes) -> None:
        assert self._stream is not None
        write_all(self._stream, data)
        self._size += len(data)
        self._hash.update(data)

    def _sync(self) -> None:
        assert self._stream is not None
        begin = time.monotonic()
        if not self._recorded:  # rows are useless without their run record
            self._lock.sync()
            sync_folder(self.path.parent)
            self._recorded = True
        os.fsync(self._stream.fileno())
        end = time.monotonic()
        self._next_sync = end + max(_SYNC_SECONDS, _SYNC_SHARE * (end - begin))

    def finish(self) -> bool:
        """Rename the file to its final name and write the run record; False if the finished file has the same rows.

        Raises
        ------
        OutputError
            If the file cannot be written; its rows stay for a later run.
        """
        assert self._stream is not None
        if self._adds_nothing:
            return False
        with output_errors(self.path):
            os.fsync(self._stream.fileno())
            write_run_record(self.path, self._identity, self.rows, self._hash.hexdigest())
            self._stream.close()  # Windows cannot rename an open file
            self.partial.replace(self.path)
            sync_folder(self.path.parent)
        self._finished = True
        return True

    @property
    def _adds_nothing(self) -> bool:
        """Whether the finished file already has all rows."""
        return self._resumed_from == self.path and self.rows == self.existing_rows

    @property
    def _keeps_rows(self) -> bool:
        """Whether rows stay for a later run."""
        return not self._finished and self.rows > 0 and not self._adds_nothing

    @property
    def interrupted(self) -> bool:
        """Whether this run has started and leaves rows for a later one."""
        return self._stream is not None and self._keeps_rows and self.partial.exists()

    def close(self) -> None:
        """Close and unlock the file. Unfinished rows stay for a later run; a file without rows is removed."""
        with contextlib.suppress(OSError):  # a full disk may refuse even that; the next run drops the torn row
            if self._stream is not None and not self._stream.closed:
                self._stream.truncate(self._size)
                self._sync()
        if self._stream is not None:
            self._stream.close()
        if not self._keeps_rows:
            with contextlib.suppress(OSError):
                self.partial.unlink(missing_ok=True)
        self._lock.release(remove=not self._keeps_rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_resume(path: Path | None) -> None:
    """Check that ``--resume`` can continue a result file.

    Raises
    ------
    UsageError
        If there is no result file, or it is a pipe.
    """
    if path is None:
        raise UsageError("--resume needs a result file; name it with --out")
    if is_stream(path):
        raise UsageError(f"--resume: {path.as_posix()} is not a regular file; name one with --out")


def identity_text(name: str, value: object) -> str:
    """Return the value of an `IDENTITY` field for a message."""
    if value is None:
        return "none"
    return str(value)[:12] if name == "bundle" else str(value)
