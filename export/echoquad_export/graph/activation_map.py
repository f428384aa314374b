"""Class activation maps: where in a quadrant the evidence lies, as one more output of the graph.

Where a network ends in the mean over its last feature map and one linear layer, the two can change places: the layer
applied at every place gives a map for each class, and its mean, plus the layer's bias, is the class's logit.
So the map is no approximation of what the network saw. B. Zhou et al., "Learning Deep Features for Discriminative
Localization", arXiv:1512.04150.

The pooling and all behind it stay in float32 in every precision: they cost next to nothing, and the equality holds.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from echoquad_export.graph.memory_session import open_in_memory
from echoquad_runtime.bundle.onnx_header import CAM, INPUT, OUTPUTS
from echoquad_runtime.errors import ParityError

__all__ = ["CAM_TOLERANCE", "add_cam", "check_cam", "last_pooling"]

CAM_TOLERANCE: Final = 1e-3
"""Of a logit: float32's rounding over some thousand terms stays a hundred times below it."""

_POOLINGS: Final = ("ReduceMean", "GlobalAveragePool", "AveragePool")
_PASSED: Final = ("Flatten", "Reshape", "Squeeze", "Identity", "Dropout")
"""What may stand between the pooling and the linear layer: nothing that changes a value."""


def last_pooling(graph: onnx.GraphProto, answer: str = OUTPUTS[0]) -> onnx.NodeProto | None:
    """Find the mean over the last feature map, where the head's linear layer follows it and nothing else does.

    `answer` is what that layer gives: the logits, or in an ensemble a member's own.
    """
    found = _ends(graph, answer)
    return found[0] if found else None


def add_cam(graph: onnx.GraphProto) -> bool:
    """Add the output `CAM`, float32 [N, C, h, w], to an exported float32 graph, where it has such an end.

    Parameters
    ----------
    graph
        As the exporter gives it; its outputs are `OUTPUTS`.

    Returns
    -------
    bool
        Whether it has.
    """
    ends = _ends(graph)
    if ends is None:
        return False
    pooling, head = ends
    constants = {item.name: item for item in graph.initializer}
    weight = numpy_helper.to_array(constants[head.input[1]])
    transposed = any(item.name == "transB" and item.i for item in head.attribute)
    kernel = weight if transposed else weight.T
    sides = _sides(graph, pooling.input[0])
    if sides is None:
        return False
    graph.initializer.append(numpy_helper.from_array(kernel[:, :, None, None].copy(), f"{CAM}.weight"))
    place = list(graph.node).index(pooling)
    # Behind the pooling, so that where the float32 end begins is found by one look at the pooling.
    graph.node.insert(
        place + 1, helper.make_node("Conv", [pooling.input[0], f"{CAM}.weight"], [CAM], name=f"{CAM}.Conv")
    )
    batch = graph.output[0].type.tensor_type.shape.dim[0].dim_param
    shape = [batch, len(kernel), *sides]
    graph.output.append(helper.make_tensor_value_info(CAM, onnx.TensorProto.FLOAT, shape))
    return True


def check_cam(graph: bytes, quadrants: npt.NDArray[np.uint8]) -> dict[str, Any] | None:
    """Hold a graph's maps against its logits.

    Parameters
    ----------
    graph
        The ONNX file, of any precision.
    quadrants
        uint8 [F, 4, S, S], real ones.

    Returns
    -------
    dict or None
        What the manifest says of the maps: their sides, and the largest difference between a map's mean plus the
        head's bias and its logit. None where the graph gives none.

    Raises
    ------
    ParityError
        If that is above `CAM_TOLERANCE`: the maps would not show what decided.
    """
    model = onnx.load_from_string(graph)
    if CAM not in [output.name for output in model.graph.output]:
        return None
    head = next(node for node in model.graph.node if OUTPUTS[0] in node.output)
    # The exporter leaves a bias out that is 0.
    bias = next((numpy_helper.to_array(it) for it in model.graph.initializer if it.name in head.input[2:]), np.zeros(1))
    session, largest = open_in_memory(graph), 0.0
    for frame in quadrants:
        logits, maps = session.run([OUTPUTS[0], CAM], {INPUT: frame[:, None]})
        largest = max(largest, float(np.abs(maps.mean(axis=(2, 3)) + bias - logits).max()))
    if not largest <= CAM_TOLERANCE:
        raise ParityError(
            f"class activation maps: a map's mean plus the bias is up to {largest:.3g} from its logit; expected at "
            f"most {CAM_TOLERANCE:g}; report this network and precision, and export another"
        )
    return {"sides": list(maps.shape[2:]), "max_abs_difference": largest}


def _ends(graph: onnx.GraphProto, answer: str = OUTPUTS[0]) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
    """Give the last pooling and the linear layer that gives `answer`; None where one does not lead to the other."""
    producers = {name: node for node in graph.node for name in node.output}
    constants = {item.name for item in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    head = producers.get(answer)
    if head is None or head.op_type != "Gemm" or head.input[1] not in constants:
        return None
    node = producers.get(head.input[0])
    while node is not None and node.op_type in _PASSED and len(readers[node.output[0]]) == 1:
        node = producers.get(node.input[0])
    if node is None or node.op_type not in _POOLINGS or len(readers[node.output[0]]) != 1:
        return None
    return (node, head) if _is_global(graph, node) else None


def _is_global(graph: onnx.GraphProto, node: onnx.NodeProto) -> bool:
    """Tell whether a pooling is over the whole map."""
    if node.op_type == "GlobalAveragePool":
        return True
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer if item.dims in ([1], [2])}
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    if node.op_type == "ReduceMean":
        axes = constants.get(node.input[1]) if len(node.input) > 1 else None
        return axes is not None and {int(axis) % 4 for axis in axes} == {2, 3}
    return list(attributes.get("kernel_shape", ())) == _sides(graph, node.input[0]) and not any(
        attributes.get("pads", ())
    )


def _sides(graph: onnx.GraphProto, name: str) -> list[int] | None:
    """Give height and width of a feature map, [N, F, h, w], as the exporter has noted them."""
    for item in graph.value_info:
        if item.name == name:
            dimensions = item.type.tensor_type.shape.dim
            sides = [dimension.dim_value for dimension in dimensions[2:]]
            return sides if len(dimensions) == 4 and all(sides) else None
    return None
