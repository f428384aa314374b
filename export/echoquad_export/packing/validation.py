"""Measurement of the validation figures: the frames of the validation split, decided as deployment decides them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.typicality import UNLIKE_TRAINING
from echoquad_runtime.bundle.validation_figures import STEPS, Distribution, ValidationFigures, design_effect
from echoquad_runtime.contract import QUADRANTS, Contract
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.predict.predictor import Predictor
from echoquad_train.data.dataset import Split
from echoquad_train.data.patients import patient_pattern, patients_of

__all__ = ["figures_of", "measure_validation"]

_BINS: Final = 10
_FRAMES_OF_A_BIN: Final = 10  # or more, on average: fewer say too little about its share
_DECIMALS: Final = 6  # of a confidence in the rows of the service, which are compared with the figures


def measure_validation(
    bundle: Bundle, precision: str, split: Split, patient_regex: str | None = None
) -> ValidationFigures | None:
    """Return the figures of a precision on the CPU: of files, through the path that will judge, flags included.

    Parameters
    ----------
    bundle
        The bundle. Its golden frames are not replayed here.
    precision
        One of the bundle's.
    split
        The validation frames; those that cannot be read are left out.
    patient_regex
        As that of training. Frames of a patient are no independent ones.

    Returns
    -------
    ValidationFigures or None
        None if no frame can be read.
    """
    predictor = Predictor(bundle, precision=precision, device="cpu", concurrent=True, self_test=False, workers=0)
    patients = patients_of(split.frames, patient_pattern(patient_regex))
    decided = [
        (prediction, patient)
        for prediction, patient in zip(predictor.predict(split.files()), patients, strict=True)
        if isinstance(prediction, Prediction)
    ]
    if not decided:
        return None
    return figures_of([one for one, _ in decided], predictor.contract, [patient for _, patient in decided])


def figures_of(predictions: Sequence[Prediction], contract: Contract, groups: Sequence[Hashable]) -> ValidationFigures:
    """Return the figures of predictions, one or more.

    Parameters
    ----------
    predictions
        Made without abstaining.
    contract
        The model's.
    groups
        The patient of each prediction.
    """
    confidence = np.array([round(one.confidence(contract), _DECIMALS) for one in predictions])
    unlike = np.array([UNLIKE_TRAINING in one.flags for one in predictions])
    agreement = np.array([one.quadrant_labels.count(one.predicted_class) for one in predictions])
    scores = [one.typicality for one in predictions if one.typicality is not None]
    typicality = np.array(scores) if len(scores) == len(predictions) else None
    parts = {
        "confidence": _histogram(confidence),
        **({} if typicality is None else {"typicality": _histogram(typicality)}),
    }
    bins = [
        np.searchsorted(parts["confidence"].edges, confidence, "right"),
        *([] if typicality is None else [np.searchsorted(parts["typicality"].edges, typicality, "right")]),
        agreement,
    ]
    indices = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    owners = np.array([indices[group] for group in groups])
    below = confidence[:, None] < np.arange(STEPS + 1) / STEPS
    return ValidationFigures(
        frames=len(predictions),
        effective_frames=len(predictions) / max(1.0, *(design_effect(_table(owners, found)) for found in bins)),
        confidence=parts["confidence"],
        typicality=parts.get("typicality"),
        agreement=tuple(np.bincount(agreement, minlength=len(QUADRANTS) + 1).tolist()),
        flags=dict(sorted(Counter(flag for one in predictions for flag in set(one.flags)).items())),
        undecided=tuple(below.sum(axis=0).tolist()),
        undecided_or_unlike=tuple((below | unlike[:, None]).sum(axis=0).tolist()),
    )


def _histogram(values: npt.NDArray[np.float64]) -> Distribution:
    """Return a histogram between the deciles; of fewer than 100 values, between fewer quantiles.

    Equal quantiles become one edge: many confidences are exactly 1.
    """
    bins = min(max(len(values) // _FRAMES_OF_A_BIN, 2), _BINS)
    quantiles = np.arange(1, bins) / bins
    edges = np.unique(np.quantile(values, quantiles, method="closest_observation"))
    counts = np.bincount(np.searchsorted(edges, values, "right"), minlength=len(edges) + 1)
    return Distribution(tuple(edges.tolist()), tuple(counts.tolist()))


def _table(groups: npt.NDArray[np.int64], bins: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return how many frames of each group are in each bin, [G, B]."""
    table = np.zeros((int(groups.max()) + 1, int(bins.max()) + 1))
    np.add.at(table, (groups, bins), 1)
    return table
