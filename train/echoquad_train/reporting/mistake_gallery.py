"""Mistake gallery: overlays of the most confident wrong decisions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from echoquad_runtime.errors import FrameError
from echoquad_runtime.frames.discovery import OVERLAY_SUFFIX
from echoquad_runtime.overlay.drawing import save_overlay
from echoquad_runtime.storage.atomic import output_errors
from echoquad_train.evaluation.evaluate import Evaluation
from echoquad_train.evaluation.metrics_record import MetricsRecord

__all__ = ["FOLDER", "Mistake", "save_mistakes"]

FOLDER: Final = "mistakes"


@dataclass(frozen=True)
class Mistake(MetricsRecord):
    """A frame with a wrong decision.

    Attributes
    ----------
    file, patient
        Name of the frame, and its patient.
    true, decided
        Its class, and the decided class.
    confidence
        Calibrated mean probability of the decided class, in [0, 1].
    picture
        Path of the overlay, relative to the evaluation folder.
    """

    file: str
    true: str
    decided: str
    confidence: float
    patient: str
    picture: str


def save_mistakes(evaluation: Evaluation, folder: Path, count: int) -> list[Mistake]:
    """Draw the overlays of the `count` wrong decisions with the highest confidence, in descending order.

    Overlays of an earlier evaluation in the folder are removed. Frames that have become unreadable are skipped.

    Raises
    ------
    OutputError
        If a file cannot be written.
    """
    scored, gallery = evaluation.scored, folder / FOLDER
    with output_errors(gallery):
        for old in gallery.rglob(f"*{OVERLAY_SUFFIX}"):
            old.unlink()
    wrong = np.flatnonzero(~scored.correct)
    mistakes: list[Mistake] = []
    for index in wrong[np.argsort(-scored.confidence[wrong], kind="stable")]:
        if len(mistakes) == count:
            break
        frame, prediction = evaluation.frames[index], evaluation.predictions[index]
        try:
            picture = save_overlay(gallery, frame.file, prediction, evaluation.contract)
        except FrameError:
            continue
        mistakes.append(
            Mistake(
                file=prediction.file,
                true=scored.classes[scored.labels[index]],
                decided=scored.classes[scored.decided[index]],
                confidence=float(scored.confidence[index]),
                patient=scored.patients[index],
                picture=picture.relative_to(folder).as_posix(),
            )
        )
    return mistakes
