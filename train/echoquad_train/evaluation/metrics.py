"""Metrics: the figures of ``metrics.json``, of decisions and probabilities held against the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from sklearn import metrics

from echoquad_runtime.contract import QUADRANTS, Contract
from echoquad_runtime.predict.prediction import Prediction
from echoquad_train.evaluation.abstention import abstention
from echoquad_train.evaluation.intervals import (
    RESAMPLES,
    Bootstrap,
    estimate,
    weighted_auc,
    weighted_counts,
    weighted_ece,
    wilson_interval,
)
from echoquad_train.evaluation.operating_points import operating_points
from echoquad_train.evaluation.reliability import BINNING, Floats, losses, reliability, squares, sweep_bins
from echoquad_train.evaluation.scored_frames import Indices, ScoredFrames, score_frames
from echoquad_train.evaluation.temperature_scaling import cross_fit, fit_temperatures, patient_folds, scores_of

__all__ = ["Settings", "measure", "measure_more", "plain", "roc_curves"]

VALIDATION: Final = "validation"
"""The split that thresholds and temperature are chosen on."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is to be measured beside the plain figures.

    Attributes
    ----------
    resamples, seed
        Of the bootstrap; 0 resamples, no intervals.
    at_specificity, at_sensitivity
        Rates that operating points hold.
    abstain_below
        The confidence under which a frame stays undecided; None decides all.
    temperature_given
        Whether the quadrants' temperature was given in training, and so stays where temperatures are fitted anew.
    """

    resamples: int = RESAMPLES
    seed: int = 0
    at_specificity: tuple[float, ...] = (0.9,)
    at_sensitivity: tuple[float, ...] = (0.9,)
    abstain_below: float | None = None
    temperature_given: bool = False

    @property
    def targets(self) -> list[tuple[str, float]]:
        """The operating points."""
        return [
            *(("specificity", value) for value in self.at_specificity),
            *(("sensitivity", value) for value in self.at_sensitivity),
        ]


def measure(predictions: Sequence[Prediction], labels: Indices, positive: str) -> dict[str, Any]:
    """Compute the plain metrics of predictions against labels, int64 [F]; those of frames alone.

    ``roc_auc`` is of the positive class's mean probability for two classes, the unweighted mean of one-against-rest
    areas for more, and None where a class has no frame.
    """
    return _plain(score_frames(predictions, labels, positive))


def _plain(judged: ScoredFrames) -> dict[str, Any]:
    classes, labels, decided = judged.classes, judged.labels, judged.decided
    every = list(range(len(classes)))
    right = int(judged.right.sum())
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, decided, labels=every, zero_division=0.0
    )
    areas = [area for _, _, _, area in roc_curves(judged.probabilities, labels, classes, judged.positive)]
    quadrants = judged.quadrant_labels
    return {
        "frames": len(labels),
        "accuracy": right / len(labels),
        "accuracy_ci95": list(wilson_interval(right, len(labels))),
        "balanced_accuracy": float(np.mean(recall[support > 0])),
        "patch_accuracy": float((quadrants == labels[:, None]).mean()),
        "roc_auc": float(np.mean(areas)) if len(np.unique(labels)) == len(classes) else None,
        "positive": judged.positive,
        "classes": list(classes),
        "confusion": metrics.confusion_matrix(labels, decided, labels=every).tolist(),
        "per_class": {
            name: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "support": int(support[i]),
            }
            for i, name in enumerate(classes)
        },
        "per_quadrant": {name: float((quadrants[:, i] == labels).mean()) for i, name in enumerate(QUADRANTS)},
    }


def roc_curves(
    probabilities: npt.NDArray[np.float64],
    labels: npt.NDArray[np.int64],
    classes: Sequence[str],
    positive: str,
) -> list[tuple[str, npt.NDArray[np.float64], npt.NDArray[np.float64], float]]:
    """Give name, false and true positive rates and area of each ROC curve.

    One curve, of the positive class, for two classes; one a class, against the rest, for more. A class without frames,
    or with all of them, has none.
    """
    wanted = [positive] if len(classes) == 2 else list(classes)
    curves = []
    for name in wanted:
        column = classes.index(name)
        truth = labels == column
        if truth.all() or not truth.any():
            continue
        false_positive, true_positive, _ = metrics.roc_curve(truth, probabilities[:, column])
        curves.append((name, false_positive, true_positive, float(metrics.auc(false_positive, true_positive))))
    return curves


def measure_more(
    judged: ScoredFrames, settings: Settings, *, split: str, contract: Contract, reference: ScoredFrames | None = None
) -> dict[str, Any]:
    """Compute what ``metrics.json`` holds beside the plain figures.

    Parameters
    ----------
    judged
        The frames that are reported.
    settings
        What to measure.
    split
        Their name. Where it is ``validation``, thresholds and temperature are cross-fitted by patient.
    contract
        What the model was trained under: its temperatures.
    reference
        Validation frames of the same model, to choose thresholds and temperatures on, but for those of patients that
        are reported; None where there are none, or where they are the frames that are reported.
    """
    sampler = Bootstrap(judged.patient_index, settings.resamples, settings.seed)
    if reference is not None:
        known = set(judged.patients)
        reference = reference.only([index for index, name in enumerate(reference.patients) if name not in known])
    folds = patient_folds(judged.patients) if reference is None and split == VALIDATION else None
    if reference is not None:
        chosen = f"on {len(reference)} frames of {len(set(reference.patients))} patients of the validation split"
    elif folds is not None:
        groups = f"for each of {int(folds.max()) + 1} groups of patients on the others"
        chosen = f"cross-fitted: {groups}, as the validation split itself is reported"
    else:
        chosen = "not chosen: there are no validation frames of other patients"
    return {
        "intervals": _intervals(judged, sampler, settings),
        "patients": _patients(judged, settings),
        "chosen_on": chosen,
        "operating_points": operating_points(judged, sampler, settings.targets, reference, folds),
        "calibration": _calibration(judged, contract, reference, folds, settings.temperature_given),
        "vote_agreement": _agreement(judged),
        "quadrant_ci95": {
            name: estimate(None if not len(judged) else float(hits.mean()), sampler.mean(hits))["ci95"]
            for name, hits in zip(QUADRANTS, (judged.quadrant_labels == judged.labels[:, None]).T, strict=True)
        },
        "abstention": abstention(judged, sampler, settings.abstain_below),
    }


def _intervals(judged: ScoredFrames, sampler: Bootstrap, settings: Settings) -> dict[str, Any]:
    """Give the main figures with their bootstrap intervals; those of sensitivity, specificity and F1 of the vote."""
    bins = sweep_bins(judged.confidence, judged.right)
    counts = weighted_counts(sampler, judged.labels, judged.decided, len(judged.classes))
    matrix = metrics.confusion_matrix(judged.labels, judged.decided, labels=range(len(judged.classes)))
    plain, draws = _of_confusion(matrix[None].astype(float), judged), _of_confusion(counts, judged)
    figures = {name: estimate(_finite(plain[name][0]), draws[name]) for name in plain}
    curves = roc_curves(judged.probabilities, judged.labels, judged.classes, judged.positive)
    areas = [
        weighted_auc(sampler, judged.probabilities[:, column], judged.labels == column)
        for column in (judged.classes.index(name) for name, *_ in curves)
    ]
    complete = len(np.unique(judged.labels)) == len(judged.classes)
    figures["roc_auc"] = estimate(
        float(np.mean([area for *_, area in curves])) if complete else None,
        np.mean(areas, axis=0) if areas else np.empty(0),
    )
    figures["ece"] = estimate(bins.error, weighted_ece(sampler, bins, judged.confidence, judged.right))
    for name, values in (("nll", losses), ("brier", squares)):
        of_frames = values(judged.shares, judged.labels)
        figures[name] = estimate(float(of_frames.mean()), sampler.mean(of_frames))
    return {
        "method": "percentile bootstrap over patients",
        "resamples": settings.resamples,
        "seed": settings.seed,
        "patients": sampler.count,
        **figures,
    }


def _of_confusion(counts: Floats, judged: ScoredFrames) -> dict[str, Floats]:
    """Compute figures of confusion matrices, float64 [B, C, C]; NaN where one has nothing to stand on."""
    at = judged.classes.index(judged.positive)
    total, diagonal = counts.sum(axis=(1, 2)), np.diagonal(counts, axis1=1, axis2=2)
    rows, columns = counts.sum(axis=2), counts.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = diagonal / rows
        negatives = total - rows[:, at]
        f1 = 2 * diagonal / (rows + columns)
        present = rows > 0
        return {
            "accuracy": diagonal.sum(axis=1) / total,
            "balanced_accuracy": np.where(present, recall, 0).sum(axis=1) / present.sum(axis=1),
            "sensitivity": recall[:, at],
            "specificity": (negatives - (columns[:, at] - diagonal[:, at])) / negatives,
            "f1": f1[:, at],
            "macro_f1": np.nan_to_num(f1).mean(axis=1),
        }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _patients(judged: ScoredFrames, settings: Settings) -> dict[str, Any]:
    """Measure decisions on patients: the mean of a patient's frames of one true class."""
    whole: dict[tuple[str, int], list[int]] = {}
    for index, key in enumerate(zip(judged.patients, judged.labels.tolist(), strict=True)):
        whole.setdefault(key, []).append(index)
    mixed = len(whole) > len(set(judged.patients))
    units = list(whole)
    labels = np.array([label for _, label in units], np.int64)
    # Each unit as one frame whose four quadrants are all its mean: a vote on them decides by that mean.
    means = np.array([judged.probabilities[rows].mean(axis=0) for rows in whole.values()])
    joined = ScoredFrames(
        names=tuple(name for name, _ in units),
        classes=judged.classes,
        positive=judged.positive,
        method="average",
        vote_weights=judged.vote_weights,
        labels=labels,
        quadrants=np.repeat(means[:, None], len(QUADRANTS), axis=1),
        decided=np.asarray(means.argmax(axis=1), np.int64),
        patients=tuple(name for name, _ in units),
    )
    sampler = Bootstrap(joined.patient_index, settings.resamples, settings.seed)
    plain, figures = _plain(joined), _intervals(joined, sampler, settings)
    return {
        "unit": "patient and true class" if mixed else "patient",
        "joined_by": "the mean of the frames' mean probabilities",
        "count": len(units),
        "patients": sampler.count,
        "most_frames": max(map(len, whole.values())),
        "accuracy": plain["accuracy"],
        "roc_auc": plain["roc_auc"],
        "confusion": plain["confusion"],
        "intervals": {
            name: figures[name]
            for name in ("accuracy", "balanced_accuracy", "roc_auc", "sensitivity", "specificity", "f1")
        },
    }


