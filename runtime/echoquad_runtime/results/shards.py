"""Shards: an archive split between processes by the names of its frames, and their result files merged into one.

The shard of a frame depends only on its name. So all processes agree on it, and a frame that appears during the run
does not move any other.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from echoquad_runtime.errors import InputNotFoundError, ResultError, UsageError
from echoquad_runtime.results.result_file import (
    IDENTITY,
    identity_text,
    is_stream,
    partial_path,
    read_run_record,
    write_run_record,
)
from echoquad_runtime.results.row_formats import Format, Row, RowReader, format_for
from echoquad_runtime.storage.atomic import write_atomically
from echoquad_runtime.storage.row_names import display_name, name_digest, to_row_name, walk_sort_key

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["MergeResult", "Shard", "merge"]

_COMMON: Final = ("bundle", "method", "precision", "flip", "abstain_below", "abstain_unlike")
"""Fields of the run record that all shards share; the device may differ, since each row has its own."""
_MAX_RUNS: Final = 4096  # sorted runs to merge
_BUFFER: Final = 1 << 14  # bytes per sorted run


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` parts of an archive; `index` counts from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse ``i/n``.

        Raises
        ------
        UsageError
            If `text` has another form or i is not within 1 to n.
        """
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        index, count = map(int, match.groups()) if match else (0, 0)
        if not 1 <= index <= count:
            raise UsageError(f"--shard {text}: expected i/n with i from 1 to n, such as 2/4")
        return cls(index, count)

    def holds(self, name: str) -> bool:
        """Return whether a frame of this name is in the shard."""
        return self.holds_row(to_row_name(name))

    def holds_row(self, row_name: str) -> bool:
        """Return whether a frame is in the shard, given its name in the form that rows have."""
        return int.from_bytes(name_digest(row_name), "big") % self.count == self.index - 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True, slots=True)
class MergeResult:
    """The result of a merge.

    Attributes
    ----------
    rows
        Number of rows.
    complete
        Whether the run records show that no shard is missing; False if a shard has no record.
    """

    rows: int
    complete: bool


@dataclass
class _Part:
    """The result file of one shard."""

    path: Path
    record: dict[str, Any] | None
    header: bytes
    columns: list[str] | None
    rows: int
    sorted_runs: list[tuple[int, int]]  # byte ranges within which the rows are sorted


def merge(paths: Sequence[Path], out: Path) -> MergeResult:
    """Merge the result files of shards into one: an external merge sort that holds only a few rows of each file.

    The rows are in the order in which a folder is walked: names are compared one folder at a time. If the input was one
    folder or one pattern, the merged file is byte-identical to that of a run without ``--shard``. If there were several
    inputs, or shards were resumed with more frames, it has the same rows in this order.

    Raises
    ------
    UsageError
        If the extensions differ, or `out` is one of the shards.
    InputNotFoundError
        If a shard's file does not exist.
    ResultError
        If a file is unfinished or damaged, if they are not shards of one run, if one is missing, or if a frame is in
        two of them.
    OutputError
        If the merged file cannot be written.
    """
    layout = format_for(out)
    for path in paths:
        if path.suffix.lower() != out.suffix.lower():
            raise UsageError(
                f"{path.as_posix()}: its extension is {path.suffix!r}, that of --out {out.suffix!r}; expected the same"
            )
        if path.exists() and out.exists() and path.samefile(out):
            raise UsageError(f"--out {out.as_posix()}: it is one of the shards; name another file")
    parts = [_read_part(path, layout) for path in paths]
    complete = _check_parts(parts)
    rows = sum(part.rows for part in parts)
    sha256 = hashlib.sha256()
    with write_atomically(out) as stream:
        for data in itertools.chain([parts[0].header], _merged_rows(parts, layout)):
            stream.write(data)
            sha256.update(data)
    if complete and not is_stream(out):
        records = [part.record for part in parts if part.record is not None]
        identity: dict[str, str | None] = {name: records[0][name] for name in _COMMON if name in records[0]}
        devices = "+".join(sorted({record["device"] for record in records}))
        write_run_record(out, {**identity, "device": devices, "shard": None}, rows, sha256.hexdigest())
    return MergeResult(rows, complete)


