"""Voting: the three methods against an exact reference, ties, margins, and invalid input."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echoquad_runtime.contract import VOTE_METHODS, VoteMethod
from echoquad_runtime.errors import ConfigError
from echoquad_runtime.voting import Decision, aggregate_votes

WEIGHTS = (1.0, 1.0, 1.5, 1.5)


def frames_of(classes: st.SearchStrategy[int]) -> st.SearchStrategy[np.ndarray]:
    """Draw float32 [N, 4, C] with rows that sum to 1 up to rounding, including ties of argmax and of votes."""

    def rows(count: int) -> st.SearchStrategy[np.ndarray]:
        row = st.lists(st.integers(0, 20), min_size=count, max_size=count).filter(any)
        frame = st.lists(row, min_size=4, max_size=4)
        return st.lists(frame, min_size=1, max_size=3).map(
            lambda drawn: (np.array(drawn, float) / np.sum(drawn, axis=2, keepdims=True)).astype(np.float32)
        )

    return classes.flatmap(rows)


def reference_decision(frame: np.ndarray, method: VoteMethod, weights: Sequence[float]) -> tuple[int, list[int], float]:
    """Return label, quadrant labels and margin of one frame, computed with exact fractions."""
    rows = [[Fraction(float(p)) for p in row] for row in frame]
    classes = range(len(rows[0]))
    argmax = [max(classes, key=lambda c: (row[c], -c)) for row in rows]
    mean = [sum((row[c] for row in rows), Fraction(0)) / 4 for c in classes]
    if method == "majority":
        score = [Fraction(argmax.count(c), 4) for c in classes]
        label = max(classes, key=lambda c: (score[c], mean[c], -c))
    else:
        shares = [Fraction(w) for w in (weights if method == "weighted" else (1,) * 4)]
        score = [
            sum((w * row[c] for w, row in zip(shares, rows, strict=True)), Fraction(0)) / sum(shares) for c in classes
        ]
        label = max(classes, key=lambda c: (score[c], -c))
    return label, argmax, float(score[label] - max(score[c] for c in classes if c != label))


def decide_one(rows: Sequence[Sequence[float]], method: VoteMethod = "majority", **options: object) -> Decision:
    return aggregate_votes(np.array([rows], np.float32), method, **options)  # type: ignore[arg-type]


@given(frames_of(st.integers(2, 5)), st.sampled_from(VOTE_METHODS), st.tuples(*[st.integers(0, 4)] * 4).filter(any))
def test_votes_equal_exact_reference(frames: np.ndarray, method: VoteMethod, weights: tuple[int, ...]) -> None:
    found = aggregate_votes(frames, method, weights)
    for index, frame in enumerate(frames):
        label, argmax, margin = reference_decision(frame, method, weights)
        assert found.quadrant_labels[index].tolist() == argmax
        assert found.margins[index] == pytest.approx(margin, abs=1e-12)
        # Where float64 may break a tie of exact fractions, either label is right.
        if (method == "majority" and clear_mean(frame)) or margin > 1e-12:
            assert found.labels[index] == label
        np.testing.assert_allclose(found.probabilities[index], frame.astype(float).mean(axis=0), rtol=0, atol=1e-15)


def clear_mean(frame: np.ndarray) -> bool:
    mean = np.sort(frame.astype(float).mean(axis=0))
    return bool((np.diff(mean) > 1e-12).all())


@given(frames_of(st.integers(2, 4)), st.sampled_from(VOTE_METHODS))
def test_shapes_dtypes_and_ranges(frames: np.ndarray, method: VoteMethod) -> None:
    count, _, classes = frames.shape
    found = aggregate_votes(frames, method, WEIGHTS)
    assert (found.labels.shape, found.labels.dtype) == ((count,), np.int64)
    assert (found.quadrant_labels.shape, found.quadrant_labels.dtype) == ((count, 4), np.int64)
    assert (found.probabilities.shape, found.probabilities.dtype) == ((count, classes), np.float64)
    assert (found.margins.shape, found.margins.dtype) == ((count,), np.float64)
    assert ((found.margins >= 0) & (found.margins <= 1 + 1e-6)).all()
    assert ((found.labels >= 0) & (found.labels < classes)).all()


@given(st.integers(2, 5), st.integers(0, 10_000), st.sampled_from(VOTE_METHODS), st.data())
def test_order_of_classes_does_not_matter(classes: int, seed: int, method: VoteMethod, data: st.DataObject) -> None:
    frames = np.random.default_rng(seed).dirichlet(np.ones(classes), (5, 4))  # no ties
    order = np.array(data.draw(st.permutations(range(classes))))
    plain, permuted = aggregate_votes(frames, method, WEIGHTS), aggregate_votes(frames[:, :, order], method, WEIGHTS)
    np.testing.assert_array_equal(order[permuted.labels], plain.labels)
    np.testing.assert_array_equal(order[permuted.quadrant_labels], plain.quadrant_labels)
    np.testing.assert_allclose(permuted.margins, plain.margins, rtol=0, atol=1e-12)


@given(frames_of(st.just(3)), st.sampled_from(VOTE_METHODS))
def test_frames_are_decided_independently(frames: np.ndarray, method: VoteMethod) -> None:
    together = aggregate_votes(frames, method, WEIGHTS)
    for index in range(len(frames)):
        alone = aggregate_votes(frames[index : index + 1], method, WEIGHTS)
        assert alone.labels[0] == together.labels[index]
        assert alone.margins[0] == together.margins[index]


def test_majority_may_contradict_the_mean() -> None:
    # Three quadrants favour ASD slightly, one NORM strongly: the label is ASD with a prob_ASD of 0.484.
    rows = [[0.56, 0.44], [0.57, 0.43], [0.196, 0.804], [0.61, 0.39]]
    found = decide_one(rows)
    assert found.labels[0] == 0
    assert found.probabilities[0, 0] == pytest.approx(0.484)
    assert found.margins[0] == 0.5
    assert decide_one(rows, "average").labels[0] == 1


@pytest.mark.parametrize(("sure", "label"), [(0.95, 0), (0.55, 1)])
def test_tied_votes_go_to_the_higher_mean(sure: float, label: int) -> None:
    found = decide_one([[sure, 1 - sure], [0.3, 0.7], [0.6, 0.4], [0.2, 0.8]])
    assert (found.labels[0], found.margins[0]) == (label, 0)
    assert found.probabilities[0].argmax() == label


def test_complete_tie_goes_to_the_first_class() -> None:
    for method in VOTE_METHODS:
        found = decide_one([[0.5, 0.5]] * 4, method)
        # Each quadrant votes for the first of equal classes, so that the votes are four to none.
        assert (found.labels[0], found.margins[0]) == (0, 1 if method == "majority" else 0)
    found = decide_one([[0.75, 0.25], [0.25, 0.75]] * 2)
    assert (found.labels[0], found.margins[0]) == (0, 0)


def test_plurality_suffices_with_more_than_two_classes() -> None:
    rows = [[0.1, 0.5, 0.4], [0.1, 0.5, 0.4], [0.9, 0.05, 0.05], [0.05, 0.05, 0.9]]
    found = decide_one(rows)
    assert (found.labels[0], found.margins[0]) == (1, 0.25)
    assert found.probabilities[0].argmax() != 1


def test_tie_is_broken_among_tied_classes_only() -> None:
    # Class 2 has the highest mean but no vote.
    rows = [[0.51, 0.0, 0.49], [0.51, 0.0, 0.49], [0.0, 0.52, 0.48], [0.0, 0.52, 0.48]]
    found = decide_one(rows)
    assert found.probabilities[0].argmax() == 2
    assert found.labels[0] == 1


def test_weights_scale_the_quadrants() -> None:
    rows = [[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]]
    assert decide_one(rows, "weighted", weights=(1, 1, 1, 1)).labels[0] == 0
    found = decide_one(rows, "weighted", weights=(1, 1, 3, 3))
    assert found.labels[0] == 1
    assert found.margins[0] == pytest.approx((0.1 + 3 * 0.8) / 4 - (0.9 + 3 * 0.2) / 4)
    assert found.probabilities[0].tolist() == pytest.approx([0.55, 0.45])  # the unweighted mean, whatever the method


@given(frames_of(st.integers(2, 4)))
def test_equal_weights_equal_the_average(frames: np.ndarray) -> None:
    average, weighted = aggregate_votes(frames, "average"), aggregate_votes(frames, "weighted", (2, 2, 2, 2))
    np.testing.assert_allclose(weighted.margins, average.margins, rtol=0, atol=1e-12)
    clear = average.margins > 1e-12
    np.testing.assert_array_equal(weighted.labels[clear], average.labels[clear])


@given(frames_of(st.integers(2, 4)), st.integers(0, 3))
def test_single_weight_takes_one_quadrant(frames: np.ndarray, quadrant: int) -> None:
    found = aggregate_votes(frames, "weighted", np.eye(4)[quadrant])
    np.testing.assert_array_equal(found.labels, found.quadrant_labels[:, quadrant])


def test_no_frames_yield_no_decisions() -> None:
    found = aggregate_votes(np.zeros((0, 4, 2), np.float32), "majority")
    assert len(found.labels) == len(found.margins) == 0


@pytest.mark.parametrize("shape", [(4, 2), (2,), (1, 1, 4, 2)])
def test_invalid_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"\[frames, quadrants, classes\]"):
        aggregate_votes(np.zeros(shape), "majority")


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'plurality'.*majority, average, weighted"):
        aggregate_votes(np.zeros((1, 4, 2)), "plurality")  # type: ignore[arg-type]


def test_wrong_number_of_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\b3\b.*\b4\b"):
        aggregate_votes(np.zeros((1, 4, 2)), "weighted", (1, 1, 1))
