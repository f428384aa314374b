"""Operating points: a threshold on the positive class's mean probability, in place of the vote.

A threshold that is chosen on the frames that it is reported on flatters itself. So it is chosen on the validation
split, and where that is what is reported, on the other patients' frames of it: cross-fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_curve

from echoquad_runtime.errors import ConfigError
from echoquad_train.evaluation.intervals import Bootstrap, estimate
from echoquad_train.evaluation.reliability import Floats
from echoquad_train.evaluation.scored_frames import Indices, ScoredFrames

__all__ = ["check_targets", "choose_threshold", "operating_points", "rates"]

KINDS: Final = ("specificity", "sensitivity")
"""What can be held fixed, so that the other is measured."""


def check_targets(values: Sequence[float], option: str) -> None:
    """Refuse a rate that cannot be held.

    Raises
    ------
    ConfigError
        If one is not above 0 and at most 1.
    """
    for value in values:
        if not 0 < value <= 1:
            raise ConfigError(f"{option} {value:g} found; expected a rate above 0, at most 1")


def choose_threshold(score: Floats, truth: npt.NDArray[np.bool_], kind: str, target: float) -> float | None:
    """Find the threshold that holds a rate and makes the best of the other; at or above it a frame is positive.

    Parameters
    ----------
    score
        float64 [F], the positive class's mean probability.
    truth
        bool [F], whether a frame is of it.
    kind, target
        ``specificity`` or ``sensitivity``, and what it has to reach.

    Returns
    -------
    float or None
        Half way between the last frame that has to be above it and the next one below, so that the choice hangs on no
        frame's last digit; None where either kind of frames lacks.
    """
    if truth.all() or not truth.any():
        return None
    false_positive, true_positive, thresholds = roc_curve(truth, score, drop_intermediate=False)
    rate = 1 - false_positive if kind == "specificity" else true_positive
    good = np.flatnonzero(rate >= target - 1e-12)
    # From the highest threshold to the lowest sensitivity grows, and specificity falls.
    chosen = int(good[-1] if kind == "specificity" else good[0])
    upper = min(float(thresholds[chosen]), 1.0)  # the first is infinite
    lower = float(thresholds[chosen + 1]) if chosen + 1 < len(thresholds) else 0.0
    if chosen == 0:  # nothing is positive
        return float(np.nextafter(thresholds[1], 2))
    middle = (upper + lower) / 2
    return middle if middle > lower else upper


def rates(positive: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_], sampler: Bootstrap) -> dict[str, Any]:
    """Give sensitivity and specificity of calling frames positive, bool [F], each with its interval."""
    hits = {"sensitivity": (truth, positive), "specificity": (~truth, ~positive)}
    found = {}
    for name, (of, called) in hits.items():
        with np.errstate(invalid="ignore", divide="ignore"):
            totals = sampler.totals(np.column_stack([of & called, of]).astype(float))
            draws = totals[:, 0] / totals[:, 1]
        found[name] = estimate(float((of & called).sum() / of.sum()) if of.any() else None, draws)
    return found


def operating_points(
    judged: ScoredFrames,
    sampler: Bootstrap,
    targets: Sequence[tuple[str, float]],
    reference: ScoredFrames | None,
    folds: Indices | None,
) -> list[dict[str, Any]]:
    """Measure operating points.

    Parameters
    ----------
    judged
        The frames that are reported.
    sampler
        Of their patients.
    targets
        Pairs of ``specificity`` or ``sensitivity`` and what it has to reach.
    reference
        The validation frames that thresholds are chosen on; None where `folds` are given instead.
    folds
        int64 [F], the fold of each reported frame: its threshold is chosen on the other folds.

    Returns
    -------
    list
        A point each: what was held (``fixed``, ``target``), the ``threshold`` or the ``thresholds`` of the folds,
        ``sensitivity`` and ``specificity``. Where none can be chosen, these are None.
    """
    points = []
    for kind, target in targets:
        point: dict[str, Any] = {"fixed": kind, "target": target}
        positive = None
        if reference is not None:
            point["threshold"] = choose_threshold(reference.score, reference.positives, kind, target)
            if point["threshold"] is not None:
                positive = judged.score >= point["threshold"]
        elif folds is not None:
            point["thresholds"] = [
                choose_threshold(judged.score[folds != fold], judged.positives[folds != fold], kind, target)
                for fold in range(int(folds.max()) + 1)
            ]
            if None not in point["thresholds"]:
                positive = judged.score >= np.array(point["thresholds"], float)[folds]
        nothing = {"sensitivity": None, "specificity": None}
        points.append(point | (nothing if positive is None else rates(positive, judged.positives, sampler)))
    return points
