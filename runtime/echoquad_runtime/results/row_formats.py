"""Row formats: write predictions as CSV or JSON lines with the same columns, and read complete rows back."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Protocol

from echoquad_runtime.contract import QUADRANTS
from echoquad_runtime.errors import UsageError
from echoquad_runtime.storage.atomic import output_errors, write_atomically
from echoquad_runtime.storage.row_names import encode_text, escape_formula, to_row_name

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

    from echoquad_runtime.predict.prediction import Prediction

__all__ = [
    "CSV",
    "JSON_LINES",
    "Format",
    "Row",
    "RowReader",
    "RowWriter",
    "Writer",
    "columns",
    "csv_line",
    "format_for",
    "open_writer",
]

_QUOTED: Final = re.compile(r'[",\r\n]')
_QUOTED_NAME: Final = re.compile(r'[",\r\n;\t]')  # also separators of other locales, so that a name stays one cell
_LAST: Final = "typicality"
_MAX_ROW_BYTES: Final = 1 << 22  # stops reading a damaged file without line ends; two classes take about 200 bytes


class Writer(Protocol):
    """Writes predictions, one per row."""

    def write(self, prediction: Prediction) -> None:
        """Write one row."""
        ...


def columns(classes: Sequence[str]) -> list[str]:
    """Return the column names: those of the reference pipeline's CSV, then ``flags,device,precision,typicality``."""
    names = ["file", "method", "pred_image", *(f"prob_{name}" for name in classes)]
    for quadrant in QUADRANTS:
        names += [f"pred_{quadrant}", *(f"p_{quadrant}_{name}" for name in classes)]
    return [*names, "flags", "device", "precision", _LAST]


_MIN_COLUMNS: Final = len(columns(())) - 1  # rows of earlier releases have no typicality


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a result file.

    Attributes
    ----------
    name
        The frame's name, in the form that rows have (`echoquad_runtime.storage.row_names`).
    run
        Method, device and precision.
    data
        The bytes of the row, including the line feed.
    """

    name: str
    run: tuple[str, str, str]
    data: bytes


@dataclass(frozen=True, slots=True)
class Format:
    """A file format for rows.

    Attributes
    ----------
    header
        Returns the bytes before the first row, given the class names.
    row
        Returns the bytes of a prediction's row.
    split
        Yields the bytes of each complete row of a stream, including the header if the format has one.
    parse
        Returns the columns and values of a row, given its bytes and the columns if known; raises a ValueError if the
        bytes are not a row.
    """

    header: Callable[[Sequence[str]], bytes]
    row: Callable[[Prediction], bytes]
    split: Callable[[IO[bytes]], Iterator[bytes]]
    parse: Callable[[bytes, Sequence[str] | None], tuple[list[str], list[str]]]


def _csv_line(name: str, values: Sequence[str]) -> bytes:
    cells = [_quote(value) if _QUOTED.search(value) else value for value in values]
    return encode_text(",".join([_quote(name) if _QUOTED_NAME.search(name) else name, *cells]) + "\n")


def _quote(value: str) -> str:
    return '"' + value.replace('"', '""') + '"'


def _csv_header(classes: Sequence[str]) -> bytes:
    first, *rest = columns(classes)
    return _csv_line(first, rest)


def _csv_row(p: Prediction) -> bytes:
    values = [p.method, escape_formula(p.label), *(f"{value:.4f}" for value in p.probabilities)]
    for label, row in zip(p.quadrant_labels, p.quadrant_probabilities, strict=True):
        values += [escape_formula(label), *(f"{value:.4f}" for value in row)]
    typicality = "" if p.typicality is None else f"{p.typicality:.4f}"
    return _csv_line(to_row_name(p.file), [*values, ";".join(p.flags), p.device, p.precision, typicality])


def _csv_split(stream: IO[bytes]) -> Iterator[bytes]:
    """Split at line ends outside of quotes."""
    lines: list[bytes] = []
    size = quotes = 0
    while size < _MAX_ROW_BYTES and (line := stream.readline(_MAX_ROW_BYTES)).endswith(b"\n"):
        lines.append(line)
        size += len(line)
        quotes += line.count(b'"')
        if quotes % 2 == 0:
            yield b"".join(lines)
            lines, size = [], 0


def _csv_parse(data: bytes, known: Sequence[str] | None) -> tuple[list[str], list[str]]:
    try:
        (values,) = csv.reader([data.decode("utf-8")], strict=True)
    except csv.Error as error:
        raise ValueError from error
    return list(known or values), values


def csv_line(row: Mapping[str, object], names: Sequence[str]) -> bytes:
    """Return the bytes of a CSV row, given a row of JSON lines; a column that it lacks stays empty.

    Parameters
    ----------
    row
        Values by column.
    names
        The columns to write: ``file``, then others.
    """
    cells = []
    for name in names[1:]:
        value = row.get(name)
        if isinstance(value, int | float):
            cells.append(f"{value:.4f}")
        elif isinstance(value, list | tuple):
            cells.append(";".join(map(str, value)))
        else:
            cells.append("" if value is None else escape_formula(str(value)))
    return _csv_line(to_row_name(str(row.get(names[0], ""))), cells)


def _json_row(p: Prediction) -> bytes:
    values: list[object] = [to_row_name(p.file), p.method, p.label, *p.probabilities]
    for label, row in zip(p.quadrant_labels, p.quadrant_probabilities, strict=True):
        values += [label, *row]
    values += [list(p.flags), p.device, p.precision, p.typicality]
    line = json.dumps(dict(zip(columns(p.classes), values, strict=True)), ensure_ascii=False)
    return encode_text(f"{line}\n")


def _json_split(stream: IO[bytes]) -> Iterator[bytes]:
    while (line := stream.readline(_MAX_ROW_BYTES)).endswith(b"\n"):
        yield line


def _json_parse(data: bytes, _: Sequence[str] | None) -> tuple[list[str], list[str]]:
    try:
        row = json.loads(data)
    except RecursionError as error:
        raise ValueError from error
    if not isinstance(row, dict):
        raise ValueError
    return list(row), [str(value) for value in row.values()]


CSV: Final = Format(_csv_header, _csv_row, _csv_split, _csv_parse)
"""CSV in UTF-8 with a header, probabilities with four decimals, and line feeds on all platforms.

