"""Operating points: thresholds on the mean probability of the positive class, used in place of the vote.

A threshold chosen on the frames it is reported on looks better than it is. Thresholds are therefore chosen on the
validation split, and if that split is reported, cross-fitted: chosen on the frames of the other patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import roc_curve

from echoquad_runtime.errors import ConfigError
from echoquad_train.evaluation.arrays import BoolArray, Float64Array, IndexArray
from echoquad_train.evaluation.intervals import Bootstrap, Estimate
from echoquad_train.evaluation.metrics_record import MetricsRecord
from echoquad_train.evaluation.scored_frames import ScoredFrames

__all__ = ["OperatingPoint", "check_targets", "choose_threshold", "operating_points", "sensitivity_specificity"]


@dataclass(frozen=True)
class OperatingPoint(MetricsRecord):
    """A threshold and the rates that it reaches.

    Attributes
    ----------
    fixed, target
        The rate that is held, ``specificity`` or ``sensitivity``, and its minimum.
    thresholds
        One threshold, or one per fold if `cross_fitted`. A threshold is None if its frames lack a class. Empty if there
        are no validation frames.
    cross_fitted
        Whether the thresholds are those of folds.
    sensitivity, specificity
        The rates on the reported frames; None without a threshold.
    """

    fixed: str
    target: float
    thresholds: tuple[float | None, ...]
    cross_fitted: bool
    sensitivity: Estimate | None
    specificity: Estimate | None

    @property
    def measured(self) -> bool:
        """Whether both rates have a value."""
        return all(rate and rate.estimate is not None for rate in (self.sensitivity, self.specificity))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, with the key ``threshold`` or ``thresholds``."""
        values = super().to_dict()
        thresholds, cross_fitted = values.pop("thresholds"), values.pop("cross_fitted")
        rates = {name: values.pop(name) for name in ("sensitivity", "specificity")}
        if cross_fitted:
            values["thresholds"] = thresholds
        elif thresholds:
            values["threshold"] = thresholds[0]
        return values | rates


def check_targets(values: Sequence[float], option: str) -> None:
    """Raise ConfigError if a rate of an option is not in (0, 1]."""
    for value in values:
        if not 0 < value <= 1:
            raise ConfigError(f"{option} {value:g} found; expected a rate above 0, at most 1")


def choose_threshold(score: Float64Array, truth: BoolArray, kind: str, target: float) -> float | None:
    """Return the threshold that holds one rate and maximises the other; a frame at or above it is positive.

    Parameters
    ----------
    score
        float64 [F], mean probability of the positive class.
    truth
        bool [F], whether each frame is of the positive class.
    kind, target
        ``specificity`` or ``sensitivity``, and its minimum.

    Returns
    -------
    float or None
        Halfway between the lowest score above the threshold and the next lower one, so that it does not depend on the
        last digit of a score. None if `truth` has only one value.
    """
    if truth.all() or not truth.any():
        return None
    false_positive, true_positive, thresholds = roc_curve(truth, score, drop_intermediate=False)
    rate = 1 - false_positive if kind == "specificity" else true_positive
    reached = np.flatnonzero(rate >= target - 1e-12)
    # As the threshold falls, sensitivity rises and specificity falls.
    chosen = int(reached[-1] if kind == "specificity" else reached[0])
    if chosen == 0:  # no frame is positive
        return float(np.nextafter(thresholds[1], 2))
    upper = min(float(thresholds[chosen]), 1.0)
    lower = float(thresholds[chosen + 1]) if chosen + 1 < len(thresholds) else 0.0
    middle = (upper + lower) / 2
    return middle if middle > lower else upper


def sensitivity_specificity(positive: BoolArray, truth: BoolArray, sampler: Bootstrap) -> tuple[Estimate, Estimate]:
    """Return the sensitivity and the specificity of positive decisions, bool [F], with bootstrap intervals."""

    def rate(members: BoolArray, decisions: BoolArray) -> Estimate:
        hits = members & decisions
        value = float(hits.sum() / members.sum()) if members.any() else None
        return Estimate.bootstrap(value, sampler.ratio(hits, members))

    return rate(truth, positive), rate(~truth, ~positive)


def operating_points(
    scored: ScoredFrames,
    sampler: Bootstrap,
    targets: Sequence[tuple[str, float]],
    reference: ScoredFrames | None,
    folds: IndexArray | None,
) -> tuple[OperatingPoint, ...]:
    """Measure one operating point per target.

    Parameters
    ----------
    scored
        The reported frames.
    sampler
        Resamples of their patients.
    targets
        Pairs of ``specificity`` or ``sensitivity`` and its minimum.
    reference
        The validation frames that thresholds are chosen on; None if `folds` are given.
    folds
        int64 [F], the fold of each reported frame: its threshold is chosen on the other folds.
    """
    points = []
    for kind, target in targets:
        thresholds: tuple[float | None, ...] = ()
        if reference is not None:
            thresholds = (choose_threshold(reference.score, reference.is_positive, kind, target),)
        elif folds is not None:
            thresholds = tuple(
                choose_threshold(scored.score[folds != fold], scored.is_positive[folds != fold], kind, target)
                for fold in range(int(folds.max()) + 1)
            )
        cross_fitted = reference is None and folds is not None
        rates: tuple[Estimate | None, Estimate | None] = (None, None)
        if thresholds and None not in thresholds:
            values = np.array(thresholds, float)
            positive = scored.score >= (values[folds] if cross_fitted else values[0])
            rates = sensitivity_specificity(positive, scored.is_positive, sampler)
        points.append(OperatingPoint(kind, target, thresholds, cross_fitted, *rates))
    return tuple(points)
