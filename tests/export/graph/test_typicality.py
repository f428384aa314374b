"""The typicality score: the fitted Gaussians, the graph's output in each precision, and the export without frames."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from sklearn.covariance import ledoit_wolf

from echoquad_export.graph.build import build_graph
from echoquad_export.graph.float_tail import float_tail
from echoquad_export.graph.onnx_graph import float_tensors, open_in_memory
from echoquad_export.graph.typicality import (
    RANK,
    QuadrantGaussians,
    ReferenceEngine,
    Typicality,
    fit_typicality,
    typicality_branch,
)
from echoquad_export.packing.exporter import export_run
from echoquad_export.precision.fp16 import to_fp16
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.onnx_header import check_graph
from echoquad_runtime.contract import Contract
from echoquad_runtime.engine.io_binding import own_position
from echoquad_runtime.engine.slot_pool import run_in_batches
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.predict.predictor import Predictor
from echoquad_runtime.verify.verify import verify
from echoquad_train.data.dataset import read_split
from echoquad_train.networks.classifier import QuadrantClassifier
from echoquad_train.networks.ensemble_classifier import EnsembleClassifier

CONTRACT = Contract(("a", "b", "c"), input_size=32, mean=0.4, std=0.22, temperature=1.3)
RNG = np.random.default_rng(5)
TRAINING = RNG.integers(0, 256, (12, 4, 32, 32), np.uint8) // np.array([1, 2, 3, 5], np.uint8)[:, None, None]
FRAMES = RNG.integers(0, 256, (6, 4, 32, 32), np.uint8)


def draw_features(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Draw correlated features, float64 [count, 4, size], whose mean differs by position."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(4, size, size)) * np.geomspace(1, 0.05, size)[:, None]
    place = np.random.default_rng(98).normal(size=(4, size)) * 2
    return np.einsum("fqi,qij->fqj", rng.normal(size=(count, 4, size)), mix) + place


def unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=2, keepdims=True)


# The Gaussians


def test_distance_is_that_of_the_shrunk_covariance() -> None:
    training, others = unit(draw_features(80, 6)), unit(draw_features(5, 6, seed=1))
    gaussians = QuadrantGaussians(training)
    for position in range(4):
        covariance, _ = ledoit_wolf(training[:, position])
        away = others - training[:, position].mean(axis=0)
        expected = np.einsum("fqi,ij,fqj->fq", away, np.linalg.inv(covariance), away) / 6
        found = gaussians(torch.from_numpy(7 * others.reshape(-1, 6)))[:, position].reshape(5, 4)
        np.testing.assert_allclose(found, expected, rtol=1e-3)  # whatever the length of the features


def test_only_the_largest_components_are_stored() -> None:
    gaussians = QuadrantGaussians(draw_features(300, 3 * RANK))
    assert gaussians.axes.shape == (4, 3 * RANK, RANK)
    new = draw_features(200, 3 * RANK, seed=1)
    distances = torch.stack([gaussians(torch.from_numpy(new[:, q]))[:, q] for q in range(4)], 1)
    assert 0.8 < float(distances.mean()) < 1.3  # near 1 for features like those of the training frames
    assert float(gaussians(torch.from_numpy(new[:, 0] + 9))[:, 0].median()) > 3


def test_a_quadrant_is_most_typical_at_its_own_position() -> None:
    score = Typicality([draw_features(100, 20)])
    with torch.inference_mode():
        found = score([torch.from_numpy(draw_features(30, 20, seed=1).reshape(-1, 20))]).numpy().reshape(30, 4, 4)
    assert (found.argmax(axis=2) == np.arange(4)).all() and (found > 0).all()


@pytest.mark.parametrize("features", [np.zeros((5, 4, 7)), np.ones((2, 4, 40)), np.eye(2, 40)[:, None].repeat(4, 1)])
def test_features_without_variation_give_finite_scores(features: np.ndarray) -> None:
    found = Typicality([features])([torch.zeros(4, features.shape[2])])
    assert bool(torch.isfinite(found).all()) and bool((found > 0).all())


@pytest.mark.parametrize("members", [1, 3])
def test_rounding_of_features_without_variation_does_not_change_the_score(members: int) -> None:
    rng = np.random.default_rng(0)
    training = 1 + 1e-6 * rng.standard_normal((8, 4, 48))
    score = Typicality([training] * members)
    features = torch.from_numpy(training.reshape(-1, 48))
    rounded = features + 1e-7 * torch.from_numpy(rng.standard_normal(features.shape))
    found, other = (score([each] * members) for each in (features, rounded))
    assert torch.equal(found, other) and float(found.max()) == pytest.approx(100)


# The graph


ENSEMBLES = [pytest.param(name, marks=pytest.mark.slow) for name in ("ensemble", "ensemble with flips")]


@pytest.fixture(params=["single", *ENSEMBLES])
def model(request: pytest.FixtureRequest, thin_model: Callable[[Contract], Any]) -> Any:
    if request.param == "single":
        return thin_model(CONTRACT)
    members = [thin_model(CONTRACT), thin_model(CONTRACT)]
    with torch.no_grad():
        for weight in members[1].parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return EnsembleClassifier(members, [1.0, 1.7], "soft", request.param != "ensemble").eval()


def run(graph: bytes, *outputs: str) -> list[np.ndarray]:
    return list(open_in_memory(graph).run(list(outputs), {"quadrants": FRAMES.reshape(-1, 1, 32, 32)}))


def test_graph_computes_the_score_and_the_same_answers(model: QuadrantClassifier | EnsembleClassifier) -> None:
    engine = ReferenceEngine(model, CONTRACT)
    plain = run_in_batches(engine, FRAMES, 4)
    assert plain.typicality is None
    fit_typicality(engine, TRAINING, 5)
    expected = run_in_batches(engine, FRAMES, 4)
    np.testing.assert_array_equal(expected.logits, plain.logits)
    assert expected.typicality is not None and expected.typicality.shape == (6, 4)

    graph, without = build_graph(model, CONTRACT, engine.typicality), build_graph(model, CONTRACT)
    check_graph(graph, CONTRACT, "graph")
    logits, probabilities, scores = run(graph, "logits", "probabilities", "typicality")
    for found, bits in zip((logits, probabilities), run(without, "logits", "probabilities"), strict=True):
        np.testing.assert_array_equal(found, bits)
    np.testing.assert_allclose(own_position(scores), expected.typicality, rtol=1e-3)
    names = [[output.name for output in onnx.load_from_string(data).graph.output] for data in (graph, without)]
    assert [name for name in names[0] if name != "typicality"] == names[1]  # activation maps stay


def test_score_stays_in_float32_in_every_precision(thin_model: Callable[[Contract], Any]) -> None:
    engine = ReferenceEngine(thin_model(CONTRACT), CONTRACT)
    fit_typicality(engine, TRAINING, 5)
    graph = build_graph(thin_model(CONTRACT), CONTRACT, engine.typicality)
    branch = typicality_branch(onnx.load_from_string(graph).graph)
    assert branch <= float_tail(onnx.load_from_string(graph).graph)
    half = to_fp16(graph)
    assert branch <= float_tensors(onnx.load_from_string(half)) | {"typicality"}
    (scores,), (exact,) = run(half, "typicality"), run(graph, "typicality")
    np.testing.assert_allclose(own_position(scores), own_position(exact), rtol=0.1)
    assert not typicality_branch(onnx.load_from_string(build_graph(thin_model(CONTRACT), CONTRACT)).graph)


# The export


def test_bundle_states_thresholds_and_parity_of_the_score(case: Any) -> None:
    manifest = Bundle(case.bundle).manifest
    stated = manifest["typicality"]
    assert (stated["frames"], stated["validation_frames"], stated["split"]) == (8, 8, "train")
    split = read_split(case.data, "validation", Bundle(case.bundle).contract.classes)
    found = list(Predictor(case.bundle, device="cpu").predict(split.files()))
    scores = [one.typicality for one in found if isinstance(one, Prediction) and one.typicality is not None]
    assert len(scores) == 8
    # The threshold of so few frames is the smallest score, and none of them is below it.
    assert stated["thresholds"] == {"fp32": {"95": pytest.approx(min(scores)), "99": pytest.approx(min(scores))}}
    assert not any("unlike-training" in one.flags for one in found if isinstance(one, Prediction))
    (batch, *_) = manifest["parity"]["fp32"]["batches"]
    assert 0 <= batch["max_rel_dtypicality"] <= manifest["parity"]["fp32"]["gate"]["max_rel_dtypicality"] == 1e-3
    assert Bundle(case.bundle).read_golden().typicality is not None
    assert "unlike-training" in (case.bundle / "MODEL_CARD.md").read_text("utf-8")


def test_noise_is_unlike_the_training_frames(case: Any) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 60), np.uint8)
    assert "unlike-training" in Predictor(case.bundle, device="cpu")(noise).flags


def test_without_training_frames_there_is_no_score(
    case: Any, run: Path, tmp_path: Path, thin: None, few_golden: None
) -> None:
    only = tmp_path / "only"
    shutil.copytree(case.data / "validation", only / "validation")
    info = json.loads((run / "run.json").read_text("utf-8"))
    info["data"]["folder"] = str(tmp_path / "gone")
    (run / "run.json").write_text(json.dumps(info), "utf-8")
    lines: list[str] = []
    export_run(run, tmp_path / "bundle", parity_data=only, progress=lines.append)
    assert any("no typicality score" in line and "--parity" in line for line in lines)
    manifest = Bundle(tmp_path / "bundle").manifest
    assert "typicality" not in manifest
    assert "max_rel_dtypicality" not in manifest["parity"]["fp32"]["batches"][0]
    assert verify(tmp_path / "bundle", device="cpu").max_rel_dtypicality is None
    assert "unlike-training" not in (tmp_path / "bundle" / "MODEL_CARD.md").read_text("utf-8")
    shutil.copytree(case.data / "train", only / "Training")  # now the folder has training frames
    shutil.move(only / "validation", only / "val")
    export_run(run, tmp_path / "spelled", parity_data=only)
    assert Bundle(tmp_path / "spelled").manifest["typicality"]["frames"] == 8