No cell starts like a spreadsheet formula: such a file name gets the prefix ``./``, which is the same path, and such a
class name an apostrophe.
"""

JSON_LINES: Final = Format(lambda _: b"", _json_row, _json_split, _json_parse)
"""One JSON object per line: its keys are the columns of the CSV, probabilities are numbers, flags a list."""

_FORMATS: Final[Mapping[str, Format]] = {".csv": CSV, ".jsonl": JSON_LINES}


class RowReader:
    """Iterates over the rows of a stream, up to the first incomplete one: torn, or filled with zeros by a power cut.

    Parameters
    ----------
    stream
        Binary stream at its start.
    layout
        Format of the rows.
    columns
        If given, the stream has these columns and no header.
    run
        Method, device and precision of the run. If given, reading also stops at a row of another run.

    Attributes
    ----------
    columns
        Column names; of a CSV from the start, else after the first row. None if there are none.
    complete_bytes
        Number of bytes of the header and of the complete rows so far.
    hash
        SHA-256 of these bytes.
    """

    def __init__(
        self,
        stream: IO[bytes],
        layout: Format,
        *,
        run: tuple[str, str, str] | None = None,
        columns: list[str] | None = None,
    ) -> None:
        self._parse, self._rows, self._run = layout.parse, layout.split(stream), run
        self.columns = columns
        self.complete_bytes = 0
        self.hash = hashlib.sha256()
        if layout.header([]) and columns is None:
            header = next(self._rows, b"")
            if (values := self._values(header)) is not None:
                self.columns = values
                self._count(header)
            else:
                self._rows = iter(())

    def __iter__(self) -> Iterator[Row]:
        """Yield the complete rows; each has as many values as there are columns."""
        for data in self._rows:
            values = self._values(data)
            if values is None:
                return
            row = self._row(values, data)
            if self._run not in (None, row.run):
                return
            self._count(data)
            yield row

    def _row(self, values: Sequence[str], data: bytes) -> Row:
        """Return a row; files of earlier releases have no column behind device and precision."""
        behind = 1 if self.columns and self.columns[-1] == _LAST else 0
        return Row(values[0], (values[1], values[-2 - behind], values[-1 - behind]), data)

    def _values(self, data: bytes) -> list[str] | None:
        if b"\0" in data:
            return None
        try:
            names, values = self._parse(data, self.columns)
        except ValueError:
            return None
        if len(values) < _MIN_COLUMNS or len(values) != len(names):
            return None
        if self.columns is None:
            self.columns = names
        return values if names == self.columns else None

    def _count(self, data: bytes) -> None:
        self.complete_bytes += len(data)
        self.hash.update(data)


class RowWriter:
    """Writes rows to a stream.

    Parameters
    ----------
    stream
        A writable binary stream; it gets the header at once.
    classes
        Class names of the model.
    layout
        Format of the rows.
    """

    def __init__(self, stream: SupportsWrite[bytes], classes: Sequence[str], layout: Format = CSV) -> None:
        self._stream, self._layout = stream, layout
        stream.write(layout.header(classes))

    def write(self, prediction: Prediction) -> None:
        """Write one row."""
        self._stream.write(self._layout.row(prediction))


@contextmanager
def open_writer(path: Path, classes: Sequence[str]) -> Iterator[Writer]:
    """Open a writer for the file's extension. The file appears, complete, when the block ends without an exception.

    Raises
    ------
    UsageError
        If the extension is neither ``.csv`` nor ``.jsonl``.
    OutputError
        If the file cannot be written.
    """
    layout = format_for(path)
    with write_atomically(path) as stream, output_errors(path):
        yield RowWriter(stream, classes, layout)


def format_for(path: Path) -> Format:
    """Return the format for a result file's extension. Call it before any work to refuse a wrong one early.

    Raises
    ------
    UsageError
        If the extension is neither ``.csv`` nor ``.jsonl``.
    """
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"--out {path.as_posix()}: the extension is {path.suffix!r}; expected .csv or .jsonl")
    return _FORMATS[path.suffix.lower()]
