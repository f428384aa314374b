"""Helpers to read and edit ONNX graphs, and to run a graph that is in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from echoquad_runtime.devices.session_factory import open_session

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["attributes", "constants", "float_tensors", "is_spatial_mean", "open_in_memory", "replace_nodes"]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes by name."""
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def constants(graph: onnx.GraphProto) -> dict[str, npt.NDArray[Any]]:
    """Return the graph's initializers by name."""
    return {item.name: numpy_helper.to_array(item) for item in graph.initializer}


def float_tensors(model: onnx.ModelProto) -> set[str]:
    """Return the names of the float32 tensors that nodes compute, without the graph's outputs."""
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    return {item.name for item in inferred if item.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}


def is_spatial_mean(node: onnx.NodeProto, values: dict[str, npt.NDArray[Any]]) -> bool:
    """Return whether a node is a ReduceMean over height and width of [N, F, H, W]; `values` are the `constants`."""
    if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in values:
        return False
    return {int(axis) % 4 for axis in values[node.input[1]]} == {2, 3}


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Replace all nodes of a graph; remove the initializers that no node reads, and the inferred shapes."""
    chosen = list(nodes)
    used = {name for node in chosen for name in node.input}
    initializers = [item for item in graph.initializer if item.name in used]
    for field in (graph.node, graph.initializer, graph.value_info):
        del field[:]
    graph.node.extend(chosen)
    graph.initializer.extend(initializers)


def open_in_memory(graph: bytes) -> onnxruntime.InferenceSession:
    """Open an inference session for the bytes of an ONNX file, on the CPU, as the runtime does."""
    return open_session(graph, device="cpu").session
