"""Smoothing over a beat: the decision of the mean probabilities of the last frames.

The mean is that of each quadrant's probabilities. The frame's probabilities are the mean over the quadrants, as always,
and therefore the mean of the frames' own. The vote, its tie and the abstention follow the rules of single frames.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from echoquad_runtime.bundle.typicality import UNLIKE_TRAINING
from echoquad_runtime.contract import Contract
from echoquad_runtime.engine.io_binding import InferenceOutput
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.predict.prediction import TIE, Prediction, decide

__all__ = ["FramePredictor", "Smoothing"]


class FramePredictor(Protocol):
    """What smoothing needs to know of a predictor."""

    abstain_below: float | None
    abstain_unlike: bool

    @property
    def contract(self) -> Contract:
        """The contract of the model."""
        ...


class Smoothing:
    """The mean of the last predictions.

    Parameters
    ----------
    frames
        Number of predictions in a mean, at least 1; with 1 they stay as they are.
    """

    def __init__(self, frames: int) -> None:
        self._probabilities: deque[npt.NDArray[np.float64]] = deque(maxlen=frames)
        self._predictor: FramePredictor | None = None

    def reset(self) -> None:
        """Forget the predictions until now."""
        self._probabilities.clear()

    def add(self, prediction: Prediction, predictor: FramePredictor) -> tuple[Prediction, int]:
        """Return the smoothed prediction, and over how many frames it is smoothed.

        Another predictor than before, such as that of a new bundle, begins anew. Flags, typicality and activation maps
        are those of the newest frame.

        Parameters
        ----------
        prediction
            The newest frame's.
        predictor
            The predictor that made it.

        Raises
        ------
        FrameError
            If the prediction is not a number.
        """
        if predictor is not self._predictor:
            self.reset()
            self._predictor = predictor
        self._probabilities.append(np.array(prediction.quadrant_probabilities, np.float64))
        count = len(self._probabilities)
        return (prediction if count == 1 else self._smoothed(prediction, predictor)), count

    def _smoothed(self, prediction: Prediction, predictor: FramePredictor) -> Prediction:
        mean = np.mean(self._probabilities, axis=0)[None]
        own = [flag for flag in prediction.flags if flag not in (TIE, UNLIKE_TRAINING)]
        (result,) = decide(
            [prediction.file],
            [tuple(own)],
            InferenceOutput(logits=np.zeros_like(mean), probabilities=mean),  # the vote takes no logits
            predictor.contract,
            method=prediction.method,
            device=prediction.device,
            precision=prediction.precision,
            threshold=None,
        )
        if isinstance(result, Failure):
            raise result.error
        unlike = (UNLIKE_TRAINING,) if UNLIKE_TRAINING in prediction.flags else ()
        result = replace(result, flags=(*result.flags, *unlike), typicality=prediction.typicality, cam=prediction.cam)
        return result.abstaining(predictor.abstain_below, predictor.contract, unlike=predictor.abstain_unlike)
