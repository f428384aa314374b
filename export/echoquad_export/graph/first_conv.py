"""The first convolution of an int8 graph: computed on 8-bit grey levels, in a layout that integer kernels run fast.

Grey levels are integers already. With the scale 1 / (255 std) and the zero point round(255 mean), DequantizeLinear
yields the normalised image without rounding; the remainder of the zero point moves into the bias.

A convolution with stride 2 over one channel is slow in integers: processors multiply four neighbouring channels at a
time, and onnxruntime copies each value of a window separately. It equals a convolution with stride 1 over four
channels, the pixels of each 2 x 2 block (space to depth)::

    grey  [N, 1, S, S]  ->  blocks  [N, 4, S/2, S/2]      channel 2 (column % 2) + row % 2
    conv  K x K, stride 2  ->  conv  T x T, stride 1      T = 4 for K = 7, T = 2 for K = 3

With the padding P, output row y covers the input rows r = 2 y + k - P, k = 0 ... K - 1: row r % 2 of block r // 2.
The same holds for columns.

Reshape and Transpose build the blocks, because onnxruntime 1.22 has no SpaceToDepth for uint8. The last operator is a
Reshape, because OpenVINO 2026.4 moves a trailing Transpose behind DequantizeLinear and then computes the convolution in
float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from echoquad_export.graph.onnx_graph import attributes, constants, replace_nodes
from echoquad_runtime.contract import Contract

__all__ = ["PREFIX", "integer_first_conv"]

PREFIX: Final = "first_conv."
BLOCK: Final = 2  # rows and columns per block
WHITE: Final = 255


def integer_first_conv(graph: onnx.ModelProto, contract: Contract, *, space_to_depth: bool = True) -> onnx.ModelProto:
    """Replace normalisation and first convolution by equivalents that begin with integers.

    Parameters
    ----------
    graph
        A float32 graph from `build_graph`: a cast, the normalisation, a convolution. An ensemble may mirror the input
        first, and has one such convolution per member.
    contract
        Supplies mean, standard deviation and input size.
    space_to_depth
        Whether to write a convolution with stride 2 over blocks of pixels. False is for comparison.

    Returns
    -------
    onnx.ModelProto
        A copy. Its first operators round no more than float32 does, except at the padded border, where 0 becomes the
        nearest grey level (an error of at most half a level of 255). A convolution with a stride other than 2, or over
        an odd input size, keeps its form. If the mean is no grey level, the copy is unchanged.
    """
    result = onnx.ModelProto()
    result.CopyFrom(graph)
    nodes = list(result.graph.node)
    operators = [node.op_type for node in nodes]
    if not 0 <= round(WHITE * contract.mean) <= WHITE or not {"Cast", "Conv"} <= set(operators):
        return result
    cast, first = operators.index("Cast"), operators.index("Conv")
    image = nodes[first].input[0]
    head = _IntegerInput(nodes[cast].input[0], contract, space_to_depth=space_to_depth)
    values = constants(result.graph)
    rest = nodes[first:]
    others = [node for node in rest if node.op_type != "Conv" or node.input[0] != image]
    body = [head.convolve(node, values) if node.op_type == "Conv" and node.input[0] == image else node for node in rest]
    before = _read_by([nodes[cast], *others], nodes[:first])
    result.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in head.constants.items())
    replace_nodes(result.graph, [*before, *head.nodes, *body])
    return result


class _IntegerInput:
    """The nodes from the grey levels to the first convolutions; the members of an ensemble share them.

    Attributes
    ----------
    nodes
        The nodes that compute the images, sorted topologically.
    constants
        Initializers of these nodes and of the convolutions, by name.
    """

    def __init__(self, grey: str, contract: Contract, *, space_to_depth: bool) -> None:
        self._grey, self._contract, self._space_to_depth = grey, contract, space_to_depth
        self._zero_point = round(WHITE * contract.mean)
        self._images: dict[bool, str] = {}
        self._convolutions = 0
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, npt.NDArray[Any]] = {
            f"{PREFIX}scale": np.array(1 / (WHITE * contract.std), np.float32),
            f"{PREFIX}zero_point": np.array(self._zero_point, np.uint8),
        }

    def convolve(self, node: onnx.NodeProto, values: dict[str, npt.NDArray[Any]]) -> onnx.NodeProto:
        """Return the convolution over integers that equals `node`, which reads the normalised image."""
        options = attributes(node)
        weight = values[node.input[1]].astype(np.float64)
        bias = values[node.input[2]].astype(np.float64) if len(node.input) > 2 else np.zeros(len(weight))
        # (g / 255 - mean) / std = (g - zero_point) / (255 std) + (zero_point / 255 - mean) / std, the last is constant.
        remainder = (self._zero_point / WHITE - self._contract.mean) / self._contract.std
        bias = bias + remainder * weight.sum(axis=(1, 2, 3))
        blocks = self._space_to_depth and _suits_blocks(options, weight, self._contract.input_size)
        if blocks:
            weight, before, after = _over_blocks(weight, options["pads"])
            options |= {"kernel_shape": list(weight.shape[2:]), "strides": [1, 1], "pads": [*before, *after]}
        prefix = f"{PREFIX}{self._convolutions}." if self._convolutions else PREFIX
        self._convolutions += 1
        self.constants[f"{prefix}weight"] = weight.astype(np.float32)
        self.constants[f"{prefix}bias"] = bias.astype(np.float32)
        inputs = [self._image(blocks), f"{prefix}weight", f"{prefix}bias"]
        return helper.make_node("Conv", inputs, list(node.output), **options)

    def _image(self, blocks: bool) -> str:
        """Return the name of the image, [N, 1, S, S] or in blocks [N, 4, S/2, S/2]; add its nodes on first use."""
        if blocks not in self._images:
            levels = self._blocks() if blocks else self._grey
            self._images[blocks] = f"{PREFIX}{'blocks.' if blocks else ''}image"
            scaled = [levels, f"{PREFIX}scale", f"{PREFIX}zero_point"]
            self.nodes.append(helper.make_node("DequantizeLinear", scaled, [self._images[blocks]]))
        return self._images[blocks]

    def _blocks(self) -> str:
        """Add the nodes from grey levels [N, 1, S, S] to blocks [N, 4, S/2, S/2]; return the blocks' name."""
        size, half = self._contract.input_size, self._contract.input_size // BLOCK
        last = self._grey
        # Moving whole rows first is fast; the second step separates even and odd columns.
        for name, shape, order in (
            ("rows", [0, half, BLOCK, size], [0, 2, 1, 3]),
            ("columns", [0, size * half, BLOCK], [0, 2, 1]),
            ("blocks", [0, BLOCK * BLOCK, half, half], None),
        ):
            self.constants[f"{PREFIX}{name}.shape"] = np.array(shape, np.int64)
            self.nodes.append(helper.make_node("Reshape", [last, f"{PREFIX}{name}.shape"], [f"{PREFIX}{name}"]))
            last = f"{PREFIX}{name}"
            if order is not None:
                self.nodes.append(helper.make_node("Transpose", [last], [f"{last}.moved"], perm=order))
                last = f"{last}.moved"
        return last


