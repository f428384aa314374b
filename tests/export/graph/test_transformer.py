"""Transformers: their graph in float32 and float16, and why there is none of integers."""

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
from echoquad_export.graph.first_conv import integer_stem
from echoquad_export.graph.memory_session import open_in_memory
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
    for weight in made.parameters():  # zeros and ones would be left out of the graph, and hide what goes wrong there
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
def test_the_graph_is_the_model_for_any_number_of_quadrants(
    model: QuadrantClassifier, single: bytes, count: int
) -> None:
    check_graph(single, CONTRACT, "it")
    with torch.inference_mode():
        expected = model(torch.from_numpy(noise(count))).numpy()
    np.testing.assert_allclose(logits(single, noise(count)), expected, atol=1e-4)
    assert count == 1 or np.ptp(expected, axis=0).max() > 1e-2


def test_in_half_precision_every_run_gives_the_same(single: bytes) -> None:
    half = to_fp16(single)
    check_graph(half, CONTRACT, "it")
    session = open_in_memory(half)  # which crashes where a cast stands before a transposition
    first, _, third = (session.run(["logits"], {"quadrants": noise(count)})[0] for count in (5, 8, 5))
    expected = logits(single, noise(5))
    np.testing.assert_allclose(first, expected, atol=0.05)
    assert np.array_equal(first, third) and np.abs(first - expected).max() > 0


def test_layer_normalisations_stay_in_single_precision(single: bytes) -> None:
    graph = onnx.load_from_string(to_fp16(single)).graph
    kinds = {item.name: item.data_type for item in graph.initializer}
    read = Counter(
        kinds[name] for node in graph.node if node.op_type == "LayerNormalization" for name in node.input[1:]
    )
    products = Counter(
        kinds[node.input[1]] for node in graph.node if node.op_type == "MatMul" and node.input[1] in kinds
    )
    assert set(read) == {onnx.TensorProto.FLOAT} and set(products) == {onnx.TensorProto.FLOAT16}


def test_the_integer_stem_keeps_the_number_of_quadrants(single: bytes) -> None:
    """A transformer reads it off its input, before its first layer, to lay a class token beside each."""
    model = integer_stem(onnx.load_from_string(single), CONTRACT)
    assert any("DequantizeLinear" in node.op_type for node in model.graph.node)
    found = logits(model.SerializeToString(), noise(3))
    np.testing.assert_allclose(found, logits(single, noise(3)), atol=1e-4)


def test_integers_are_refused(single: bytes) -> None:
    calibration = CalibrationSet(noise(4).reshape(1, 4, 48, 48), 0, "0" * 64, 0)
    with pytest.raises(
        ConfigError, match="weights in matrix products found, 4096 in convolutions; expected a network of"
    ):
        build_int8(single, CONTRACT, calibration, judge=lambda _: pytest.fail("it was not to be judged"))
