"""Quantisation: a float graph becomes one of 8-bit integers, layer by layer, in QDQ form.

Activations are uint8 with one scale a tensor, weights int8 with one scale an output channel and no zero point: the pair
that x86 and Arm have instructions for (int8 with int8 takes three times as long on x86). In QDQ form every operator
stays the float one between DequantizeLinear and QuantizeLinear, and the runtime joins the three into an integer kernel
where it has one; a GPU, which has others, joins other ones.

After Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
(CVPR 2018): a real number is scale * (integer - zero point), a bias has the scale of input times weight in 32 bits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from echoquad_export.graph.first_conv import integer_stem
from echoquad_export.graph.float_tail import float_end
from echoquad_export.precision.calibration_set import Ranges
from echoquad_runtime.contract import Contract

__all__ = ["float_tensors", "layers", "prepare", "quantize"]

COMPUTED: Final = ("Conv", "Add", "Mul", "GlobalAveragePool", "Sigmoid")
"""Operators that onnxruntime has integer kernels for. From the last pooling on all stays float: it costs nothing."""

MOVED: Final = ("MaxPool", "Transpose", "Reshape")
"""Operators that choose among values or move them: they act on the integers as they are."""

Constants = Mapping[str, npt.NDArray[Any]]

Scale = tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]
"""A tensor's scale and zero point."""


def prepare(graph: bytes, contract: Contract, *, space_to_depth: bool = True) -> onnx.ModelProto:
    """Bring an exported float32 graph into the form that is quantised; it still computes in float.

    Normalisation and first convolution become the integer stem, means over the image become poolings, and every node
    has a name that says which layer it is. For `space_to_depth` see `integer_stem`.
    """
    model = integer_stem(onnx.load_from_string(graph), contract, space_to_depth=space_to_depth)
    constants = _constants(model)
    for index, node in enumerate(model.graph.node):
        if node.op_type == "ReduceMean" and _is_spatial_mean(node, constants):
            node.op_type = "GlobalAveragePool"
            del node.input[1:], node.attribute[:]
        if node.op_type == "Conv":
            node.name = node.input[1].removesuffix(".weight").removeprefix("backbone.")
        else:
            node.name = f"{node.op_type}.{index}"
    return model


def layers(model: onnx.ModelProto) -> list[tuple[str, ...]]:
    """Give the names of the nodes that can be quantised, a layer at a time: a convolution and what follows it."""
    computed = _computed(model, _constants(model), ())
    found: list[list[str]] = []
    for node in model.graph.node:
        if node.name in computed:
            if node.op_type == "Conv" or not found:
                found.append([])
            found[-1].append(node.name)
    return [tuple(names) for names in found]


def float_tensors(model: onnx.ModelProto) -> list[str]:
    """Name the tensors whose ranges `quantize` may ask for."""
    constants = _constants(model)
    return sorted(set(_quantized_tensors(model, constants, _computed(model, constants, ())).values()))


def quantize(
    model: onnx.ModelProto, ranges: Ranges, *, percentile: float | None = None, keep_float: Collection[str] = ()
) -> bytes:
    """Quantise a prepared graph.

    Parameters
    ----------
    model
        As `prepare` gives it; left as it is.
    ranges
        Of `float_tensors`, on the calibration set.
    percentile
        As in `Ranges.range`.
    keep_float
        Names of nodes that stay in float.

    Returns
    -------
    bytes
        The ONNX file: inputs, outputs and metadata are the model's.
    """
    constants = _constants(model)
    computed = _computed(model, constants, keep_float)
    scales = {
        tensor: _activation_scale(*ranges.range(source, percentile))
        for tensor, source in _quantized_tensors(model, constants, computed).items()
    }
    writer = _Writer(constants, scales)
    for original in model.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        if node.op_type == "DequantizeLinear":
            writer.keep(node)
        elif node.op_type in MOVED and node.output[0] in scales:
            writer.move(node)
        else:
            writer.compute(node, integer=node.name in computed)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for field in (result.graph.node, result.graph.initializer, result.graph.value_info):
        del field[:]
    result.graph.node.extend(_needed(writer.nodes, [output.name for output in model.graph.output]))
    used = {name for node in result.graph.node for name in node.input}
    every = {**constants, **writer.added}
    result.graph.initializer.extend(numpy_helper.from_array(every[name], name) for name in every if name in used)
    onnx.checker.check_model(result, full_check=True)
    return bytes(result.SerializeToString(deterministic=True))


