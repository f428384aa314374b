"""Result files that outlive whatever happens: rows that were written stay, and a later run goes on behind them.

While a run goes on, its rows are in ``FILE.partial``; ``FILE.partial.json`` says which run they are of, and is locked.
At the end the first takes its name over whatever had it, and ``FILE.run.json`` says what made it. A row is handed to
the system whole as soon as it is there, so that a process that is killed loses none, and about once a second the disk
is waited for, so that a power cut costs no more than that. What is torn then is found by its form, and dropped.
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
from echoquad_runtime.results.row_formats import RowReader, columns, format_of
from echoquad_runtime.storage.atomic import output_errors, sync_folder, write_all, write_json
from echoquad_runtime.storage.file_lock import FileLock, LockedError
from echoquad_runtime.storage.row_names import DIGEST_BYTES, digest, printed

if TYPE_CHECKING:
    from echoquad_runtime.predict.predictor import Prediction

__all__ = [
    "IDENTITY",
    "Named",
    "ResultFile",
    "in_words",
    "is_stream",
    "partial_of",
    "read_run_record",
    "refuse_resume",
    "run_record_of",
    "write_run_record",
]

SCHEMA: Final = 1
"""Of the record beside a result file."""

_SYNC_SECONDS: Final = 1.0
_SYNC_SHARE: Final = 20  # a disk that is slow to answer is waited for less often: one part in so many of the time
IDENTITY: Final[Mapping[str, str]] = {
    "schema": "record",
    "echoquad": "EchoQuad",
    "bundle": "bundle",
    "method": "vote method",
    "device": "device",
    "precision": "precision",
    "shard": "shard",
    "flip": "turning over of matrices",
    "abstain_below": "bound for abstaining",
}
"""What must be the same for rows to go into one file, and what each is called."""
_OPTIONAL: Final = ("shard", "flip", "abstain_below")  # text or nothing
_OTHER: Final = {"schema", *_OPTIONAL}  # than text


def is_stream(path: Path) -> bool:
    """Say whether a result file is there and is none to be renamed or gone back in: a pipe, a terminal, a device."""
    with output_errors(path):
        return path.exists() and not path.is_file() and not path.is_dir()


def partial_of(path: Path) -> Path:
    """Name the file that holds rows until a result file is finished."""
    return path.with_name(f"{path.name}.partial")


def run_record_of(path: Path) -> Path:
    """Name the record that lies beside a finished result file."""
    return path.with_name(f"{path.name}.run.json")


def read_run_record(path: Path) -> dict[str, Any] | None:
    """Read the record beside a finished result file; None where there is none that can be understood."""
    try:
        return _understand(run_record_of(path).read_bytes())
    except OSError:
        return None


def write_run_record(path: Path, identity: Mapping[str, str | None], rows: int, sha256: str) -> None:
    """Write the record beside a result file: what made it, how many rows it holds, and the SHA-256 of its bytes."""
    write_json(
        run_record_of(path), {"schema": SCHEMA, "echoquad": __version__, **identity, "rows": rows, "sha256": sha256}
    )


def _understand(data: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in IDENTITY.keys() - _OTHER):
        return None
    return found if all(isinstance(found.get(name), str | None) for name in _OPTIONAL) else None


class Named:
    """The names of rows that are there, each as often as it is: 17 bytes a row."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._digests = np.empty(0, f"S{DIGEST_BYTES}")
        self._used = np.empty(0, bool)

    def add(self, row_name: str) -> None:
        """Add a name as rows carry it; once all are added, `sort`."""
        self._bytes += digest(row_name)

    def sort(self) -> None:
        """Make ready for `take`."""
        self._digests = np.frombuffer(self._bytes, f"S{DIGEST_BYTES}")  # the same memory, sorted where it is
        self._digests.sort()
        self._used = np.zeros(len(self._digests), bool)

    def take(self, name: str) -> bool:
        """Say whether there is one more row of a frame than was taken before, and take it."""
        wanted = np.frombuffer(digest(printed(name)), f"S{DIGEST_BYTES}")
        begin, end = (int(np.searchsorted(self._digests, wanted, side)[0]) for side in ("left", "right"))
        for index in range(begin, end):
            if not self._used[index]:
                self._used[index] = True
                return True
        return False


