"""Class activation maps: where in a quadrant the evidence for a class lies, as a further output of the graph.

If a network ends in the mean over its last feature map and one linear layer, the two commute. The linear layer applied
to each position gives one map per class, and the mean of a map plus the layer's bias is the logit of that class. So the
map is exact, not an approximation.

B. Zhou et al., "Learning Deep Features for Discriminative Localization", arXiv:1512.04150.

The pooling and everything after it stay in float32 in every precision: this costs next to nothing and keeps the
equality.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from echoquad_export.graph.onnx_graph import attributes, constants, is_spatial_mean, open_in_memory
from echoquad_export.graph.typicality import typicality_branch
from echoquad_runtime.bundle.onnx_header import CAM, INPUT, OUTPUTS
from echoquad_runtime.errors import ParityError

__all__ = ["CAM_TOLERANCE", "add_activation_maps", "check_activation_maps", "last_pooling"]

CAM_TOLERANCE: Final = 1e-3
"""Allowed difference of a logit: float32 rounding over a thousand terms stays a hundred times below it."""

_POOLINGS: Final = ("ReduceMean", "GlobalAveragePool", "AveragePool")
_TRANSPARENT: Final = ("Flatten", "Reshape", "Squeeze", "Identity", "Dropout")
"""Operators allowed between the pooling and the linear layer: they change no value."""


def last_pooling(graph: onnx.GraphProto, output: str = OUTPUTS[0]) -> onnx.NodeProto | None:
    """Return the mean over the last feature map, or None if anything but the head and the typicality reads it.

    `output` is the tensor that the linear layer computes: the logits, or those of one member of an ensemble.
    """
    found = _pooling_and_head(graph, output)
    return found[0] if found else None


def add_activation_maps(graph: onnx.GraphProto) -> bool:
    """Add the output `CAM`, float32 [N, C, h, w], to an exported float32 graph; return whether its end allows that."""
    found = _pooling_and_head(graph)
    if found is None:
        return False
    pooling, head = found
    sides = _sides(graph, pooling.input[0])
    if sides is None:
        return False
    weight = next(numpy_helper.to_array(item) for item in graph.initializer if item.name == head.input[1])
    kernel = weight if attributes(head).get("transB") else weight.T
    graph.initializer.append(numpy_helper.from_array(kernel[:, :, None, None].copy(), f"{CAM}.weight"))
    # After the pooling, so that the pooling alone marks the beginning of the float tail.
    graph.node.insert(
        list(graph.node).index(pooling) + 1,
        helper.make_node("Conv", [pooling.input[0], f"{CAM}.weight"], [CAM], name=f"{CAM}.Conv"),
    )
    batch = graph.output[0].type.tensor_type.shape.dim[0].dim_param
    shape = [batch, len(kernel), *sides]
    graph.output.append(helper.make_tensor_value_info(CAM, onnx.TensorProto.FLOAT, shape))
    return True


def check_activation_maps(graph: bytes, quadrants: npt.NDArray[np.uint8]) -> dict[str, Any] | None:
    """Compare a graph's class activation maps with its logits.

    Parameters
    ----------
    graph
        An ONNX file of any precision.
    quadrants
        uint8 [F, 4, S, S], from real frames.

    Returns
    -------
    dict or None
        The manifest's entry: the maps' height and width, and the largest difference between a map's mean plus the
        head's bias and its logit. None if the graph has no such output.

    Raises
    ------
    ParityError
        If the difference exceeds `CAM_TOLERANCE`: the maps would not show what the decision is based on.
    """
    model = onnx.load_from_string(graph)
    if CAM not in [output.name for output in model.graph.output]:
        return None
    head = next(node for node in model.graph.node if OUTPUTS[0] in node.output)
    # The exporter omits a bias of zeros.
    bias = next((numpy_helper.to_array(it) for it in model.graph.initializer if it.name in head.input[2:]), np.zeros(1))
    session, largest = open_in_memory(graph), 0.0
    for frame in quadrants:
        logits, maps = session.run([OUTPUTS[0], CAM], {INPUT: frame[:, None]})
        largest = max(largest, float(np.abs(maps.mean(axis=(2, 3)) + bias - logits).max()))
    if not largest <= CAM_TOLERANCE:
        raise ParityError(
            f"class activation maps: a map's mean plus the bias differs from its logit by {largest:.3g}; expected at "
            f"most {CAM_TOLERANCE:g}; export another precision, and report this network"
        )
    return {"sides": list(maps.shape[2:]), "max_abs_difference": largest}


def _pooling_and_head(graph: onnx.GraphProto, output: str = OUTPUTS[0]) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
    """Return the last pooling and the linear layer that computes `output`, or None if the graph does not end so."""
    producers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    typicality = typicality_branch(graph)  # it does not change the logits
    for node in graph.node:
        for name in node.input if typicality.isdisjoint(node.output) else ():
            readers.setdefault(name, []).append(node)
    head = producers.get(output)
    if head is None or head.op_type != "Gemm" or head.input[1] not in {item.name for item in graph.initializer}:
        return None
    node = producers.get(head.input[0])
    while node is not None and node.op_type in _TRANSPARENT and len(readers[node.output[0]]) == 1:
        node = producers.get(node.input[0])
    if node is None or node.op_type not in _POOLINGS or len(readers[node.output[0]]) != 1:
        return None
    return (node, head) if _is_global(graph, node) else None


def _is_global(graph: onnx.GraphProto, node: onnx.NodeProto) -> bool:
    """Return whether a pooling covers the whole feature map."""
    if node.op_type == "AveragePool":
        found = attributes(node)
        return list(found.get("kernel_shape", ())) == _sides(graph, node.input[0]) and not any(found.get("pads", ()))
    return node.op_type == "GlobalAveragePool" or is_spatial_mean(node, constants(graph))


def _sides(graph: onnx.GraphProto, name: str) -> list[int] | None:
    """Return height and width of a feature map [N, F, h, w] from the exporter's shapes, or None if unknown."""
    for item in graph.value_info:
        if item.name == name:
            dimensions = item.type.tensor_type.shape.dim
            sides = [dimension.dim_value for dimension in dimensions[2:]]
            return sides if len(dimensions) == 4 and all(sides) else None
    return None