def _read_by(nodes: Sequence[onnx.NodeProto], before: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Return the nodes of `before` that `nodes` depend on: mirrored views, a transformer's batch size."""
    wanted = {name for node in nodes for name in node.input}
    found: list[onnx.NodeProto] = []
    for node in reversed(before):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            found.insert(0, node)
    return found


def _suits_blocks(options: dict[str, Any], weight: npt.NDArray[np.float64], size: int) -> bool:
    return (
        options.get("strides") == [BLOCK, BLOCK]
        and options.get("dilations", [1, 1]) == [1, 1]
        and options.get("group", 1) == 1
        and options.get("auto_pad", b"NOTSET") == b"NOTSET"
        and weight.shape[1] == 1
        and size % BLOCK == 0
        # Each block yields exactly one output row and column.
        and all(
            (size + options["pads"][i] + options["pads"][i + 2] - weight.shape[i + 2]) // BLOCK + 1 == size // BLOCK
            for i in (0, 1)
        )
    )


def _over_blocks(
    weight: npt.NDArray[np.float64], pads: Sequence[int]
) -> tuple[npt.NDArray[np.float64], list[int], list[int]]:
    """Return the weights [O, 4, T, T] over blocks, and the padding in blocks before and after (rows, columns)."""
    rows, columns = ([divmod(k - pads[i], BLOCK) for k in range(weight.shape[i + 2])] for i in (0, 1))
    before = [-rows[0][0], -columns[0][0]]
    after = [rows[-1][0], columns[-1][0]]
    shape = [first + 1 + last for first, last in zip(before, after, strict=True)]
    found = np.zeros((len(weight), BLOCK * BLOCK, *shape))
    for y, (block_y, row) in enumerate(rows):
        for x, (block_x, column) in enumerate(columns):
            found[:, BLOCK * column + row, block_y + before[0], block_x + before[1]] = weight[:, 0, y, x]
    return found, before, after
