"""The gallery: the most confident mistakes as overlays, which teach more than any figure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from echoquad_runtime.errors import FrameError
from echoquad_runtime.frames.discovery import OVERLAY_SUFFIX
from echoquad_runtime.overlay.drawing import save_overlay
from echoquad_runtime.storage.atomic import output_errors

if TYPE_CHECKING:
    from echoquad_train.evaluation.evaluate import Evaluation

__all__ = ["FOLDER", "Mistake", "save_mistakes"]

FOLDER: Final = "mistakes"


@dataclass(frozen=True, slots=True)
class Mistake:
    """A frame that was judged wrongly.

    Attributes
    ----------
    file
        The frame's name.
    true, decided
        Its class, and what it was taken for.
    confidence
        The mean probability of the latter, 0 to 1.
    patient
        Whom it is of.
    picture
        The overlay's path, relative to the evaluation's folder.
    """

    file: str
    true: str
    decided: str
    confidence: float
    patient: str
    picture: str

    def to_dict(self) -> dict[str, Any]:
        """Give it as JSON values."""
        return asdict(self)


def save_mistakes(evaluation: Evaluation, folder: Path, count: int) -> list[Mistake]:
    """Draw the overlays of the `count` wrong decisions with the highest confidence, the surest first.

    Overlays that an earlier evaluation left in the same folder are removed. A frame that cannot be read any more is
    passed over.

    Raises
    ------
    OutputError
        If the system refuses.
    """
    judged, place = evaluation.judged, folder / FOLDER
    with output_errors(place):
        for old in place.rglob(f"*{OVERLAY_SUFFIX}"):
            old.unlink()
    wrong = np.flatnonzero(~judged.right)
    surest = wrong[np.argsort(-judged.confidence[wrong], kind="stable")]
    mistakes: list[Mistake] = []
    for index in surest:
        if len(mistakes) == count:
            break
        frame, prediction = evaluation.frames[index], evaluation.predictions[index]
        try:
            picture = save_overlay(place, frame.file, prediction, evaluation.contract)
        except FrameError:
            continue
        mistakes.append(
            Mistake(
                file=prediction.file,
                true=judged.classes[judged.labels[index]],
                decided=judged.classes[judged.decided[index]],
                confidence=float(judged.confidence[index]),
                patient=judged.patients[index],
                picture=picture.relative_to(folder).as_posix(),
            )
        )
    return mistakes
