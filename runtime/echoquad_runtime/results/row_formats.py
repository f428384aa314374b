"""Writers: predictions as CSV or as JSON lines, the same columns in both; and rows read back, while they are whole."""

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
from echoquad_runtime.storage.row_names import encoded, printed, without_formula

if TYPE_CHECKING:
    from echoquad_runtime.predict.predictor import Prediction

__all__ = [
    "CsvWriter",
    "Format",
    "JsonlWriter",
    "Row",
    "RowReader",
    "Stream",
    "Writer",
    "check_ending",
    "columns",
    "format_of",
    "open_writer",
    "writer_of",
]

_QUOTED: Final = re.compile(r'[",\r\n]')
_QUOTED_NAME: Final = re.compile(r'[",\r\n;\t]')  # where another sign parts cells, a name must not begin one of its own
_MOST_BYTES: Final = 1 << 22  # in a row, so that damage is not read to the end of the file; two classes have 200


class Stream(Protocol):
    """Takes bytes."""

    def write(self, data: bytes, /) -> object:
        """Write them."""
        ...


class Writer(Protocol):
    """Takes predictions, one a row."""

    def write(self, prediction: Prediction) -> None:
        """Write a row."""
        ...


def columns(classes: Sequence[str]) -> list[str]:
    """Name the columns: the document's header with the classes' names in it, then ``flags,device,precision``."""
    names = ["file", "method", "pred_image", *(f"prob_{name}" for name in classes)]
    for quadrant in QUADRANTS:
        names += [f"pred_{quadrant}", *(f"p_{quadrant}_{name}" for name in classes)]
    return [*names, "flags", "device", "precision"]


_FEWEST: Final = len(columns(()))


@dataclass(frozen=True, slots=True)
class Row:
    """A row that was read back.

    Attributes
    ----------
    name
        The frame's, as rows carry it.
    ran
        Method, device and precision.
    data
        The row's bytes, its line feed included.
    """

    name: str
    ran: tuple[str, str, str]
    data: bytes


@dataclass(frozen=True, slots=True)
class Format:
    """How rows are bytes.

    Attributes
    ----------
    header
        Gives what comes before the first row, of the class names.
    row
        Gives a row, of a prediction.
    split
        Cuts a stream into rows' bytes, the header first if there is one, as long as they are whole.
    parse
        Gives columns and values of a row's bytes and the columns so far; raises a ValueError where it is none.
    """

    header: Callable[[Sequence[str]], bytes]
    row: Callable[[Prediction], bytes]
    split: Callable[[IO[bytes]], Iterator[bytes]]
    parse: Callable[[bytes, Sequence[str] | None], tuple[list[str], list[str]]]


def _csv_line(name: str, values: Sequence[str]) -> bytes:
    cells = [f'"{value.replace(chr(34), chr(34) * 2)}"' if _QUOTED.search(value) else value for value in values]
    name = f'"{name.replace(chr(34), chr(34) * 2)}"' if _QUOTED_NAME.search(name) else name
    return encoded(",".join([name, *cells]) + "\n")


def _csv_header(classes: Sequence[str]) -> bytes:
    first, *rest = columns(classes)
    return _csv_line(first, rest)


def _csv_row(p: Prediction) -> bytes:
    values = [p.method, without_formula(p.label), *(f"{value:.4f}" for value in p.probabilities)]
    for label, row in zip(p.quadrant_labels, p.quadrant_probabilities, strict=True):
        values += [without_formula(label), *(f"{value:.4f}" for value in row)]
    return _csv_line(printed(p.file), [*values, ";".join(p.flags), p.device, p.precision])


def _csv_split(stream: IO[bytes]) -> Iterator[bytes]:
    """Cut where a line ends outside of quotes."""
    lines: list[bytes] = []
    size = quotes = 0
    while size < _MOST_BYTES and (line := stream.readline(_MOST_BYTES)).endswith(b"\n"):
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


def _json_row(p: Prediction) -> bytes:
    values: list[object] = [printed(p.file), p.method, p.label, *p.probabilities]
    for label, row in zip(p.quadrant_labels, p.quadrant_probabilities, strict=True):
        values += [label, *row]
    values += [list(p.flags), p.device, p.precision]
    line = json.dumps(dict(zip(columns(p.classes), values, strict=True)), ensure_ascii=False)
    return encoded(f"{line}\n")


def _json_split(stream: IO[bytes]) -> Iterator[bytes]:
    while (line := stream.readline(_MOST_BYTES)).endswith(b"\n"):
        yield line


