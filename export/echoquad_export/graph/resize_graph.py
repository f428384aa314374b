"""Crop, split and Pillow's bilinear resize as ONNX operators, from a frame to the network's quadrants.

The ONNX operator ``Resize`` with antialiasing uses other weights: downsampled noise differs by many grey levels. So the
resize is written out here. It has two passes, columns first and then rows, and rounds to 8 bits after each. Output i of
a pass has its centre at ``(i + 0.5) * scale`` and weighs input x by
``max(0, 1 - |x + 0.5 - centre| / max(scale, 1))``; the weights of an output are divided by their sum and rounded to
multiples of 2**-22. A sum of products of such weights and grey levels is exact in float64, in any order of addition, so
the results are Pillow's integers, bit for bit.

A pass is a matrix product with a band matrix, because neighbouring outputs depend on the same few inputs. Blocks of
outputs, each with its window of inputs, are several times faster than the full matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from echoquad_runtime.contract import QUADRANTS, Contract
from echoquad_runtime.quadrants import MIN_SIDE

__all__ = ["FRAMES", "Nodes", "add_quadrants"]

FRAMES: Final = "frames"
"""The graph's input: uint8 [N, H, W], grey levels."""

BLOCK: Final = 16  # outputs per window: fewer need fewer products, more need fewer gathers
FRACTION: Final = 2.0**22  # fixed-point unit of Pillow's weights

Operand = str | float | int | Sequence[int] | npt.NDArray[Any]
"""A tensor's name, or a constant: numbers become float64 or int64 on every platform."""


class Nodes:
    """Appends operators and names their outputs; equal constants are stored once.

    Parameters
    ----------
    prefix
        Prefix of all names, to keep them distinct from those of other graphs.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = {}

    @property
    def constants(self) -> list[onnx.TensorProto]:
        """Initializers of the operators."""
        return list(self._constants.values())

    def __call__(self, operator: str, *inputs: Operand, output: str | None = None, **attributes: Any) -> str:
        """Add an operator with one output; return the output's name, which is `output` if given."""
        name = output or self._next(operator)
        self._add(operator, inputs, [name], attributes)
        return name

    def split(self, tensor: str, sizes: Operand, parts: int, axis: int) -> list[str]:
        """Split a tensor along an axis into parts of the given sizes, int64 [parts]; return their names."""
        names = [f"{self._next('Split')}_{part}" for part in range(parts)]
        self._add("Split", (tensor, sizes), names, {"axis": axis})
        return names

    def _add(self, operator: str, inputs: Sequence[Operand], outputs: list[str], attributes: dict[str, Any]) -> None:
        names = [item if isinstance(item, str) else self._constant(item) for item in inputs]
        self.nodes.append(helper.make_node(operator, names, outputs, name=self._next(operator), **attributes))

    def _next(self, operator: str) -> str:
        return f"{self.prefix}{operator}_{len(self.nodes)}"

    def _constant(self, value: Operand) -> str:
        array = np.asarray(value)
        if not isinstance(value, np.ndarray):
            array = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = numpy_helper.from_array(array, f"{self.prefix}constant_{len(self._constants)}")
        return str(self._constants[key].name)


def add_quadrants(nodes: Nodes, contract: Contract, output: str) -> None:
    """Add the operators that compute quadrants from frames, as `echoquad_runtime.quadrants` does.

    Parameters
    ----------
    nodes
        Receives the operators. Their input is `FRAMES`, uint8 [N, H, W], with H and W at least 2; for smaller frames
        the inference fails in ``Split``.
    contract
        Supplies the kept fraction, the quadrant layout and the input size S.
    output
        Name of the output: uint8 [4 N, 1, S, S], LA, RA, LV, RV of the first frame, then of the next.
    """
    size = contract.input_size
    above, top, bottom, below = _cuts(nodes, 1, contract.keep)
    before, left, right, after = _cuts(nodes, 2, contract.keep)
    rows = nodes("Concat", above, nodes("Add", top, bottom), below, axis=0)
    _, kept, _ = nodes.split(FRAMES, rows, 3, axis=1)
    # A pass gathers rows, which are contiguous; so the columns are transposed for their pass.
    kept = nodes("Transpose", kept, perm=[0, 2, 1])
    _, *halves, _ = nodes.split(kept, nodes("Concat", before, left, right, after, axis=0), 4, axis=1)
    narrow = [_resize(nodes, half, side, size) for half, side in zip(halves, (left, right), strict=True)]
    # The left and right quadrants are now side by side, and their rows are resized together.
    kept = nodes("Transpose", nodes("Concat", *narrow, axis=1), perm=[0, 2, 1])
    halves = nodes.split(kept, nodes("Concat", top, bottom, axis=0), 2, axis=1)
    small = [_resize(nodes, half, side, size) for half, side in zip(halves, (top, bottom), strict=True)]
    mosaic = nodes("Reshape", nodes("Concat", *small, axis=1), [0, 2, size, 2, size])
    mosaic = nodes("Transpose", mosaic, perm=[0, 1, 3, 2, 4])
    if contract.quadrants != QUADRANTS:  # from the order of the positions to that of the names
        order = [contract.quadrants.index(name) for name in QUADRANTS]
        mosaic = nodes("Gather", nodes("Reshape", mosaic, [0, len(QUADRANTS), size, size]), order, axis=1)
    nodes("Reshape", mosaic, [-1, 1, size, size], output=output)


