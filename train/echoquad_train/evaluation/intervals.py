"""Intervals: Wilson's for a share of independent things, the bootstrap by patient for everything else.

Frames of one patient are much alike, so what is drawn with replacement is patients, each with all of its frames: the
cluster bootstrap (A. C. Davison, D. V. Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8), with
percentile intervals. A resample is a weight for each patient, so that every figure is a weighted one, and all resamples
are computed at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from echoquad_train.evaluation.reliability import Bins, Floats

__all__ = ["Bootstrap", "estimate", "weighted_auc", "weighted_counts", "weighted_ece", "wilson_interval"]

RESAMPLES: Final = 1000
_MOST: Final = 4_000_000  # numbers held at once
_QUANTILES: Final = (0.025, 0.975)

Indices = npt.NDArray[np.int64]


def wilson_interval(right: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Give the Wilson score interval of a proportion; at the default z it covers 95 %.

    E. B. Wilson, JASA 22 (1927) 209. Frames of one patient are not independent, so where a patient has several
    the interval is too narrow.
    """
    share = right / count
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    centre, scale = share + z * z / (2 * count), 1 + z * z / count
    # At its ends it is 0 and 1 exactly, whatever rounding says.
    return (centre - spread) / scale if right else 0.0, (centre + spread) / scale if right < count else 1.0


class Bootstrap:
    """Resamples of patients.

    Parameters
    ----------
    patients
        int64 [F], each frame's patient by number, 0 to P - 1.
    resamples
        How many; 0 draws none, and there are no intervals.
    seed
        Of the draws: the same patients, resamples and seed give the same intervals.

    Attributes
    ----------
    weights
        float64 [B, P], how often each resample has each patient.
    """

    def __init__(self, patients: Indices, resamples: int = RESAMPLES, seed: int = 0) -> None:
        self.patients = patients
        self.count = int(patients.max()) + 1
        rng = np.random.default_rng(seed)
        self.weights: Floats = rng.multinomial(self.count, np.full(self.count, 1 / self.count), resamples).astype(float)

    def totals(self, values: Floats) -> Floats:
        """Sum values of frames, float64 [F, K], over each resample: float64 [B, K]."""
        by_patient = np.zeros((self.count, values.shape[1]))
        np.add.at(by_patient, self.patients, values)
        return np.asarray(self.weights @ by_patient)

    def frame_weights(self, order: Indices) -> Iterator[Floats]:
        """Give the frames' weights in an order, float64 [b, F], some resamples at a time."""
        chosen = self.patients[order]
        step = max(1, _MOST // max(1, len(chosen)))
        for start in range(0, len(self.weights), step):
            yield self.weights[start : start + step][:, chosen]

    def mean(self, values: npt.NDArray[Any]) -> Floats:
        """Give the mean of values, [F], in each resample: float64 [B]."""
        found = self.totals(np.column_stack([values, np.ones(len(values))]).astype(float))
        return np.asarray(found[:, 0] / found[:, 1])


def estimate(value: float | None, draws: Floats) -> dict[str, Any]:
    """Give a figure and its percentile interval: ``estimate`` and ``ci95``.

    The interval is None where the figure is, or where fewer than half of the resamples have one: a resample without a
    frame of a class has no sensitivity.
    """
    known = draws[np.isfinite(draws)]
    if value is None or not math.isfinite(value):
        return {"estimate": None, "ci95": None}
    if not len(known) or 2 * len(known) < len(draws):
        return {"estimate": float(value), "ci95": None}
    return {"estimate": float(value), "ci95": [float(bound) for bound in np.quantile(known, _QUANTILES)]}


def weighted_counts(sampler: Bootstrap, labels: Indices, decided: Indices, classes: int) -> Floats:
    """Give the confusion matrix of each resample, float64 [B, C, C], true classes in rows."""
    cells = np.zeros((len(labels), classes * classes))
    cells[np.arange(len(labels)), labels * classes + decided] = 1
    return sampler.totals(cells).reshape(-1, classes, classes)


def weighted_auc(sampler: Bootstrap, score: Floats, truth: npt.NDArray[np.bool_]) -> Floats:
    """Give the area under the ROC curve in each resample, float64 [B]; NaN where it lacks one of the two kinds.

    The area is the share of pairs in order, a tie counting half (J. A. Hanley, B. J. McNeil, Radiology 143 (1982) 29).
    """
    order = np.argsort(score, kind="stable")
    begins = np.flatnonzero(np.diff(score[order], prepend=-np.inf))  # of each distinct score
    up = truth[order].astype(float)
    areas = []
    for weights in sampler.frame_weights(order):
        positive = np.add.reduceat(weights * up, begins, axis=1)
        negative = np.add.reduceat(weights * (1 - up), begins, axis=1)
        below = np.cumsum(negative, axis=1) - negative / 2
        pairs = positive.sum(axis=1) * negative.sum(axis=1)
        with np.errstate(invalid="ignore"):
            areas.append((positive * below).sum(axis=1) / pairs)
    return np.concatenate(areas) if areas else np.empty(0)


def weighted_ece(sampler: Bootstrap, bins: Bins, confidence: Floats, right: npt.NDArray[np.bool_]) -> Floats:
    """Give the expected calibration error of each resample, float64 [B], in the bins of the sample itself."""
    gaps = np.zeros((len(confidence), len(bins.counts)))
    gaps[np.arange(len(confidence)), bins.index] = right - confidence
    counts = sampler.totals(np.ones((len(confidence), 1)))[:, 0]
    return np.asarray(np.abs(sampler.totals(gaps)).sum(axis=1) / counts)