class ResultFile:
    """A result file that is being written, or gone on with.

    Opened, it is locked, and it is known which rows are there; after `begin` it takes rows; `finish` gives it its
    name. Closed before that, it leaves its rows for a later run, or, where there is none, nothing.

    Parameters
    ----------
    path
        The file, ``.csv`` or ``.jsonl``; no pipe.
    resume
        Whether to go on behind the rows of an interrupted run, else of the finished file, else afresh.

    Attributes
    ----------
    kept
        How many rows are there from before.
    torn
        How many bytes behind them were not whole, and are dropped.
    rows
        How many rows are there now.
    certain
        False where the disk knows no locks, so that a second process could not be kept out.

    Raises
    ------
    ResultError
        If another process writes it, if rows are there and `resume` is not given, or if what is there cannot be gone
        on with.
    UsageError
        If the ending is neither ``.csv`` nor ``.jsonl``.
    OutputError
        If the system refuses.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self.path, self.partial = path, partial_of(path)
        self._layout = format_of(path)
        self._stream: FileIO | None = None
        self._named = Named()
        self._earlier: dict[str, Any] | None = None  # the record of the run that the rows are of
        self._columns: list[str] | None = None
        self._source: Path | None = None  # where they are
        self._hash = hashlib.sha256()  # of what is there
        self.kept = self.rows = self.torn = self._size = 0
        self._next_sync = 0.0
        self._recorded = self._finished = False
        with output_errors(path):
            if path.is_dir():
                raise OutputError(f"{path.as_posix()}: is a folder; expected a file name")
            try:
                self._lock = FileLock(path.with_name(f"{self.partial.name}.json"))
            except LockedError as error:
                what = f"{path.as_posix()}: another process is writing it; wait for its end, or name another --out"
                raise ResultError(what) from error
            try:
                self._look(resume=resume)
            except BaseException:
                self._lock.release(remove=not self.partial.exists())
                raise
        self.certain = self._lock.certain

    def _look(self, *, resume: bool) -> None:
        if self._has_rows():
            if not resume:
                raise ResultError(
                    f"{self.partial.as_posix()}: it holds rows of a run that was interrupted; "
                    "go on with --resume, or delete it"
                )
            self._earlier = _understand(self._lock.read())
            if self._earlier is None:
                raise ResultError(
                    f"{self.partial.as_posix()}: {self._lock.path.name} does not say which run its rows are of; "
                    "delete both, or name another --out"
                )
            self._scan(self.partial)
        elif resume and self.path.exists():
            self._earlier = read_run_record(self.path)
            if self._earlier is None:
                raise ResultError(
                    f"{self.path.as_posix()}: there is no {run_record_of(self.path).name} to say what made it, so it "
                    "cannot be gone on with; leave out --resume to replace it, or name another --out"
                )
            self._scan(self.path)
            if self.torn or self._hash.hexdigest() != self._earlier.get("sha256"):
                raise ResultError(
                    f"{self.path.as_posix()}: it is not as its run left it; leave out --resume to replace it, or name "
                    "another --out"
                )

    def _has_rows(self) -> bool:
        try:
            with self.partial.open("rb") as stream:
                return next(iter(RowReader(stream, self._layout)), None) is not None
        except FileNotFoundError:
            return False

    def _scan(self, source: Path) -> None:
        """Learn which rows are there, up to the first that is not whole or no row of its run."""
        assert self._earlier is not None
        method, device, precision = (str(self._earlier[name]) for name in ("method", "device", "precision"))
        with source.open("rb") as stream:
            reader = RowReader(stream, self._layout, ran=(method, device, precision))
            for row in reader:
                self._named.add(row.name)
                self.kept += 1
            self.torn = os.fstat(stream.fileno()).st_size - reader.whole
        self._named.sort()
        self._hash, self._size, self.rows = reader.hash, reader.whole, self.kept
        self._columns, self._source = reader.columns, source

    def take(self, name: str) -> bool:
        """Say whether a frame's row is there from before; one that was given twice has two."""
        return self.kept > 0 and self._named.take(name)

    def begin(self, classes: Sequence[str], identity: Mapping[str, str | None]) -> None:
        """Make ready for rows.

        Parameters
        ----------
        classes
            The model's.
        identity
            ``bundle``, ``method``, ``device``, ``precision``, ``shard``, ``abstain_below`` and ``self_test`` of this
            run, and ``flip`` where matrices are turned over.

        Raises
        ------
        ResultError
            If the rows that are there are of another run.
        OutputError
            If the system refuses.
        """
        self._identity = identity
        record = {"schema": SCHEMA, "echoquad": __version__, **identity}
        if self._earlier is not None and self._source is not None:
            self._compare(record, classes)
        with output_errors(self.path):
            if self._source != self.partial:
                self._lock.write(json.dumps(record, indent=2).encode())
                if self._source is None:
                    self.partial.write_bytes(b"")
                else:
                    import shutil

                    shutil.copyfile(self._source, self.partial)
            self._stream = FileIO(self.partial, "r+")
            self._stream.truncate(self._size)
            self._stream.seek(self._size)
            if self._source is None:
                self._append(self._layout.header(classes))
            # What is done within a second never waits for the disk on the way.
            self._next_sync = time.monotonic() + _SYNC_SECONDS

    def _compare(self, record: Mapping[str, Any], classes: Sequence[str]) -> None:
        assert self._earlier is not None
        assert self._source is not None
        for name, word in IDENTITY.items():
            there, here = (in_words(name, values.get(name)) for values in (self._earlier, record))
            if there != here:
                raise ResultError(
                    f"{self._source.as_posix()}: its {word} is {there}, this run's is {here}; run as it was begun, or "
                    "name another --out"
                )
        if self._columns is not None and self._columns != columns(classes):
            raise ResultError(f"{self._source.as_posix()}: its columns are not this bundle's; name another --out")

    def write(self, prediction: Prediction) -> None:
        """Write a row.

        Raises
        ------
        OutputError
            If the system refuses; what was written is whole, without this row.
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
        if not self._recorded:  # rows are worth nothing without it
            self._lock.sync()
            sync_folder(self.path.parent)
            self._recorded = True
        os.fsync(self._stream.fileno())
        end = time.monotonic()
        self._next_sync = end + max(_SYNC_SECONDS, _SYNC_SHARE * (end - begin))

    def finish(self) -> bool:
        """Give the file its name, in place of what had it; False where that is the same rows, and stays as it is.

        Raises
        ------
        OutputError
            If the system refuses; the rows are then where they were, for a later run.
        """
        assert self._stream is not None
        if self._adds_nothing:
            return False
        with output_errors(self.path):
            os.fsync(self._stream.fileno())
            write_run_record(self.path, self._identity, self.rows, self._hash.hexdigest())
            self._stream.close()  # Windows renames no open file
            self.partial.replace(self.path)
            sync_folder(self.path.parent)
        self._finished = True
        return True

    @property
    def _adds_nothing(self) -> bool:
        """Whether all rows are in the finished file, too."""
        return self._source == self.path and self.rows == self.kept

    @property
    def _left(self) -> bool:
        """Whether there are rows for a later run."""
        return not self._finished and self.rows > 0 and not self._adds_nothing

    @property
    def interrupted(self) -> bool:
        """Whether this run has begun, and leaves rows for a later one."""
        return self._stream is not None and self._left and self.partial.exists()

    def close(self) -> None:
        """Let go of it: what is not finished is left whole for a later run, and what holds no row is removed."""
        with contextlib.suppress(OSError):  # there may be no room even for that; the torn row is then dropped later
            if self._stream is not None and not self._stream.closed:
                self._stream.truncate(self._size)
                self._sync()
        if self._stream is not None:
            self._stream.close()
        if not self._left:
            with contextlib.suppress(OSError):
                self.partial.unlink(missing_ok=True)
        self._lock.release(remove=not self._left)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def refuse_resume(path: Path | None) -> None:
    """Refuse to go on with what cannot be gone on with.

    Raises
    ------
    UsageError
        If there is no result file, or it is a pipe.
    """
    if path is None:
        raise UsageError("--resume: rows on stdout cannot be gone on with; name a file with --out")
    if is_stream(path):
        raise UsageError(f"--resume: {path.as_posix()} is no regular file, and cannot be gone on with")


def in_words(name: str, value: object) -> str:
    """Say what a run has for one of `IDENTITY`."""
    if value is None:
        return "none"
    return str(value)[:12] if name == "bundle" else str(value)
