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

__all__ = ["PREFIX", "integer_stem"]

PREFIX: Final = "stem."
COLUMNS: Final = 4  # neighbouring ones that become channels; VNNI multiplies four bytes at a time
WHITE: Final = 255


def integer_stem(graph: onnx.ModelProto, contract: Contract, *, regroup: bool = True) -> onnx.ModelProto:
    """Replace normalisation and first convolution by equals that begin with integers.

    Parameters
    ----------
    graph
        As `echoquad_export.graph.build_graph` makes it, in float32: a cast, the normalisation, a convolution; of an
        ensemble, perhaps a flip before these, and the convolutions of all its members.
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
    kinds = [node.op_type for node in nodes]
    if not 0 <= round(WHITE * contract.mean) <= WHITE or not {"Cast", "Conv"} <= set(kinds):
        return result
    cast, position = kinds.index("Cast"), kinds.index("Conv")
    grey, image = nodes[cast].input[0], nodes[position].input[0]
    constants = {item.name: numpy_helper.to_array(item) for item in result.graph.initializer}
    rest = nodes[position:]
    readers = [node for node in rest if node.op_type != "Conv" or node.input[0] != image]
    written = _read_by([nodes[cast], *readers], nodes[:position])
    first = 0
    while rest:
        node = rest.pop(0)
        if node.op_type != "Conv" or node.input[0] != image:
            written.append(node)
            continue
        # With its convolution, as the integers join the two.
        follows = rest and rest[0].op_type == "Relu" and rest[0].input[0] == node.output[0]
        relu = rest[0] if follows else None
        prefix = f"{PREFIX}{first}." if first else PREFIX
        front, added, taken = _front(node, relu, grey, prefix, constants, contract, regroup=regroup)
        written += front
        result.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in added.items())
        rest, first = rest[taken:], first + 1
    replace_nodes(result.graph, written)
    return result


def _front(
    convolution: onnx.NodeProto,
    relu: onnx.NodeProto | None,
    grey: str,
    prefix: str,
    constants: dict[str, npt.NDArray[Any]],
    contract: Contract,
    *,
    regroup: bool,
) -> tuple[list[onnx.NodeProto], dict[str, npt.NDArray[Any]], int]:
    """Give the nodes that take a first convolution's place, their constants, and whether (1) its ReLU is in them."""
    attributes = {item.name: helper.get_attribute_value(item) for item in convolution.attribute}
    weight = constants[convolution.input[1]].astype(np.float64)
    bias = constants[convolution.input[2]].astype(np.float64) if len(convolution.input) > 2 else np.zeros(len(weight))
    # (g / 255 - mean) / std = (g - zero_point) / (255 std) + (zero_point / 255 - mean) / std, the last a constant.
    zero_point = round(WHITE * contract.mean)
    bias = bias + (zero_point / WHITE - contract.mean) / contract.std * weight.sum(axis=(1, 2, 3))

    added: dict[str, npt.NDArray[Any]] = {
        f"{prefix}scale": np.array(1 / (WHITE * contract.std), np.float32),
        f"{prefix}zero_point": np.array(zero_point, np.uint8),
    }
    front: list[onnx.NodeProto] = []
    after = list(convolution.output)
    regrouped = regroup and _regroups(attributes, weight, contract.input_size)
    if regrouped:
        size, filters = contract.input_size, len(weight)
        weight, before, behind = _regrouped(weight, attributes["pads"][1])
        attributes |= {
            "kernel_shape": list(weight.shape[2:]),
            "strides": [2, 1],
            "pads": [attributes["pads"][0], before, attributes["pads"][2], behind],
        }
        bias = np.tile(bias, 2)
        added[f"{prefix}columns"] = np.array([0, size, size // COLUMNS, COLUMNS], np.int64)
        added[f"{prefix}rows"] = np.array([0, size // 2, size // 2, filters], np.int64)
        front += [
            helper.make_node("Reshape", [grey, f"{prefix}columns"], [f"{prefix}grouped"]),
            helper.make_node("Transpose", [f"{prefix}grouped"], [f"{prefix}grey"], perm=[0, 3, 1, 2]),
        ]
        grey, after = f"{prefix}grey", [f"{prefix}features"]
    added[f"{prefix}weight"], added[f"{prefix}bias"] = weight.astype(np.float32), bias.astype(np.float32)
    scaled = [grey, f"{prefix}scale", f"{prefix}zero_point"]
    front.append(helper.make_node("DequantizeLinear", scaled, [f"{prefix}image"]))
    inputs = [f"{prefix}image", f"{prefix}weight", f"{prefix}bias"]
    front.append(helper.make_node("Conv", inputs, after, **attributes))
    if not regrouped:
        return front, added, 0
    last = convolution.output[0]
    if relu is not None:
        front.append(helper.make_node("Relu", after, [f"{prefix}active"]))
        after, last = [f"{prefix}active"], relu.output[0]
    front += [
        helper.make_node("Transpose", after, [f"{prefix}last"], perm=[0, 2, 3, 1]),
        helper.make_node("Reshape", [f"{prefix}last", f"{prefix}rows"], [f"{prefix}unrolled"]),
        helper.make_node("Transpose", [f"{prefix}unrolled"], [last], perm=[0, 3, 1, 2]),
    ]
    return front, added, int(relu is not None)


def _read_by(nodes: Sequence[onnx.NodeProto], before: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Find what stands before the first convolution and is read behind it: flips, a transformer's count."""
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
