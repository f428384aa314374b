"""Rows of results: the JSON lines of `echoquad predict`, with what a service adds."""

from __future__ import annotations

import json
from typing import Any

from echoquad_runtime.bundle.typicality import UNLIKE_TRAINING
from echoquad_runtime.contract import INDETERMINATE, QUADRANTS, Contract
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.results.row_formats import JSON_LINES
from echoquad_serve.records import LOW_CONFIDENCE, UNLIKE_TRAINING_FRAMES

__all__ = ["prediction_of", "row_of"]


def row_of(
    prediction: Prediction, contract: Contract, *, bundle_sha256: str, provider: str, abstain_unlike: bool
) -> dict[str, Any]:
    """Return the row of a prediction; `abstain_unlike` says whether it abstains on what is unlike the training frames.

    Returns
    -------
    dict
        The columns of `echoquad predict`, then ``predicted_class``, ``confidence``, ``abstained_because``,
        ``bundle_sha256`` and ``provider``.
    """
    row: dict[str, Any] = json.loads(JSON_LINES.row(prediction))
    row["predicted_class"] = prediction.predicted_class
    row["confidence"] = round(prediction.confidence(contract), 6)
    if prediction.label == INDETERMINATE:
        unlike = abstain_unlike and UNLIKE_TRAINING in prediction.flags
        row["abstained_because"] = UNLIKE_TRAINING_FRAMES if unlike else LOW_CONFIDENCE
    row["bundle_sha256"], row["provider"] = bundle_sha256, provider
    return row


def prediction_of(row: dict[str, Any], contract: Contract) -> Prediction:
    """Return the prediction that a row states, without activation maps.

    Raises
    ------
    KeyError
        If the row is not one of a bundle with this contract.
    """
    names = contract.classes
    return Prediction(
        file=row["file"],
        classes=names,
        method=row["method"],
        label=row["pred_image"],
        probabilities=tuple(row[f"prob_{name}"] for name in names),
        quadrant_labels=tuple(row[f"pred_{quadrant}"] for quadrant in QUADRANTS),
        quadrant_probabilities=tuple(tuple(row[f"p_{quadrant}_{name}"] for name in names) for quadrant in QUADRANTS),
        flags=tuple(row["flags"]),
        device=row["device"],
        precision=row["precision"],
        predicted_class=row["predicted_class"],
        typicality=row["typicality"],
    )
