"""CSV files of rows, one a day, in which a repeated result adds no row.

A row ends with the id of its result. Before the first write, and whenever somebody else has changed the file, the rows
that it has are counted by id, and what a crash left of a torn row is cut off. Rows of a result go on where they ended.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from echoquad_runtime.errors import OutputError
from echoquad_runtime.results.row_formats import CSV, columns, csv_line
from echoquad_runtime.storage.atomic import output_errors, sync_folder
from echoquad_runtime.storage.regular_file import open_nofollow, write_all

__all__ = ["ID_COLUMN", "DailyRows"]

ID_COLUMN: Final = "id"
"""The last column: the id of the row's result."""

_MOST_FILES: Final = 100  # of one day: each has other columns
_MOST_OPEN: Final = 4


class DailyRows:
    """The CSV files of a folder: ``2026-11-27.csv``.

    Rows of a bundle with other classes have other columns. They go into ``2026-11-27-2.csv``, and so on.

    Parameters
    ----------
    folder
        The folder, which exists when rows are added.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tables: dict[tuple[str, tuple[str, ...]], _Table] = {}

    def add(self, day: str, result_id: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add those of a result's rows that the day's file does not have; on return they are on the disk.

        Raises
        ------
        OutputError
            If the file cannot be written.
        """
        if not rows:
            return
        classes = [name.removeprefix("prob_") for name in rows[0] if name.startswith("prob_")]
        names = (*columns(classes), ID_COLUMN)
        table = self._tables.pop((day, names), None)
        if table is None or not table.is_current():
            table = self._open(day, names)
        table.add(result_id, rows)
        self._tables[day, names] = table  # the latest is last
        while len(self._tables) > _MOST_OPEN:
            del self._tables[next(iter(self._tables))]

    def _open(self, day: str, names: tuple[str, ...]) -> _Table:
        for number in range(1, _MOST_FILES + 1):
            path = self._folder / (f"{day}.csv" if number == 1 else f"{day}-{number}.csv")
            table = _Table(path, names)
            if table.load():
                return table
        raise OutputError(f"{path.as_posix()}: {_MOST_FILES} files of this day have other columns; move them away")


class _Table:
    """One file. Between two writes it is closed, so that the share may go away and people may open it."""

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self._path, self._names = path, names
        self._header = csv_line(dict(zip(names, names, strict=True)), names)
        self._rows: Counter[str] = Counter()
        self._state: tuple[int, ...] = ()

    def is_current(self) -> bool:
        """Return whether the file is as the last write left it."""
        try:
            return self._state == _state(self._path.stat())
        except OSError:
            return False

    def load(self) -> bool:
        """Count the rows by id and cut a torn end off; create the file if there is none.

        Returns
        -------
        bool
            False, without any change, if the file has other columns.

        Raises
        ------
        OutputError
            If the file cannot be read or written.
        """
        with output_errors(self._path), open_nofollow(self._path) as stream:
            data = stream.readall()
            rows = CSV.split(io.BytesIO(data))
            if next(rows, b"") == self._header:
                complete = len(self._header) + self._count(rows)
                if complete < len(data):
                    stream.truncate(complete)
            elif self._header.startswith(data.rstrip(b"\0")):  # new, or torn at its first write
                stream.truncate(0)
                stream.seek(0)
                write_all(stream, self._header)
            else:
                return False
            os.fsync(stream.fileno())
            sync_folder(self._path.parent)
            self._state = _state(os.fstat(stream.fileno()))
        return True

    def _count(self, rows: Iterator[bytes]) -> int:
        """Count the complete rows by id, and return their bytes."""
        size = 0
        for data in rows:
            if b"\0" in data:  # a power cut may leave zeros where the last write should be
                break
            size += len(data)
            try:
                _, values = CSV.parse(data, self._names)
            except ValueError:  # somebody has edited the row
                continue
            self._rows[values[-1]] += 1
        return size

    def add(self, result_id: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """See `DailyRows.add`."""
        missing = rows[self._rows[result_id] :]
        if not missing:
            return
        data = b"".join(csv_line({**row, ID_COLUMN: result_id}, self._names) for row in missing)
        with output_errors(self._path), open_nofollow(self._path) as stream:
            stream.seek(0, os.SEEK_END)
            write_all(stream, data)
            os.fsync(stream.fileno())
            self._state = _state(os.fstat(stream.fileno()))
        self._rows[result_id] = len(rows)


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
