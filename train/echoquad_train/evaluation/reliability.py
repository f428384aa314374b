"""Reliability: how far probabilities are from what comes true, and how much of that so few frames would show anyway.

The expected calibration error is the mean gap between confidence and accuracy, in bins of confidence. With fixed bins
it is too high by far where frames are few: a hundred frames of a perfectly calibrated model show 0.06 in 15 bins. So
the error given as ``ece`` is that of R. Roelofs et al., "Mitigating Bias in Calibration Error Estimation", AISTATS
2022, arXiv:2012.08668: as many bins of equal mass as leave the accuracy rising from bin to bin. Beside it stand the
usual one, 15 bins of equal width (C. Guo et al., ICML 2017, arXiv:1706.04599), and what ``ece`` would be were the model
perfect (J. Broecker, L. A. Smith, Weather and Forecasting 22 (2007) 651: truths drawn by the probabilities themselves).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["BINNING", "Bins", "brier", "equal_width_bins", "losses", "nll", "reliability", "squares", "sweep_bins"]

BINNING: Final = "equal mass, as many bins as leave the accuracy rising (at most 100)"
"""How ``ece`` is binned, in words."""

WIDTHS: Final = 15
_MOST_BINS: Final = 100
_DRAWS: Final = 200
_SMALLEST: Final = 1e-12  # a probability of nothing would cost infinitely much

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Bins:
    """Frames in bins of confidence.

    Attributes
    ----------
    index
        int64 [F], the bin that each frame is in.
    counts
        int64 [B], frames in each; none is empty.
    confidence, accuracy
        float64 [B], the means in each, 0 to 1.
    """

    index: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    confidence: Floats
    accuracy: Floats

    @property
    def error(self) -> float:
        """The expected calibration error, 0 to 1: the mean |accuracy - confidence| over the frames."""
        return float(np.average(np.abs(self.accuracy - self.confidence), weights=self.counts))


def _binned(index: npt.NDArray[np.int64], confidence: Floats, right: npt.NDArray[np.bool_]) -> Bins:
    used, index = np.unique(index, return_inverse=True)
    counts = np.bincount(index, minlength=len(used))
    sure, correct = (np.bincount(index, values, len(used)) / counts for values in (confidence, right))
    return Bins(index.astype(np.int64), counts, sure, correct)


def equal_width_bins(confidence: Floats, right: npt.NDArray[np.bool_], count: int = WIDTHS) -> Bins:
    """Put frames into `count` bins of equal width over [0, 1], each open below; empty ones are left out.

    Parameters
    ----------
    confidence
        float64 [F], 0 to 1.
    right
        bool [F], whether the decisions are right.
    count
        How many bins.
    """
    index = np.clip(np.ceil(confidence * count).astype(np.int64) - 1, 0, count - 1)
    return _binned(index, confidence, right)


def sweep_bins(confidence: Floats, right: npt.NDArray[np.bool_]) -> Bins:
    """Put frames into as many bins of equal mass as leave the accuracy rising from each to the next.

    Parameters
    ----------
    confidence
        float64 [F], 0 to 1.
    right
        bool [F], whether the decisions are right.
    """
    order = np.lexsort((right, confidence))  # equal confidences in an order that is not that of the files
    ends = _sweep(right[order])
    index = np.empty(len(order), np.int64)
    index[order] = np.searchsorted(ends, np.arange(len(order)), side="right")
    return _binned(index, confidence, right)


def _sweep(right: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Give where the bins end, of frames in the order of their confidence."""
    total = np.concatenate([[0], np.cumsum(right)])
    ends = np.array([len(right)])
    for count in range(2, min(len(right), _MOST_BINS) + 1):
        edges = np.arange(count + 1) * len(right) // count
        if (np.diff(np.diff(total[edges]) / np.diff(edges)) < 0).any():
            break
        ends = edges[1:]
    return ends


def _sweep_error(confidence: Floats, right: npt.NDArray[np.bool_]) -> float:
    """Give the error of `sweep_bins`, of frames in the order of their confidence."""
    gaps = np.add.reduceat(right - confidence, np.concatenate([[0], _sweep(right)[:-1]]))
    return float(np.abs(gaps).sum() / len(right))


def losses(probabilities: Floats, labels: npt.NDArray[np.int64]) -> Floats:
    """Give each frame's negative log-likelihood, float64 [F], in nats; an impossible truth costs 28."""
    return np.asarray(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], _SMALLEST)))


def squares(probabilities: Floats, labels: npt.NDArray[np.int64]) -> Floats:
    """Give each frame's squared distance to the true class's corner, summed over classes: float64 [F], 0 to 2."""
    return np.asarray(((probabilities - np.eye(probabilities.shape[1])[labels]) ** 2).sum(axis=1))


def nll(probabilities: Floats, labels: npt.NDArray[np.int64]) -> float:
    """Give the mean negative log-likelihood, in nats, of probabilities, float64 [F, C], at labels, int64 [F]."""
    return float(losses(probabilities, labels).mean())


def brier(probabilities: Floats, labels: npt.NDArray[np.int64]) -> float:
    """Give the Brier score, 0 to 2: the mean of `squares`.

    G. W. Brier, Monthly Weather Review 78 (1950) 1. For two classes it is twice what is given of the positive one.
    """
    return float(squares(probabilities, labels).mean())


def reliability(
    probabilities: Floats, labels: npt.NDArray[np.int64], decided: npt.NDArray[np.int64], *, floor: bool = True
) -> dict[str, Any]:
    """Measure how reliable the reported probabilities are.

    Parameters
    ----------
    probabilities
        float64 [F, C], each frame's calibrated mean over its quadrants.
    labels, decided
        int64 [F], true and decided classes. A frame's confidence is the probability of the class that was decided,
        which a vote may decide against the higher mean.
    floor
        Whether to draw what a perfect model would show, with a fixed seed.

    Returns
    -------
    dict
        ``nll``, ``brier``, ``ece``, ``ece_bins``, ``ece_equal_width``, ``frame_accuracy``, ``confidence`` (the mean),
        and with `floor` ``ece_if_calibrated``: mean and 95 % quantile.
    """
    rows = np.arange(len(labels))
    confidence, right = probabilities[rows, decided], decided == labels
    bins = sweep_bins(confidence, right)
    found: dict[str, Any] = {
        "nll": nll(probabilities, labels),
        "brier": brier(probabilities, labels),
        "ece": bins.error,
        "ece_bins": len(bins.counts),
        "ece_equal_width": equal_width_bins(confidence, right).error,
        "frame_accuracy": float(right.mean()),
        "confidence": float(confidence.mean()),
    }
    if floor:
        rng = np.random.default_rng(0)
        sure = np.sort(confidence)
        drawn = [_sweep_error(sure, rng.random(len(rows)) < sure) for _ in range(_DRAWS)]
        found["ece_if_calibrated"] = {"mean": float(np.mean(drawn)), "q95": float(np.quantile(drawn, 0.95))}
    return found