class _Writer:
    """Writes the nodes of the quantised graph, in order.

    A tensor t of the float graph is there twice, where it has a scale: in integers as ``t.u8``, and given back to float
    as ``t.real``, which whoever computes with t reads.
    """

    def __init__(self, constants: Constants, scales: Mapping[str, Scale]) -> None:
        self._constants, self._scales = constants, dict(scales)
        self._real: dict[str, str] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.added: dict[str, npt.NDArray[Any]] = {}

    def keep(self, node: onnx.NodeProto) -> None:
        """Take over a DequantizeLinear that is there already: its output has a scale, and needs no other."""
        self._scales[node.output[0]] = (self._constants[node.input[1]], self._constants[node.input[2]])
        self.nodes.append(node)

    def move(self, node: onnx.NodeProto) -> None:
        """Have an operator act on integers; scale and zero point stay."""
        source, tensor = node.input[0], node.output[0]
        node.input[0], node.output[0] = f"{source}.u8", f"{tensor}.u8"
        self.nodes.append(node)
        self._give_back(tensor)

    def compute(self, node: onnx.NodeProto, *, integer: bool) -> None:
        """Write an operator that computes, between integers where `integer`."""
        if integer and node.op_type == "Conv":
            self._quantize_weights(node)
        for index, name in enumerate(node.input):
            node.input[index] = self._real.get(name, name)
        self.nodes.append(node)
        for tensor in node.output:
            if tensor in self._scales:
                scaled = [tensor, *self._store_scale(tensor)]
                self.nodes.append(helper.make_node("QuantizeLinear", scaled, [f"{tensor}.u8"], name=f"{tensor}.Q"))
                self._give_back(tensor)

    def _give_back(self, tensor: str) -> None:
        scaled = [f"{tensor}.u8", *self._store_scale(tensor)]
        self._real[tensor] = f"{tensor}.real"
        self.nodes.append(helper.make_node("DequantizeLinear", scaled, [f"{tensor}.real"], name=f"{tensor}.DQ"))

    def _store_scale(self, tensor: str) -> tuple[str, str]:
        scale, zero_point = self._scales[tensor]
        self.added[f"{tensor}.scale"], self.added[f"{tensor}.zero_point"] = scale, zero_point
        return f"{tensor}.scale", f"{tensor}.zero_point"

    def _quantize_weights(self, node: onnx.NodeProto) -> None:
        weight = self._constants[node.input[1]].astype(np.float64)
        bias = self._constants[node.input[2]].astype(np.float64) if len(node.input) > 2 else None
        source = float(self._scales[node.input[0]][0])
        scale = np.abs(weight).reshape(len(weight), -1).max(axis=1) / 127
        if bias is not None:  # where a filter's weights are next to nothing, its bias must still fit into 32 bits
            scale = np.maximum(scale, np.abs(bias) / (source * 2**30))
        scale = np.maximum(scale, np.finfo(np.float32).tiny).astype(np.float32)
        rounded = np.round(weight / scale.astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1)))
        node.input[1] = self._store(node.input[1], np.clip(rounded, -127, 127).astype(np.int8), scale)
        if bias is not None:
            scale = scale * np.float32(source)
            node.input[2] = self._store(
                node.input[2], np.round(bias / scale.astype(np.float64)).astype(np.int32), scale
            )

    def _store(self, name: str, integers: npt.NDArray[Any], scale: npt.NDArray[np.float32]) -> str:
        """Store a constant in integers, with one scale an output channel; gives the tensor that is it in float."""
        names = [f"{name}.integers", f"{name}.scale", f"{name}.zero_point"]
        values = [integers, scale, np.zeros(len(scale), integers.dtype)]
        self.added.update(zip(names, values, strict=True))
        self.nodes.append(helper.make_node("DequantizeLinear", names, [f"{name}.real"], name=f"{name}.DQ", axis=0))
        return f"{name}.real"


def _constants(model: onnx.ModelProto) -> dict[str, npt.NDArray[Any]]:
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


def _is_computed(node: onnx.NodeProto, constants: Constants) -> bool:
    if node.op_type == "Conv":
        return node.input[1] in constants
    return node.op_type in COMPUTED and not any(name in constants for name in node.input)


def _computed(model: onnx.ModelProto, constants: Constants, keep_float: Collection[str]) -> set[str]:
    end = float_end(model.graph)
    nodes = [node for node in model.graph.node if node.output[0] not in end]
    return {node.name for node in nodes if _is_computed(node, constants)} - set(keep_float)


def _quantized_tensors(model: onnx.ModelProto, constants: Constants, computed: Collection[str]) -> dict[str, str]:
    """Find the tensors that are held in integers; gives for each the tensor whose range is its own."""
    producers = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    marked: set[str] = set()
    for node in model.graph.node:
        if node.name in computed:
            marked.update(name for name in node.input if name and name not in constants)
            output = node.output[0]
            following = readers.get(output, [])
            # A ReLU is free: the integers' range ends at 0, and what is below is cut off by it.
            if len(following) == 1 and following[0].op_type == "Relu":
                output = following[0].output[0]
            marked.add(output)
    for node in reversed(model.graph.node):
        if node.op_type in MOVED and node.output[0] in marked:
            marked.add(node.input[0])
    found: dict[str, str] = {}
    for node in model.graph.node:
        for name in node.output:
            if node.op_type in MOVED and node.input[0] in found:
                found[name] = found[node.input[0]]
            elif name in marked and producers[name].op_type != "DequantizeLinear":
                found[name] = name
    return found


def _is_spatial_mean(node: onnx.NodeProto, constants: Constants) -> bool:
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    axes = constants.get(node.input[1]) if len(node.input) > 1 else None
    return axes is not None and attributes.get("keepdims", 1) == 1 and {int(axis) % 4 for axis in axes} == {2, 3}


def _activation_scale(low: float, high: float) -> Scale:
    """Spread 0 to 255 over a range that holds 0, so that 0 is one of the integers."""
    scale = np.float32((high - low) / 255) or np.float32(1)
    return np.array(scale), np.array(np.clip(round(-low / float(scale)), 0, 255), np.uint8)


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """Leave out the nodes that lead to no output."""
    wanted = set(outputs)
    kept: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]
