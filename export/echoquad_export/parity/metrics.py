"""Metrics: what a model reached on labelled frames, with intervals, as the manifest holds it.

The runtime shows these figures where there is no scikit-learn: whatever has to be computed is computed here.
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
    """Give what a run or an ensemble reached on labelled frames: in training, and by its weights as they are exported.

    Parameters
    ----------
    run
        Says what was reached on the validation split, in the epoch whose weights were kept.
    probabilities
        float32 [F * 4, C], the training code's answers in float32, quadrants of a frame together.
    labels
        int64 [F], the true classes of these frames.
    source
        What they are, for the record.

    Returns
    -------
    dict
        ``training`` with its ``frame_accuracy`` (not for an ensemble, which was not validated as such; for one of folds
        ``out_of_fold`` instead, which its members reached one by one); ``export`` with that, the ``recall`` of each
        class, and ``quadrant_accuracy``. Each has the number that was right, that of all, the share and its 95 %
        interval; the last has none, for the quadrants of a frame are not independent.

    Raises
    ------
    RunError
        If ``run.json`` lacks what was reached.
    """
    if isinstance(run, Ensemble):
        reached_before = _out_of_fold(run)
        if run.trained_in_folds:
            source = f"{source}, whose frames most members have learned from,"
    else:
        reached_before = {"training": _in_training(run)}
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
    return {**reached_before, "export": export}


def _in_training(run: Run) -> dict[str, Any]:
    try:
        best, count = run.info["best"], sum(run.info["data"]["frames"]["validation"].values())
        reached = _share(round(best["validation_frame_accuracy"] * count), count)
        return {"split": "validation", "epoch": best["epoch"], "frame_accuracy": reached}
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{run.folder.as_posix()}: run.json does not say what was reached ({error}); train again"
        ) from error


def _out_of_fold(ensemble: Ensemble) -> dict[str, Any]:
    """Give what an ensemble's folds reached on the frames that each had not learned from; nothing for another one."""
    try:
        found = ensemble.info["out_of_fold"]
        count = found["pooled"]["frames"]
        return {
            "out_of_fold": {
                "folds": len(found["folds"]),
                "frame_accuracy": _share(round(found["pooled"]["accuracy"] * count), count),
                "standard_deviation": found["standard_deviation"]["accuracy"],
            }
        }
    except (KeyError, TypeError):
        return {}


def _share(right: int, count: int) -> dict[str, Any]:
    return {"right": right, "count": count, "share": right / count, "ci95": list(wilson_interval(right, count))}
