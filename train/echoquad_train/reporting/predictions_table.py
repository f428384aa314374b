"""Predictions table: the rows of ``echoquad predict`` with the true class of each frame."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.results.row_formats import format_for
from echoquad_runtime.storage.atomic import write_atomically
from echoquad_runtime.storage.row_names import escape_formula

__all__ = ["write_predictions"]


def write_predictions(
    path: Path,
    rows: Iterable[tuple[Prediction, int, Sequence[object]]],
    classes: Sequence[str],
    columns: Sequence[str] = (),
) -> None:
    """Write a CSV file of predictions, with more columns behind those of ``echoquad predict``.

    Parameters
    ----------
    path
        The file.
    rows
        For each frame its prediction, the index of its true class, and the values of `columns`.
    classes
        The class names.
    columns
        Names of columns between those of ``echoquad predict`` and the last one, ``true_class``.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    layout = format_for(path)
    with write_atomically(path) as stream:
        stream.write(layout.header(classes).rstrip(b"\n") + b"," + _line([*columns, "true_class"]))
        for prediction, label, values in rows:
            cells = _line([*values, escape_formula(classes[label])])
            stream.write(layout.row(prediction).removesuffix(b"\n") + b"," + cells)


def _line(cells: Sequence[object]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()
