"""Static quantization to 8-bit integers in QDQ form (QuantizeLinear and DequantizeLinear around float operators).

Activations are uint8 with one scale per tensor. Weights are int8 with one scale per output channel and zero point 0:
x86 and Arm have instructions for this pair (int8 activations take three times as long on x86). onnxruntime fuses each
operator and the Q/DQ nodes around it into an integer kernel where it has one.

onnxruntime's `QDQQuantizer`, the second half of its ``quantize_static``, writes the graph. The first half, the
calibration, is `Ranges`: ``quantize_static`` calibrates anew at each call, holds all activations in memory for
percentiles, and writes to standard output.

B. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
arXiv:1712.05877.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx

from echoquad_export.graph.first_conv import integer_first_conv
from echoquad_export.graph.float_tail import float_tail
from echoquad_export.graph.onnx_graph import attributes, constants, float_tensors, is_spatial_mean
from echoquad_export.precision.bias_correction import correct_biases
from echoquad_export.precision.calibration_set import Ranges
from echoquad_runtime.bundle.onnx_header import OUTPUTS
from echoquad_runtime.contract import Contract
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime

__all__ = ["activation_tensors", "biased_convolutions", "layers", "prepare", "quantize"]

COMPUTED: Final = ("Conv", "Add", "Mul", "GlobalAveragePool", "Sigmoid")
"""Operators for which onnxruntime has integer kernels."""

FOLLOWING: Final = ("Relu", "Clip", "MaxPool", "Transpose", "Reshape")
"""Operators that become part of the integer operator before them, or that move its integers unchanged."""


def prepare(graph: bytes, contract: Contract, *, space_to_depth: bool = True) -> onnx.ModelProto:
    """Rewrite an exported float32 graph into the form that is quantized; it still computes in float32.

    Normalisation and first convolution begin with integers, spatial means become poolings, and each node has a unique
    name; a convolution is named after its weight. For `space_to_depth` see `integer_first_conv`.
    """
    model = integer_first_conv(onnx.load_from_string(graph), contract, space_to_depth=space_to_depth)
    values = constants(model.graph)
    for index, node in enumerate(model.graph.node):
        if is_spatial_mean(node, values) and attributes(node).get("keepdims", 1):
            node.op_type = "GlobalAveragePool"
            del node.input[1:], node.attribute[:]
        if node.op_type == "Conv":
            node.name = node.input[1].removesuffix(".weight").removeprefix("backbone.")
        else:
            node.name = f"{node.op_type}.{index}"
    return model


def layers(model: onnx.ModelProto) -> list[tuple[str, ...]]:
    """Return the names of the nodes that can be quantized, by layer: a convolution and the operators after it."""
    found: list[list[str]] = []
    for node in _quantizable(model):
        if node.op_type in COMPUTED:
            if node.op_type == "Conv" or not found:
                found.append([])
            found[-1].append(node.name)
    return [tuple(names) for names in found]


def biased_convolutions(model: onnx.ModelProto) -> list[str]:
    """Return the names of the convolutions whose biases need correction: all, if any convolution is depthwise.

    Without depthwise convolutions the correction does not pay: the logits of a ResNet-18 err by 0.0063 with it, by
    0.0067 without.
    """
    found = [node for node in _quantizable(model) if node.op_type == "Conv"]
    depthwise = any(attributes(node).get("group", 1) > 1 for node in found)
    return [node.name for node in found] if depthwise else []


def activation_tensors(model: onnx.ModelProto) -> list[str]:
    """Return the names of the tensors whose ranges `quantize` needs, in the graph's order."""
    floats = float_tensors(model)
    floats -= {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    names = dict.fromkeys(name for node in _quantizable(model) for name in (*node.input, *node.output))
    return [name for name in names if name in floats]


def quantize(
    model: onnx.ModelProto,
    ranges: Ranges,
    *,
    errors: Mapping[str, npt.NDArray[np.float64]] | None = None,
    percentile: float | None = None,
    keep_float: Collection[str] = (),
) -> bytes:
    """Quantize a prepared graph.

    Parameters
    ----------
    model
        A graph from `prepare`; it is not changed.
    ranges
        Ranges of the `activation_tensors` on the calibration set.
    errors
        Mean rounding errors of the `biased_convolutions`, to subtract from the biases. None leaves these as they are.
    percentile
        See `Ranges.range`.
    keep_float
        Names of nodes that stay in float32.

    Returns
    -------
    bytes
        The ONNX file, with the model's inputs, outputs and metadata. Equal arguments give equal bytes.
    """
    load_onnxruntime()  # turns telemetry off before anything else imports onnxruntime
    from onnxruntime.quantization import QDQQuantizer, QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.quant_utils import add_infer_metadata

    bounds = {name: ranges.range(name, percentile) for name in activation_tensors(model)}
    model = correct_biases(model, {name: error for name, error in (errors or {}).items() if name not in keep_float})
    bounds[OUTPUTS[1]] = (0.0, 1.0)  # onnxruntime 1.20 needs the range of each Softmax
    values = constants(model.graph)
    for node in model.graph.node:
        # onnxruntime before 1.22 quantizes these again: the same scale and zero point make that a no-op.
        if node.op_type == "DequantizeLinear":
            scale, zero = (float(values[name]) for name in node.input[1:])
            bounds[node.output[0]] = (-zero * scale, (255 - zero) * scale)
    typed = onnx.shape_inference.infer_shapes(model)
    add_infer_metadata(typed)  # otherwise the quantizer infers shapes again, through a temporary file
    with _silent_root_logger():
        quantizer = QDQQuantizer(
            typed,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=TensorsData(
                CalibrationMethod.MinMax,
                {
                    name: TensorData(lowest=np.float32(low), highest=np.float32(high))
                    for name, (low, high) in bounds.items()
                },
            ),
            nodes_to_quantize=[node.name for node in _quantizable(model) if node.name not in keep_float],
            nodes_to_exclude=[],
            op_types_to_quantize=[*COMPUTED, *FOLLOWING],
            extra_options={},
        )
        quantizer.quantize_model()
    quantizer.model.topological_sort()
    result = onnx.ModelProto()
    result.CopyFrom(model)
    result.graph.CopyFrom(quantizer.model.graph())
    del result.graph.value_info[:]
    onnx.checker.check_model(result, full_check=True)
    return bytes(result.SerializeToString(deterministic=True))


def _quantizable(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the nodes that can be part of the integer graph: all from the last pooling on stay in float32."""
    initializers = {item.name for item in model.graph.initializer}
    tail = float_tail(model.graph)

    def fits(node: onnx.NodeProto) -> bool:
        if node.op_type == "Conv":
            return node.input[1] in initializers
        return node.op_type in FOLLOWING or (node.op_type in COMPUTED and initializers.isdisjoint(node.input))

    return [node for node in model.graph.node if node.output[0] not in tail and fits(node)]


@contextmanager
def _silent_root_logger() -> Iterator[None]:
    """Silence onnxruntime's quantizer: it logs to the root logger, and without a handler configures one for good."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
