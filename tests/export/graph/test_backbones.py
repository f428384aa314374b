"""Backbones, linear classifiers and distilled students from training to a verified bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from echoquad_export.graph.build import DeployedClassifier, build_graph
from echoquad_export.graph.onnx_graph import open_in_memory
from echoquad_export.packing.exporter import export_run
from echoquad_export.precision.calibration_set import Ranges
from echoquad_export.precision.quantize import activation_tensors, layers, prepare, quantize
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.contract import Contract
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.engine.slot_pool import infer_in_batches
from echoquad_runtime.verify.verify import verify
from echoquad_train.data.dataset import load_quadrants, read_split
from echoquad_train.fitting import linear_probe as linear
from echoquad_train.fitting.linear_probe import LinearKind, LinearProbe, set_head
from echoquad_train.fitting.loop import fit
from echoquad_train.networks.classifier import QuadrantClassifier
from echoquad_train.recipe import Recipe
from echoquad_train.runs.checkpoint import load_run


class Silent:
    """A reporter that ignores all calls."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0"])
def test_graph_of_a_backbone_equals_the_model_in_float_and_int8(name: str) -> None:
    contract = Contract(("a", "b", "c"), input_size=64)
    torch.manual_seed(8)
    model = QuadrantClassifier(name, contract, dropout=0.3).train()
    # Blobs, because noise has equal averages over feature maps.
    blobs = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 255
    quadrants = nn.functional.interpolate(blobs, size=(64, 64), mode="bilinear").byte()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # cumulative mean
    with torch.no_grad():
        for _ in range(5):
            model(quadrants)
    with torch.inference_mode():
        expected = model.eval()(quadrants).numpy()
        deployed = DeployedClassifier(model, contract)(quadrants)[0].numpy()
    np.testing.assert_allclose(deployed, expected, atol=1e-4)
    assert np.ptp(expected, axis=0).min() > 1e-2  # different frames get different logits
    graph = build_graph(model, contract)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for batch in (quadrants, quadrants[:1]):
        logits, probabilities = session.run(["logits", "probabilities"], {"quadrants": batch.numpy()})
        np.testing.assert_allclose(logits, expected[: len(batch)], atol=1e-4)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)

    prepared = prepare(graph, contract)
    units = layers(prepared)
    ranges = Ranges(prepared, quadrants.numpy().reshape(2, 4, 64, 64), activation_tensors(prepared))
    every = [name for unit in units for name in unit]
    errors = []
    for kept in (every, [name for unit in units[: len(units) // 2] for name in unit], []):
        integers = open_in_memory(quantize(prepared, ranges, keep_float=kept))
        errors.append(np.abs(integers.run(None, {"quadrants": quadrants.numpy()})[0] - expected).mean())
    # Float layers differ by half a grey level at the padded border only; integers differ more.
    assert errors[0] < 0.02 * np.ptp(expected) and errors[0] < errors[1] and errors[2] < 0.3 * np.ptp(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet50",
        "mobilenet_v3_small",
        "efficientnet_b0",
        "densenet121",
        "vgg16",
        "alexnet",
        "googlenet",
        "vit_b_16",
    ],
)
def test_backbone_trains_exports_and_verifies(name: str, case: Any, tmp_path: Path) -> None:
    recipe = Recipe.load(str(case.run / "recipe.toml")).replace(
        backbone=name, input_size=64, epochs=3, warmup_epochs=1, trained_layers="layer4", layer3_epoch=3, lr=1e-4
    )
    fitted = fit(case.data, tmp_path / "run", recipe, device="cpu", resume=False, reporter=Silent())
    assert [epoch.phase for epoch in fitted.history] == ["head", "layer4", "layer3"]
    export_run(tmp_path / "run", tmp_path / "bundle", frame_graph=True)
    found = verify(tmp_path / "bundle", device="cpu")
    assert found.passed and found.frame_flips == 0


@pytest.mark.parametrize("kind", ["linear-svm", "logistic"])
def test_graph_of_a_linear_classifier_decides_as_scikit_learn(
    kind: LinearKind, other_case: Any, tmp_path: Path, thin: None, few_golden: None
) -> None:
    """The reference is scikit-learn's pipeline on the features of all quadrants of all splits, with three classes."""
    recipe = load_run(other_case.run).recipe.replace(weights=(other_case.run / "best.safetensors").as_posix())
    fitted: list[LinearProbe] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "set_head", lambda model, chosen: (fitted.append(chosen), set_head(model, chosen)))
        # All frames of this case belong to one patient.
        patch.setattr(linear, "patients_of", lambda frames, _: [frame.name for frame in frames])
        linear.fit_linear(other_case.data, tmp_path / "run", recipe, kind, device="cpu", reporter=Silent())
    export_run(tmp_path / "run", tmp_path / "bundle")
    assert verify(tmp_path / "bundle", device="cpu").passed
    run, engine = load_run(tmp_path / "run"), OnnxEngine(Bundle(tmp_path / "bundle"), device="cpu")
    for split in ("train", "validation"):
        store = load_quadrants(read_split(other_case.data, split, run.contract.classes), run.contract)
        expected = fitted[0].pipeline.predict(linear.quadrant_features(run.model, store).astype(np.float64))
        logits, _ = infer_in_batches(engine, store.quadrants, 4)
        assert np.array_equal(logits.argmax(axis=1), expected) and len(set(expected)) == 3
    manifest = json.loads((tmp_path / "bundle" / "bundle.json").read_text("utf-8"))
    assert manifest["training"]["fit"] == run.info["fit"] and manifest["training"]["fit"]["kind"] == kind


def test_manifest_describes_the_teacher_without_paths(case: Any, tmp_path: Path, thin: None, few_golden: None) -> None:
    recipe = load_run(case.run).recipe.replace(input_size=32, epochs=1)
    fit(case.data, tmp_path / "run", recipe, device="cpu", resume=False, reporter=Silent(), teacher=case.run)
    export_run(tmp_path / "run", tmp_path / "bundle")
    assert verify(tmp_path / "bundle", device="cpu").passed
    text = (tmp_path / "bundle" / "bundle.json").read_text("utf-8")
    training = json.loads(text)["training"]
    assert training["teacher"] == json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["teacher"]
    assert training["teacher"]["input_size"] == 24 and str(case.run.parent) not in text
    untaught = json.loads((case.bundle / "bundle.json").read_text("utf-8"))["training"]
    assert "teacher" not in untaught
