"""Evaluation: what a run or a bundle reaches on a labelled split.

A run's probabilities come from torch, a bundle's from onnxruntime; everything after them is the same code.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.manifest import MANIFEST
from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import DatasetError
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.predict.predictor import Prediction, Predictor
from echoquad_train.data.dataset import LabelledFrame, Split
from echoquad_train.data.patients import patients_of
from echoquad_train.evaluation.metrics import Settings, measure, measure_more
from echoquad_train.evaluation.scored_frames import ScoredFrames, score_frames

__all__ = [
    "Evaluation",
    "SplitPredictions",
    "evaluate",
    "judge",
    "model_facts",
]

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluated split.

    Attributes
    ----------
    metrics
        What ``metrics.json`` holds.
    predictions
        A prediction a readable frame, in the split's order.
    labels
        int64 [F], the true classes of these frames.
    failures
        Frames that could not be read.
    frames
        The readable frames themselves.
    judged
        The same as arrays.
    contract
        What the model was trained under.
    """

    metrics: dict[str, Any]
    predictions: tuple[Prediction, ...]
    labels: npt.NDArray[np.int64]
    failures: tuple[Failure, ...]
    frames: tuple[LabelledFrame, ...]
    judged: ScoredFrames
    contract: Contract


@dataclass(frozen=True, slots=True)
class SplitPredictions:
    """The readable frames of a split, a prediction each, and the same as arrays; and those that could not be read."""

    predictions: tuple[Prediction, ...]
    frames: tuple[LabelledFrame, ...]
    failures: tuple[Failure, ...]
    judged: ScoredFrames


def evaluate(
    predictor: Predictor,
    split: Split,
    *,
    settings: Settings | None = None,
    reference: Split | None = None,
    pattern: re.Pattern[str] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Judge every frame of a split and hold the decisions against its labels.

    Parameters
    ----------
    predictor
        The model.
    split
        The frames to report on.
    settings
        What to measure beside the plain figures.
    reference
        Validation frames to choose thresholds and a temperature on, judged as well; None where there are none, or where
        `split` is the validation split itself: then they are chosen on its other patients.
    pattern
        Whom a frame is of; see `echoquad_train.data.patients`.
    progress
        Called with the number of frames judged and of all.

    Raises
    ------
    DatasetError
        If no frame can be read.
    """
    settings = settings or Settings()
    total = len(split.frames) + (len(reference.frames) if reference else 0)
    found = judge(predictor, split, pattern, total=total, progress=progress)
    chosen = (
        judge(predictor, reference, pattern, before=len(split.frames), total=total, progress=progress)
        if reference
        else None
    )
    metrics = {
        "split": split.name,
        "device": predictor.engine.device,
        "precision": predictor.engine.precision,
        "method": predictor.method,
        "contract_sha256": predictor.contract.sha256,
        **measure(found.predictions, found.judged.labels, predictor.contract.positive),
        "unreadable": len(found.failures),
        **measure_more(
            found.judged,
            settings,
            split=split.name,
            contract=predictor.contract,
            reference=chosen.judged if chosen else None,
        ),
    }
    return Evaluation(
        metrics, found.predictions, found.judged.labels, found.failures, found.frames, found.judged, predictor.contract
    )


def judge(
    predictor: Predictor,
    split: Split,
    pattern: re.Pattern[str] | None = None,
    *,
    before: int = 0,
    total: int | None = None,
    progress: Progress | None = None,
) -> SplitPredictions:
    """Judge every frame of a split; `progress` is called with the number done, `before` included, and of all.

    Raises
    ------
    DatasetError
        If no frame can be read.
    """
    total = total or len(split.frames)
    predictions: list[Prediction] = []
    frames: list[LabelledFrame] = []
    failures: list[Failure] = []
    results = predictor.predict(split.files())
    for done, (frame, result) in enumerate(zip(split.frames, results, strict=True), before + 1):
        if isinstance(result, Failure):
            failures.append(result)
        else:
            predictions.append(result)
            frames.append(frame)
        if progress is not None:
            progress(done, total)
    if not predictions:
        raise DatasetError(
            f"{split.name}: no frame can be read; the first failure: {failures[0].file}: {failures[0].error}"
        )
    judged = score_frames(
        predictions,
        np.array([frame.label for frame in frames], np.int64),
        predictor.contract.positive,
        predictor.contract,
        patients_of(frames, pattern),
    )
    return SplitPredictions(tuple(predictions), tuple(frames), tuple(failures), judged)


def model_facts(folder: Path) -> dict[str, Any]:
    """Say which model a folder holds.

    Returns
    -------
    dict
        ``model``: its name, and the SHA-256 of the bundle's manifest or of the run's weights; and
        ``trained_calibration``, what its training says of its temperatures, None where it says nothing.
    """
    facts: dict[str, Any] = {"name": folder.resolve().name, "kind": "folder"}
    told: Any = None
    if (folder / MANIFEST).exists():
        manifest = Bundle(folder).manifest
        facts |= {"kind": "bundle", "manifest_sha256": manifest["manifest_sha256"]}
        told = manifest.get("training")
    else:
        from echoquad_train.runs.checkpoint import BEST, RUN, read_info

        if (folder / BEST).is_file():
            facts |= {"kind": "run", "weights_sha256": hashlib.sha256((folder / BEST).read_bytes()).hexdigest()}
        told = read_info(folder) if (folder / RUN).is_file() else None
    return {"model": facts, "trained_calibration": told.get("calibration") if isinstance(told, dict) else None}
