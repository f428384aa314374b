"""Tolerance: which decisions a bounded difference of the probabilities can turn, and which it cannot.

A gate that lets every probability be out by d lets any lead of at most 2 d turn round: the leader loses d, the
other gains d. So a frame whose training answer is that close may be decided otherwise by a graph that keeps its
gate, and to count it would be a false alarm. A frame that is further away may not. The rule is one-sided by
design: where no probability is out by more than d, no decision is ever called wrong; a decision that is called
wrong proves that some probability is out by more than d.
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

__all__ = ["frame_leads", "quadrant_leads", "within_tolerance"]

_ROUNDING: Final = 1e-9  # of float64 arithmetic on numbers in [0, 1]: a lead at the bound counts as inside


def within_tolerance(leads: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], allowed: float) -> np.ndarray:
    """Say which decisions a difference of at most `allowed` in each probability can lead to.

    Parameters
    ----------
    leads
        float64 [..., C], from `frame_leads` or `quadrant_leads`, of the expected probabilities.
    labels
        int64 [...], the classes that were decided instead.
    allowed
        The gate's bound on |difference| of a probability.

    Returns
    -------
    bool [...]
        True where the lead that had to be turned round is at most ``2 * allowed``.
    """
    turned = np.take_along_axis(leads, labels[..., None], axis=-1)[..., 0]
    return np.asarray(turned <= 2 * allowed + _ROUNDING)


def quadrant_leads(probabilities: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Give, for each class, how far it lies behind the leader of its quadrant.

    Parameters
    ----------
    probabilities
        float [..., C].

    Returns
    -------
    float64 [..., C]
        0 for the leader itself, in [0, 1]; infinite where a probability is no number.
    """
    p = np.asarray(probabilities, np.float64)
    return np.asarray(np.nan_to_num(p.max(axis=-1, keepdims=True) - p, nan=np.inf, posinf=np.inf))


def frame_leads(
    probabilities: npt.NDArray[np.floating], method: VoteMethod, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
) -> npt.NDArray[np.float64]:
    """Give, for each frame and class, the lead that must be turned round for the frame to be decided as that class.

    ``average`` and ``weighted``: the decided class's score less this class's.

    ``majority``: the least lead L for which quadrants can vote such that this class wins, where a quadrant may
    vote for any class that lies at most L behind its leader, and a tie may go to any class whose mean lies at most
    L behind the means of those it is tied with. That the quadrants' and the means' changes must go together is not
    asked, nor that probabilities stay in [0, 1] with the sum 1: L is never too large.

    Parameters
    ----------
    probabilities
        float [N, Q, C], what the training code gave.
    method, weights
        As `echoquad_runtime.voting.decide`.

    Returns
    -------
    float64 [N, C]
        0 for the decided class. The least of the others is the frame's margin.

    Raises
    ------
    ConfigError
        As `echoquad_runtime.voting.decide`.
    """
    p = np.asarray(probabilities, np.float64)
    mean = aggregate_votes(p, method, weights).probabilities
    if method == "majority":
        frames = zip(quadrant_leads(p), mean, strict=True)
        leads = [[_majority_lead(*frame, label) for label in range(p.shape[2])] for frame in frames]
        return np.array(leads, np.float64).reshape(mean.shape)
    if method == "average":
        return quadrant_leads(mean)
    w = np.asarray(weights, np.float64)
    return quadrant_leads(np.einsum("nqc,q->nc", p, w / w.sum()))


def _majority_lead(behind: npt.NDArray[np.float64], mean: npt.NDArray[np.float64], label: int) -> float:
    """Find the least lead at which `label` can win; `behind` is float64 [Q, C], `mean` float64 [C]."""
    ahead = np.nan_to_num(np.maximum(mean - mean[label], 0.0), nan=np.inf)
    # Something changes only where a quadrant gains a choice or a tie another end; more lead never takes one away.
    steps = np.unique(np.concatenate([behind.ravel(), ahead]))
    return float(steps[bisect_left(steps, True, key=lambda lead: _can_win(behind <= lead, ahead <= lead, label))])


def _can_win(choices: npt.NDArray[np.bool_], beaten: npt.NDArray[np.bool_], label: int) -> bool:
    """Say whether quadrants can vote such that `label` wins.

    `choices`, bool [Q, C], are the classes that each may vote for; `beaten`, bool [C], those that `label` wins a tie
    against. Every quadrant that can vote for `label` does, which is never to its harm; for each of the others it
    is enough to try as many classes as there are such quadrants, those that lose a tie first.
    """
    votes = int(choices[:, label].sum())
    others = choices[~choices[:, label]]
    options = [sorted(np.flatnonzero(row).tolist(), key=lambda c: not beaten[c])[: len(others)] for row in others]
    return votes > 0 and any(
        all(count < votes or (count == votes and beaten[c]) for c, count in Counter(choice).items())
        for choice in product(*options)
    )
