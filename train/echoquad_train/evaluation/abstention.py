"""Abstention: accuracy and coverage when the least confident frames stay undecided (risk-coverage curve).

Y. Geifman, R. El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017, arXiv:1705.08500; area under
the risk-coverage curve (AURC) as in Y. Geifman, G. Uziel, R. El-Yaniv, ICLR 2019, arXiv:1805.08206.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from echoquad_train.evaluation.arrays import BoolArray, Float64Array
from echoquad_train.evaluation.intervals import Bootstrap, Estimate
from echoquad_train.evaluation.metrics_record import MetricsRecord
from echoquad_train.evaluation.scored_frames import ScoredFrames

__all__ = ["Abstention", "AbstentionPoint", "CoveragePoint", "abstention", "risk_coverage"]

COVERAGES: Final = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)


@dataclass(frozen=True)
class CoveragePoint(MetricsRecord):
    """A confidence threshold, the fraction of frames decided at it, and the accuracy among these."""

    threshold: float
    coverage: float
    accuracy: float


@dataclass(frozen=True)
class AbstentionPoint(MetricsRecord):
    """Coverage and accuracy at ``--abstain-below``, and the number of frames that stay undecided."""

    below: float
    indeterminate: int
    coverage: Estimate
    accuracy: Estimate


@dataclass(frozen=True)
class Abstention(MetricsRecord):
    """The effect of abstaining.

    Attributes
    ----------
    aurc
        Area under the risk-coverage curve: the mean risk over the coverages.
    points
        The highest threshold that decides at least 100, 95, 90, 80, 70 and 50 % of the frames.
    at
        The point of ``--abstain-below``; None without this option, and then not in JSON.
    """

    aurc: float
    points: tuple[CoveragePoint, ...]
    at: AbstentionPoint | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        values = super().to_dict()
        if self.at is None:
            del values["at"]
        return values


def risk_coverage(confidence: Float64Array, correct: BoolArray) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Return the risk-coverage curve, from the highest confidence to the lowest.

    Returns
    -------
    thresholds, coverage, risk
        float64 [K], one point per distinct confidence: the threshold, the fraction of frames at or above it, and the
        fraction of these that are wrong.
    """
    order = np.argsort(-confidence, kind="stable")
    ordered, wrong = confidence[order], np.cumsum(~correct[order])
    ends = np.flatnonzero(np.diff(ordered, append=-np.inf))  # frames of equal confidence are decided together
    return ordered[ends], (ends + 1) / len(ordered), wrong[ends] / (ends + 1)


def abstention(scored: ScoredFrames, sampler: Bootstrap, below: float | None = None) -> Abstention:
    """Measure the effect of abstaining on the least confident frames; `below` is ``--abstain-below``."""
    thresholds, coverage, risk = risk_coverage(scored.confidence, scored.correct)
    indices = [int(np.argmax(coverage >= target - 1e-12)) for target in COVERAGES]
    points = tuple(CoveragePoint(float(thresholds[i]), float(coverage[i]), float(1 - risk[i])) for i in indices)
    aurc = float((risk * np.diff(coverage, prepend=0.0)).sum())
    if below is None:
        return Abstention(aurc, points)
    decided = scored.confidence >= below
    accuracy = float(scored.correct[decided].mean()) if decided.any() else None
    at = AbstentionPoint(
        below,
        int((~decided).sum()),
        Estimate.bootstrap(float(decided.mean()), sampler.mean(decided)),
        Estimate.bootstrap(accuracy, sampler.ratio(decided & scored.correct, decided)),
    )
    return Abstention(aurc, points, at)
