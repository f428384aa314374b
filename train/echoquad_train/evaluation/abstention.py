"""Abstention: how accuracy rises where a model may leave the frames that it is least sure of undecided.

Y. Geifman, R. El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017, arXiv:1705.08500; the area
under the risk-coverage curve (AURC) as in Y. Geifman, G. Uziel, R. El-Yaniv, ICLR 2019, arXiv:1805.08206.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from echoquad_train.evaluation.intervals import Bootstrap, estimate
from echoquad_train.evaluation.reliability import Floats
from echoquad_train.evaluation.scored_frames import ScoredFrames

__all__ = ["abstention", "risk_coverage"]

COVERAGES: Final = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)


def risk_coverage(confidence: Floats, right: npt.NDArray[np.bool_]) -> tuple[Floats, Floats, Floats]:
    """Give the risk-coverage curve, of the highest confidence to the lowest.

    Returns
    -------
    thresholds, coverage, risk
        float64 [K], a point for each distinct confidence: what is decided at or above it, how large a share of the
        frames that is, and what share of these is wrong.
    """
    order = np.argsort(-confidence, kind="stable")
    sure, wrong = confidence[order], np.cumsum(~right[order])
    ends = np.flatnonzero(np.diff(sure, append=-np.inf))  # frames of one confidence are decided together or not at all
    return sure[ends], (ends + 1) / len(sure), wrong[ends] / (ends + 1)


def abstention(judged: ScoredFrames, sampler: Bootstrap, below: float | None = None) -> dict[str, Any]:
    """Measure what abstaining buys.

    Parameters
    ----------
    judged
        The frames; a frame's confidence is the decided class's mean probability.
    sampler
        Of their patients.
    below
        ``--abstain-below``: the confidence under which a frame stays undecided.

    Returns
    -------
    dict
        ``aurc``, the mean risk over the frames' coverages; ``points`` with the highest threshold that decides at least
        95, 90, 80, 70 and 50 % of the frames, the ``coverage`` that it comes to and the ``accuracy`` there; with
        `below` also ``at``: coverage and accuracy at that confidence, each with its interval.
    """
    thresholds, coverage, risk = risk_coverage(judged.confidence, judged.right)
    shares = np.diff(coverage, prepend=0.0)
    points = []
    for wanted in COVERAGES:
        at = int(np.argmax(coverage >= wanted - 1e-12))
        points.append(
            {"threshold": float(thresholds[at]), "coverage": float(coverage[at]), "accuracy": float(1 - risk[at])}
        )
    found: dict[str, Any] = {"aurc": float((risk * shares).sum()), "points": points}
    if below is not None:
        answered = judged.confidence >= below
        with np.errstate(invalid="ignore", divide="ignore"):
            totals = sampler.totals(np.column_stack([answered & judged.right, answered]).astype(float))
            draws = totals[:, 0] / totals[:, 1]
        accuracy = float(judged.right[answered].mean()) if answered.any() else None
        found["at"] = {
            "below": below,
            "indeterminate": int((~answered).sum()),
            "coverage": estimate(float(answered.mean()), sampler.mean(answered)),
            "accuracy": estimate(accuracy, draws),
        }
    return found
