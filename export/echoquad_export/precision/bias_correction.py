"""Bias correction: take back the mean error that rounding the weights adds to a convolution.

Rounded weights W + D yield W x + D x. The mean of D x over the calibration set is a constant per output channel, so it
can be subtracted from the bias, at no cost at run time. Depthwise convolutions gain most: a filter of nine weights has
few rounding errors, which do not average out.

M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv:1906.04721, section
4.2; here the mean is measured on the calibration set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from echoquad_export.graph.onnx_graph import attributes, constants, open_in_memory, replace_nodes
from echoquad_runtime.bundle.onnx_header import INPUT

__all__ = ["correct_biases", "mean_rounding_errors", "rounded"]

WEIGHT_MAX = 127  # of int8, symmetric around 0


def rounded(weight: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Return the values that weights [O, I, H, W] take in int8, with one scale per output channel."""
    exact = weight.astype(np.float64)
    scale = np.abs(exact).max(axis=(1, 2, 3), keepdims=True) / WEIGHT_MAX
    scale[scale == 0] = 1
    return np.asarray(np.rint(exact / scale) * scale)


def mean_rounding_errors(
    model: onnx.ModelProto, names: Iterable[str], quadrants: npt.NDArray[np.uint8]
) -> dict[str, npt.NDArray[np.float64]]:
    """Return the mean error that rounding its weights adds to each output channel of a convolution.

    Parameters
    ----------
    model
        A graph from `echoquad_export.precision.quantize.prepare`.
    names
        Names of convolutions whose weights are initializers.
    quadrants
        The calibration set, uint8 [F, 4, S, S].

    Returns
    -------
    dict
        float64 [O] by the name of the convolution.
    """
    wanted, values = set(names), constants(model.graph)
    if not wanted:
        return {}
    convolutions = {node.name: node for node in model.graph.node if node.name in wanted}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    outputs: dict[str, str] = {}
    for node in convolutions.values():
        weight, error, product = values[node.input[1]], f"{node.name}.error", f"{node.name}.error.product"
        outputs[node.name] = f"{node.name}.error.mean"
        probe.graph.initializer.append(numpy_helper.from_array((rounded(weight) - weight).astype(np.float32), error))
        # The same convolution over the errors alone: padding and stride count as in the graph.
        convolution = helper.make_node("Conv", [node.input[0], error], [product], **attributes(node))
        probe.graph.node.append(convolution)
        probe.graph.node.append(helper.make_node("GlobalAveragePool", [product], [outputs[node.name]]))
        probe.graph.output.append(helper.make_tensor_value_info(outputs[node.name], onnx.TensorProto.FLOAT, None))
    session = open_in_memory(probe.SerializeToString())
    totals = {name: np.zeros(len(values[node.input[1]])) for name, node in convolutions.items()}
    for frame in quadrants:
        found = session.run(list(outputs.values()), {INPUT: frame[:, None]})
        for name, value in zip(outputs, found, strict=True):
            totals[name] += value.mean(axis=(0, 2, 3), dtype=np.float64)
    return {name: total / len(quadrants) for name, total in totals.items()}


def correct_biases(model: onnx.ModelProto, errors: Mapping[str, npt.NDArray[np.float64]]) -> onnx.ModelProto:
    """Return a copy of a graph with the mean errors, by the name of the convolution, subtracted from its biases."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    if not errors:
        return result
    values = constants(model.graph)
    for node in result.graph.node:
        if node.name in errors:
            bias = values[node.input[2]] if len(node.input) > 2 else np.float32(0)
            name = f"{node.name}.corrected_bias"  # another convolution may share the bias
            corrected = (bias - errors[node.name]).astype(np.float32)
            result.graph.initializer.append(numpy_helper.from_array(corrected, name))
            node.input[2:] = [name]
    replace_nodes(result.graph, list(result.graph.node))
    return result
