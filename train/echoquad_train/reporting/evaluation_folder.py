"""Evaluation folder: metrics, predictions, figures, mistakes and HTML report of one evaluation."""

from __future__ import annotations

from pathlib import Path

from echoquad_runtime.contract import describe_layout
from echoquad_runtime.storage.atomic import make_folder, write_json
from echoquad_train.evaluation.evaluate import Evaluation
from echoquad_train.reporting.mistake_gallery import save_mistakes
from echoquad_train.reporting.predictions_table import write_predictions
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
    pairs = zip(evaluation.predictions, evaluation.scored.labels, strict=True)
    write_predictions(table, ((prediction, label, ()) for prediction, label in pairs), evaluation.scored.classes)
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
