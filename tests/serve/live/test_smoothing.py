"""Smoothing over a beat: the mean of probabilities, decided by the contract's own rule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echoquad_runtime.bundle.typicality import UNLIKE_TRAINING
from echoquad_runtime.contract import INDETERMINATE, Contract, VoteMethod
from echoquad_runtime.predict.prediction import TIE, Prediction
from echoquad_runtime.predict.predictor import Predictor
from echoquad_runtime.voting import aggregate_votes
from echoquad_serve.live.smoothing import Smoothing


class Settings:
    def __init__(self, *, abstain_below: float | None = None, abstain_unlike: bool = False) -> None:
        self.contract = Contract(classes=("ASD", "NORM"), input_size=32, vote_weights=(1.0, 1.0, 2.0, 1.0))
        self.abstain_below, self.abstain_unlike = abstain_below, abstain_unlike


def prediction(
    first_class: list[float], method: VoteMethod = "majority", flags: tuple[str, ...] = (), label: str | None = None
) -> Prediction:
    rows = np.array([[p, 1 - p] for p in first_class])
    decided = aggregate_votes(rows[None], method, (1.0, 1.0, 2.0, 1.0))
    classes = ("ASD", "NORM")
    return Prediction(
        file="live#1",
        classes=classes,
        method=method,
        label=label or classes[decided.labels[0]],
        probabilities=tuple(decided.probabilities[0].tolist()),
        quadrant_labels=tuple(classes[index] for index in decided.quadrant_labels[0]),
        quadrant_probabilities=tuple(tuple(row) for row in rows.tolist()),
        flags=flags,
        device="cpu",
        precision="int8",
        predicted_class=classes[decided.labels[0]],
        typicality=0.9,
    )


QUARTET = st.lists(st.floats(0, 1), min_size=4, max_size=4)


@given(
    st.lists(QUARTET, min_size=1, max_size=12), st.integers(1, 6), st.sampled_from(["majority", "average", "weighted"])
)
def test_decision_is_the_vote_on_the_mean_of_the_last_frames(
    frames: list[list[float]], size: int, method: VoteMethod
) -> None:
    smoothing, settings = Smoothing(size), Settings()
    for index, frame in enumerate(frames):
        result, count = smoothing.add(prediction(frame, method), settings)
        last = np.array(frames[max(0, index + 1 - size) : index + 1])
        mean = np.stack([last, 1 - last], axis=-1).mean(axis=0)
        expected = aggregate_votes(mean[None], method, settings.contract.vote_weights)
        assert count == len(last)
        assert np.allclose(result.quadrant_probabilities, mean)
        assert np.allclose(result.probabilities, mean.mean(axis=0))
        top = np.sort(mean.mean(axis=0))
        if method == "average" and top[1] - top[0] > 1e-9:
            assert result.label == ("ASD", "NORM")[expected.labels[0]]


def test_one_frame_stays_as_it_is() -> None:
    one = prediction([0.2, 0.7, 0.9, 0.1], flags=(TIE, UNLIKE_TRAINING))
    assert Smoothing(1).add(one, Settings()) == (one, 1)
    assert Smoothing(5).add(one, Settings()) == (one, 1)


def test_flags_of_the_decision_are_made_anew_and_those_of_the_frame_stay() -> None:
    smoothing, settings = Smoothing(4), Settings()
    smoothing.add(prediction([0.9, 0.9, 0.9, 0.9]), settings)
    result, _ = smoothing.add(prediction([0.6, 0.6, 0.3, 0.3], flags=("screen", TIE, UNLIKE_TRAINING)), settings)
    assert result.flags == ("screen", UNLIKE_TRAINING)
    assert result.typicality == 0.9
    smoothing.reset()
    smoothing.add(prediction([0.9, 0.9, 0.9, 0.9]), settings)
    result, _ = smoothing.add(prediction([0.9, 0.9, 0.0, 0.0], flags=("screen",)), settings)
    assert result.flags == ("screen", TIE)


def test_abstention_is_by_the_smoothed_confidence() -> None:
    smoothing, settings = Smoothing(2), Settings(abstain_below=0.8)
    unsure = prediction([0.6] * 4, label=INDETERMINATE)
    assert smoothing.add(unsure, settings)[0].label == INDETERMINATE
    result, _ = smoothing.add(prediction([1.0] * 4), settings)
    assert (result.label, result.predicted_class) == ("ASD", "ASD")
    result, _ = smoothing.add(prediction([0.1] * 4), settings)
    assert (result.label, result.predicted_class) == (INDETERMINATE, "ASD")


def test_abstention_on_unlike_frames_survives() -> None:
    smoothing, settings = Smoothing(2), Settings(abstain_unlike=True)
    smoothing.add(prediction([0.9] * 4), settings)
    result, _ = smoothing.add(prediction([0.9] * 4, flags=(UNLIKE_TRAINING,)), settings)
    assert result.label == INDETERMINATE


def test_another_predictor_begins_anew() -> None:
    smoothing, settings = Smoothing(8), Settings()
    smoothing.add(prediction([0.9] * 4), settings)
    assert smoothing.add(prediction([0.1] * 4), settings)[1] == 2
    assert smoothing.add(prediction([0.1] * 4), Settings())[1] == 1


def test_identical_frames_of_a_bundle_are_decided_as_one(
    tiny_bundle: Path, make_frame: Callable[..., np.ndarray]
) -> None:
    predictor, smoothing = Predictor(tiny_bundle, threads=1), Smoothing(5)
    single = predictor(make_frame(3))
    for _ in range(7):
        result, _ = smoothing.add(single, predictor)
    assert (result.label, result.flags, result.quadrant_labels) == (single.label, single.flags, single.quadrant_labels)
    assert result.probabilities == pytest.approx(single.probabilities)
