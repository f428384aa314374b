"""Tests of decision margins: the rule against brute force, and its guarantee of no false alarm."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echoquad_runtime.contract import VOTE_METHODS, VoteMethod
from echoquad_runtime.errors import ConfigError
from echoquad_runtime.verify.decision_margins import frame_margins, quadrant_margins, within_tolerance
from echoquad_runtime.voting import aggregate_votes

WEIGHTS = (1.0, 1.0, 1.5, 1.5)
METHODS = st.sampled_from(VOTE_METHODS)


def row(classes: int) -> st.SearchStrategy[list[float]]:
    """Draw the probabilities of a quadrant, including ties of all kinds."""
    counts = st.lists(st.integers(0, 12), min_size=classes, max_size=classes).filter(any)
    return counts.map(lambda drawn: [count / sum(drawn) for count in drawn])


def frame(classes: int) -> st.SearchStrategy[np.ndarray]:
    return st.lists(row(classes), min_size=4, max_size=4).map(lambda rows: np.array([rows]))


FRAMES = st.integers(2, 4).flatmap(frame)
PAIRS = st.integers(2, 4).flatmap(lambda classes: st.tuples(frame(classes), frame(classes)))


def slow_majority_margin(p: np.ndarray, label: int) -> float:
    """Return the smallest margin over all votes of four quadrants."""
    quadrants, classes = p.shape
    behind, mean = p.max(axis=1, keepdims=True) - p, p.mean(axis=0)
    best = np.inf
    for votes in product(range(classes), repeat=quadrants):
        counts = [votes.count(name) for name in range(classes)]
        if counts[label] == max(counts):
            tied = [mean[name] - mean[label] for name in range(classes) if counts[name] == counts[label]]
            best = min(best, max(*tied, 0.0, *(behind[quadrant, vote] for quadrant, vote in enumerate(votes))))
    return best


@given(FRAMES)
def test_majority_margin_equals_brute_force(p: np.ndarray) -> None:
    found = frame_margins(p, "majority")
    expected = [[slow_majority_margin(p[0], label) for label in range(p.shape[2])]]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@given(PAIRS, METHODS)
def test_allowed_difference_is_always_within_tolerance(pair: tuple[np.ndarray, np.ndarray], method: VoteMethod) -> None:
    """Any difference up to the bound only leads to decisions within tolerance."""
    expected, found = pair
    allowed = float(np.abs(expected - found).max())
    decided = aggregate_votes(found, method, WEIGHTS)
    assert within_tolerance(frame_margins(expected, method, WEIGHTS), decided.labels, allowed).all()
    assert within_tolerance(quadrant_margins(expected), decided.quadrant_labels, allowed).all()


@given(frame(2), METHODS, st.integers(0, 1), st.sampled_from([0.98, 1.02]))
def test_bound_is_tight_for_two_classes(p: np.ndarray, method: VoteMethod, label: int, share: float) -> None:
    """A difference just above half the margin changes the decision: the rule tolerates no more than necessary."""
    p = 0.3 + 0.4 * p  # away from 0 and 1, where a probability cannot move further
    lead = frame_margins(p, method, WEIGHTS)[0, label]
    shift = share * lead / 2
    shifted = p + shift * np.where(np.arange(2) == label, 1, -1)
    if lead > 1e-9:
        assert (aggregate_votes(shifted, method, WEIGHTS).labels[0] == label) == (share > 1)


@given(FRAMES, METHODS)
def test_margin_of_decided_class_is_zero(p: np.ndarray, method: VoteMethod) -> None:
    decision = aggregate_votes(p, method, WEIGHTS)
    leads = frame_margins(p, method, WEIGHTS)
    assert leads[0, decision.labels[0]] == 0
    assert (leads >= 0).all() and (leads <= 1).all()
    if method != "majority":
        assert np.partition(leads[0], 1)[1] == pytest.approx(decision.margins[0], abs=1e-12)


# Probabilities of the first of two classes by quadrant, the method, the margin of the second class.
EXAMPLES: dict[str, tuple[list[float], VoteMethod, float]] = {
    "all four, two must turn and then the mean": ([0.9, 0.8, 0.7, 0.6], "majority", 0.5),
    "three to one, one must turn and then the mean": ([0.51, 0.52, 0.9, 0.1], "majority", 0.02),
    "three to one, the tie is lost by the mean": ([0.51, 0.9, 0.9, 0.4], "majority", 0.355),
    "a tie that the mean decides": ([0.9, 0.8, 0.4, 0.1], "majority", 0.1),
    "the mean": ([0.9, 0.8, 0.4, 0.1], "average", 0.1),
    "the weighted mean": ([0.9, 0.8, 0.4, 0.2], "weighted", 0.04),
}


@pytest.mark.parametrize(("first", "method", "lead"), EXAMPLES.values(), ids=EXAMPLES)
def test_margins_of_examples(first: list[float], method: VoteMethod, lead: float) -> None:
    p = np.array([[[value, 1 - value] for value in first]])
    found = frame_margins(p, method, WEIGHTS)
    assert found[0] == pytest.approx([0, lead], abs=1e-12)
    assert not within_tolerance(found, np.array([1]), lead / 2 - 1e-6)[0]
    assert within_tolerance(found, np.array([1]), lead / 2)[0]


def test_one_vote_can_win_if_others_split() -> None:
    p = np.array([[[0.8, 0.1, 0.05, 0.05], [0, 1, 0, 0], [0.48, 0.04, 0.02, 0.46], [0.05, 0.1, 0.8, 0.05]]])
    assert aggregate_votes(p, "majority").labels[0] == 0
    # If the third quadrant votes for D, each class has one vote, and B has the highest mean except for A, whose margin
    # of (1.33 - 1.24) / 4 must be reversed as well.
    assert frame_margins(p, "majority")[0, 1] == pytest.approx(0.0225)


def test_nan_is_never_within_tolerance() -> None:
    p = np.full((1, 4, 2), np.nan)
    for method in VOTE_METHODS:
        assert not within_tolerance(frame_margins(p, method, WEIGHTS), np.array([1]), 0.5).any()
    assert not within_tolerance(quadrant_margins(p), np.ones((1, 4), int), 1e300).any()


def test_no_frames_and_unknown_method() -> None:
    assert frame_margins(np.zeros((0, 4, 3)), "majority").shape == (0, 3)
    with pytest.raises(ConfigError, match="expected one of majority, average, weighted"):
        frame_margins(np.zeros((1, 4, 2)), "oracle")  # type: ignore[arg-type]
