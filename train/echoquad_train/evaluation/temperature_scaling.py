"""Calibration: two temperatures, fitted on validation frames, so that what has 0.8 comes true in eight of ten frames.

The first, in the graph, is that of C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On Calibration of Modern Neural
Networks", ICML 2017, arXiv:1706.04599: it makes each quadrant's softmax reliable. The mean of reliable probabilities is
not reliable itself, but too timid (R. Ranjan, T. Gneiting, "Combining probability forecasts", JRSS B 72 (2010) 71):
four quadrants that are right in three of four cases agree on what is right in nine of ten. So a frame's mean has a
temperature of its own, after the vote, of which its confidence is made. One alone cannot do: what makes the mean of
the softmax as sure as it should be, makes each quadrant far too sure, and turns decisions at ties.

A recipe may give the first. A high one softens the quadrants, and the nearer their means come to the mean of their
logits: to the logarithmic opinion pool, in which a sure quadrant counts more than a hesitant one (C. Genest, J. V.
Zidek, "Combining probability distributions", Statistical Science 1 (1986) 114). A quadrant's probability is too timid
then; the frame's confidence is not, since the second is fitted under it.
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
from echoquad_train.evaluation.reliability import BINNING, Floats, reliability

__all__ = [
    "FOLDS",
    "Temperatures",
    "calibration_facts",
    "cross_fit",
    "fit_temperature",
    "fit_temperatures",
    "patient_folds",
    "scores_of",
]

FOLDS: Final = 5
_QUADRANTS: Final = (0.2, 5.0)
_FRAMES: Final = (0.05, 5.0)
"""Temperatures that are looked through. A best one at an end is none: see `fit_temperature`."""
_TINY: Final = float(np.finfo(np.float32).tiny)

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Temperatures:
    """Temperatures of the quadrants' softmax and of a frame's mean; `note` says which is 1 for want of a fit."""

    quadrants: float = 1.0
    frames: float = 1.0
    note: str = ""

    def of(self, contract: Contract) -> Contract:
        """Give a contract these temperatures."""
        return replace(contract, temperature=self.quadrants, frame_temperature=self.frames)


def scores_of(probabilities: npt.NDArray[np.floating]) -> Floats:
    """Give what a softmax makes these probabilities of, [..., C], none below what float32 can hold."""
    return np.asarray(np.log(np.maximum(np.asarray(probabilities, np.float64), _TINY)), np.float64)


def fit_temperature(
    scores: npt.NDArray[np.floating], labels: Indices, bounds: tuple[float, float] = _QUADRANTS
) -> float | None:
    """Find the temperature at which softmax(scores / temperature) has the lowest negative log-likelihood.

    Parameters
    ----------
    scores
        [N, C], logits, or logarithms of probabilities, which differ from them by a constant a row.
    labels
        int64 [N], true classes.
    bounds
        What to look through; the loss is convex in 1 / temperature, so there is one minimum.

    Returns
    -------
    float or None
        Four decimals. None where the likelihood has no best temperature within the bounds: what is all judged rightly
        asks for infinite confidence, a model that knows nothing for none at all.
    """
    x, rows = np.asarray(scores, np.float64), np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(x / np.exp(log_temperature), axis=1)[rows, labels].mean())

    low, high = np.log(bounds)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    if min(loss(low), loss(high)) < found.fun + 1e-9:  # at an end, or level up to it
        return None
    return round(float(np.exp(found.x)), 4)


def fit_temperatures(scores: npt.NDArray[np.floating], labels: Indices, quadrants: float | None = None) -> Temperatures:
    """Fit both temperatures to logits of frames' quadrants, [F, 4, C]; true classes are int64 [F].

    First that of the quadrants, each with its frame's class, unless one is given; then, under it, that of the frames'
    means.
    """
    x = np.asarray(scores, np.float64)
    notes = []
    if quadrants is None:
        quadrants = fit_temperature(x.reshape(-1, x.shape[2]), np.repeat(labels, x.shape[1]))
    if quadrants is None:
        notes.append(f"no temperature of the quadrants from {_QUADRANTS[0]:g} to {_QUADRANTS[1]:g} is the likeliest")
    mean = softmax(x / (quadrants or 1.0), axis=2).mean(axis=1)
    frames = fit_temperature(scores_of(mean), labels, _FRAMES)
    if frames is None:
        notes.append(f"no temperature of the frames from {_FRAMES[0]:g} to {_FRAMES[1]:g} is the likeliest")
    return Temperatures(quadrants or 1.0, frames or 1.0, "; ".join(notes))


def patient_folds(patients: Sequence[str], count: int = FOLDS) -> Indices | None:
    """Deal frames into folds of which none shares a patient with another.

    Parameters
    ----------
    patients
        Whom each of F frames is of.
    count
        How many folds, at most; fewer where there are fewer patients.

    Returns
    -------
    int64 [F] or None
        The fold of each; None where there is one patient alone.
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
    scores: npt.NDArray[np.floating],
    labels: Indices,
    folds: Indices,
    contract: Contract,
    quadrants: float | None = None,
) -> tuple[dict[str, Any], list[Temperatures]]:
    """Measure the reliability of frames under temperatures that were fitted on the other folds' frames.

    Parameters
    ----------
    scores
        [F, 4, C], logits of the frames' quadrants.
    labels, folds
        int64 [F], true classes, and which fold a frame is in.
    contract
        Says how quadrants vote.
    quadrants
        Their temperature, where it is not fitted.

    Returns
    -------
    dict
        The figures of `echoquad_train.evaluation.reliability.reliability`, over all frames at once.
    list
        The temperatures, one pair a fold.
    """
    fitted = []
    shares = np.empty((len(labels), np.shape(scores)[2]))
    decided = np.empty(len(labels), np.int64)
    for fold in range(int(folds.max()) + 1):
        held = folds == fold
        fitted.append(fit_temperatures(scores[~held], labels[~held], quadrants))
        shares[held], decided[held] = under(fitted[-1], scores[held], contract)
    return reliability(shares, labels, decided), fitted