def _read_part(path: Path, layout: Format) -> _Part:
    """Read a shard's file once and check it against its run record."""
    label = path.as_posix()
    if not path.is_file():
        raise InputNotFoundError(f"{label}: no such file; expected a result file of predict --shard")
    if partial_path(path).exists():
        raise ResultError(
            f"{label}: its run is not finished, since {partial_path(path).name} exists; continue it with --resume"
        )
    record = read_run_record(path)
    rows, begin, last, sorted_runs = 0, 0, "", []
    with path.open("rb") as stream:
        reader = RowReader(stream, layout)
        header = begin = end = reader.complete_bytes
        for row in reader:
            if record is not None and record.get("shard") and not Shard.parse(record["shard"]).holds_row(row.name):
                raise ResultError(
                    f"{label}: {display_name(row.name)} is not in shard {record['shard']}; run the shard again"
                )
            key = walk_sort_key(row.name)
            if key < last:
                sorted_runs.append((begin, end))
                begin = end
            last, end, rows = key, reader.complete_bytes, rows + 1
        sorted_runs.append((begin, end))
        size = os.fstat(stream.fileno()).st_size
        if size != reader.complete_bytes or (layout.header([]) and reader.columns is None):
            raise ResultError(f"{label}: row {rows + 1} is incomplete; the file is cut or damaged: run the shard again")
        if record is not None and record.get("sha256") != reader.hash.hexdigest():
            raise ResultError(f"{label}: the file has changed since its run; run the shard again")
        stream.seek(0)
        return _Part(path, record, stream.read(header), reader.columns, rows, sorted_runs)


def _check_parts(parts: Sequence[_Part]) -> bool:
    """Check that all parts are shards of one run; return whether none is known to be missing."""
    first = parts[0]
    for part in parts[1:]:
        if part.columns and first.columns and part.columns != first.columns:
            raise ResultError(f"{part.path.as_posix()}: its columns are not those of {first.path.as_posix()}")
    known = [(part, part.record) for part in parts if part.record is not None]
    seen: dict[Shard, Path] = {}
    for part, record in known:
        there, label = known[0][1], part.path.as_posix()
        for name in ("schema", "echoquad", *_COMMON):
            if record.get(name) != there.get(name):
                here, other = (identity_text(name, values.get(name)) for values in (record, there))
                raise ResultError(
                    f"{label}: its {IDENTITY[name]} is {here}, that of {known[0][0].path.as_posix()} is {other}; "
                    "expected shards of one run"
                )
        if record.get("shard") is None:
            raise ResultError(f"{label}: it is a run without --shard; expected files of predict --shard")
        shard = Shard.parse(record["shard"])
        if shard in seen:
            raise ResultError(f"{label}: it is shard {shard}, as is {seen[shard].as_posix()}; leave out one of them")
        seen[shard] = part.path
    counts = {shard.count for shard in seen}
    if len(counts) > 1:
        raise ResultError(
            f"the files are of {' and of '.join(map(str, sorted(counts)))} shards; expected shards of one run"
        )
    if len(known) < len(parts):
        return False
    (count,) = counts
    missing = [str(shard) for index in range(1, count + 1) if (shard := Shard(index, count)) not in seen]
    if missing:
        raise ResultError(f"shard {_shorten(missing)} is missing; name the files of all {count} shards")
    return True


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _merged_rows(parts: Sequence[_Part], layout: Format) -> Iterator[bytes]:
    """Yield the rows of all shards in the order of a directory walk."""
    if (runs := sum(len(part.sorted_runs) for part in parts)) > _MAX_RUNS:
        raise ResultError(
            f"the rows of the shards form {runs} sorted runs; expected at most {_MAX_RUNS}: run the shards again on a "
            "folder instead of single files"
        )
    with ExitStack() as files:
        readers = []
        for number, part in enumerate(parts):
            stream = files.enter_context(FileIO(part.path))
            readers += [_keyed_rows(stream, number, part, extent, layout) for extent in part.sorted_runs]
        before: tuple[int, Row] | None = None
        for (_, number), row in heapq.merge(*readers, key=lambda item: item[0]):
            if before is not None and before[0] != number and before[1].name == row.name:
                where = " and in ".join(parts[index].path.as_posix() for index in (before[0], number))
                raise ResultError(
                    f"the frame {display_name(row.name)} is in {where}; expected it in one file: leave out one of them"
                )
            before = number, row
            yield row.data


def _keyed_rows(
    stream: FileIO, number: int, part: _Part, extent: tuple[int, int], layout: Format
) -> Iterator[tuple[tuple[str, int], Row]]:
    with io.BufferedReader(_Slice(stream, *extent), _BUFFER) as rows:
        for row in RowReader(rows, layout, columns=part.columns):
            yield (walk_sort_key(row.name), number), row


class _Slice(io.RawIOBase):
    """A byte range of a file with a position of its own, so that several share one descriptor."""

    def __init__(self, stream: FileIO, begin: int, end: int) -> None:
        self._stream, self._at, self._end = stream, begin, end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        self._stream.seek(self._at)
        count = self._stream.readinto(memoryview(buffer)[: self._end - self._at]) or 0
        self._at += count
        return count