def _json_parse(data: bytes, _: Sequence[str] | None) -> tuple[list[str], list[str]]:
    try:
        found = json.loads(data)
    except RecursionError as error:
        raise ValueError from error
    if not isinstance(found, dict):
        raise ValueError
    return list(found), [str(value) for value in found.values()]


_FORMATS: Final[Mapping[str, Format]] = {
    ".csv": Format(_csv_header, _csv_row, _csv_split, _csv_parse),
    ".jsonl": Format(lambda _: b"", _json_row, _json_split, _json_parse),
}


class RowReader:
    """Reads rows back, up to the first that is not whole: torn, or filled with zeros as after a power cut.

    Parameters
    ----------
    stream
        Opened at its beginning.
    layout
        Of its rows.
    columns
        Where given, the stream begins with a row of these columns, and has no header.
    ran
        Method, device and precision of the run: where given, a row of another is as good as torn.

    Attributes
    ----------
    columns
        The columns' names, once the first row is read; a CSV's are there from the beginning. None where there are none.
    whole
        How many bytes, from the beginning, were read and are whole.
    hash
        SHA-256 of these bytes.
    """

    def __init__(
        self,
        stream: IO[bytes],
        layout: Format,
        *,
        ran: tuple[str, str, str] | None = None,
        columns: list[str] | None = None,
    ) -> None:
        self._parse, self._rows, self._ran = layout.parse, layout.split(stream), ran
        self.columns = columns
        self.whole = 0
        self.hash = hashlib.sha256()
        if layout.header([]) and columns is None:
            header = next(self._rows, b"")
            if (values := self._values(header)) is not None:
                self.columns = values
                self._pass(header)
            else:
                self._rows = iter(())

    def __iter__(self) -> Iterator[Row]:
        """Give the whole rows, one after the other; the values of each are as many as the columns."""
        for data in self._rows:
            values = self._values(data)
            if values is None:
                return
            row = Row(values[0], (values[1], values[-2], values[-1]), data)
            if self._ran not in (None, row.ran):
                return
            self._pass(data)
            yield row

    def _values(self, data: bytes) -> list[str] | None:
        if b"\0" in data:
            return None
        try:
            found, values = self._parse(data, self.columns)
        except ValueError:
            return None
        if len(values) < _FEWEST or len(values) != len(found):
            return None
        if self.columns is None:
            self.columns = found
        return values if found == self.columns else None

    def _pass(self, data: bytes) -> None:
        self.whole += len(data)
        self.hash.update(data)


class _StreamWriter:
    """Rows to a stream, in one layout."""

    layout: Format

    def __init__(self, stream: Stream, classes: Sequence[str]) -> None:
        self._stream = stream
        stream.write(self.layout.header(classes))

    def write(self, prediction: Prediction) -> None:
        """Write a row."""
        self._stream.write(self.layout.row(prediction))


class CsvWriter(_StreamWriter):
    """Rows of CSV in UTF-8: a header, probabilities with four decimals, lines that end in a line feed everywhere.

    No cell begins as a formula does: a file's name has ``./`` before it, which is the same path, a class an apostrophe.
    """

    layout = _FORMATS[".csv"]


class JsonlWriter(_StreamWriter):
    """A JSON object a line, its keys the CSV's columns, probabilities as numbers and flags as a list."""

    layout = _FORMATS[".jsonl"]


@contextmanager
def open_writer(path: Path, classes: Sequence[str]) -> Iterator[Writer]:
    """Open a writer by the file's ending; the file appears, whole, when the block ends well.

    Raises
    ------
    UsageError
        If the ending is neither ``.csv`` nor ``.jsonl``.
    OutputError
        If the system refuses.
    """
    make = writer_of(path)
    with write_atomically(path) as stream, output_errors(path):
        yield make(stream, classes)


def writer_of(path: Path) -> type[CsvWriter | JsonlWriter]:
    """Give the writer that a result file's ending names.

    Raises
    ------
    UsageError
        As `check_ending`.
    """
    return CsvWriter if format_of(path) is CsvWriter.layout else JsonlWriter


def format_of(path: Path) -> Format:
    """Give the format that a result file's ending names.

    Raises
    ------
    UsageError
        As `check_ending`.
    """
    check_ending(path)
    return _FORMATS[path.suffix.lower()]


def check_ending(path: Path) -> None:
    """Refuse a result file's name before any work is done for it.

    Raises
    ------
    UsageError
        If the ending is neither ``.csv`` nor ``.jsonl``.
    """
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"--out {path.as_posix()}: the ending is {path.suffix!r}; expected .csv or .jsonl")