def _cuts(nodes: Nodes, axis: int, keep: float) -> tuple[str, str, str, str]:
    """Return the lengths, int64 [1], before the crop, of its two halves, and after the crop."""
    side = nodes("Shape", FRAMES, start=axis, end=axis + 1)
    kept = nodes("Floor", nodes("Add", nodes("Mul", _float(nodes, side), keep), 0.5))
    kept = nodes("Max", nodes("Cast", kept, to=onnx.TensorProto.INT64), [MIN_SIDE])
    border = nodes("Sub", side, kept)
    before = nodes("Div", border, [2])
    first = nodes("Div", kept, [2])
    return before, first, nodes("Sub", kept, first), nodes("Sub", border, before)


def _resize(nodes: Nodes, image: str, side: str, size: int) -> str:
    """Resize axis 1 of an image, uint8 [N, side, M], to `size`."""
    blocks = -(-size // BLOCK)
    window, weights = _band(nodes, side, size, blocks)
    inputs = _float(nodes, nodes("Gather", image, window, axis=1))  # [N, blocks, taps, M]
    sums = nodes("MatMul", weights, inputs)
    # The cast truncates, so 0.5 rounds half up. No clipping: weights sum to 256 / 255 only from 16,000 taps on.
    levels = nodes("Cast", nodes("Add", sums, 0.5), to=onnx.TensorProto.UINT8)
    levels = nodes("Reshape", levels, [0, blocks * BLOCK, -1])
    return levels if blocks * BLOCK == size else nodes("Slice", levels, [0], [size], [1])


def _band(nodes: Nodes, side: str, size: int, blocks: int) -> tuple[str, str]:
    """Return the inputs of each block, int64 [blocks, taps], and their weights, float64 [blocks, BLOCK, taps].

    The float64 operations and their order are Pillow's, so that the roundings agree.
    """
    outputs = np.minimum(np.arange(blocks * BLOCK), size - 1) + 0.5  # outputs beyond the size repeat the last
    outputs = outputs.reshape(blocks, BLOCK, 1)
    scale = nodes("Div", _float(nodes, side), float(size))
    support = nodes("Max", scale, 1.0)

    # From the first input of the first output to the last input of the last, plus one for rounding.
    reach = nodes("Add", nodes("Mul", scale, float(BLOCK - 1)), nodes("Mul", support, 2.0))
    taps = nodes("Cast", nodes("Add", nodes("Ceil", reach), 1.0), to=onnx.TensorProto.INT64)
    taps = nodes("Min", taps, side)
    start = nodes("Sub", nodes("Mul", outputs[:, 0], scale), support)
    start = nodes("Cast", nodes("Floor", nodes("Add", start, 0.5)), to=onnx.TensorProto.INT64)
    start = nodes("Max", nodes("Min", start, nodes("Sub", side, taps)), [0])  # [blocks, 1]
    window = nodes("Add", start, nodes("Range", 0, nodes("Squeeze", taps), 1))

    centre = nodes("Mul", outputs, scale)
    position = nodes("Unsqueeze", _float(nodes, window), [1])
    distance = nodes("Add", nodes("Sub", position, centre), 0.5)
    distance = nodes("Abs", nodes("Mul", distance, nodes("Div", 1.0, support)))
    weights = nodes("Relu", nodes("Sub", 1.0, distance))
    weights = nodes("Div", weights, nodes("ReduceSum", weights, [2]))
    weights = nodes("Floor", nodes("Add", nodes("Mul", weights, FRACTION), 0.5))
    return window, nodes("Mul", weights, 1 / FRACTION)


def _float(nodes: Nodes, tensor: str) -> str:
    return nodes("Cast", tensor, to=onnx.TensorProto.DOUBLE)
