"""Metrics of the manifest: accuracy and recall on labelled frames, with confidence intervals.

The runtime shows these figures without scikit-learn, so they are computed at export.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from echoquad_runtime.engine.io_binding import FloatArray
from echoquad_runtime.errors import RunError
from echoquad_runtime.voting import aggregate_votes
from echoquad_train.evaluation.intervals import wilson_interval
from echoquad_train.runs.checkpoint import Run
from echoquad_train.runs.ensemble_folder import Ensemble

__all__ = ["measure_run"]


def measure_run(
    run: Run | Ensemble, probabilities: FloatArray, labels: npt.NDArray[np.int64], source: str
) -> dict[str, Any]:
    """Return the metrics that training recorded, and those of the exported weights.

    Parameters
    ----------
    run
        Records the validation metrics of the epoch whose weights are exported.
    probabilities
        float32 [F * 4, C], from the training code in float32; the quadrants of a frame are consecutive.
    labels
        int64 [F], the true classes.
    source
        Description of the frames, for the manifest.

    Returns
    -------
    dict
        ``training`` with its ``frame_accuracy`` (for an ensemble of folds ``out_of_fold`` instead, for another ensemble
        neither), and ``export`` with ``frame_accuracy``, the ``recall`` of each class, and ``quadrant_accuracy``. Each
        has the number of correct answers, the total, the share and its 95 % confidence interval; quadrant accuracy has
        no interval, because the quadrants of a frame are not independent.

    Raises
    ------
    RunError
        If ``run.json`` lacks the training metrics.
    """
    if isinstance(run, Ensemble):
        recorded = _out_of_fold(run)
        if run.trained_in_folds:
            source = f"{source}, which most members were trained on,"
    else:
        recorded = {"training": _in_training(run)}
    contract = run.contract
    shape = (-1, 4, len(contract.classes))
    decision = aggregate_votes(probabilities.reshape(shape), contract.vote, contract.vote_weights)
    right, quadrants = decision.labels == labels, decision.quadrant_labels == labels[:, None]
    of_class = {name: right[labels == index] for index, name in enumerate(contract.classes)}
    export = {
        "source": source,
        "frame_accuracy": _share(int(right.sum()), len(labels)),
        "recall": {name: _share(int(found.sum()), len(found)) for name, found in of_class.items()},
        "quadrant_accuracy": {
            "right": int(quadrants.sum()),
            "count": quadrants.size,
            "share": float(quadrants.mean()),
        },
    }
    return {**recorded, "export": export}


def _in_training(run: Run) -> dict[str, Any]:
    try:
        best, count = run.info["best"], sum(run.info["data"]["frames"]["validation"].values())
        reached = _share(round(best["validation_frame_accuracy"] * count), count)
        return {"split": "validation", "epoch": best["epoch"], "frame_accuracy": reached}
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise RunError(
            f"{run.folder.as_posix()}: run.json lacks the training metrics ({error}); train again"
        ) from error


def _out_of_fold(ensemble: Ensemble) -> dict[str, Any]:
    """Return the metrics of an ensemble of folds on the frames that each fold was not trained on; {} for others."""
    try:
        found = ensemble.info["out_of_fold"]
        pooled, count = found["pooled"], found["pooled"]["frames"]
        share = _share(round(pooled["accuracy"] * count), count)
        interval = pooled["intervals"]["accuracy"]["ci95"] if "intervals" in pooled else None
        return {
            "out_of_fold": {
                "folds": len(found["folds"]),
                "frame_accuracy": share if interval is None else {**share, "ci95": interval},  # by patient
                "standard_deviation": found["standard_deviation"]["accuracy"],
            }
        }
    except (KeyError, TypeError):
        return {}


def _share(right: int, count: int) -> dict[str, Any]:
    return {"right": right, "count": count, "share": right / count, "ci95": list(wilson_interval(right, count))}
