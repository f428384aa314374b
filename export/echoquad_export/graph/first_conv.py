"""The stem of an int8 graph: from 8-bit grey levels to a first convolution that integer kernels compute fast.

Grey levels are integers already. With the scale 1 / (255 std) and the zero point round(255 mean) they equal the
normalised image without rounding; the remainder of the zero point goes into the first bias.

A convolution with stride 2 over a single channel is slow in integers: processors multiply four neighbouring channels
at a time, and onnxruntime copies every value of a window by itself. It equals a convolution with stride 1 over four
channels, which are the pixels of each 2 x 2 block (space to depth)::

    grey  [N, 1, S, S]  ->  blocks  [N, 4, S/2, S/2]      channel 2 (column % 2) + row % 2
    conv  K x K, stride 2  ->  conv  T x T, stride 1      T = 4 for K = 7, T = 2 for K = 3

With the padding P, output row y covers the input rows r = 2 y + k - P, k = 0 ... K - 1: row r % 2 of block r // 2.
Columns are treated alike.

The blocks are made by Reshape and Transpose: onnxruntime 1.22 has no SpaceToDepth for uint8. A Reshape comes last,
since OpenVINO 2026.4 moves a last Transpose behind DequantizeLinear and then computes the convolution in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from echoquad_export.graph.build import replace_nodes
from echoquad_runtime.contract import Contract

__all__ = ["PREFIX", "integer_stem"]

PREFIX: Final = "stem."
BLOCK: Final = 2  # rows and columns of a block
WHITE: Final = 255


def integer_stem(graph: onnx.ModelProto, contract: Contract, *, space_to_depth: bool = True) -> onnx.ModelProto:
    """Replace normalisation and first convolution by equivalents that begin with integers.

    Parameters
    ----------
    graph
        As `build_graph` makes it, in float32: a cast, the normalisation, a convolution; of an
        ensemble, perhaps a flip before these, and the convolutions of all its members.
    contract
        Gives mean, standard deviation and input size.
    space_to_depth
        Whether a convolution with stride 2 is written over blocks of pixels; False leaves it as it was trained, for
        comparison.

    Returns
    -------
    onnx.ModelProto
        A copy whose first operators round no more than float32 does, but at the padded border, where 0 becomes the
        nearest grey level: at most half a level of 255. A convolution with another stride than 2, or over an odd input
        size, stays as it was trained. Where the mean is no grey level the copy is unchanged.
    """
    result = onnx.ModelProto()
    result.CopyFrom(graph)
    nodes = list(result.graph.node)
    kinds = [node.op_type for node in nodes]
    if not 0 <= round(WHITE * contract.mean) <= WHITE or not {"Cast", "Conv"} <= set(kinds):
        return result
    cast, position = kinds.index("Cast"), kinds.index("Conv")
    image = nodes[position].input[0]
    front = _Front(nodes[cast].input[0], contract, space_to_depth=space_to_depth)
    constants = {item.name: numpy_helper.to_array(item) for item in result.graph.initializer}
    rest = nodes[position:]
    readers = [node for node in rest if node.op_type != "Conv" or node.input[0] != image]
    body = [
        front.convolve(node, constants) if node.op_type == "Conv" and node.input[0] == image else node for node in rest
    ]
    before = _read_by([nodes[cast], *readers], nodes[:position])
    result.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in front.constants.items())
    replace_nodes(result.graph, [*before, *front.nodes, *body])
    return result


class _Front:
    """The nodes from the grey levels to the first convolutions, shared by the members of an ensemble.

    Attributes
    ----------
    nodes
        In order: what makes the images that convolutions read.
    constants
        What these nodes and the convolutions read, by name.
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

    def convolve(self, node: onnx.NodeProto, constants: dict[str, npt.NDArray[Any]]) -> onnx.NodeProto:
        """Return the convolution over integers that equals `node`, which reads the normalised image."""
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        weight = constants[node.input[1]].astype(np.float64)
        bias = constants[node.input[2]].astype(np.float64) if len(node.input) > 2 else np.zeros(len(weight))
        # (g / 255 - mean) / std = (g - zero_point) / (255 std) + (zero_point / 255 - mean) / std, the last a constant.
        remainder = (self._zero_point / WHITE - self._contract.mean) / self._contract.std
        bias = bias + remainder * weight.sum(axis=(1, 2, 3))
        blocks = self._space_to_depth and _suits_blocks(attributes, weight, self._contract.input_size)
        if blocks:
            weight, before, behind = _over_blocks(weight, attributes["pads"])
            attributes |= {"kernel_shape": list(weight.shape[2:]), "strides": [1, 1], "pads": [*before, *behind]}
        prefix = f"{PREFIX}{self._convolutions}." if self._convolutions else PREFIX
        self._convolutions += 1
        self.constants[f"{prefix}weight"] = weight.astype(np.float32)
        self.constants[f"{prefix}bias"] = bias.astype(np.float32)
        inputs = [self._image(blocks), f"{prefix}weight", f"{prefix}bias"]
        return helper.make_node("Conv", inputs, list(node.output), **attributes)

    def _image(self, blocks: bool) -> str:
        """Name the image in real numbers, [N, 1, S, S] or in blocks [N, 4, S/2, S/2]; its nodes are added once."""
        if blocks not in self._images:
            levels = self._blocks() if blocks else self._grey
            self._images[blocks] = f"{PREFIX}{'blocks.' if blocks else ''}image"
            scaled = [levels, f"{PREFIX}scale", f"{PREFIX}zero_point"]
            self.nodes.append(helper.make_node("DequantizeLinear", scaled, [self._images[blocks]]))
        return self._images[blocks]

    def _blocks(self) -> str:
        """Add the nodes from grey levels [N, 1, S, S] to [N, 4, S/2, S/2]; returns the name of what they give."""
        size, half = self._contract.input_size, self._contract.input_size // BLOCK
        last = self._grey
        # Whole rows are moved first, which is fast; then even and odd columns part.
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
    """Find what stands before the first convolution and is read behind it: flips, a transformer's count."""
    wanted = {name for node in nodes for name in node.input}
    found: list[onnx.NodeProto] = []
    for node in reversed(before):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            found.insert(0, node)
    return found


