"""Conversion to float16: accuracy, which weights are converted, unchanged inputs, outputs and metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from echoquad_export.graph.onnx_graph import open_in_memory
from echoquad_export.precision.fp16 import to_fp16
from echoquad_runtime.contract import Contract

CONTRACT = Contract(("a", "b", "c"), input_size=40, mean=0.31, std=0.22, temperature=1.7)


@pytest.fixture
def single(thin_graph: Callable[[Contract], bytes]) -> bytes:
    return thin_graph(CONTRACT)


def test_fp16_graph_differs_by_rounding_only(single: bytes) -> None:
    half = to_fp16(single)
    quadrants = np.random.default_rng(0).integers(0, 256, (12, 1, 40, 40), np.uint8)
    expected, found = (open_in_memory(graph).run(None, {"quadrants": quadrants}) for graph in (single, half))
    for a, b in zip(expected, found, strict=True):
        assert b.dtype == np.float32
        np.testing.assert_allclose(b, a, atol=0.02)
    assert np.abs(expected[0] - found[0]).max() > 0  # otherwise nothing was converted


def test_weights_are_float16_and_head_stays_float32(single: bytes) -> None:
    half = onnx.load_from_string(to_fp16(single))
    kinds = Counter(item.data_type for item in half.graph.initializer if "conv" in item.name or "layer" in item.name)
    assert set(kinds) == {onnx.TensorProto.FLOAT16}
    head = [item for item in half.graph.initializer if item.name.startswith("head.")]
    assert head and all(item.data_type == onnx.TensorProto.FLOAT for item in head)
    casts = [node for node in half.graph.node if node.op_type == "Cast"]
    assert len(casts) == 3  # grey levels to float32, then to float16, then back to float32
    assert len(half.SerializeToString()) < 0.55 * len(single)


def test_to_fp16_keeps_inputs_outputs_and_metadata_and_is_deterministic(single: bytes) -> None:
    before, after = onnx.load_from_string(single), onnx.load_from_string(to_fp16(single))
    assert after.metadata_props == before.metadata_props and after.opset_import == before.opset_import
    assert after.graph.input == before.graph.input and after.graph.output == before.graph.output
    assert (after.ir_version, after.producer_name) == (before.ir_version, "echoquad")
    assert to_fp16(single) == to_fp16(single)


def test_weights_beyond_float16_range_are_clipped(single: bytes) -> None:
    model = onnx.load_from_string(single)
    item = next(item for item in model.graph.initializer if item.name.endswith("conv1.weight"))
    value = numpy_helper.to_array(item).copy()
    value.flat[0], value.flat[1] = 1e6, -1e6
    item.CopyFrom(numpy_helper.from_array(value, item.name))
    half = onnx.load_from_string(to_fp16(model.SerializeToString()))
    found = next(numpy_helper.to_array(other) for other in half.graph.initializer if other.name == f"{item.name}.half")
    assert np.isfinite(found).all() and found.flat[0] == 65504 and found.flat[1] == -65504
