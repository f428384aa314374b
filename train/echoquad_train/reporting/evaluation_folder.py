"""Evaluation folder: metrics, predictions, figures, mistakes and HTML report of one evaluation."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from echoquad_runtime.contract import describe_layout
from echoquad_runtime.results.row_formats import format_for
from echoquad_runtime.storage.atomic import make_folder, write_atomically, write_json
from echoquad_runtime.storage.row_names import escape_formula
from echoquad_train.evaluation.evaluate import Evaluation
from echoquad_train.reporting.mistake_gallery import save_mistakes
from echoquad_train.reporting.report import write_report
from echoquad_train.reporting.saved_figures import save_figures

__all__ = ["write_evaluation"]


def write_evaluation(evaluation: Evaluation, folder: Path, *, gallery: int = 0) -> list[Path]:
    """Write ``metrics.json``, ``predictions.csv``, the figures, ``mistakes/`` and ``report.html``; return their paths.

    The folder is created if it does not exist; `gallery` is the number of most confident mistakes to draw.

    Raises
    ------
    OutputError
        If a file cannot be written.
    """
    make_folder(folder)
    mistakes = save_mistakes(evaluation, folder, gallery) if gallery else []
    metrics, table, report = folder / "metrics.json", folder / "predictions.csv", folder / "report.html"
    write_json(metrics, evaluation.metrics.to_dict() | {"mistakes": [mistake.to_dict() for mistake in mistakes]})
    _write_predictions(table, evaluation)
    pictures = save_figures(evaluation, folder)
    write_report(
        report,
        "evaluation",
        metrics=evaluation.metrics,
        layout=describe_layout(evaluation.contract.quadrants),
        pictures=pictures,
        mistakes=mistakes,
        wrong=int((~evaluation.scored.correct).sum()),
        folder=folder,
    )
    return [metrics, table, *(picture.path for picture in pictures), report]


def _write_predictions(path: Path, evaluation: Evaluation) -> None:
    """Write the rows of ``echoquad predict`` with one more column, the true class."""
    layout, classes = format_for(path), evaluation.scored.classes
    with write_atomically(path) as stream:
        stream.write(layout.header(classes).rstrip(b"\n") + b",true_class\n")
        for prediction, label in zip(evaluation.predictions, evaluation.scored.labels, strict=True):
            cell = io.StringIO()
            csv.writer(cell, lineterminator="\n").writerow([escape_formula(classes[label])])
            stream.write(layout.row(prediction).removesuffix(b"\n") + b"," + cell.getvalue().encode())
