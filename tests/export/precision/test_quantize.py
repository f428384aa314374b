"""Static quantization: integer kernels, accuracy, float layers, and unchanged inputs, outputs and metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from echoquad_export.graph.onnx_graph import open_in_memory
from echoquad_export.precision.calibration_set import Ranges
from echoquad_export.precision.quantize import activation_tensors, layers, prepare, quantize
from echoquad_runtime.contract import Contract
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime

CONTRACT = Contract(("a", "b", "c"), input_size=64, mean=0.31, std=0.22, temperature=1.7)


@pytest.fixture
def single(thin_graph: Callable[[Contract], bytes]) -> bytes:
    return thin_graph(CONTRACT)


@pytest.fixture
def quadrants() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (10, 4, 64, 64), np.uint8)


def quantized(single: bytes, quadrants: np.ndarray, **options: Any) -> bytes:
    model = prepare(single, CONTRACT)
    return quantize(model, Ranges(model, quadrants, activation_tensors(model)), **options)


def answers(graph: bytes, quadrants: np.ndarray) -> list[np.ndarray]:
    return list(open_in_memory(graph).run(None, {"quadrants": quadrants.reshape(-1, 1, 64, 64)}))


def test_quantized_graph_stays_close_to_float_logits(single: bytes, quadrants: np.ndarray) -> None:
    graph = quantized(single, quadrants)
    other = np.random.default_rng(2).integers(0, 256, (6, 4, 64, 64), np.uint8)
    expected, found = answers(single, other), answers(graph, other)
    spread = np.ptp(expected[0], axis=0).min()
    assert spread > 0.05  # otherwise the comparison below proves nothing
    assert 0 < np.abs(expected[0] - found[0]).max() < 0.2 * spread
    np.testing.assert_allclose(found[1].sum(axis=1), 1, atol=1e-6)


def test_onnxruntime_fuses_all_layers_before_the_float_tail_into_integer_kernels(
    single: bytes, quadrants: np.ndarray, tmp_path: Path
) -> None:
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(quantized(single, quadrants), options, providers=["CPUExecutionProvider"])
    optimised = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    convolutions = sum(node.op_type == "Conv" for node in onnx.load_from_string(single).graph.node)
    assert optimised.pop("QLinearConv") == convolutions - 1  # without that of the class activation maps
    assert optimised.pop("QLinearAdd") == 4
    assert optimised.pop("NhwcMaxPool") == 1
    # For the blocks of pixels and the channels-last layout.
    assert optimised.pop("Reshape") == 4 and optimised.pop("Transpose") <= 4
    for name in ("ReorderInput", "ReorderOutput"):  # layout of the maps' convolution on some processors
        optimised.pop(name, None)
    # The last feature map, read by the maps and the mean.
    assert optimised.pop("DequantizeLinear") <= 2
    assert optimised == {"GlobalAveragePool": 1, "Conv": 1, "Gemm": 1, "Div": 1, "Softmax": 1}


def test_activations_are_uint8_and_weights_int8_per_channel(single: bytes, quadrants: np.ndarray) -> None:
    model = onnx.load_from_string(quantized(single, quadrants))
    constants = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            assert constants[node.input[2]].dtype == np.uint8 and constants[node.input[1]].shape == ()
        if node.op_type == "Conv" and "cam" not in node.output:
            image, weight, bias = node.input
            sources = {other.output[0]: other for other in model.graph.node if other.op_type == "DequantizeLinear"}
            integers, scale, zero = (constants[name] for name in sources[weight].input)
            assert integers.dtype == zero.dtype == np.int8 and not zero.any()
            assert scale.shape == (len(integers),) and np.abs(integers).max() == 127
            held, bias_scale, _ = (constants[name] for name in sources[bias].input)
            assert held.dtype == np.int32
            np.testing.assert_allclose(bias_scale, scale * constants[sources[image].input[1]], rtol=1e-6)


def test_batch_gives_the_same_logits_as_single_frames(single: bytes, quadrants: np.ndarray) -> None:
    graph = quantized(single, quadrants)
    together = answers(graph, quadrants)[0]
    alone = np.concatenate([answers(graph, frame[None])[0] for frame in quadrants])
    assert np.array_equal(together, alone)


def test_quantize_keeps_inputs_outputs_and_metadata_and_is_deterministic(single: bytes, quadrants: np.ndarray) -> None:
    before, after = onnx.load_from_string(single), onnx.load_from_string(quantized(single, quadrants))
    assert after.metadata_props == before.metadata_props and after.opset_import == before.opset_import
    assert after.graph.input == before.graph.input and after.graph.output == before.graph.output
    assert {node.domain for node in after.graph.node} == {""}
    assert len(after.SerializeToString()) < 0.5 * len(single)  # 0.27 for layers of normal width
    assert quantized(single, quadrants) == quantized(single, quadrants)


def test_keep_float_leaves_the_named_layers_unquantized(single: bytes, quadrants: np.ndarray) -> None:
    model = prepare(single, CONTRACT)
    units = layers(model)
    assert units[0] == ("first_conv",) and units[1][0] == "layer1.0.conv1" and len(units) == 13
    everything = [name for unit in units for name in unit]
    assert len(set(everything)) == len(everything)
    none = quantized(single, quadrants, keep_float=everything)
    assert "QuantizeLinear" not in {node.op_type for node in onnx.load_from_string(none).graph.node}
    np.testing.assert_allclose(answers(none, quadrants)[0], answers(model.SerializeToString(), quadrants)[0], atol=1e-5)

    kept = onnx.load_from_string(quantized(single, quadrants, keep_float=["layer1.0.conv1"]))
    weights = {node.name: node.input[1] for node in kept.graph.node if node.op_type == "Conv"}
    assert weights.pop("layer1.0.conv1") == "backbone.layer1.0.conv1.weight"
    assert "cam.weight" in weights.values()
    weights = {name: weight for name, weight in weights.items() if weight != "cam.weight"}
    initializers = {item.name for item in kept.graph.initializer}
    assert initializers.isdisjoint(weights.values())  # a DequantizeLinear computes them


def test_error_shrinks_with_more_float_layers(single: bytes, quadrants: np.ndarray) -> None:
    expected = answers(single, quadrants)[0]
    everything = [name for unit in layers(prepare(single, CONTRACT)) for name in unit]
    errors = [
        float(np.abs(answers(quantized(single, quadrants, keep_float=kept), quadrants)[0] - expected).mean())
        for kept in ((), everything[len(everything) // 2 :], everything)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_relu6_becomes_part_of_the_integer_operator_before_it(single: bytes, quadrants: np.ndarray) -> None:
    model = onnx.load_from_string(single)
    for node in model.graph.node:
        if node.op_type == "Relu":
            node.op_type = "Clip"
            node.input.extend(["zero", "six"])
    for name, value in (("zero", 0), ("six", 6)):
        model.graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
    changed = model.SerializeToString()
    graph = quantized(changed, quadrants)
    assert "Clip" not in {node.op_type for node in onnx.load_from_string(graph).graph.node}
    expected, found = (answers(one, quadrants)[0] for one in (changed, graph))
    assert np.abs(expected - found).max() < 0.2 * np.ptp(expected, axis=0).min()


def test_filter_with_tiny_weights_keeps_its_bias(single: bytes, quadrants: np.ndarray) -> None:
    model = onnx.load_from_string(single)
    convolution = next(node for node in model.graph.node if node.input[1:2] == ["backbone.layer1.0.conv2.weight"])
    for item in model.graph.initializer:
        value = numpy_helper.to_array(item).copy()
        if item.name == convolution.input[1]:
            value[0] = 1e-30
        elif item.name == convolution.input[2]:
            value[0] = 3.0
        else:
            continue
        item.CopyFrom(numpy_helper.from_array(value, item.name))
    changed = model.SerializeToString()
    expected, found = (answers(graph, quadrants)[0] for graph in (changed, quantized(changed, quadrants)))
    assert np.abs(expected - found).max() < 0.2 * np.ptp(expected, axis=0).min()
