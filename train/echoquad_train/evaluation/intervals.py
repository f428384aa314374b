"""Confidence intervals: Wilson's for independent observations, and the bootstrap interval by patient.

Frames of one patient resemble each other. The bootstrap therefore resamples patients, each with all of its frames: the
cluster bootstrap (A. C. Davison, D. V. Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8) with
percentile intervals. `scipy.stats.bootstrap` resamples observations only. A resample is a weight per patient, so that
every statistic is a weighted one and all resamples are computed at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from echoquad_train.evaluation.arrays import BoolArray, Float64Array, IndexArray
from echoquad_train.evaluation.metrics_record import MetricsRecord
from echoquad_train.evaluation.reliability import Bins

__all__ = ["Bootstrap", "Estimate", "weighted_auc", "weighted_counts", "weighted_ece", "wilson_interval"]

RESAMPLES: Final = 1000
_MAX_ELEMENTS: Final = 4_000_000  # of an array of weights
_QUANTILES: Final = (0.025, 0.975)


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion.

    It takes observations as independent. It is too narrow for frames if patients have several.
    """
    interval = binomtest(successes, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Estimate(MetricsRecord):
    """A statistic and its 95 % interval; either is None if it is undefined."""

    estimate: float | None
    ci95: tuple[float, float] | None = None

    @classmethod
    def bootstrap(cls, value: float | None, resampled: Float64Array) -> Estimate:
        """Return a statistic with its bootstrap interval, the percentiles of its resampled values.

        The interval is None if fewer than half of the resamples define the statistic: a resample without a frame of a
        class has no sensitivity.
        """
        if value is None or not math.isfinite(value):
            return cls(None)
        finite = resampled[np.isfinite(resampled)]
        if not len(finite) or 2 * len(finite) < len(resampled):
            return cls(float(value))
        low, high = np.quantile(finite, _QUANTILES)
        return cls(float(value), (float(low), float(high)))


class Bootstrap:
    """Resamples of patients.

    Parameters
    ----------
    patients
        int64 [F], patient index of each frame, 0 to P - 1.
    resamples
        Number of resamples B; 0 gives no intervals.
    seed
        Seed of the random numbers: equal arguments give equal intervals.

    Attributes
    ----------
    weights
        float64 [B, P], how often each resample contains each patient.
    """

    def __init__(self, patients: IndexArray, resamples: int = RESAMPLES, seed: int = 0) -> None:
        self.patients = patients
        self.count = int(patients.max()) + 1
        rng = np.random.default_rng(seed)
        self.weights: Float64Array = rng.multinomial(self.count, np.full(self.count, 1 / self.count), resamples).astype(
            float
        )

    def totals(self, values: Float64Array) -> Float64Array:
        """Return the sum of values of frames, float64 [F, K], in each resample: float64 [B, K]."""
        by_patient = np.zeros((self.count, values.shape[1]))
        np.add.at(by_patient, self.patients, values)
        return np.asarray(self.weights @ by_patient)

    def frame_weights(self, order: IndexArray) -> Iterator[Float64Array]:
        """Yield the weights of the frames in the given order, float64 [b, F], for some resamples at a time."""
        chosen = self.patients[order]
        step = max(1, _MAX_ELEMENTS // max(1, len(chosen)))
        for start in range(0, len(self.weights), step):
            yield self.weights[start : start + step][:, chosen]

    def ratio(self, numerator: npt.NDArray[Any], denominator: npt.NDArray[Any]) -> Float64Array:
        """Return the ratio of the sums of two values of frames, [F], in each resample: float64 [B]; NaN for 0 / 0."""
        totals = self.totals(np.column_stack([numerator, denominator]).astype(float))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(totals[:, 0] / totals[:, 1])

    def mean(self, values: npt.NDArray[Any]) -> Float64Array:
        """Return the mean of values of frames, [F], in each resample: float64 [B]."""
        return self.ratio(values, np.ones(len(values)))


def weighted_counts(sampler: Bootstrap, labels: IndexArray, decided: IndexArray, classes: int) -> Float64Array:
    """Return the confusion matrix of each resample, float64 [B, C, C], true classes in rows."""
    cells = np.zeros((len(labels), classes * classes))
    cells[np.arange(len(labels)), labels * classes + decided] = 1
    return sampler.totals(cells).reshape(-1, classes, classes)


def weighted_auc(sampler: Bootstrap, score: Float64Array, truth: BoolArray) -> Float64Array:
    """Return the area under the ROC curve in each resample, float64 [B]; NaN without positives or negatives.

    The area is the fraction of ordered pairs, a tie counting half (J. A. Hanley, B. J. McNeil, Radiology 143 (1982)
    29).
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


def weighted_ece(sampler: Bootstrap, bins: Bins, confidence: Float64Array, correct: BoolArray) -> Float64Array:
    """Return the expected calibration error of each resample, float64 [B], in the bins of the sample itself."""
    gaps = np.zeros((len(confidence), len(bins.counts)))
    gaps[np.arange(len(confidence)), bins.index] = correct - confidence
    counts = sampler.totals(np.ones((len(confidence), 1)))[:, 0]
    return np.asarray(np.abs(sampler.totals(gaps)).sum(axis=1) / counts)
