"""Evaluation of a run or a bundle on a labelled split.

The probabilities of a run come from torch, those of a bundle from onnxruntime; all else is shared.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.manifest import MANIFEST
from echoquad_runtime.bundle.typicality import UNLIKE_TRAINING
from echoquad_runtime.contract import Contract
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.predict.predictor import Predictor
from echoquad_train.data.dataset import LabelledFrame, Progress, Split, no_readable_frame
from echoquad_train.data.patients import patients_of
from echoquad_train.evaluation.intervals import wilson_interval
from echoquad_train.evaluation.metrics import (
    EvaluationMetrics,
    EvaluationOptions,
    UnlikeTraining,
    evaluation_metrics,
)
from echoquad_train.evaluation.scored_frames import ScoredFrames, score_frames

__all__ = ["Evaluation", "SplitPredictions", "evaluate", "model_facts", "predict_split"]


@dataclass(frozen=True, slots=True)
class SplitPredictions:
    """Predictions of a split.

    Attributes
    ----------
    predictions, frames
        The readable frames in the split's order, and the prediction of each.
    failures
        Frames that could not be read.
    scored
        The predictions and labels as arrays.
    """

    predictions: tuple[Prediction, ...]
    frames: tuple[LabelledFrame, ...]
    failures: tuple[Failure, ...]
    scored: ScoredFrames


@dataclass(frozen=True, slots=True)
class Evaluation(SplitPredictions):
    """An evaluated split: its predictions, their metrics, and the contract of the model."""

    metrics: EvaluationMetrics
    contract: Contract


def evaluate(
    predictor: Predictor,
    split: Split,
    *,
    options: EvaluationOptions | None = None,
    reference: Split | None = None,
    pattern: re.Pattern[str] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Predict every frame of a split and compare the decisions with the labels.

    Parameters
    ----------
    predictor
        The model.
    split
        The frames to report.
    options
        What to measure besides the frame metrics.
    reference
        Validation frames on which thresholds and temperatures are chosen. None if there are none, or if `split` is the
        validation split: they are cross-fitted by patient then.
    pattern
        See `echoquad_train.data.patients.read_patient`.

    Raises
    ------
    DatasetError
        If no frame can be read.
    """
    first = len(split.frames)
    total = first + (len(reference.frames) if reference else 0)

    def report(offset: int) -> Progress | None:
        return None if progress is None else lambda done, _: progress(offset + done, total)

    found = predict_split(predictor, split, pattern, report(0))
    chosen = predict_split(predictor, reference, pattern, report(first)) if reference else None
    metrics = evaluation_metrics(
        found.scored,
        options or EvaluationOptions(),
        split=split.name,
        device=predictor.engine.device,
        precision=predictor.engine.precision,
        contract=predictor.contract,
        unreadable=len(found.failures),
        reference=chosen.scored if chosen else None,
    )
    metrics = replace(metrics, unlike_training=_unlike_training(found.predictions))
    return Evaluation(found.predictions, found.frames, found.failures, found.scored, metrics, predictor.contract)


def _unlike_training(predictions: Sequence[Prediction]) -> UnlikeTraining | None:
    """Count the frames unlike the training frames; None if the model has no typicality score."""
    scores = [prediction.typicality for prediction in predictions if prediction.typicality is not None]
    if not scores:
        return None
    flagged = sum(UNLIKE_TRAINING in prediction.flags for prediction in predictions)
    low, high = wilson_interval(flagged, len(scores))
    return UnlikeTraining(flagged, flagged / len(scores), (low, high), float(np.median(scores)))


def predict_split(
    predictor: Predictor, split: Split, pattern: re.Pattern[str] | None = None, progress: Progress | None = None
) -> SplitPredictions:
    """Predict every frame of a split; `progress` is called with the number of frames done and the total.

    Raises
    ------
    DatasetError
        If no frame can be read.
    """
    predictions: list[Prediction] = []
    frames: list[LabelledFrame] = []
    failures: list[Failure] = []
    results = predictor.predict(split.files())
    for done, (frame, result) in enumerate(zip(split.frames, results, strict=True), 1):
        if isinstance(result, Failure):
            failures.append(result)
        else:
            predictions.append(result)
            frames.append(frame)
        if progress is not None:
            progress(done, len(split.frames))
    if not predictions:
        raise no_readable_frame(split.name, failures)
    labels = np.array([frame.label for frame in frames], np.int64)
    contract = predictor.contract
    scored = score_frames(predictions, labels, contract.positive, contract, patients_of(frames, pattern))
    return SplitPredictions(tuple(predictions), tuple(frames), tuple(failures), scored)


def model_facts(folder: Path) -> dict[str, Any]:
    """Return the fields of `EvaluationMetrics` that describe the model in a folder.

    Returns
    -------
    dict
        ``model``: its name and kind, and the SHA-256 of the bundle's manifest or of the run's weights;
        ``trained_calibration``: the calibration that its training recorded, or None.
    """
    facts: dict[str, str] = {"name": folder.resolve().name, "kind": "folder"}
    info: Any = None
    if (folder / MANIFEST).exists():
        manifest = Bundle(folder).manifest
        facts |= {"kind": "bundle", "manifest_sha256": manifest["manifest_sha256"]}
        info = manifest.get("training")
    else:
        from echoquad_train.runs.checkpoint import BEST, RUN, read_info

        if (folder / BEST).is_file():
            facts |= {"kind": "run", "weights_sha256": hashlib.sha256((folder / BEST).read_bytes()).hexdigest()}
        info = read_info(folder) if (folder / RUN).is_file() else None
    return {"model": facts, "trained_calibration": info.get("calibration") if isinstance(info, dict) else None}
