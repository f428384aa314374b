"""The stem: how a graph of integers takes in 8-bit grey levels, and its first convolution at the speed of the others.

Two facts are used. Grey levels are integers already: with the scale 1 / (255 std) and the zero point round(255 mean)
they *are* the normalised image, without a rounding, where the remainder of the zero point goes into the first bias. And
a convolution with the stride 2 over a single channel, which processors' integer instructions suit badly (they multiply
four neighbouring channels at a time), equals one over four channels that are four neighbouring columns. In memory, with
channels last, as onnxruntime keeps integer convolutions, that regrouping moves no byte::

    grey  [N, 1, S, S]  =  [N, S, S/4, 4]       four columns become four channels
    conv  K x K, stride 2 x 2, O filters  =  K x T, stride 2 x 1, 2 O filters: two output columns at a time
    out   [N, S/2, S/4, 2 O]  =  [N, S/2, S/2, O]

Filter r O + o of the regrouped convolution gives output column 2 m + r, which covers input columns 2 (2 m + r) + k - P,
k = 0 ... K - 1, P the padding: column c is channel c mod 4 of group c // 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from echoquad_export.graph import replace_nodes
from echoquad_runtime.contract import Contract
from echoquad_runtime.session import INPUT

__all__ = ["PREFIX", "integer_stem"]

PREFIX: Final = "stem."
COLUMNS: Final = 4  # neighbouring ones that become channels; VNNI multiplies four bytes at a time
WHITE: Final = 255


def integer_stem(graph: onnx.ModelProto, contract: Contract, *, regroup: bool = True) -> onnx.ModelProto:
    """Replace normalisation and first convolution by equals that begin with integers.

    Parameters
    ----------
    graph
        As `echoquad_export.graph.build_graph` makes it, in float32: a cast, the normalisation, a convolution.
    contract
        Gives mean, standard deviation and input size.
    regroup
        Whether columns become channels; False is for runtimes that do not keep channels last.

    Returns
    -------
    onnx.ModelProto
        A copy whose first operators make no rounding beyond float32's, but at the padded border, where 0 becomes the
        nearest grey level: at most half a level of 255. Where the convolution's stride is not 2, the input size no
        multiple of 4 or the mean no grey level, only what still holds is done, or nothing.
    """
    result = onnx.ModelProto()
    result.CopyFrom(graph)
    nodes = list(result.graph.node)
    position = next((i for i, node in enumerate(nodes) if node.op_type == "Conv"), None)
    zero_point = round(WHITE * contract.mean)
    if position is None or not 0 <= zero_point <= WHITE:
        return result
    convolution, rest = nodes[position], nodes[position + 1 :]
    kept = _read_by(rest, nodes[:position])
    constants = {item.name: numpy_helper.to_array(item) for item in result.graph.initializer}
    attributes = {item.name: helper.get_attribute_value(item) for item in convolution.attribute}
    weight = constants[convolution.input[1]].astype(np.float64)
    bias = constants[convolution.input[2]].astype(np.float64) if len(convolution.input) > 2 else np.zeros(len(weight))
    # (g / 255 - mean) / std = (g - zero_point) / (255 std) + (zero_point / 255 - mean) / std, the last a constant.
    bias = bias + (zero_point / WHITE - contract.mean) / contract.std * weight.sum(axis=(1, 2, 3))

    added: dict[str, npt.NDArray[Any]] = {
        "scale": np.array(1 / (WHITE * contract.std), np.float32),
        "zero_point": np.array(zero_point, np.uint8),
    }
    front: list[onnx.NodeProto] = []
    grey, after = INPUT, list(convolution.output)
    if regroup and _regroups(attributes, weight, contract.input_size):
        size, filters = contract.input_size, len(weight)
        weight, before, behind = _regrouped(weight, attributes["pads"][1])
        attributes |= {
            "kernel_shape": list(weight.shape[2:]),
            "strides": [2, 1],
            "pads": [attributes["pads"][0], before, attributes["pads"][2], behind],
        }
        bias = np.tile(bias, 2)
        added["columns"] = np.array([0, size, size // COLUMNS, COLUMNS], np.int64)
        added["rows"] = np.array([0, size // 2, size // 2, filters], np.int64)
        front += [
            helper.make_node("Reshape", [INPUT, f"{PREFIX}columns"], [f"{PREFIX}grouped"]),
            helper.make_node("Transpose", [f"{PREFIX}grouped"], [f"{PREFIX}grey"], perm=[0, 3, 1, 2]),
        ]
        grey, after = f"{PREFIX}grey", [f"{PREFIX}features"]
    added["weight"], added["bias"] = weight.astype(np.float32), bias.astype(np.float32)
    scaled = [grey, f"{PREFIX}scale", f"{PREFIX}zero_point"]
    front.append(helper.make_node("DequantizeLinear", scaled, [f"{PREFIX}image"]))
    inputs = [f"{PREFIX}image", f"{PREFIX}weight", f"{PREFIX}bias"]
    front.append(helper.make_node("Conv", inputs, after, **attributes))
    if after != list(convolution.output):
        last = convolution.output[0]
        if rest and rest[0].op_type == "Relu":  # with its convolution, as the integers join the two
            relu, rest = rest[0], rest[1:]
            front.append(helper.make_node("Relu", after, [f"{PREFIX}active"]))
            after, last = [f"{PREFIX}active"], relu.output[0]
        front += [
            helper.make_node("Transpose", after, [f"{PREFIX}last"], perm=[0, 2, 3, 1]),
            helper.make_node("Reshape", [f"{PREFIX}last", f"{PREFIX}rows"], [f"{PREFIX}unrolled"]),
            helper.make_node("Transpose", [f"{PREFIX}unrolled"], [last], perm=[0, 3, 1, 2]),
        ]
    result.graph.initializer.extend(numpy_helper.from_array(value, f"{PREFIX}{name}") for name, value in added.items())
    replace_nodes(result.graph, [*front, *kept, *rest])
    return result


def _read_by(nodes: Sequence[onnx.NodeProto], before: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Find what stands before the first convolution and is read behind it: a transformer counts the quadrants."""
    wanted = {name for node in nodes for name in node.input}
    found: list[onnx.NodeProto] = []
    for node in reversed(before):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            found.insert(0, node)
    return found