def under(temperatures: Temperatures, scores: npt.NDArray[np.floating], contract: Contract) -> tuple[Floats, Indices]:
    """Give frames' calibrated probabilities, float64 [F, C], and decided classes, int64 [F], under temperatures."""
    quadrants = softmax(np.asarray(scores, np.float64) / temperatures.quadrants, axis=2)
    decision = aggregate_votes(quadrants, contract.vote, contract.vote_weights)
    return apply_temperature(decision.probabilities, temperatures.frames), decision.labels


def calibration_facts(
    scores: npt.NDArray[np.floating],
    labels: Indices,
    patients: Sequence[str],
    contract: Contract,
    quadrants: float | None = None,
) -> tuple[Temperatures, dict[str, Any]]:
    """Fit the temperatures, and measure what they are worth.

    Parameters
    ----------
    scores
        [F, 4, C], logits of the validation frames' quadrants.
    labels
        int64 [F], true classes.
    patients
        Whom each frame is of: cross-fitting keeps a patient's frames together.
    contract
        Says how quadrants vote.
    quadrants
        Their temperature, where the recipe gives it; None is fitted.

    Returns
    -------
    Temperatures
        What was fitted on all the frames.
    dict
        What ``run.json`` says: ``temperature``, ``temperature_given`` (by the recipe, and so not fitted),
        ``frame_temperature``, ``note``, ``frames``, ``patients``, ``binning``;
        ``before``, ``after`` and ``cross_fitted`` with the figures of
        `echoquad_train.evaluation.reliability.reliability`, and ``quadrants`` with the same of the quadrants. Those of
        ``after`` are of the frames that the temperatures were fitted on; ``cross_fitted``, None where there is one
        patient alone, has each frame under temperatures that were fitted without its patient.
    """
    x = np.asarray(scores, np.float64)
    fitted = fit_temperatures(x, labels, quadrants)
    before, after = (under(temperatures, x, contract) for temperatures in (Temperatures(), fitted))
    folds = patient_folds(patients)
    crossed = None
    if folds is not None:
        figures, temperatures = cross_fit(x, labels, folds, contract, quadrants)
        crossed = {
            "folds": len(temperatures),
            "temperatures": [found.quadrants for found in temperatures],
            "frame_temperatures": [found.frames for found in temperatures],
            **figures,
        }
    flat, repeated = x.reshape(-1, x.shape[2]), np.repeat(labels, x.shape[1])
    return fitted, {
        "temperature": fitted.quadrants,
        "temperature_given": quadrants is not None,
        "frame_temperature": fitted.frames,
        "note": fitted.note,
        "frames": len(labels),
        "patients": len(set(patients)),
        "binning": BINNING,
        "before": reliability(before[0], labels, before[1]),
        "after": reliability(after[0], labels, after[1]),
        "cross_fitted": crossed,
        "quadrants": {
            name: _of_quadrants(softmax(flat / temperature, axis=1), repeated)
            for name, temperature in (("before", 1.0), ("after", fitted.quadrants))
        },
    }


def _of_quadrants(probabilities: Floats, labels: Indices) -> dict[str, Any]:
    found = reliability(probabilities, labels, np.asarray(probabilities.argmax(axis=1), np.int64), floor=False)
    return {name: found[name] for name in ("nll", "ece")}
