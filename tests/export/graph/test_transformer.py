"""Transformers: float32 and float16 graphs, and refusal of int8."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from echoquad_export.graph.build import build_graph
from echoquad_export.graph.first_conv import integer_first_conv
from echoquad_export.graph.onnx_graph import open_in_memory
from echoquad_export.precision.calibration_set import CalibrationSet
from echoquad_export.precision.fp16 import to_fp16
from echoquad_export.precision.int8 import build_int8
from echoquad_runtime.bundle.onnx_header import check_graph
from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import ConfigError
from echoquad_train.networks.classifier import QuadrantClassifier

CONTRACT = Contract(("a", "b", "c"), input_size=48, mean=0.4, std=0.3)


def small_transformer(name: str, weights: object = None, image_size: int = 224) -> VisionTransformer:
    return VisionTransformer(image_size, 16, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32)


@pytest.fixture(scope="module")
def model() -> QuadrantClassifier:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "get_model", small_transformer)
        torch.manual_seed(1)
        made = QuadrantClassifier("vit_b_16", CONTRACT)
    for weight in made.parameters():  # the exporter folds zeros and ones away, which would hide errors
        nn.init.normal_(weight, 0, 0.3)
    return made.eval()


@pytest.fixture(scope="module")
def single(model: QuadrantClassifier) -> bytes:
    return build_graph(model, CONTRACT)


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 1, 48, 48), np.uint8)


def logits(graph: bytes, quadrants: np.ndarray) -> np.ndarray:
    return open_in_memory(graph).run(["logits"], {"quadrants": quadrants})[0]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_graph_equals_model_for_any_number_of_quadrants(model: QuadrantClassifier, single: bytes, count: int) -> None:
    check_graph(single, CONTRACT, "it")
    with torch.inference_mode():
        expected = model(torch.from_numpy(noise(count))).numpy()
    np.testing.assert_allclose(logits(single, noise(count)), expected, atol=1e-4)
    assert count == 1 or np.ptp(expected, axis=0).max() > 1e-2


def test_fp16_runs_are_repeatable(single: bytes) -> None:
    half = to_fp16(single)
    check_graph(half, CONTRACT, "it")
    session = open_in_memory(half)  # crashes if a cast precedes a Transpose
    first, _, third = (session.run(["logits"], {"quadrants": noise(count)})[0] for count in (5, 8, 5))
    expected = logits(single, noise(5))
    np.testing.assert_allclose(first, expected, atol=0.05)
    assert np.array_equal(first, third) and np.abs(first - expected).max() > 0


def test_layer_normalisations_stay_in_float32(single: bytes) -> None:
    graph = onnx.load_from_string(to_fp16(single)).graph
    kinds = {item.name: item.data_type for item in graph.initializer}
    read = Counter(
        kinds[name] for node in graph.node if node.op_type == "LayerNormalization" for name in node.input[1:]
    )
    products = Counter(
        kinds[node.input[1]] for node in graph.node if node.op_type == "MatMul" and node.input[1] in kinds
    )
    assert set(read) == {onnx.TensorProto.FLOAT} and set(products) == {onnx.TensorProto.FLOAT16}


def test_integer_first_conv_keeps_the_batch_size(single: bytes) -> None:
    """A transformer reads the batch size from its input to add one class token per quadrant."""
    model = integer_first_conv(onnx.load_from_string(single), CONTRACT)
    assert any("DequantizeLinear" in node.op_type for node in model.graph.node)
    found = logits(model.SerializeToString(), noise(3))
    np.testing.assert_allclose(found, logits(single, noise(3)), atol=1e-4)


def test_int8_raises_config_error_for_a_transformer(single: bytes) -> None:
    calibration = CalibrationSet(noise(4).reshape(1, 4, 48, 48), 0, "0" * 64, 0)
    with pytest.raises(ConfigError, match=r"precision int8: .* 4096 in convolutions"):
        build_int8(single, CONTRACT, calibration, lambda _: pytest.fail("no graph should be measured"))
