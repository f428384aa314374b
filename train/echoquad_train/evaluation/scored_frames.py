"""Scored frames: predictions and true classes of a split as arrays, the input of every metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from echoquad_runtime.contract import Contract, VoteMethod
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.voting import aggregate_votes, apply_temperature
from echoquad_train.evaluation.arrays import BoolArray, Float64Array, IndexArray

__all__ = ["ScoredFrames", "score_frames"]


@dataclass(frozen=True)
class ScoredFrames:
    """Predictions and labels of F frames of C classes.

    Attributes
    ----------
    names
        F names.
    classes, positive
        C class names, and the positive one.
    method, vote_weights
        How quadrants vote.
    labels
        int64 [F], true classes.
    quadrants
        float64 [F, 4, C], probabilities.
    decided
        int64 [F], decided classes.
    patients
        The patient of each frame.
    frame_temperature
        Temperature of the mean probability that gives the confidence; see `Contract`.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...]
    positive: str
    method: VoteMethod
    vote_weights: tuple[float, float, float, float]
    labels: IndexArray
    quadrants: Float64Array
    decided: IndexArray
    patients: tuple[str, ...]
    frame_temperature: float = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def positive_index(self) -> int:
        """Index of the positive class."""
        return self.classes.index(self.positive)

    @property
    def complete(self) -> bool:
        """Whether every class has a frame."""
        return len(np.unique(self.labels)) == len(self.classes)

    @cached_property
    def probabilities(self) -> Float64Array:
        """float64 [F, C], the mean over the quadrants."""
        return np.asarray(self.quadrants.mean(axis=1))

    @cached_property
    def quadrant_labels(self) -> IndexArray:
        """int64 [F, 4], the most probable class of each quadrant."""
        return np.asarray(self.quadrants.argmax(axis=2), np.int64)

    @cached_property
    def correct(self) -> BoolArray:
        """Bool [F], whether each decision is correct."""
        return np.asarray(self.decided == self.labels)

    @cached_property
    def calibrated(self) -> Float64Array:
        """float64 [F, C], the mean over the quadrants under the frame temperature."""
        return apply_temperature(self.probabilities, self.frame_temperature)

    @cached_property
    def confidence(self) -> Float64Array:
        """float64 [F], the calibrated probability of the decided class."""
        return np.asarray(self.calibrated[np.arange(len(self)), self.decided])

    @cached_property
    def is_positive(self) -> BoolArray:
        """Bool [F], whether each frame is of the positive class."""
        return np.asarray(self.labels == self.positive_index)

    @cached_property
    def score(self) -> Float64Array:
        """float64 [F], the mean probability of the positive class."""
        return np.asarray(self.probabilities[:, self.positive_index])

    @cached_property
    def patient_index(self) -> IndexArray:
        """int64 [F], patient numbers in the order of first appearance."""
        number = {name: index for index, name in enumerate(dict.fromkeys(self.patients))}
        return np.array([number[name] for name in self.patients], np.int64)

    def subset(self, indices: Sequence[int]) -> ScoredFrames | None:
        """Return the frames of these indices; None for no index."""
        if not len(indices):
            return None
        rows = np.asarray(indices, np.int64)
        return replace(
            self,
            names=tuple(self.names[row] for row in rows),
            labels=self.labels[rows],
            quadrants=self.quadrants[rows],
            decided=self.decided[rows],
            patients=tuple(self.patients[row] for row in rows),
        )

    def rescaled(self, factor: float, frame_temperature: float) -> ScoredFrames:
        """Return the frames with logits divided by `factor`, voted on again, under another frame temperature."""
        quadrants = apply_temperature(self.quadrants, factor)
        decision = aggregate_votes(quadrants, self.method, self.vote_weights)
        return replace(self, quadrants=quadrants, decided=decision.labels, frame_temperature=frame_temperature)

    def uncalibrated(self, contract: Contract) -> ScoredFrames:
        """Return the frames without the contract's temperatures: a power of a softmax divides its logits."""
        return self.rescaled(1 / contract.temperature, 1.0)


def score_frames(
    predictions: Sequence[Prediction],
    labels: IndexArray,
    positive: str,
    contract: Contract | None = None,
    patients: Sequence[str] | None = None,
) -> ScoredFrames:
    """Convert predictions to arrays.

    Without `patients`, each frame counts as a patient of its own. `contract` defines the vote weights and the frame
    temperature; without it they are 1.
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
