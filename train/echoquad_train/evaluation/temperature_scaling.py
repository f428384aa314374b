"""Temperature scaling: two temperatures, fitted on validation frames, that calibrate quadrants and frames.

The first temperature is inside the graph and calibrates the softmax of each quadrant (C. Guo, G. Pleiss, Y. Sun, K. Q.
Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599). The mean of calibrated
probabilities is underconfident (R. Ranjan, T. Gneiting, "Combining probability forecasts", JRSS B 72 (2010) 71): four
quadrants that are correct in three of four cases agree on what is correct in nine of ten. The second temperature is
applied after the vote, to the mean of a frame, and gives its confidence. One temperature for both would make each
quadrant overconfident and change decisions at ties.

A recipe may set the first temperature. A high one moves the means towards the logarithmic opinion pool, the mean of the
logits, in which confident quadrants weigh more (C. Genest, J. V. Zidek, "Combining probability distributions",
Statistical Science 1 (1986) 114). Quadrants are underconfident then; frames are not, because the second temperature is
fitted under the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from echoquad_runtime.contract import Contract
from echoquad_runtime.voting import aggregate_votes, apply_temperature
from echoquad_train.evaluation.arrays import Float64Array, IndexArray
from echoquad_train.evaluation.metrics_record import MetricsRecord
from echoquad_train.evaluation.reliability import BINNING, Reliability, reliability

__all__ = [
    "FOLDS",
    "Refit",
    "Temperatures",
    "calibrated_probabilities",
    "calibration_facts",
    "cross_fit",
    "fit_temperature",
    "fit_temperatures",
    "log_probabilities",
    "patient_folds",
]

FOLDS: Final = 5
_QUADRANT_BOUNDS: Final = (0.2, 5.0)
_FRAME_BOUNDS: Final = (0.05, 5.0)
"""Temperatures that are searched; see `fit_temperature` for an optimum at a bound."""
_TINY: Final = float(np.finfo(np.float32).tiny)

Scores = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Temperatures:
    """Temperatures of the quadrants' softmax and of a frame's mean; `note` names any that could not be fitted."""

    quadrants: float = 1.0
    frames: float = 1.0
    note: str = ""

    def of(self, contract: Contract) -> Contract:
        """Return the contract with these temperatures."""
        return replace(contract, temperature=self.quadrants, frame_temperature=self.frames)


@dataclass(frozen=True)
class Refit(MetricsRecord):
    """Reliability under temperatures fitted on other patients.

    Attributes
    ----------
    temperatures
        One pair, fitted on the validation split, or one pair per fold if `cross_fitted`.
    cross_fitted
        Whether the temperatures are those of folds.
    reliability
        Of the reported frames.
    """

    temperatures: tuple[Temperatures, ...]
    cross_fitted: bool
    reliability: Reliability

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: the temperatures, then those of `reliability`."""
        if self.cross_fitted:
            values: dict[str, Any] = {
                "folds": len(self.temperatures),
                "temperatures": [pair.quadrants for pair in self.temperatures],
                "frame_temperatures": [pair.frames for pair in self.temperatures],
            }
        else:
            (pair,) = self.temperatures
            values = {"temperature": pair.quadrants, "frame_temperature": pair.frames, "note": pair.note}
        return values | self.reliability.to_dict()


def log_probabilities(probabilities: Scores) -> Float64Array:
    """Return the logarithm of probabilities, [..., C], clipped at the smallest float32; a softmax inverts it."""
    return np.asarray(np.log(np.maximum(np.asarray(probabilities, np.float64), _TINY)), np.float64)


def fit_temperature(scores: Scores, labels: IndexArray, bounds: tuple[float, float] = _QUADRANT_BOUNDS) -> float | None:
    """Return the temperature that minimises the negative log-likelihood of softmax(scores / temperature).

    Parameters
    ----------
    scores
        [N, C], logits or log probabilities, which differ by a constant per row.
    labels
        int64 [N], true classes.
    bounds
        The interval that is searched. The loss is convex in 1 / temperature and has one minimum.

    Returns
    -------
    float or None
        Rounded to four decimals. None if the minimum is at a bound: frames that are all correct favour a temperature of
        zero, a model without skill an infinite one.
    """
    x, rows = np.asarray(scores, np.float64), np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(x / np.exp(log_temperature), axis=1)[rows, labels].mean())

    low, high = np.log(bounds)
    result = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    if min(loss(low), loss(high)) < result.fun + 1e-9:  # at a bound, or flat up to it
        return None
    return round(float(np.exp(result.x)), 4)


def fit_temperatures(scores: Scores, labels: IndexArray, quadrants: float | None = None) -> Temperatures:
    """Fit both temperatures to the logits of frames' quadrants, [F, 4, C], and true classes, int64 [F].

    The quadrants' temperature is fitted first, unless it is given; the frames' temperature is fitted under it.
    """
    x = np.asarray(scores, np.float64)
    notes = []
    if quadrants is None:
        quadrants = fit_temperature(x.reshape(-1, x.shape[2]), np.repeat(labels, x.shape[1]))
    if quadrants is None:
        notes.append(_no_optimum("quadrants", _QUADRANT_BOUNDS))
    mean = softmax(x / (quadrants or 1.0), axis=2).mean(axis=1)
    frames = fit_temperature(log_probabilities(mean), labels, _FRAME_BOUNDS)
    if frames is None:
        notes.append(_no_optimum("frames", _FRAME_BOUNDS))
    return Temperatures(quadrants or 1.0, frames or 1.0, "; ".join(notes))