def _suits_blocks(attributes: dict[str, Any], weight: npt.NDArray[np.float64], size: int) -> bool:
    return (
        attributes.get("strides") == [BLOCK, BLOCK]
        and attributes.get("dilations", [1, 1]) == [1, 1]
        and attributes.get("group", 1) == 1
        and attributes.get("auto_pad", b"NOTSET") == b"NOTSET"
        and weight.shape[1] == 1
        and size % BLOCK == 0
        # One row and one column come out of each block, no more and no less.
        and all(
            (size + attributes["pads"][i] + attributes["pads"][i + 2] - weight.shape[i + 2]) // BLOCK + 1
            == size // BLOCK
            for i in (0, 1)
        )
    )


def _over_blocks(
    weight: npt.NDArray[np.float64], pads: Sequence[int]
) -> tuple[npt.NDArray[np.float64], list[int], list[int]]:
    """Return the weights [O, 4, T, T] over blocks, and the blocks of padding before and behind, (rows, columns)."""
    rows, columns = ([divmod(k - pads[i], BLOCK) for k in range(weight.shape[i + 2])] for i in (0, 1))
    before = [-rows[0][0], -columns[0][0]]
    behind = [rows[-1][0], columns[-1][0]]
    shape = [first + 1 + last for first, last in zip(before, behind, strict=True)]
    found = np.zeros((len(weight), BLOCK * BLOCK, *shape))
    for y, (block_y, row) in enumerate(rows):
        for x, (block_x, column) in enumerate(columns):
            found[:, BLOCK * column + row, block_y + before[0], block_x + before[1]] = weight[:, 0, y, x]
    return found, before, behind
