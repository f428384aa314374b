"""Shards: an archive split between processes by its frames' names, and their result files merged into one.

Which shard a frame is in follows from its name alone, so that every process comes to the same answer, and a frame that
appears while they run moves no other.
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
    in_words,
    is_stream,
    partial_of,
    read_run_record,
    write_run_record,
)
from echoquad_runtime.results.row_formats import Format, Row, RowReader, format_of
from echoquad_runtime.storage.atomic import write_atomically
from echoquad_runtime.storage.row_names import digest, display_name, printed, walk_order

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["Merged", "Shard", "merge"]

_SAME: Final = (
    "schema",
    "echoquad",
    "bundle",
    "method",
    "precision",
    "flip",
    "abstain_below",
)  # the device may differ: each row has its own
_MOST_STRETCHES: Final = 4096
_BUFFER: Final = 1 << 14  # bytes a stretch


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` parts of an archive; `index` counts from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``i/n``.

        Raises
        ------
        UsageError
            If it is none.
        """
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        index, count = map(int, found.groups()) if found else (0, 0)
        if not 1 <= index <= count:
            raise UsageError(f"--shard {text}: expected i/n, two whole numbers with i from 1 to n, such as 2/4")
        return cls(index, count)

    def holds(self, name: str) -> bool:
        """Say whether a frame of this name is in this shard."""
        return self.holds_row(printed(name))

    def holds_row(self, row_name: str) -> bool:
        """Say the same of a name as rows carry it."""
        return int.from_bytes(digest(row_name), "big") % self.count == self.index - 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge has written.

    Attributes
    ----------
    rows
        How many.
    complete
        Whether the shards' records say that none is missing; False where some have no record.
    """

    rows: int
    complete: bool


@dataclass
class _Part:
    """A shard's result file, gone through once."""

    path: Path
    record: dict[str, Any] | None
    header: bytes
    columns: list[str] | None
    rows: int
    stretches: list[tuple[int, int]]  # where rows are in order: from byte to byte


def merge(paths: Sequence[Path], out: Path) -> Merged:
    """Merge the result files of shards into one, row by row, holding no more than a few rows of each.

    The rows come in the order in which one folder is walked: names are compared one folder at a time. Where the inputs
    were one folder, or one pattern, the file equals that of a run without ``--shard``, byte for byte. Where they were
    several, or the shards have grown by ``--resume``, it has the same rows, in this order.

    Raises
    ------
    UsageError
        If the endings differ, or `out` is one of the shards.
    InputNotFoundError
        If a shard's file is not there.
    ResultError
        If a file is unfinished or damaged, if they are not shards of one run, if one is missing, or if a frame is in
        two of them.
    OutputError
        If the system refuses to write.
    """
    layout = format_of(out)
    for path in paths:
        if path.suffix.lower() != out.suffix.lower():
            raise UsageError(
                f"{path.as_posix()}: its ending is {path.suffix!r}, that of --out {out.suffix!r}; expected the same"
            )
        if path.exists() and out.exists() and path.samefile(out):
            raise UsageError(f"--out {out.as_posix()}: it is one of the shards; name another file")
    parts = [_go_through(path, layout) for path in paths]
    complete = _check(parts)
    rows = sum(part.rows for part in parts)
    hashed = hashlib.sha256()
    with write_atomically(out) as stream:
        for data in itertools.chain([parts[0].header], _in_order(parts, layout)):
            stream.write(data)
            hashed.update(data)
    if complete and not is_stream(out):
        records = [part.record for part in parts if part.record is not None]
        kept = ("bundle", "method", "precision", "flip", "abstain_below")
        identity: dict[str, str | None] = {name: records[0][name] for name in kept if name in records[0]}
        devices = "+".join(sorted({record["device"] for record in records}))
        write_run_record(out, {**identity, "device": devices, "shard": None}, rows, hashed.hexdigest())
    return Merged(rows, complete)


