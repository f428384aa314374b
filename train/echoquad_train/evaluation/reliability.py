"""Reliability: how closely confidence matches accuracy, by the expected calibration error (ECE) and proper scores.

The expected calibration error is the mean gap between confidence and accuracy in bins of confidence. Fixed bins
overestimate it for few frames: a hundred frames of a perfectly calibrated model show 0.06 in 15 bins. ``ece`` therefore
uses the monotonic sweep of R. Roelofs et al., "Mitigating Bias in Calibration Error Estimation", AISTATS 2022,
arXiv:2012.08668: as many bins of equal mass as keep the accuracy rising from bin to bin. ``ece_equal_width`` is the
usual one with 15 bins of equal width (C. Guo et al., ICML 2017, arXiv:1706.04599). ``ece_if_calibrated`` is what
``ece`` would be for a perfect model, by consistency resampling (J. Broecker, L. A. Smith, Weather and Forecasting 22
(2007) 651).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from echoquad_train.evaluation.arrays import BoolArray, Float64Array, IndexArray
from echoquad_train.evaluation.metrics_record import MetricsRecord

__all__ = [
    "BINNING",
    "Bins",
    "Reliability",
    "equal_width_bins",
    "log_losses",
    "reliability",
    "squared_errors",
    "sweep_bins",
]

BINNING: Final = "equal mass, as many bins as leave the accuracy rising (at most 100)"
"""The binning of ``ece`` in words, as ``metrics.json`` records it."""

EQUAL_WIDTH_BINS: Final = 15
_MAX_BINS: Final = 100
_RESAMPLES: Final = 200
_SMALLEST: Final = 1e-12  # probabilities are clipped here, so that the loss stays finite


@dataclass(frozen=True, slots=True)
class Bins:
    """Frames in bins of confidence.

    Attributes
    ----------
    index
        int64 [F], the bin of each frame.
    counts
        int64 [B], number of frames per bin; none is empty.
    confidence, accuracy
        float64 [B], means per bin, in [0, 1].
    """

    index: IndexArray
    counts: IndexArray
    confidence: Float64Array
    accuracy: Float64Array

    @property
    def error(self) -> float:
        """Expected calibration error, in [0, 1]: the mean |accuracy - confidence| over the frames."""
        return float(np.average(np.abs(self.accuracy - self.confidence), weights=self.counts))


@dataclass(frozen=True)
class Reliability(MetricsRecord):
    """Proper scores and calibration errors of probabilities.

    Attributes
    ----------
    nll, brier
        Mean negative log-likelihood in nats, and Brier score in [0, 2].
    ece, ece_bins, ece_equal_width
        Expected calibration error with swept bins, the number of these bins, and the error with 15 equal widths.
    frame_accuracy, confidence
        Means over the frames.
    ece_if_calibrated
        ``mean`` and ``q95`` (95 % quantile) of `ece` for a perfect model; None if not computed, and then not in JSON.
    """

    nll: float
    brier: float
    ece: float
    ece_bins: int
    ece_equal_width: float
    frame_accuracy: float
    confidence: float
    ece_if_calibrated: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        values = super().to_dict()
        if self.ece_if_calibrated is None:
            del values["ece_if_calibrated"]
        return values


def _binned(index: IndexArray, confidence: Float64Array, correct: BoolArray) -> Bins:
    used, index = np.unique(index, return_inverse=True)
    counts = np.bincount(index, minlength=len(used))
    means = (np.bincount(index, values, len(used)) / counts for values in (confidence, correct))
    return Bins(index.astype(np.int64), counts, *means)


def equal_width_bins(confidence: Float64Array, correct: BoolArray, count: int = EQUAL_WIDTH_BINS) -> Bins:
    """Return `count` bins of equal width over [0, 1], each open below, without the empty ones.

    The confidence is float64 [F], in [0, 1]; `correct`, bool [F], states whether each decision is correct.
    """
    index = np.clip(np.ceil(confidence * count).astype(np.int64) - 1, 0, count - 1)
    return _binned(index, confidence, correct)


def sweep_bins(confidence: Float64Array, correct: BoolArray) -> Bins:
    """Return as many bins of equal mass as keep the accuracy rising from bin to bin; see `equal_width_bins`."""
    order = np.lexsort((correct, confidence))  # the order of equal confidences must not depend on that of the files
    ends = _sweep(correct[order])
    index = np.empty(len(order), np.int64)
    index[order] = np.searchsorted(ends, np.arange(len(order)), side="right")
    return _binned(index, confidence, correct)


def _sweep(correct: BoolArray) -> IndexArray:
    """Return the end of each bin, for frames sorted by confidence."""
    total = np.concatenate([[0], np.cumsum(correct)])
    ends = np.array([len(correct)])
    for count in range(2, min(len(correct), _MAX_BINS) + 1):
        edges = np.arange(count + 1) * len(correct) // count
        if (np.diff(np.diff(total[edges]) / np.diff(edges)) < 0).any():
            break
        ends = edges[1:]
    return ends


def _sweep_error(confidence: Float64Array, correct: BoolArray) -> float:
    """Return `Bins.error` of `sweep_bins`, for frames sorted by confidence."""
    gaps = np.add.reduceat(correct - confidence, np.concatenate([[0], _sweep(correct)[:-1]]))
    return float(np.abs(gaps).sum() / len(correct))


def log_losses(probabilities: Float64Array, labels: IndexArray) -> Float64Array:
    """Return the negative log-likelihood of each frame, float64 [F], in nats; at most 28."""
    return np.asarray(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], _SMALLEST)))


def squared_errors(probabilities: Float64Array, labels: IndexArray) -> Float64Array:
    """Return the squared distance to the one-hot label, summed over the classes: float64 [F], in [0, 2].

    Their mean is the Brier score (G. W. Brier, Monthly Weather Review 78 (1950) 1), for two classes twice that of the
    positive class alone.
    """
    return np.asarray(((probabilities - np.eye(probabilities.shape[1])[labels]) ** 2).sum(axis=1))


def reliability(
    probabilities: Float64Array, labels: IndexArray, decided: IndexArray, *, resample: bool = True
) -> Reliability:
    """Measure the reliability of probabilities.

    Parameters
    ----------
    probabilities
        float64 [F, C], calibrated mean over the quadrants of each frame.
    labels, decided
        int64 [F], true and decided classes. The confidence of a frame is the probability of its decided class, which
        may differ from the most probable class because quadrants vote.
    resample
        Whether to compute ``ece_if_calibrated``, with a fixed seed.
    """
    rows = np.arange(len(labels))
    confidence, correct = probabilities[rows, decided], decided == labels
    bins = sweep_bins(confidence, correct)
    if_calibrated = None
    if resample:
        rng = np.random.default_rng(0)
        ordered = np.sort(confidence)
        errors = [_sweep_error(ordered, rng.random(len(rows)) < ordered) for _ in range(_RESAMPLES)]
        if_calibrated = {"mean": float(np.mean(errors)), "q95": float(np.quantile(errors, 0.95))}
    return Reliability(
        nll=float(log_losses(probabilities, labels).mean()),
        brier=float(squared_errors(probabilities, labels).mean()),
        ece=bins.error,
        ece_bins=len(bins.counts),
        ece_equal_width=equal_width_bins(confidence, correct).error,
        frame_accuracy=float(correct.mean()),
        confidence=float(confidence.mean()),
        ece_if_calibrated=if_calibrated,
    )