def _calibration(
    judged: ScoredFrames, contract: Contract, reference: ScoredFrames | None, folds: Indices | None, given: bool
) -> dict[str, Any]:
    """Measure reliability: as reported, without the contract's temperatures, and under ones that are fitted anew."""

    def measured(of: ScoredFrames) -> dict[str, Any]:
        return reliability(of.shares, of.labels, of.decided)

    temperature, frames = contract.temperature, contract.frame_temperature
    kept = temperature if given else None
    found: dict[str, Any] = {
        "temperature": temperature,
        "frame_temperature": frames,
        "binning": BINNING,
        "confidence": "the decided class's mean probability, calibrated by the frame temperature",
        "reported": measured(judged),
        "uncalibrated": measured(plain(judged, contract)) if (temperature, frames) != (1, 1) else None,
        "refitted": None,
    }
    if reference is not None:
        fitted = fit_temperatures(scores_of(reference.quadrants) * temperature, reference.labels, kept)
        found["refitted"] = {
            "temperature": fitted.quadrants,
            "frame_temperature": fitted.frames,
            "note": fitted.note,
            **measured(judged.under(fitted.quadrants / temperature, fitted.frames)),
        }
    elif folds is not None:
        rule = replace(contract, vote=judged.method)
        figures, pairs = cross_fit(scores_of(judged.quadrants) * temperature, judged.labels, folds, rule, kept)
        found["refitted"] = {
            "folds": len(pairs),
            "temperatures": [pair.quadrants for pair in pairs],
            "frame_temperatures": [pair.frames for pair in pairs],
            **figures,
        }
    return found


def plain(judged: ScoredFrames, contract: Contract) -> ScoredFrames:
    """Take the contract's temperatures back: a power of the softmax is that of the logits without one."""
    return judged.under(1 / contract.temperature, 1.0)


def _agreement(judged: ScoredFrames) -> list[dict[str, Any]]:
    """Count how many quadrants agree with the decision, and how often it is right then."""
    agreeing = (judged.quadrant_labels == judged.decided[:, None]).sum(axis=1)
    rows = []
    for count in range(len(QUADRANTS) + 1):
        frames = agreeing == count
        total, right = int(frames.sum()), int((frames & judged.right).sum())
        rows.append(
            {
                "quadrants": count,
                "frames": total,
                "right": right,
                "accuracy": right / total if total else None,
                "accuracy_ci95": list(wilson_interval(right, total)) if total else None,
            }
        )
    return rows
