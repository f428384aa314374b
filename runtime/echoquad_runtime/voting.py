"""Voting: how the probabilities of the four quadrants become one decision per frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from echoquad_runtime.contract import VOTE_METHODS, VoteMethod
from echoquad_runtime.errors import ConfigError

__all__ = ["Decision", "aggregate_votes", "apply_temperature"]


@dataclass(frozen=True, slots=True)
class Decision:
    """Decisions on N frames with Q quadrants and C classes.

    Attributes
    ----------
    labels
        int64 [N], the index of each frame's decided class.
    probabilities
        float64 [N, C], the unweighted mean over the quadrants, whatever the method.
    quadrant_labels
        int64 [N, Q], the class of each quadrant: the largest probability, the first one of equal ones.
    margins
        float64 [N] in [0, 1], the score of the decided class minus the best other score: votes / Q for ``majority`` (0
        if the mean broke a tie), probability for the other methods.
    """

    labels: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]
    quadrant_labels: npt.NDArray[np.int64]
    margins: npt.NDArray[np.float64]


def aggregate_votes(
    probabilities: npt.NDArray[np.floating],
    method: VoteMethod,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
) -> Decision:
    """Aggregate the quadrants' probabilities to decisions.

    Parameters
    ----------
    probabilities
        float [N, Q, C] in [0, 1] with sum 1 over C. Means are computed in float64.
    method
        ``majority``: the class with the most quadrant votes (plurality); a tie goes to the highest mean probability
        among the tied classes, and a tie of those to the first class. ``average``: the highest mean probability.
        ``weighted``: the highest mean weighted by `weights`.
    weights
        Q numbers, used by ``weighted`` only.

    Raises
    ------
    ConfigError
        If the method is unknown or the shapes do not match.
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 3:
        raise ConfigError(f"probabilities have the shape {p.shape}; expected [frames, quadrants, classes]")
    _, quadrants, classes = p.shape
    mean = p.mean(axis=1)
    quadrant_labels = p.argmax(axis=2)
    if method == "majority":
        votes = (quadrant_labels[:, :, None] == np.arange(classes)).sum(axis=1)
        tied = votes == votes.max(axis=1, keepdims=True)
        labels = np.where(tied, mean, -1.0).argmax(axis=1)
        score = votes / quadrants
    elif method == "average":
        labels, score = mean.argmax(axis=1), mean
    elif method == "weighted":
        if len(weights) != quadrants:
            raise ConfigError(f"{len(weights)} vote weights found; expected one for each of {quadrants} quadrants")
        w = np.asarray(weights, np.float64)
        score = np.einsum("nqc,q->nc", p, w / w.sum())
        labels = score.argmax(axis=1)
    else:
        raise ConfigError(f"vote method {method!r} found; expected one of {', '.join(VOTE_METHODS)}")
    return Decision(labels, mean, quadrant_labels, _margins(score, labels))


def apply_temperature(probabilities: npt.NDArray[np.floating], temperature: float) -> npt.NDArray[np.float64]:
    """Return probabilities, [..., C], at another temperature, as if their logits were divided by it.

    The result is p^(1/T), normalised, since a probability is exp(logit) up to a factor; the order of classes does not
    change. Probabilities below float32's smallest normal number count as that number. A temperature of 1 returns the
    same bits.
    """
    p = np.asarray(probabilities, np.float64)
    if temperature == 1:
        return p
    scaled = np.log(np.maximum(p, np.finfo(np.float32).tiny)) / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), np.float64)


def _margins(score: npt.NDArray[np.floating], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    rows = np.arange(len(labels))
    chosen = score[rows, labels]
    others = score.astype(np.float64)
    others[rows, labels] = -np.inf
    return np.asarray(chosen - others.max(axis=1), np.float64)
