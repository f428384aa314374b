"""A narrow EfficientNet-Lite of timm: TensorFlow's padding, depthwise convolutions and ReLU6, from run to bundle."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from echoquad_export.graph.activation_map import check_activation_maps
from echoquad_export.graph.build import build_graph
from echoquad_export.graph.onnx_graph import open_in_memory
from echoquad_export.packing.exporter import export_run
from echoquad_export.precision.bias_correction import mean_rounding_errors
from echoquad_export.precision.calibration_set import Ranges
from echoquad_export.precision.quantize import activation_tensors, biased_convolutions, prepare, quantize
from echoquad_runtime.contract import Contract
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime
from echoquad_runtime.verify.verify import verify
from echoquad_train.fitting.loop import fit
from echoquad_train.networks import timm_backbones
from echoquad_train.networks.classifier import QuadrantClassifier
from echoquad_train.recipe import Recipe

pytest.importorskip("timm")

NAME = "timm:narrow_lite"
CONVOLUTIONS = 19
SIZE = 64


class Silent:
    """A reporter that ignores all calls."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow the EfficientNet-Lite that timm builds: few channels and blocks, two of them with a residual."""
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    def create(name: str, size: int | None, classes: int) -> nn.Module:
        assert name == NAME
        stages = ["ds_r1_k3_s1_e1_c8", "ir_r2_k3_s2_e3_c12", "ir_r1_k5_s2_e3_c16", "ir_r1_k3_s2_e3_c24"]
        network = EfficientNet(
            decode_arch_def([[stage] for stage in stages] + [["ir_r1_k5_s2_e2_c24"]]),
            num_classes=classes,
            num_features=48,
            stem_size=8,
            fix_stem=True,
            pad_type="same",
            act_layer=nn.ReLU6,
        )
        network.pretrained_cfg = {"classifier": "classifier"}
        return network

    monkeypatch.setattr(timm_backbones, "_create", create)
    monkeypatch.setattr(timm_backbones, "_require_known", lambda name: None)


def blobs(count: int, seed: int) -> torch.Tensor:
    """Return smooth images uint8 [count, 1, SIZE, SIZE]; noise has equal averages over feature maps."""
    coarse = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) * 255
    return nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear").byte()


@pytest.fixture
def model(narrow: None) -> Callable[[Contract], QuadrantClassifier]:
    def make(contract: Contract) -> QuadrantClassifier:
        torch.manual_seed(4)
        model = QuadrantClassifier(NAME, contract).train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # cumulative mean
        with torch.no_grad():
            for seed in range(4):
                model(blobs(16, seed))
        return model.eval()

    return make


def test_lite_graph_equals_the_model_and_is_all_integers_in_int8(
    model: Callable[[Contract], QuadrantClassifier], tmp_path: Path
) -> None:
    contract = Contract(("a", "b", "c"), input_size=SIZE)
    trained, quadrants = model(contract), blobs(8, 9)
    with torch.inference_mode():
        expected = trained(quadrants).numpy()
    graph = build_graph(trained, contract)
    session = open_in_memory(graph)
    for batch in (quadrants, quadrants[:1]):
        logits = session.run(["logits"], {"quadrants": batch.numpy()})[0]
        np.testing.assert_allclose(logits, expected[: len(batch)], atol=1e-4)
    assert np.ptp(expected, axis=0).min() > 1e-2  # different quadrants get different logits
    operators = Counter(node.op_type for node in onnx.load_from_string(graph).graph.node)
    assert operators["Conv"] == CONVOLUTIONS + 1 and operators["Clip"] > 8 and operators["Add"] == 2
    assert operators["Pad"] == 0  # TensorFlow's padding is part of the convolutions

    calibration = blobs(32, 5).numpy().reshape(8, 4, SIZE, SIZE)
    prepared = prepare(graph, contract)
    errors = mean_rounding_errors(prepared, biased_convolutions(prepared), calibration)
    assert len(errors) == CONVOLUTIONS
    integers = quantize(prepared, Ranges(prepared, calibration, activation_tensors(prepared)), errors=errors)
    found = open_in_memory(integers).run(["logits"], {"quadrants": quadrants.numpy()})[0]
    assert 0 < np.abs(found - expected).mean() < 0.1 * np.ptp(expected)
    frames = quadrants.numpy().reshape(2, 4, SIZE, SIZE)
    assert check_activation_maps(graph, frames) and check_activation_maps(integers, frames)

    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(integers, options, providers=["CPUExecutionProvider"])
    optimised = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    # No Clip, and no pair of Q and DQ, is left between integer operators.
    assert optimised["QLinearConv"] == CONVOLUTIONS and optimised["QLinearAdd"] == 2
    assert optimised["Clip"] == optimised["QuantizeLinear"] == 0 and optimised["DequantizeLinear"] <= 2
    assert optimised["Conv"] == 1  # of the class activation maps


@pytest.mark.slow
def test_lite_trains_exports_and_verifies(narrow: None, case: Any, tmp_path: Path, few_golden: None) -> None:
    recipe = Recipe.load(str(case.run / "recipe.toml")).replace(
        backbone=NAME, input_size=SIZE, epochs=2, warmup_epochs=1, trained_layers="layer4", layer3_epoch=2, lr=1e-3
    )
    fit(case.data, tmp_path / "run", recipe, device="cpu", resume=False, reporter=Silent())
    export_run(tmp_path / "run", tmp_path / "bundle", precisions=("fp32", "fp16"), frame_graph=True)
    for precision in ("fp32", "fp16"):
        found = verify(tmp_path / "bundle", device="cpu", precision=precision)
        assert found.passed and found.frame_flips == 0
    manifest = json.loads((tmp_path / "bundle" / "bundle.json").read_text("utf-8"))
    assert manifest["typicality"]["thresholds"].keys() == {"fp32", "fp16"}
    assert all("cam" in entry for entry in manifest["precisions"].values())
