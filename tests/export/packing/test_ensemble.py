"""Ensembles as one graph and one bundle: equal answers in each precision, and the manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from echoquad_export.graph.build import build_graph
from echoquad_export.graph.first_conv import integer_first_conv
from echoquad_export.graph.onnx_graph import open_in_memory
from echoquad_export.packing.exporter import export_run
from echoquad_export.precision.fp16 import to_fp16
from echoquad_export.precision.quantize import layers, prepare
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.onnx_header import check_graph
from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import BundleError
from echoquad_runtime.predict.predictor import Predictor
from echoquad_train.data.dataset import read_split
from echoquad_train.evaluation.evaluate import evaluate
from echoquad_train.fitting.cross_validation import fit_folds
from echoquad_train.fitting.fold_splits import FoldSettings
from echoquad_train.fitting.loop import fit
from echoquad_train.networks.ensemble_classifier import EnsembleClassifier
from echoquad_train.networks.torch_engine import TorchEngine
from echoquad_train.recipe import Recipe
from echoquad_train.runs.ensemble_folder import load_trained, write_ensemble

CONTRACT = Contract(("a", "b", "c"), input_size=32, mean=0.4, std=0.22, temperature=1.3)
QUADRANTS = np.random.default_rng(0).integers(0, 256, (7, 1, 32, 32), np.uint8)
Built = tuple[bytes, EnsembleClassifier]
_KNOWN: dict[tuple[str, bool], Built] = {}


@pytest.fixture(params=[("soft", False), ("soft", True), ("hard", True)], ids=["soft", "soft-flip", "hard-flip"])
def built(request: pytest.FixtureRequest, thin_model: Callable[[Contract], Any]) -> Built:
    """Return the graph of an ensemble of two and the ensemble; each is built once."""
    if request.param not in _KNOWN:
        members = [thin_model(CONTRACT), thin_model(CONTRACT)]
        with torch.no_grad():
            for weight in members[1].parameters():
                weight.add_(0.02 * torch.randn_like(weight))
            for member in members:  # balances the classes, so that votes differ
                member.head[-1].weight.mul_(5)
                member.head[-1].bias.sub_(member(torch.from_numpy(QUADRANTS)).mean(dim=0))
        model = EnsembleClassifier(members, [1.0, 1.7], *request.param).eval()
        _KNOWN[request.param] = build_graph(model, CONTRACT), model
    return _KNOWN[request.param]


def run(graph: bytes, quadrants: np.ndarray = QUADRANTS) -> list[np.ndarray]:
    return list(open_in_memory(graph).run(["logits", "probabilities"], {"quadrants": quadrants}))


@pytest.mark.parametrize("count", [1, 7])
def test_ensemble_graph_computes_what_the_training_code_computes(built: Built, count: int) -> None:
    graph, model = built
    assert [port.name for port in check_graph(graph, CONTRACT, "graph").outputs] == ["logits", "probabilities"]
    expected = TorchEngine(model, CONTRACT).infer(QUADRANTS[:count])
    for found, wanted in zip(run(graph, QUADRANTS[:count]), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    if count > 1:
        assert len(set(expected[1].argmax(axis=1))) > 1  # otherwise the comparison proves nothing


def test_ensemble_graph_holds_each_folded_member_once(built: Built) -> None:
    proto = onnx.load_from_string(built[0])
    shapes = [list(item.dims) for item in proto.graph.initializer]
    assert shapes.count([64, 1, 7, 7]) == 2 and [64, 3, 7, 7] not in shapes
    names = [node.output[0] for node in proto.graph.node]
    assert len(set(names)) == len(names)
    assert sum(node.op_type == "Gemm" for node in proto.graph.node) == 2  # the views form one batch


def test_heads_and_vote_of_an_fp16_ensemble_stay_float32(built: Built) -> None:
    half = to_fp16(built[0])
    if built[1].vote == "soft":  # a hard vote is not continuous
        for found, wanted in zip(run(half), run(built[0]), strict=True):
            np.testing.assert_allclose(found, wanted, atol=0.1)
    proto = onnx.load_from_string(half)
    kinds = {item.name: item.data_type for item in proto.graph.initializer}
    heads = [kind for name, kind in kinds.items() if ".head." in name]
    assert len(heads) == 4 and set(heads) == {onnx.TensorProto.FLOAT}
    assert {kind for name, kind in kinds.items() if "layer" in name} == {onnx.TensorProto.FLOAT16}


def test_int8_members_share_the_integer_input_and_keep_float_tails(built: Built) -> None:
    rewritten = integer_first_conv(onnx.load_from_string(built[0]), CONTRACT)
    onnx.checker.check_model(rewritten, full_check=True)
    assert sum(node.op_type == "DequantizeLinear" for node in rewritten.graph.node) == 1
    for found, wanted in zip(run(rewritten.SerializeToString()), run(built[0]), strict=True):
        np.testing.assert_allclose(found, wanted, atol=5e-4)
    quantized = {name for unit in layers(prepare(built[0], CONTRACT)) for name in unit}
    assert {"first_conv", "first_conv.1"} <= quantized
    # The vote is not quantized.
    assert not [name for name in quantized if name.startswith(("Mul", "GlobalAveragePool"))]


# The bundle


class Silent:
    """A reporter that ignores all calls."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def test_ensemble_exports_to_one_bundle_in_each_precision(
    case: Any, thin: None, few_golden: None, tmp_path: Path
) -> None:
    recipe = Recipe.load(str(case.run / "recipe.toml"))
    options: dict[str, Any] = {"device": "cpu", "resume": False, "reporter": Silent()}
    fit(case.data, tmp_path / "Jane-Q", replace(recipe, seed=4), **options)
    ensemble, bundle = tmp_path / "ensemble", tmp_path / "bundle"
    write_ensemble([case.run, tmp_path / "Jane-Q"], ensemble, flip_tta=True)
    exported = export_run(ensemble, bundle, precisions=("fp32", "fp16", "int8"), frame_graph=True)
    assert [parity.passed for parity in exported.parities] == [True] * 3 and exported.verification.passed

    found = load_trained(ensemble)
    split = read_split(case.data, "validation", found.contract.classes)
    runs = [evaluate(Predictor(model), split) for model in (TorchEngine(found.model, found.contract), bundle)]
    for one, other in zip(*(done.predictions for done in runs), strict=True):
        assert (one.label, one.quadrant_labels) == (other.label, other.quadrant_labels)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)

    manifest = Bundle(bundle).manifest
    training = manifest["training"]
    assert (training["kind"], training["vote"], training["views"]) == ("ensemble", "soft", ["as it is", "flipped"])
    assert [member["seed"] for member in training["members"]] == [0, 4]
    assert all({"backbone", "best", "weights_sha256", "recipe"} <= member.keys() for member in training["members"])
    text = json.dumps(manifest) + (bundle / "MODEL_CARD.md").read_text("utf-8")
    assert "Jane-Q" not in text and "members/1" not in text and str(tmp_path) not in text
    card = " ".join((bundle / "MODEL_CARD.md").read_text("utf-8").split())
    assert "2 members" in card and "soft vote" in card and "resnet18" in card and "not stated" not in card
    with pytest.raises(BundleError, match="class activation maps"):
        Predictor(bundle, cam=True)


def test_manifest_of_folds_holds_the_out_of_fold_accuracy(
    case: Any, thin: None, few_golden: None, tmp_path: Path
) -> None:
    recipe = replace(Recipe.load(str(case.run / "recipe.toml")), epochs=1)
    # The number in the file name is the patient: all frames are in one patient's folder.
    settings = FoldSettings(2, r"-(\d)\D*$")
    folded = fit_folds(case.data, tmp_path / "run", recipe, settings, device="cpu", resume=False, reporter=Silent())
    export_run(tmp_path / "run", tmp_path / "bundle")
    metrics = Bundle(tmp_path / "bundle").manifest["metrics"]
    pooled = folded.out_of_fold["pooled"]
    assert metrics["out_of_fold"]["frame_accuracy"]["share"] == pytest.approx(pooled["accuracy"])
    assert metrics["out_of_fold"]["frame_accuracy"]["ci95"] == pooled["intervals"]["accuracy"]["ci95"]
    assert "training" not in metrics and "most members were trained on" in metrics["export"]["source"]
    card = (tmp_path / "bundle" / "MODEL_CARD.md").read_text("utf-8")
    assert "1 of 2" in card
