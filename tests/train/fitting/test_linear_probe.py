"""Linear probes: the head decides as scikit-learn does; regularisation, scaling, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import DatasetError, RunError
from echoquad_train.data.dataset import load_quadrants, read_split
from echoquad_train.fitting import linear_probe as linear
from echoquad_train.fitting.linear_probe import (
    LinearProbe,
    fit_linear,
    fit_scale,
    quadrant_features,
    select_probe,
    set_head,
)
from echoquad_train.networks.classifier import QuadrantClassifier
from echoquad_train.recipe import Recipe
from echoquad_train.runs.checkpoint import load_run

CLASSES = ("dark", "grey", "light")


def draw(seed: int, classes: int, noise: float = 1.5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features, labels and patients: overlapping clusters of different scales, five samples for each patient."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(classes), 60))
    centres = rng.normal(0, 1, (classes, 8))
    features = (centres[labels] + rng.normal(0, noise, (len(labels), 8))) * np.geomspace(0.01, 100, 8) + 3
    order = np.argsort(labels, kind="stable")
    patients = np.empty(len(labels), dtype="<U4")
    patients[order] = [f"p{index // 5}" for index in range(len(labels))]
    return features.astype(np.float32), labels, patients


@pytest.fixture
def model(thin: None) -> Callable[[int], QuadrantClassifier]:
    def make(classes: int) -> QuadrantClassifier:
        made = QuadrantClassifier("resnet18", Contract(tuple("abcd"[:classes]), input_size=16))
        made.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, classes))
        return made.eval()

    return make


def logits_of(model: QuadrantClassifier, features: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model.head(torch.from_numpy(features)).numpy()


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("kind", ("linear-svm", "logistic"))
def test_head_decides_as_scikit_learn(
    model: Callable[[int], QuadrantClassifier], kind: linear.LinearKind, classes: int, balanced: bool
) -> None:
    features, labels, patients = draw(classes, classes)
    chosen = select_probe(kind, features, labels, patients, balanced=balanced, seed=0)
    head = model(classes)
    set_head(head, chosen)
    fresh, _, _ = draw(9, classes, noise=3)
    logits = logits_of(head, fresh)
    found = chosen.pipeline.predict(fresh.astype(np.float64))
    assert np.array_equal(logits.argmax(axis=1), found) and len(set(found)) == classes
    assert logits.argmax(axis=1).tolist() != labels.tolist()
    if kind == "logistic":
        probabilities = torch.softmax(torch.from_numpy(logits), dim=1).numpy()
        np.testing.assert_allclose(probabilities, chosen.pipeline.predict_proba(fresh.astype(np.float64)), atol=1e-4)
    elif classes == 2:
        decisions = chosen.pipeline.decision_function(fresh.astype(np.float64))
        np.testing.assert_allclose(logits[:, 1] - logits[:, 0], chosen.scale * decisions, atol=1e-3)
    else:
        decisions = chosen.pipeline.decision_function(fresh.astype(np.float64))
        np.testing.assert_allclose(logits, chosen.scale * decisions, atol=1e-3)


def test_regularisation_is_selected_on_held_out_patients() -> None:
    """A feature that identifies the patient does not generalise; a split by samples would prefer it."""
    rng = np.random.default_rng(3)
    labels = np.repeat([0, 1], 60)
    patients = np.repeat([f"p{index}" for index in range(24)], 5)
    one_hot = (patients[:, None] == np.unique(patients)).astype(np.float32) * 30
    weak = labels[:, None] * 0.8 + rng.normal(0, 1, (120, 1))
    features = np.hstack([one_hot, weak]).astype(np.float32)
    grouped = select_probe("logistic", features, labels, patients, balanced=True, seed=0).metadata
    loose = select_probe("logistic", features, labels, np.arange(120).astype(str), balanced=True, seed=0).metadata
    assert loose["cv_balanced_accuracy"] > 0.95 > 0.75 > grouped["cv_balanced_accuracy"] > 0.5
    assert grouped["folds"] == 5 and grouped["c"] in linear.REGULARISATIONS and grouped["class_weight"] == "balanced"


@pytest.mark.parametrize("classes", [2, 3])
def test_scale_turns_decision_values_into_probabilities(classes: int) -> None:
    """Labels drawn from the softmax of 3 times the decision values give a scale of 3."""
    rng = np.random.default_rng(classes)
    decisions = rng.normal(0, 1, (20_000, classes))
    raised = np.exp(3 * decisions)
    labels = (raised.cumsum(axis=1) / raised.sum(axis=1, keepdims=True) < rng.random((20_000, 1))).sum(axis=1)
    assert fit_scale(decisions, labels, balanced=False) == pytest.approx(3, rel=0.05)


def test_scale_is_finite_for_separable_data() -> None:
    decisions = np.array([[1.0, -1.0]] * 20 + [[-1.0, 1.0]] * 20)
    labels = np.repeat([0, 1], 20)
    scale = fit_scale(decisions, labels, balanced=True)
    # Platt's target for 20 samples is 21 / 22; the softmax of 2 * scale meets it.
    assert 1 / (1 + np.exp(-2 * scale)) == pytest.approx(21 / 22, abs=1e-4)


def test_features_are_inputs_of_head(model: Callable[[int], QuadrantClassifier], flat_data: Path) -> None:
    made = model(2)
    made.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 2))
    contract = Contract(("bright", "dark"), input_size=16, keep=1.0)
    store = load_quadrants(read_split(flat_data, "train", contract.classes), contract)
    made.train()  # the features must be computed in evaluation mode
    features = quadrant_features(made, store)
    flat = torch.from_numpy(store.quadrants.reshape(-1, 1, 16, 16).copy())
    with torch.inference_mode():
        expected = made.eval().backbone(((flat.float() / 255 - 0.5) / 0.5).expand(-1, 3, -1, -1))
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-5)
    assert features.shape == (4 * len(store.labels), 64)


@pytest.fixture
def three(tmp_path: Path, make_data: Callable[..., Path]) -> Path:
    return make_data(tmp_path / "data", CLASSES, frames=6)


@pytest.mark.parametrize("kind", ("linear-svm", "logistic"))
def test_linear_run_loads_and_evaluates_like_any_run(
    kind: linear.LinearKind, thin: None, three: Path, tiny: Recipe, quiet: Any, tmp_path: Path
) -> None:
    reporter = quiet()
    fitted = fit_linear(three, tmp_path / "run", tiny, kind, device="cpu", reporter=reporter)
    run = load_run(tmp_path / "run")
    assert (run.info["status"], run.info["epochs"], run.info["fit"]["kind"]) == ("finished", 1, kind)
    assert run.info["fit"]["c"] in linear.REGULARISATIONS and run.info["fit"]["cv_balanced_accuracy"] > 0.9
    assert fitted.best.phase == kind and fitted.best.validation_frame_accuracy == 1
    assert [best for _, best in reporter.epochs] == [True] and reporter.batches[-1][1] == reporter.batches[-1][2]
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 2
    assert (tmp_path / "run" / "curves.png").exists() and not (tmp_path / "run" / "last.pt").exists()
    # Refit with scikit-learn on the features of the saved run.
    store = load_quadrants(read_split(three, "train", CLASSES), run.contract)
    features, labels = quadrant_features(run.model, store), np.repeat(store.labels, 4)
    patients = np.repeat(np.arange(len(store.labels)), 4).astype(str)
    again = select_probe(kind, features, labels, patients, balanced=True, seed=tiny.seed)
    expected = again.pipeline.predict(features.astype(np.float64))
    assert np.array_equal(logits_of(run.model, features).argmax(axis=1), expected)
    first = (tmp_path / "run" / "best.safetensors").read_bytes()
    fit_linear(three, tmp_path / "again", tiny, kind, device="cpu", reporter=quiet())
    assert (tmp_path / "again" / "best.safetensors").read_bytes() == first


def test_backbone_weights_are_unchanged(thin: None, trained: Any, quiet: Any, tiny: Recipe, tmp_path: Path) -> None:
    weights = trained.folder / "best.safetensors"
    recipe = tiny.replace(weights=weights.as_posix())
    fit_linear(trained.data, tmp_path / "run", recipe, "logistic", device="cpu", reporter=quiet())
    before, after = load_run(trained.folder).model.backbone, load_run(tmp_path / "run").model.backbone
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())


def test_class_with_one_patient_is_refused(thin: None, quiet: Any, tiny: Recipe, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        for name in ("dark", "light"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(3):
                patient = 7 if name == "dark" else number
                Image.new("L", (20, 20), 40 * number).save(folder / f"patient{patient}_{number}.png")
    with pytest.raises(DatasetError, match=r"train/dark: frames of 1 patient found; expected two or more"):
        fit_linear(tmp_path / "data", tmp_path / "run", tiny, "logistic", device="cpu", reporter=quiet())
    assert not (tmp_path / "run").exists()


def test_occupied_folder_is_refused(thin: None, flat_data: Path, quiet: Any, tiny: Recipe, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(RunError, match="exists and is not empty"):
        fit_linear(flat_data, tmp_path, tiny, "linear-svm", device="cpu", reporter=quiet())


def test_scale_multiplies_weights_and_bias(model: Callable[[int], QuadrantClassifier]) -> None:
    features, labels, _ = draw(1, 2)
    pipeline = linear._fit("logistic", 0.1, None, 0, features, labels)
    assert isinstance(pipeline.steps[-1][1], LogisticRegression)
    plain, scaled = model(2), model(2)
    set_head(plain, LinearProbe(pipeline, 1.0, {}))
    set_head(scaled, LinearProbe(pipeline, 2.5, {}))
    np.testing.assert_allclose(logits_of(scaled, features), 2.5 * logits_of(plain, features), atol=1e-3)


def test_run_json_describes_linear_fit(thin: None, flat_data: Path, quiet: Any, tiny: Recipe, tmp_path: Path) -> None:
    fit_linear(flat_data, tmp_path / "run", tiny, "linear-svm", device="cpu", reporter=quiet())
    facts = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["fit"]
    assert set(facts) == {
        "kind",
        "c",
        "tried",
        "folds",
        "cv_balanced_accuracy",
        "cv_standard_deviation",
        "scale",
        "features",
        "class_weight",
    }
    assert facts["scale"] > 0 and facts["features"] == 64