def _no_optimum(what: str, bounds: tuple[float, float]) -> str:
    return f"no temperature of the {what} from {bounds[0]:g} to {bounds[1]:g} is the likeliest"


def patient_folds(patients: Sequence[str], count: int = FOLDS) -> IndexArray | None:
    """Assign frames to folds so that the frames of a patient share a fold.

    Parameters
    ----------
    patients
        The patient of each of F frames.
    count
        Maximum number of folds; there are at most as many as patients.

    Returns
    -------
    int64 [F] or None
        The fold of each frame; None for a single patient.
    """
    from sklearn.model_selection import GroupKFold

    count = min(count, len(set(patients)))
    if count < 2:
        return None
    folds = np.empty(len(patients), np.int64)
    for fold, (_, held_out) in enumerate(GroupKFold(count).split(np.empty(len(patients)), groups=list(patients))):
        folds[held_out] = fold
    return folds


def cross_fit(
    scores: Scores, labels: IndexArray, folds: IndexArray, contract: Contract, quadrants: float | None = None
) -> Refit:
    """Measure the reliability of frames under temperatures fitted on the frames of the other folds.

    Parameters
    ----------
    scores
        [F, 4, C], logits of the frames' quadrants.
    labels, folds
        int64 [F], true class and fold of each frame.
    contract
        Defines how quadrants vote.
    quadrants
        The quadrants' temperature; None fits it.
    """
    pairs = []
    probabilities = np.empty((len(labels), np.shape(scores)[2]))
    decided = np.empty(len(labels), np.int64)
    for fold in range(int(folds.max()) + 1):
        held_out = folds == fold
        pairs.append(fit_temperatures(scores[~held_out], labels[~held_out], quadrants))
        probabilities[held_out], decided[held_out] = calibrated_probabilities(pairs[-1], scores[held_out], contract)
    return Refit(tuple(pairs), True, reliability(probabilities, labels, decided))


def calibrated_probabilities(
    temperatures: Temperatures, scores: Scores, contract: Contract
) -> tuple[Float64Array, IndexArray]:
    """Return the calibrated probabilities, float64 [F, C], and decided classes, int64 [F], of logits [F, 4, C]."""
    quadrants = softmax(np.asarray(scores, np.float64) / temperatures.quadrants, axis=2)
    decision = aggregate_votes(quadrants, contract.vote, contract.vote_weights)
    return apply_temperature(decision.probabilities, temperatures.frames), decision.labels


def calibration_facts(
    scores: Scores,
    labels: IndexArray,
    patients: Sequence[str],
    contract: Contract,
    quadrants: float | None = None,
) -> tuple[Temperatures, dict[str, Any]]:
    """Fit the temperatures and measure their effect.

    Parameters
    ----------
    scores
        [F, 4, C], logits of the validation frames' quadrants.
    labels
        int64 [F], true classes.
    patients
        The patient of each frame; cross-fitting keeps a patient's frames together.
    contract
        Defines how quadrants vote.
    quadrants
        The quadrants' temperature of the recipe; None fits it.

    Returns
    -------
    Temperatures
        Fitted on all frames.
    dict
        The entry of ``run.json``: ``temperature``, ``temperature_given`` (set by the recipe), ``frame_temperature``,
        ``note``, ``frames``, ``patients``, ``binning``; the reliability of frames ``before`` and ``after`` on the
        fitted frames, and ``cross_fitted``, under temperatures fitted without their patients (None for a single
        patient); and ``nll`` and ``ece`` of ``quadrants``, ``before`` and ``after``.
    """
    x = np.asarray(scores, np.float64)
    fitted = fit_temperatures(x, labels, quadrants)

    def frames_under(temperatures: Temperatures) -> dict[str, Any]:
        probabilities, decided = calibrated_probabilities(temperatures, x, contract)
        return reliability(probabilities, labels, decided).to_dict()

    flat, repeated = x.reshape(-1, x.shape[2]), np.repeat(labels, x.shape[1])

    def quadrants_under(temperature: float) -> dict[str, float]:
        probabilities = softmax(flat / temperature, axis=1)
        decided = np.asarray(probabilities.argmax(axis=1), np.int64)
        measured = reliability(probabilities, repeated, decided, resample=False)
        return {"nll": measured.nll, "ece": measured.ece}

    folds = patient_folds(patients)
    return fitted, {
        "temperature": fitted.quadrants,
        "temperature_given": quadrants is not None,
        "frame_temperature": fitted.frames,
        "note": fitted.note,
        "frames": len(labels),
        "patients": len(set(patients)),
        "binning": BINNING,
        "before": frames_under(Temperatures()),
        "after": frames_under(fitted),
        "cross_fitted": None if folds is None else cross_fit(x, labels, folds, contract, quadrants).to_dict(),
        "quadrants": {"before": quadrants_under(1.0), "after": quadrants_under(fitted.quadrants)},
    }
