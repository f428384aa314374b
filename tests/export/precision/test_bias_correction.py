"""Bias correction: rounding as in the quantized graph, mean errors as torch computes them, and smaller errors."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from echoquad_export.graph.onnx_graph import open_in_memory
from echoquad_export.precision.bias_correction import correct_biases, mean_rounding_errors, rounded
from echoquad_export.precision.calibration_set import Ranges
from echoquad_export.precision.quantize import activation_tensors, biased_convolutions, prepare, quantize
from echoquad_runtime.contract import Contract

CONTRACT = Contract(("a", "b"), input_size=16, mean=0.4, std=0.2)
DARK = np.random.default_rng(1).integers(0, 60, (6, 4, 16, 16), np.uint8)
"""Frames without bright pixels: the errors of the first convolution do not average out."""


def network(*, groups: int, bias: bool = True) -> bytes:
    """Build a graph of three convolutions: 8 filters, then 3 x 3 with `groups` and TensorFlow's padding, then 1 x 1."""
    rng = np.random.default_rng(2)
    values = {
        "white": np.float32(255),
        "mean": np.float32(CONTRACT.mean),
        "std": np.float32(CONTRACT.std),
        "zero": np.float32(0),
        "six": np.float32(6),
        "stem.weight": rng.normal(0, 0.3, (8, 1, 3, 3)),
        "depthwise.weight": rng.normal(0, 0.4, (8, 8 // groups, 3, 3)),
        "point.weight": rng.normal(0, 0.4, (4, 8, 1, 1)),
        "bias": rng.normal(0, 0.3, 8),
        "linear.weight": rng.normal(0, 1, (2, 4)),
        "linear.bias": np.zeros(2),
    }
    shared = ["bias"] if bias else []  # by two convolutions
    padded = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}
    nodes = [
        helper.make_node("Cast", ["quadrants"], ["cast"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Div", ["cast", "white"], ["unit"]),
        helper.make_node("Sub", ["unit", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["normal"]),
        helper.make_node("Conv", ["normal", "stem.weight", *shared], ["a"], **padded),
        helper.make_node("Clip", ["a", "zero", "six"], ["b"]),
        helper.make_node("Conv", ["b", "depthwise.weight", *shared], ["c"], group=groups, **padded),
        helper.make_node("Clip", ["c", "zero", "six"], ["d"]),
        helper.make_node("Conv", ["d", "point.weight"], ["e"], kernel_shape=[1, 1]),
        helper.make_node("GlobalAveragePool", ["e"], ["f"]),
        helper.make_node("Flatten", ["f"], ["g"]),
        helper.make_node("Gemm", ["g", "linear.weight", "linear.bias"], ["logits"], transB=1),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    outputs = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 2]) for name in ("logits", "probabilities")
    ]
    image = helper.make_tensor_value_info("quadrants", onnx.TensorProto.UINT8, ["N", 1, 16, 16])
    constants = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "network", [image], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def run(graph: bytes, names: list[str]) -> list[np.ndarray]:
    return list(open_in_memory(graph).run(names, {"quadrants": DARK.reshape(-1, 1, 16, 16)}))


@pytest.fixture
def model() -> onnx.ModelProto:
    return prepare(network(groups=8), CONTRACT)


def test_mean_rounding_errors_equal_those_that_torch_computes(model: onnx.ModelProto) -> None:
    found = mean_rounding_errors(model, biased_convolutions(model), DARK)
    assert list(found) == ["first_conv", "depthwise", "point"]
    values = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    for name in ("b", "d"):
        probe.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    b, d = (torch.from_numpy(value.copy()).double() for value in run(probe.SerializeToString(), ["b", "d"]))

    def error(name: str) -> torch.Tensor:
        return torch.from_numpy(rounded(values[f"{name}.weight"]) - values[f"{name}.weight"])

    padded = torch.nn.functional.pad(b, (0, 1, 0, 1))
    expected = torch.nn.functional.conv2d(padded, error("depthwise"), stride=2, groups=8).mean(dim=(0, 2, 3))
    np.testing.assert_allclose(found["depthwise"], expected.numpy(), rtol=1e-3, atol=1e-7)
    expected = torch.nn.functional.conv2d(d, error("point")).mean(dim=(0, 2, 3))
    np.testing.assert_allclose(found["point"], expected.numpy(), rtol=1e-3, atol=1e-7)
    assert min(np.abs(value).max() for value in found.values()) > 1e-4  # otherwise this proves nothing


def test_rounded_weights_are_those_of_the_quantized_graph(model: onnx.ModelProto) -> None:
    graph = onnx.load_from_string(quantize(model, Ranges(model, DARK, activation_tensors(model))))
    held = {item.name: numpy_helper.to_array(item) for item in graph.graph.initializer}
    values = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    sources = {node.output[0]: node.input for node in graph.graph.node if node.op_type == "DequantizeLinear"}
    convolutions = [node for node in graph.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 3
    for node in convolutions:
        integers, scale = (held[name] for name in sources[node.input[1]][:2])
        dequantized = integers.astype(np.float64) * scale.reshape(-1, 1, 1, 1)
        np.testing.assert_allclose(dequantized, rounded(values[f"{node.name}.weight"]), rtol=1e-5, atol=1e-9)


def test_zero_filter_stays_zero() -> None:
    weight = np.zeros((2, 1, 3, 3), np.float32)
    weight[1, 0, 1, 1] = 0.25
    assert np.array_equal(rounded(weight), weight)


def test_corrected_graph_errs_less_on_average_and_as_it_did_where_layers_stay_in_float(model: onnx.ModelProto) -> None:
    ranges = Ranges(model, DARK, activation_tensors(model))
    errors = mean_rounding_errors(model, biased_convolutions(model), DARK)
    expected = run(model.SerializeToString(), ["logits"])[0]

    def offset(**options: object) -> float:
        graph = quantize(model, ranges, **options)  # type: ignore[arg-type]
        return float(np.abs((run(graph, ["logits"])[0] - expected).mean(axis=0)).max())

    assert offset(errors=errors) < 0.5 * offset()
    kept = list(errors)
    assert quantize(model, ranges, errors=errors, keep_float=kept) == quantize(model, ranges, keep_float=kept)


def test_convolutions_without_bias_get_one_and_a_shared_bias_is_copied(model: onnx.ModelProto) -> None:
    errors = {"depthwise": np.arange(8.0), "point": np.arange(4.0)}
    corrected = correct_biases(model, errors)
    values = {item.name: numpy_helper.to_array(item) for item in corrected.graph.initializer}
    biases = {node.name: values[node.input[2]] for node in corrected.graph.node if node.op_type == "Conv"}
    before = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    np.testing.assert_allclose(biases["depthwise"], before["bias"] - np.arange(8), rtol=1e-6)
    assert np.array_equal(biases["point"], -np.arange(4)) and "bias" not in values
    assert np.array_equal(biases["first_conv"], before["first_conv.bias"])


def test_network_without_depthwise_convolutions_is_not_corrected() -> None:
    model = prepare(network(groups=1), CONTRACT)
    assert biased_convolutions(model) == [] and mean_rounding_errors(model, [], DARK) == {}
    assert correct_biases(model, {}) == model
