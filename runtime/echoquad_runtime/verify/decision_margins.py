"""Decision margins: which decisions a bounded difference of the probabilities can change.

A gate that allows every probability to differ by d allows any margin of at most 2 d to be reversed: the leader loses
d, the other class gains d. So a frame whose expected margin is that small may get another decision from a graph within
its gate, and counting it would be a false alarm. A frame with a larger margin may not. The rule is one-sided by design:
if no probability differs by more than d, no decision is ever called wrong; a decision that is called wrong proves that
some probability differs by more than d.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Final

import numpy as np
import numpy.typing as npt

from echoquad_runtime.contract import VoteMethod
from echoquad_runtime.voting import aggregate_votes

__all__ = ["frame_margins", "quadrant_margins", "within_tolerance"]

_ROUNDING: Final = 1e-9  # error of float64 arithmetic in [0, 1]: a margin at the bound counts as within


def within_tolerance(margins: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], allowed: float) -> np.ndarray:
    """Return which decisions a difference of at most `allowed` in each probability can explain.

    Parameters
    ----------
    margins
        float64 [..., C], from `frame_margins` or `quadrant_margins`, of the expected probabilities.
    labels
        int64 [...], the decided classes.
    allowed
        The gate's bound on |difference| of a probability.

    Returns
    -------
    bool [...]
        True where the margin of the decided class is at most ``2 * allowed``.
    """
    reversed_margins = np.take_along_axis(margins, labels[..., None], axis=-1)[..., 0]
    return np.asarray(reversed_margins <= 2 * allowed + _ROUNDING)


def quadrant_margins(probabilities: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Return how far each class is behind the leading class of its quadrant.

    Parameters
    ----------
    probabilities
        float [..., C].

    Returns
    -------
    float64 [..., C]
        0 for the leading class, in [0, 1]; infinite where a probability is not a number.
    """
    p = np.asarray(probabilities, np.float64)
    return np.asarray(np.nan_to_num(p.max(axis=-1, keepdims=True) - p, nan=np.inf, posinf=np.inf))


def frame_margins(
    probabilities: npt.NDArray[np.floating], method: VoteMethod, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
) -> npt.NDArray[np.float64]:
    """Return, for each frame and class, the margin that must be reversed to decide the frame as that class.

    ``average`` and ``weighted``: the decided class's score minus this class's score.

    ``majority``: the smallest margin m for which quadrants can vote such that this class wins, where a quadrant may
    vote for any class at most m behind its leading class, and a tie may go to any class whose mean is at most m behind
    the means of the tied classes. The bound ignores that the changes of quadrants and means depend on each other, and
    that probabilities stay in [0, 1] with the sum 1. Ignoring both only makes m smaller, so m is never too large.

    Parameters
    ----------
    probabilities
        float [N, Q, C], the training code's answers.
    method, weights
        As `echoquad_runtime.voting.aggregate_votes`.

    Returns
    -------
    float64 [N, C]
        0 for the decided class. The smallest of the others is the frame's decision margin.

    Raises
    ------
    ConfigError
        As `echoquad_runtime.voting.aggregate_votes`.
    """
    p = np.asarray(probabilities, np.float64)
    mean = aggregate_votes(p, method, weights).probabilities
    if method == "majority":
        frames = zip(quadrant_margins(p), mean, strict=True)
        margins = [[_majority_margin(*frame, label) for label in range(p.shape[2])] for frame in frames]
        return np.array(margins, np.float64).reshape(mean.shape)
    if method == "average":
        return quadrant_margins(mean)
    w = np.asarray(weights, np.float64)
    return quadrant_margins(np.einsum("nqc,q->nc", p, w / w.sum()))


def _majority_margin(behind: npt.NDArray[np.float64], mean: npt.NDArray[np.float64], label: int) -> float:
    """Return the smallest margin at which `label` can win; `behind` is float64 [Q, C], `mean` float64 [C]."""
    ahead = np.nan_to_num(np.maximum(mean - mean[label], 0.0), nan=np.inf)
    # The outcome changes only at these values, and a larger margin never removes an option: bisect them.
    steps = np.unique(np.concatenate([behind.ravel(), ahead]))
    return float(steps[bisect_left(steps, True, key=lambda margin: _can_win(behind <= margin, ahead <= margin, label))])


def _can_win(choices: npt.NDArray[np.bool_], beaten: npt.NDArray[np.bool_], label: int) -> bool:
    """Return whether quadrants can vote such that `label` wins.

    `choices`, bool [Q, C], are the classes that each quadrant may vote for; `beaten`, bool [C], those against which
    `label` wins a tie. Every quadrant that can vote for `label` does, which never hurts it. For each other quadrant it
    is enough to try as many classes as there are such quadrants, those that lose a tie first.
    """
    votes = int(choices[:, label].sum())
    others = choices[~choices[:, label]]
    options = [sorted(np.flatnonzero(row).tolist(), key=lambda c: not beaten[c])[: len(others)] for row in others]
    return votes > 0 and any(
        all(count < votes or (count == votes and beaten[c]) for c, count in Counter(choice).items())
        for choice in product(*options)
    )
