"""The folder of an evaluation: metrics, predictions, figures, mistakes and the HTML report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from echoquad_runtime.results.row_formats import open_writer
from echoquad_runtime.storage.atomic import make_folder, write_bytes, write_json
from echoquad_train.evaluation.evaluate import Evaluation
from echoquad_train.reporting.mistake_gallery import save_mistakes
from echoquad_train.reporting.report import evaluation_report
from echoquad_train.reporting.saved_figures import save_figures

__all__ = ["write_evaluation"]


def write_evaluation(evaluation: Evaluation, folder: Path, *, gallery: int = 0) -> list[Path]:
    """Write ``metrics.json``, ``predictions.csv``, the figures, ``mistakes/`` and ``report.html``; gives their paths.

    Parameters
    ----------
    evaluation
        What was found.
    folder
        Where to; made where it is not there.
    gallery
        How many of the most confident mistakes to draw.

    Raises
    ------
    OutputError
        If the system refuses.
    """
    make_folder(folder)
    mistakes = save_mistakes(evaluation, folder, gallery) if gallery else []
    metrics = {**evaluation.metrics, "mistakes": [mistake.to_dict() for mistake in mistakes]}
    found = replace(evaluation, metrics=metrics)
    paths = [folder / "metrics.json", folder / "predictions.csv"]
    write_json(paths[0], metrics)
    with open_writer(paths[1], tuple(metrics["classes"])) as writer:
        for prediction in evaluation.predictions:
            writer.write(prediction)
    pictures = save_figures(found.judged, found.contract, metrics, folder)
    report = folder / "report.html"
    write_bytes(report, evaluation_report(metrics, pictures, mistakes, folder).encode("utf-8", "backslashreplace"))
    return [*paths, *(picture.path for picture in pictures), report]