def _regroups(attributes: dict[str, Any], weight: npt.NDArray[np.float64], size: int) -> bool:
    return (
        attributes.get("strides") == [2, 2]
        and attributes.get("dilations", [1, 1]) == [1, 1]
        and attributes.get("group", 1) == 1
        and attributes.get("auto_pad", b"NOTSET") == b"NOTSET"
        and weight.shape[1] == 1
        and size % COLUMNS == 0
        # Half as many rows and columns come out, no more and no less: two columns of each group of four.
        and all(
            (size + attributes["pads"][i] + attributes["pads"][i + 2] - weight.shape[i + 2]) // 2 + 1 == size // 2
            for i in (0, 1)
        )
    )


def _regrouped(weight: npt.NDArray[np.float64], padding: int) -> tuple[npt.NDArray[np.float64], int, int]:
    """Give the weights [2 O, 4, K, T] of the regrouped convolution, and the groups of padding before and behind."""
    filters, _, height, width = weight.shape
    places = [(r, k, *divmod(2 * r + k - padding, COLUMNS)) for r in range(2) for k in range(width)]
    first, last = min(group for *_, group, _ in places), max(group for *_, group, _ in places)
    regrouped = np.zeros((2 * filters, COLUMNS, height, last - first + 1))
    for r, k, group, column in places:
        regrouped[r * filters : (r + 1) * filters, column, :, group - first] = weight[:, 0, :, k]
    return regrouped, -first, last
