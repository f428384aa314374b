"""Metrics: the contents of ``metrics.json`` as dataclasses, and the functions that compute them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from sklearn.metrics import confusion_matrix

from echoquad_runtime.contract import QUADRANTS, Contract
from echoquad_train.evaluation.abstention import Abstention, abstention
from echoquad_train.evaluation.arrays import Float64Array, IndexArray
from echoquad_train.evaluation.frame_metrics import (
    FrameMetrics,
    VoteAgreement,
    metrics_of_frames,
    roc_curves,
    vote_agreement,
)
from echoquad_train.evaluation.intervals import (
    RESAMPLES,
    Bootstrap,
    Estimate,
    weighted_auc,
    weighted_counts,
    weighted_ece,
)
from echoquad_train.evaluation.metrics_record import MetricsRecord
from echoquad_train.evaluation.operating_points import OperatingPoint, operating_points
from echoquad_train.evaluation.reliability import (
    BINNING,
    Reliability,
    log_losses,
    reliability,
    squared_errors,
    sweep_bins,
)
from echoquad_train.evaluation.scored_frames import ScoredFrames
from echoquad_train.evaluation.temperature_scaling import (
    Refit,
    cross_fit,
    fit_temperatures,
    log_probabilities,
    patient_folds,
)

__all__ = [
    "BootstrapMetrics",
    "CalibrationMetrics",
    "EvaluationMetrics",
    "EvaluationOptions",
    "PatientMetrics",
    "UnlikeTraining",
    "confusion_metrics",
    "evaluation_metrics",
]

VALIDATION: Final = "validation"
"""The split on which thresholds and temperatures are chosen."""


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """What to measure besides the frame metrics.

    Attributes
    ----------
    resamples, seed
        Of the bootstrap; 0 resamples give no intervals.
    at_specificity, at_sensitivity
        Rates that the operating points hold.
    abstain_below
        Confidence under which a frame stays undecided; None decides all.
    temperature_given
        Whether the recipe set the quadrants' temperature; refitting keeps it then.
    """

    resamples: int = RESAMPLES
    seed: int = 0
    at_specificity: tuple[float, ...] = (0.9,)
    at_sensitivity: tuple[float, ...] = (0.9,)
    abstain_below: float | None = None
    temperature_given: bool = False

    @property
    def targets(self) -> list[tuple[str, float]]:
        """The operating points: the rate that is held and its minimum."""
        return [
            *(("specificity", value) for value in self.at_specificity),
            *(("sensitivity", value) for value in self.at_sensitivity),
        ]


@dataclass(frozen=True)
class BootstrapMetrics(MetricsRecord):
    """Metrics with bootstrap intervals; sensitivity, specificity and F1 are those of the vote for the positive class.

    `patients` is the number of resampled patients.
    """

    method: str
    resamples: int
    seed: int
    patients: int
    accuracy: Estimate
    balanced_accuracy: Estimate
    sensitivity: Estimate
    specificity: Estimate
    f1: Estimate
    macro_f1: Estimate
    roc_auc: Estimate
    ece: Estimate
    nll: Estimate
    brier: Estimate


@dataclass(frozen=True)
class PatientMetrics(MetricsRecord):
    """Metrics of the decisions on patients, each by the mean probability of the patient's frames.

    Attributes
    ----------
    unit
        ``patient``, or ``patient and true class`` if a patient has frames of several classes.
    joined_by
        How the frames are combined, in words.
    count, patients, most_frames
        Number of decisions, number of patients, and the most frames in one decision.
    accuracy, roc_auc, confusion
        See `FrameMetrics`.
    intervals
        Some of the metrics of `BootstrapMetrics`, by name.
    """

    unit: str
    joined_by: str
    count: int
    patients: int
    most_frames: int
    accuracy: float
    roc_auc: float | None
    confusion: list[list[int]]
    intervals: dict[str, Estimate]


@dataclass(frozen=True)
class CalibrationMetrics(MetricsRecord):
    """Reliability under the contract's temperatures (`reported`), without them, and under refitted ones.

    `binning` and `confidence` define the terms in words. `uncalibrated` is None if both temperatures are 1, `refitted`
    if there are no validation frames of other patients.
    """

    temperature: float
    frame_temperature: float
    binning: str
    confidence: str
    reported: Reliability
    uncalibrated: Reliability | None
    refitted: Refit | None


@dataclass(frozen=True)
class UnlikeTraining(MetricsRecord):
    """Frames with the flag ``unlike-training``.

    `share` has a Wilson interval, which takes frames as independent; `median_typicality` is that of all frames.
    """

    frames: int
    share: float
    ci95: tuple[float, float]
    median_typicality: float


@dataclass(frozen=True)
class EvaluationMetrics(MetricsRecord):
    """The contents of ``metrics.json``.

    Attributes
    ----------
    split, device, precision, method, contract_sha256
        What was evaluated, and how.
    frame
        Metrics of the frames, which JSON has at the top level.
    unreadable
        Number of frames that could not be read.
    chosen_on
        In words, the frames on which thresholds and refitted temperatures were chosen.
    model, trained_calibration, data
        The evaluated model and the calibration that its training recorded, see
        `echoquad_train.evaluation.evaluate.model_facts`, and the data folder. JSON has them only with a model.
    unlike_training
        Frames unlike the training frames. None, and not in JSON, if the model has no typicality score.
    """

    split: str
    device: str
    precision: str
    method: str
    contract_sha256: str
    frame: FrameMetrics
    unreadable: int
    intervals: BootstrapMetrics
    patients: PatientMetrics
    chosen_on: str
    operating_points: tuple[OperatingPoint, ...]
    calibration: CalibrationMetrics
    vote_agreement: tuple[VoteAgreement, ...]
    quadrant_ci95: dict[str, tuple[float, float] | None]
    abstention: Abstention
    model: dict[str, str] | None = None
    trained_calibration: dict[str, Any] | None = None
    data: str | None = None
    unlike_training: UnlikeTraining | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        values: dict[str, Any] = {}
        for name, value in super().to_dict().items():
            values |= value if name == "frame" else {name: value}
        if absent := self.frame.absent_classes:
            values["absent_classes"] = list(absent)
        if self.model is None:
            for name in ("model", "trained_calibration", "data"):
                del values[name]
        if self.unlike_training is None:
            del values["unlike_training"]
        return values


def evaluation_metrics(
    scored: ScoredFrames,
    options: EvaluationOptions,
    *,
    split: str,
    device: str,
    precision: str,
    contract: Contract,
    unreadable: int,
    reference: ScoredFrames | None = None,
) -> EvaluationMetrics:
    """Compute the metrics of a split.

    Parameters
    ----------
    scored
        The reported frames.
    options
        What to measure besides the frame metrics.
    split
        Name of their split. For ``validation``, thresholds and temperatures are cross-fitted by patient.
    device, precision, contract, unreadable
        The model, and the number of frames that could not be read.
    reference
        Validation frames of the same model, on which thresholds and temperatures are chosen; frames of reported
        patients are left out. None if there are none, or if they are the reported frames.
    """
    sampler = Bootstrap(scored.patient_index, options.resamples, options.seed)
    if reference is not None:
        reported = set(scored.patients)
        reference = reference.subset([i for i, patient in enumerate(reference.patients) if patient not in reported])
    folds = patient_folds(scored.patients) if reference is None and split == VALIDATION else None
    if reference is not None:
        chosen = f"on {len(reference)} frames of {len(set(reference.patients))} patients of the validation split"
    elif folds is not None:
        groups = f"for each of {int(folds.max()) + 1} groups of patients on the others"
        chosen = f"cross-fitted: {groups}, as the validation split itself is reported"
    else:
        chosen = "not chosen: there are no validation frames of other patients"
    quadrant_hits = zip(QUADRANTS, (scored.quadrant_labels == scored.labels[:, None]).T, strict=True)
    return EvaluationMetrics(
        split=split,
        device=device,
        precision=precision,
        method=scored.method,
        contract_sha256=contract.sha256,
        frame=metrics_of_frames(scored),
        unreadable=unreadable,
        intervals=_bootstrap_metrics(scored, sampler, options),
        patients=_patient_metrics(scored, options),
        chosen_on=chosen,
        operating_points=operating_points(scored, sampler, options.targets, reference, folds),
        calibration=_calibration_metrics(scored, contract, reference, folds, options.temperature_given),
        vote_agreement=vote_agreement(scored),
        quadrant_ci95={
            name: Estimate.bootstrap(float(hits.mean()), sampler.mean(hits)).ci95 for name, hits in quadrant_hits
        },
        abstention=abstention(scored, sampler, options.abstain_below),
    )


def _bootstrap_metrics(scored: ScoredFrames, sampler: Bootstrap, options: EvaluationOptions) -> BootstrapMetrics:
    bins = sweep_bins(scored.confidence, scored.correct)
    matrix = confusion_matrix(scored.labels, scored.decided, labels=range(len(scored.classes)))
    values = confusion_metrics(matrix[None].astype(float), scored)
    resampled = confusion_metrics(weighted_counts(sampler, scored.labels, scored.decided, len(scored.classes)), scored)
    curves = roc_curves(scored)
    columns = [scored.classes.index(curve.name) for curve in curves]
    areas = [weighted_auc(sampler, scored.probabilities[:, c], scored.labels == c) for c in columns]
    per_frame = {
        "nll": log_losses(scored.calibrated, scored.labels),
        "brier": squared_errors(scored.calibrated, scored.labels),
    }
    return BootstrapMetrics(
        method="percentile bootstrap over patients",
        resamples=options.resamples,
        seed=options.seed,
        patients=sampler.count,
        **{name: Estimate.bootstrap(float(values[name][0]), resampled[name]) for name in values},
        roc_auc=Estimate.bootstrap(
            float(np.mean([curve.area for curve in curves])) if scored.complete else None,
            np.mean(areas, axis=0) if areas else np.empty(0),
        ),
        ece=Estimate.bootstrap(bins.error, weighted_ece(sampler, bins, scored.confidence, scored.correct)),
        **{name: Estimate.bootstrap(float(frames.mean()), sampler.mean(frames)) for name, frames in per_frame.items()},
    )


def confusion_metrics(counts: Float64Array, scored: ScoredFrames) -> dict[str, Float64Array]:
    """Return metrics of confusion matrices, float64 [B, C, C], each float64 [B]; NaN where undefined.

    A class without frames among `scored` has no F1, and the mean F1 leaves it out.
    """
    at, occurring = scored.positive_index, np.unique(scored.labels)
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
            "f1": f1[:, at] if at in occurring else np.full(len(f1), np.nan),
            "macro_f1": np.nan_to_num(f1[:, occurring]).mean(axis=1),
        }


def _patient_metrics(scored: ScoredFrames, options: EvaluationOptions) -> PatientMetrics:
    frames_of: dict[tuple[str, int], list[int]] = {}
    for index, key in enumerate(zip(scored.patients, scored.labels.tolist(), strict=True)):
        frames_of.setdefault(key, []).append(index)
    patients = tuple(patient for patient, _ in frames_of)
    # Each patient becomes a frame whose four quadrants equal its mean, so that the vote decides by that mean.
    means = np.array([scored.probabilities[rows].mean(axis=0) for rows in frames_of.values()])
    joined = ScoredFrames(
        names=patients,
        classes=scored.classes,
        positive=scored.positive,
        method="average",
        vote_weights=scored.vote_weights,
        labels=np.array([label for _, label in frames_of], np.int64),
        quadrants=np.repeat(means[:, None], len(QUADRANTS), axis=1),
        decided=np.asarray(means.argmax(axis=1), np.int64),
        patients=patients,
    )
    sampler = Bootstrap(joined.patient_index, options.resamples, options.seed)
    metrics, intervals = metrics_of_frames(joined), _bootstrap_metrics(joined, sampler, options)
    return PatientMetrics(
        unit="patient and true class" if len(patients) > len(set(patients)) else "patient",
        joined_by="the mean of the frames' mean probabilities",
        count=len(patients),
        patients=sampler.count,
        most_frames=max(map(len, frames_of.values())),
        accuracy=metrics.accuracy,
        roc_auc=metrics.roc_auc,
        confusion=metrics.confusion,
        intervals={
            name: getattr(intervals, name)
            for name in ("accuracy", "balanced_accuracy", "roc_auc", "sensitivity", "specificity", "f1")
        },
    )


def _calibration_metrics(
    scored: ScoredFrames,
    contract: Contract,
    reference: ScoredFrames | None,
    folds: IndexArray | None,
    temperature_given: bool,
) -> CalibrationMetrics:
    def measured(frames: ScoredFrames) -> Reliability:
        return reliability(frames.calibrated, frames.labels, frames.decided)

    temperature = contract.temperature
    given = temperature if temperature_given else None
    refitted = None
    if reference is not None:
        pair = fit_temperatures(log_probabilities(reference.quadrants) * temperature, reference.labels, given)
        rescaled = scored.rescaled(pair.quadrants / temperature, pair.frames)
        refitted = Refit((pair,), False, measured(rescaled))
    elif folds is not None:
        rule = replace(contract, vote=scored.method)
        refitted = cross_fit(log_probabilities(scored.quadrants) * temperature, scored.labels, folds, rule, given)
    calibrated = (temperature, contract.frame_temperature) != (1, 1)
    return CalibrationMetrics(
        temperature=temperature,
        frame_temperature=contract.frame_temperature,
        binning=BINNING,
        confidence="the decided class's mean probability, calibrated by the frame temperature",
        reported=measured(scored),
        uncalibrated=measured(scored.uncalibrated(contract)) if calibrated else None,
        refitted=refitted,
    )
