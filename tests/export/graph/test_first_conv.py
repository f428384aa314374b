"""The first convolution on integers equals the one on the normalised image."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from echoquad_export.graph.first_conv import integer_first_conv
from echoquad_export.graph.onnx_graph import constants, open_in_memory
from echoquad_runtime.contract import Contract

BLOCKS = ["Reshape", "Transpose", "Reshape", "Transpose", "Reshape"]


def first_layer(
    contract: Contract,
    *,
    filters: int,
    kernel: int,
    stride: int,
    padding: int,
    relu: bool,
    seed: int,
    bias: bool = True,
) -> onnx.ModelProto:
    """Build the beginning of an exported graph: normalisation, a convolution, optionally a ReLU."""
    rng = np.random.default_rng(seed)
    size = contract.input_size
    nodes = [
        helper.make_node("Cast", ["quadrants"], ["cast"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Div", ["cast", "white"], ["unit"]),
        helper.make_node("Sub", ["unit", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["normal"]),
        helper.make_node(
            "Conv",
            ["normal", "weight", *(["bias"] if bias else [])],
            ["features" if relu else "out"],
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[padding] * 4,
        ),
    ]
    if relu:
        nodes.append(helper.make_node("Relu", ["features"], ["out"]))
    constants = {
        "white": 255.0,
        "mean": contract.mean,
        "std": contract.std,
        "weight": rng.normal(0, 0.2, (filters, 1, kernel, kernel)),
        "bias": rng.normal(0, 0.2, filters),
    }
    graph = helper.make_graph(
        nodes,
        "first",
        [helper.make_tensor_value_info("quadrants", onnx.TensorProto.UINT8, ["N", 1, size, size])],
        [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, ["N", filters, "H", "W"])],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(graph: onnx.ModelProto, quadrants: np.ndarray) -> np.ndarray:
    return np.asarray(open_in_memory(graph.SerializeToString()).run(None, {"quadrants": quadrants})[0])


def operators(graph: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in graph.graph.node]


@given(
    kernel=st.sampled_from([3, 5, 7]),
    half=st.integers(6, 18),
    filters=st.integers(1, 5),
    relu=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_convolution_over_blocks_equals_convolution_over_pixels(
    kernel: int, half: int, filters: int, relu: bool, bias: bool, seed: int
) -> None:
    # mean 102/255 is a grey level, so the padded border is exact too
    contract = Contract(("a", "b"), input_size=2 * half, mean=0.4, std=0.21)
    graph = first_layer(
        contract, filters=filters, kernel=kernel, stride=2, padding=kernel // 2, relu=relu, seed=seed, bias=bias
    )
    rewritten = integer_first_conv(graph, contract)
    onnx.checker.check_model(rewritten, full_check=True)
    # OpenVINO computes the convolution in float32 if a Transpose precedes DequantizeLinear.
    assert operators(rewritten) == [*BLOCKS, "DequantizeLinear", "Conv", *(["Relu"] if relu else [])]
    (weight,) = (
        numpy_helper.to_array(item) for item in rewritten.graph.initializer if item.name == "first_conv.weight"
    )
    assert weight.shape == (filters, 4, *[{3: 2, 5: 3, 7: 4}[kernel]] * 2)
    quadrants = np.random.default_rng(seed).integers(0, 256, (2, 1, 2 * half, 2 * half), np.uint8)
    np.testing.assert_allclose(run(rewritten, quadrants), run(graph, quadrants), atol=2e-5)


@pytest.mark.parametrize(
    ("size", "stride", "kernel", "padding"), [(31, 2, 7, 3), (32, 1, 3, 1), (32, 2, 7, 2), (32, 4, 7, 3)]
)
def test_unsuitable_convolutions_keep_their_form_and_begin_with_integers(
    size: int, stride: int, kernel: int, padding: int
) -> None:
    contract = Contract(("a", "b"), input_size=size, mean=0.4, std=0.21)
    graph = first_layer(contract, filters=3, kernel=kernel, stride=stride, padding=padding, relu=True, seed=1)
    rewritten = integer_first_conv(graph, contract)
    assert operators(rewritten) == ["DequantizeLinear", "Conv", "Relu"]
    quadrants = np.random.default_rng(1).integers(0, 256, (2, 1, size, size), np.uint8)
    np.testing.assert_allclose(run(rewritten, quadrants), run(graph, quadrants), atol=2e-5)


def test_fractional_mean_changes_the_border_by_at_most_half_a_level() -> None:
    contract = Contract(("a", "b"), input_size=32, mean=0.5, std=0.5)  # 127.5: padding becomes 128
    graph = first_layer(contract, filters=3, kernel=7, stride=2, padding=3, relu=False, seed=2)
    quadrants = np.random.default_rng(2).integers(0, 256, (2, 1, 32, 32), np.uint8)
    difference = np.abs(run(integer_first_conv(graph, contract), quadrants) - run(graph, quadrants))
    assert difference[:, :, 2:-2, 2:-2].max() < 2e-5
    weight = next(numpy_helper.to_array(item) for item in graph.graph.initializer if item.name == "weight")
    half_a_level = 0.5 / (255 * contract.std)
    assert 1e-4 < difference.max() <= half_a_level * np.abs(weight).sum(axis=(1, 2, 3)).max() + 2e-5


def test_mean_outside_grey_levels_leaves_graph_unchanged() -> None:
    contract = Contract(("a", "b"), input_size=32, mean=0.4, std=0.2)
    graph = first_layer(contract, filters=3, kernel=7, stride=2, padding=3, relu=True, seed=3)
    object.__setattr__(contract, "mean", 1.2)  # bypasses the contract's own check
    assert integer_first_conv(graph, contract) == graph


def test_ensemble_members_share_the_blocks() -> None:
    contract = Contract(("a", "b"), input_size=32, mean=0.4, std=0.21)
    graph = first_layer(contract, filters=3, kernel=7, stride=2, padding=3, relu=False, seed=4)
    nodes = graph.graph.node
    nodes.append(helper.make_node("Conv", [*nodes[-1].input], ["other"], strides=[2, 2], pads=[3] * 4))
    nodes.append(helper.make_node("Conv", ["normal", "weight"], ["odd"], strides=[1, 1], pads=[3] * 4))
    for name in ("other", "odd"):
        graph.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 3, "H", "W"]))
    rewritten = integer_first_conv(graph, contract)
    onnx.checker.check_model(rewritten, full_check=True)
    assert operators(rewritten) == [*BLOCKS, *["DequantizeLinear"] * 2, *["Conv"] * 3]
    quadrants = np.random.default_rng(4).integers(0, 256, (2, 1, 32, 32), np.uint8)
    sessions = (open_in_memory(one.SerializeToString()) for one in (rewritten, graph))
    for found, expected in zip(*(session.run(None, {"quadrants": quadrants}) for session in sessions), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_space_to_depth_false_keeps_the_convolution() -> None:
    contract = Contract(("a", "b"), input_size=32)
    graph = first_layer(contract, filters=3, kernel=7, stride=2, padding=3, relu=True, seed=3)
    assert operators(integer_first_conv(graph, contract, space_to_depth=False)) == ["DequantizeLinear", "Conv", "Relu"]


def test_first_convolution_equals_torch() -> None:
    contract = Contract(("a", "b"), input_size=48, mean=0.4, std=0.3)
    graph = first_layer(contract, filters=4, kernel=7, stride=2, padding=3, relu=True, seed=5)
    values = {name: torch.from_numpy(value.copy()) for name, value in constants(graph.graph).items()}
    quadrants = np.random.default_rng(5).integers(0, 256, (3, 1, 48, 48), np.uint8)
    normal = (torch.from_numpy(quadrants).double() / 255 - 0.4) / 0.3
    expected = torch.relu(torch.nn.functional.conv2d(normal, values["weight"].double(), values["bias"].double(), 2, 3))
    np.testing.assert_allclose(run(integer_first_conv(graph, contract), quadrants), expected.numpy(), atol=2e-5)