def _go_through(path: Path, layout: Format) -> _Part:
    """Read a shard's file from end to end, and hold it against its record."""
    label = path.as_posix()
    if not path.is_file():
        raise InputNotFoundError(f"{label}: no such file; expected a result file of predict --shard")
    if partial_of(path).exists():
        raise ResultError(
            f"{label}: {partial_of(path).name} lies beside it, so its run is not finished; go on with --resume"
        )
    record = read_run_record(path)
    rows, begin, last, stretches = 0, 0, "", []
    with path.open("rb") as stream:
        reader = RowReader(stream, layout)
        header = begin = end = reader.whole
        for row in reader:
            if record is not None and record["shard"] and not Shard.parse(record["shard"]).holds_row(row.name):
                raise ResultError(
                    f"{label}: {display_name(row.name)} is no frame of shard {record['shard']}; run the shard again"
                )
            key = walk_order(row.name)
            if key < last:
                stretches.append((begin, end))
                begin = end
            last, end, rows = key, reader.whole, rows + 1
        stretches.append((begin, end))
        size = os.fstat(stream.fileno()).st_size
        if size != reader.whole or (layout.header([]) and reader.columns is None):
            raise ResultError(f"{label}: row {rows + 1} is not whole; the file is cut or damaged: run the shard again")
        if record is not None and record.get("sha256") != reader.hash.hexdigest():
            raise ResultError(f"{label}: it is not as its run left it; run the shard again")
        stream.seek(0)
        return _Part(path, record, stream.read(header), reader.columns, rows, stretches)


def _check(parts: Sequence[_Part]) -> bool:
    """Hold the shards against one another; says whether it is known that none is missing."""
    first = parts[0]
    for part in parts[1:]:
        if part.columns and first.columns and part.columns != first.columns:
            raise ResultError(f"{part.path.as_posix()}: its columns are not those of {first.path.as_posix()}")
    known = [(part, part.record) for part in parts if part.record is not None]
    seen: dict[Shard, Path] = {}
    for part, record in known:
        there, label = known[0][1], part.path.as_posix()
        for name in _SAME:
            if record.get(name) != there.get(name):
                raise ResultError(
                    f"{label}: its {IDENTITY[name]} is {in_words(name, record.get(name))}, that of "
                    f"{known[0][0].path.as_posix()} is {in_words(name, there.get(name))}; expected shards of one run"
                )
        if record["shard"] is None:
            raise ResultError(f"{label}: it is no shard but a whole run; expected files of predict --shard")
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
        raise ResultError(
            f"shard {_some(missing)} of the archive is not among the files; name the files of all {count}"
        )
    return True


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _in_order(parts: Sequence[_Part], layout: Format) -> Iterator[bytes]:
    """Give the shards' rows in the order of a walk."""
    if (stretches := sum(len(part.stretches) for part in parts)) > _MOST_STRETCHES:
        raise ResultError(
            f"the shards' rows leave their order {stretches} times; expected at most {_MOST_STRETCHES}: run the shards "
            "again over a folder in place of single files"
        )
    with ExitStack() as files:
        readers = []
        for number, part in enumerate(parts):
            stream = files.enter_context(FileIO(part.path))
            readers += [_keyed(stream, number, part, stretch, layout) for stretch in part.stretches]
        before: tuple[int, Row] | None = None
        for (_, number), row in heapq.merge(*readers, key=lambda item: item[0]):
            if before is not None and before[0] != number and before[1].name == row.name:
                where = " and in ".join(parts[index].path.as_posix() for index in (before[0], number))
                raise ResultError(
                    f"the frame {display_name(row.name)} is in {where}; expected it in one: leave out one of them"
                )
            before = number, row
            yield row.data


def _keyed(
    stream: FileIO, number: int, part: _Part, stretch: tuple[int, int], layout: Format
) -> Iterator[tuple[tuple[str, int], Row]]:
    with io.BufferedReader(_Slice(stream, *stretch), _BUFFER) as rows:
        for row in RowReader(rows, layout, columns=part.columns):
            yield (walk_order(row.name), number), row


class _Slice(io.RawIOBase):
    """A part of a file, read on its own however many others there are."""

    def __init__(self, stream: FileIO, begin: int, end: int) -> None:
        self._stream, self._at, self._end = stream, begin, end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        self._stream.seek(self._at)
        count = self._stream.readinto(memoryview(buffer)[: self._end - self._at]) or 0
        self._at += count
        return count
