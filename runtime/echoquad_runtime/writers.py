"""Writers: predictions as CSV or as JSON lines, the same columns in both."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final, Protocol

from echoquad_runtime.contract import QUADRANTS
from echoquad_runtime.errors import UsageError
from echoquad_runtime.files import output_errors, write_atomically
from echoquad_runtime.predictor import Prediction

__all__ = ["CsvWriter", "JsonlWriter", "Writer", "check_ending", "columns", "open_writer"]


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


class CsvWriter:
    """Rows of CSV in UTF-8: a header, probabilities with four decimals, lines that end in a line feed everywhere."""

    def __init__(self, stream: IO[bytes], classes: Sequence[str]) -> None:
        self._stream = stream
        self._row(columns(classes))

    def write(self, prediction: Prediction) -> None:
        """Write a row."""
        p = prediction
        row = [p.file, p.method, p.label, *(f"{value:.4f}" for value in p.probabilities)]
        for label, values in zip(p.quadrant_labels, p.quadrant_probabilities, strict=True):
            row += [label, *(f"{value:.4f}" for value in values)]
        self._row([*row, ";".join(p.flags), p.device, p.precision])

    def _row(self, values: Sequence[str]) -> None:
        line = io.StringIO()
        # Until Python 3.13 it quotes a carriage return only where the line's own end has one.
        csv.writer(line, lineterminator="\r\n").writerow(values)
        text = line.getvalue().removesuffix("\r\n") + "\n"
        self._stream.write(text.encode("utf-8", "backslashreplace"))


class JsonlWriter:
    """A JSON object a line, its keys the CSV's columns, probabilities as numbers and flags as a list."""

    def __init__(self, stream: IO[bytes], classes: Sequence[str]) -> None:
        self._stream = stream
        self._columns = columns(classes)

    def write(self, prediction: Prediction) -> None:
        """Write a line."""
        p = prediction
        values: list[object] = [p.file, p.method, p.label, *p.probabilities]
        for label, row in zip(p.quadrant_labels, p.quadrant_probabilities, strict=True):
            values += [label, *row]
        values += [list(p.flags), p.device, p.precision]
        line = json.dumps(dict(zip(self._columns, values, strict=True)), ensure_ascii=False)
        self._stream.write(f"{line}\n".encode("utf-8", "backslashreplace"))


_WRITERS: Final[Mapping[str, Callable[[IO[bytes], Sequence[str]], Writer]]] = {".csv": CsvWriter, ".jsonl": JsonlWriter}


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
    check_ending(path)
    with write_atomically(path) as stream, output_errors(path):
        yield _WRITERS[path.suffix.lower()](stream, classes)


def check_ending(path: Path) -> None:
    """Refuse a result file's name before any work is done for it.

    Raises
    ------
    UsageError
        If the ending is neither ``.csv`` nor ``.jsonl``.
    """
    if path.suffix.lower() not in _WRITERS:
        raise UsageError(f"--out {path.as_posix()}: the ending is {path.suffix!r}; expected .csv or .jsonl")
