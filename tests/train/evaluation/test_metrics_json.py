"""The contents of metrics.json: keys, their order and values equal those of a stored file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from echoquad_runtime.contract import Contract
from echoquad_runtime.frames.frame_file import FrameFile
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.voting import aggregate_votes
from echoquad_train.data.dataset import LabelledFrame, Split
from echoquad_train.evaluation.evaluate import evaluate
from echoquad_train.evaluation.metrics import EvaluationOptions

EXPECTED = Path(__file__).with_name("expected_metrics.json")


def split_of(name: str, frames: int, first_patient: int, classes: tuple[str, ...]) -> Split:
    """Return frames of two per patient, one class after the other."""
    listed = []
    for index in range(frames):
        label = index % len(classes)
        file = f"{name}/{classes[label]}/patient{first_patient + index // 2}_{index}.png"
        listed.append(LabelledFrame(Path(file), file, label))
    return Split(name, classes, tuple(listed))


def predictor_of(contract: Contract, labels: dict[str, int]) -> Any:
    """Return a predictor whose probabilities are random numbers that favour the true class."""
    classes = contract.classes

    def predict(file: FrameFile) -> Prediction:
        rng = np.random.default_rng([len(classes), *file.name.encode()])
        scores = rng.integers(-20, 21, (4, len(classes))) / 10 + 1.2 * (np.arange(len(classes)) == labels[file.name])
        p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        decision = aggregate_votes(p[None], contract.vote, contract.vote_weights)
        return Prediction(
            file=file.name,
            classes=classes,
            method=contract.vote,
            label=classes[decision.labels[0]],
            probabilities=tuple(decision.probabilities[0].tolist()),
            quadrant_labels=tuple(classes[label] for label in decision.quadrant_labels[0]),
            quadrant_probabilities=tuple(tuple(row) for row in p.tolist()),
            flags=(),
            device="cpu",
            precision="fp32",
        )

    return SimpleNamespace(
        contract=contract,
        engine=SimpleNamespace(device="cpu", precision="fp32"),
        method=contract.vote,
        predict=lambda files: map(predict, files),
    )


def metrics_of(case: str) -> dict[str, Any]:
    classes = ("a", "b", "c") if case == "three classes" else ("ASD", "NORM")
    contract = Contract(classes, temperature=1.5, frame_temperature=0.4, vote="weighted")
    splits = [split_of("test", 44, 0, classes), split_of("validation", 40, 100, classes)]
    labels = {frame.name: frame.label for split in splits for frame in split.frames}
    options = EvaluationOptions(resamples=60, abstain_below=0.8 if case == "test" else None)
    reported = splits[1] if case == "validation" else splits[0]
    reference = splits[1] if case == "test" else None
    return evaluate(predictor_of(contract, labels), reported, options=options, reference=reference).metrics.to_dict()


def assert_equal(found: Any, expected: Any, path: str = "") -> None:
    assert type(found) is type(expected), path
    if isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key in expected:
            assert_equal(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_equal(one, other, f"{path}[{index}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), path
    else:
        assert found == expected, path


@pytest.mark.parametrize("case", ["test", "validation", "three classes"])
def test_metrics_equal_the_stored_file(case: str) -> None:
    found, expected = metrics_of(case), json.loads(EXPECTED.read_text("utf-8"))[case]
    assert len(found.pop("contract_sha256")) == 64  # tests of the contract hold its hash
    assert_equal(found, expected)
