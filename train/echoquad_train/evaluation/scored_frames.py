"""What was judged of a split, as arrays: the ground that every figure stands on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from echoquad_runtime.contract import Contract, VoteMethod
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.voting import aggregate_votes, apply_temperature
from echoquad_train.evaluation.reliability import Floats

__all__ = ["ScoredFrames", "score_frames"]

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ScoredFrames:
    """Decisions on F frames of C classes, beside the truth.

    Attributes
    ----------
    names
        F names.
    classes, positive
        C names, and which of them is the positive one.
    method, vote_weights
        How quadrants vote.
    labels
        int64 [F], true classes.
    quadrants
        float64 [F, 4, C], probabilities.
    decided
        int64 [F], decided classes.
    patients
        F names: whom each frame is of.
    frame_temperature
        Of the mean, for the confidence; see the contract.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...]
    positive: str
    method: VoteMethod
    vote_weights: tuple[float, float, float, float]
    labels: Indices
    quadrants: Floats
    decided: Indices
    patients: tuple[str, ...]
    frame_temperature: float = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def probabilities(self) -> Floats:
        """float64 [F, C], the mean over the quadrants."""
        return np.asarray(self.quadrants.mean(axis=1))

    @cached_property
    def quadrant_labels(self) -> Indices:
        """int64 [F, 4], what each quadrant was taken for."""
        return np.asarray(self.quadrants.argmax(axis=2), np.int64)

    @cached_property
    def right(self) -> npt.NDArray[np.bool_]:
        """Bool [F], whether a decision is right."""
        return np.asarray(self.decided == self.labels)

    @cached_property
    def shares(self) -> Floats:
        """float64 [F, C], the mean over the quadrants as calibrated."""
        return apply_temperature(self.probabilities, self.frame_temperature)

    @cached_property
    def confidence(self) -> Floats:
        """float64 [F], the decided class's calibrated mean probability."""
        return np.asarray(self.shares[np.arange(len(self)), self.decided])

    @cached_property
    def positives(self) -> npt.NDArray[np.bool_]:
        """Bool [F], whether a frame is of the positive class."""
        return np.asarray(self.labels == self.classes.index(self.positive))

    @cached_property
    def score(self) -> Floats:
        """float64 [F], the positive class's mean probability."""
        return np.asarray(self.probabilities[:, self.classes.index(self.positive)])

    @cached_property
    def patient_index(self) -> Indices:
        """int64 [F], patients by number, in the order in which they first appear."""
        number = {name: index for index, name in enumerate(dict.fromkeys(self.patients))}
        return np.array([number[name] for name in self.patients], np.int64)

    def only(self, kept: Sequence[int]) -> ScoredFrames | None:
        """Give the frames of these indices alone; None where there is no index."""
        if not len(kept):
            return None
        rows = np.asarray(kept, np.int64)
        return replace(
            self,
            names=tuple(self.names[row] for row in rows),
            labels=self.labels[rows],
            quadrants=self.quadrants[rows],
            decided=self.decided[rows],
            patients=tuple(self.patients[row] for row in rows),
        )

    def under(self, factor: float, frame_temperature: float) -> ScoredFrames:
        """Give what is decided where all logits are divided by `factor` once more, under another frame temperature."""
        quadrants = apply_temperature(self.quadrants, factor)
        decision = aggregate_votes(quadrants, self.method, self.vote_weights)
        return replace(self, quadrants=quadrants, decided=decision.labels, frame_temperature=frame_temperature)


def score_frames(
    predictions: Sequence[Prediction],
    labels: Indices,
    positive: str,
    contract: Contract | None = None,
    patients: Sequence[str] | None = None,
) -> ScoredFrames:
    """Make arrays of predictions; without `patients` each frame is somebody by itself.

    A `contract` gives the vote's weights and the frame temperature; without one they are equal, and 1.
    """
    first = predictions[0]
    index = {name: position for position, name in enumerate(first.classes)}
    names = tuple(prediction.file for prediction in predictions)
    return ScoredFrames(
        names=names,
        classes=first.classes,
        positive=positive,
        method=first.method,
        vote_weights=contract.vote_weights if contract else (1.0, 1.0, 1.0, 1.0),
        labels=np.asarray(labels, np.int64),
        quadrants=np.array([prediction.quadrant_probabilities for prediction in predictions], np.float64),
        decided=np.array([index[prediction.predicted_class] for prediction in predictions], np.int64),
        patients=tuple(patients) if patients is not None else names,
        frame_temperature=contract.frame_temperature if contract else 1.0,
    )
