"""The validation figures of an export: of the exported graphs, on the files of the validation split."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echoquad_export.packing import exporter
from echoquad_export.packing.exporter import export_run
from echoquad_export.packing.validation import figures_of
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.typicality import UNLIKE_TRAINING
from echoquad_runtime.bundle.validation_figures import ValidationFigures
from echoquad_runtime.contract import QUADRANTS, Contract
from echoquad_runtime.predict.prediction import TIE, Prediction
from echoquad_runtime.predict.predictor import Predictor

CONTRACT = Contract(classes=("ASD", "NORM"), input_size=32)


def prediction(p: float, votes: int = 4, flags: tuple[str, ...] = (), typicality: float | None = 1.0) -> Prediction:
    return Prediction(
        file="a",
        classes=CONTRACT.classes,
        method="majority",
        label="ASD",
        probabilities=(p, 1 - p),
        quadrant_labels=("ASD",) * votes + ("NORM",) * (4 - votes),
        quadrant_probabilities=((p, 1 - p),) * len(QUADRANTS),
        flags=flags,
        device="cpu",
        precision="fp32",
        typicality=typicality,
    )


def test_figures_of_known_predictions() -> None:
    predictions = [
        prediction(0.55, 2, (TIE,), 0.1),
        prediction(0.7, 3, (UNLIKE_TRAINING,), 0.05),
        prediction(0.8, 4, (), 1.0),
        prediction(0.9999999, 4, (), 2.0),  # a row has six decimals: 1
    ]
    found = figures_of(predictions, CONTRACT, range(4))
    assert found.frames == 4 == found.effective_frames
    assert (found.confidence.edges, found.confidence.counts) == ((0.7,), (1, 3))
    assert found.typicality is not None
    assert (found.typicality.edges, found.typicality.counts) == ((0.1,), (1, 3))
    assert found.agreement == (0, 0, 1, 1, 2) and found.flags == {TIE: 1, UNLIKE_TRAINING: 1}
    assert [found.undecided[step] for step in (0, 11, 12, 14, 15, 16, 17, 20)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [found.undecided_or_unlike[step] for step in (0, 11, 12, 15, 17, 20)] == [1, 1, 2, 2, 3, 3]
    assert ValidationFigures.from_dict(json.loads(json.dumps(found.to_dict())), "x") == found


def test_bins_are_deciles_and_equal_values_share_one() -> None:
    values = np.linspace(0.5, 0.99, 200)
    found = figures_of([prediction(float(p)) for p in values], CONTRACT, range(200)).confidence
    assert len(found.edges) == 9 and set(found.counts) <= {19, 20, 21}
    sure = figures_of([prediction(1.0 if index > 50 else 0.8) for index in range(200)], CONTRACT, range(200))
    assert (sure.confidence.edges, sure.confidence.counts) == ((0.8, 1.0), (0, 51, 149))
    alone = figures_of([prediction(0.75, typicality=None)], CONTRACT, [0])
    assert (alone.confidence.edges, alone.confidence.counts, alone.typicality) == ((0.75,), (0, 1), None)


def test_frames_of_a_patient_count_as_the_number_that_tells_as_much() -> None:
    rng = np.random.default_rng(2)
    levels = np.repeat(rng.uniform(0.5, 1, 50), 6)  # all frames of a patient are the same
    predictions = [prediction(float(p)) for p in levels]
    assert figures_of(predictions, CONTRACT, range(300)).effective_frames > 250
    of_patients = figures_of(predictions, CONTRACT, np.repeat(np.arange(50), 6).tolist())
    assert 35 < of_patients.effective_frames < 65


def test_bundle_has_the_figures_of_each_graph(
    few_golden: None, case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thin: None
) -> None:
    graph = (case.bundle / "model.fp32.onnx").read_bytes()
    monkeypatch.setattr(exporter, "build_graph", lambda *_: graph)  # building takes seconds
    export_run(case.run, tmp_path / "out", precisions=("int8", "fp32"))
    bundle = Bundle(tmp_path / "out")
    files = sorted((case.data / "validation").rglob("*.png"))
    for precision in ("int8", "fp32"):
        figures = bundle.validation(precision)
        predictor = Predictor(bundle, precision=precision, device="cpu")
        found = [one for one in predictor.predict(map(str, files)) if isinstance(one, Prediction)]
        assert figures is not None and len(found) == figures.frames == len(files)
        # The frames are of one patient, which is as much as one frame.
        assert figures == replace(figures_of(found, bundle.contract, range(len(found))), effective_frames=1.0)
    assert bundle.validation("int8") != bundle.validation("fp32")
    text = (tmp_path / "out" / "bundle.json").read_text("ascii")
    assert "DOE" not in text and "validation" in json.loads(text)
