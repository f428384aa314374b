"""Half precision: float16 weights and activations, for GPUs with float16 units.

The normalisation of grey levels and everything from the last pooling on stay in float32: they cost next to nothing, and
decisions depend on small differences there. Layer normalisation stays in float32 too: its squares overflow float16, and
onnxruntime's float16 kernel returns different results from its second run on (onnxruntime issue 27768).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from echoquad_export.graph.float_tail import float_tail
from echoquad_export.graph.onnx_graph import float_tensors, replace_nodes

__all__ = ["to_fp16"]

_FLOAT32_OPERATORS: Final = ("LayerNormalization",)
_MOVES: Final = ("Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that only move values keep their input's type: with a cast before a Transpose that a product follows,
onnxruntime 1.32 crashes when it opens the graph on a CPU."""
_LARGEST: Final = float(np.finfo(np.float16).max)


def to_fp16(graph: bytes) -> bytes:
    """Convert an exported float32 graph to float16.

    Parameters
    ----------
    graph
        The ONNX file from `echoquad_export.graph.build.build_graph`.

    Returns
    -------
    bytes
        The ONNX file, with the same inputs, outputs and metadata; float16 from the first convolution to the last
        pooling. Weights beyond float16's range are clipped to it: the parity check decides whether that matters.
    """
    model = onnx.load_from_string(graph)
    nodes = list(model.graph.node)
    begin, tail = [node.op_type for node in nodes].index("Conv"), float_tail(model.graph)
    initializers = {item.name: item for item in model.graph.initializer}
    floats = float_tensors(model)  # a transformer also computes sizes, which stay integers
    converted: set[str] = set()  # tensors that are float16 now
    converted_initializers: set[str] = set()
    written: list[onnx.NodeProto] = []
    casts: dict[tuple[str, int], str] = {}

    def cast(name: str, dtype: int) -> str:
        """Return the name of a tensor in another type; all its readers share one cast."""
        key = (name, dtype)
        if key not in casts:
            casts[key] = f"{name}.{'half' if dtype == TensorProto.FLOAT16 else 'single'}"
            written.append(helper.make_node("Cast", [name], [casts[key]], name=f"{casts[key]}.Cast", to=dtype))
        return casts[key]

    for index, node in enumerate(nodes):
        moves = node.op_type in _MOVES and node.input[0] not in converted
        inside = node.op_type not in _FLOAT32_OPERATORS and index >= begin and node.output[0] not in tail and not moves
        for position, name in enumerate(node.input):
            if name in initializers:
                if inside and initializers[name].data_type == TensorProto.FLOAT:
                    converted_initializers.add(name)
                    node.input[position] = f"{name}.half"
            elif inside and name in floats and name not in converted:
                node.input[position] = cast(name, TensorProto.FLOAT16)
            elif not inside and name in converted:
                node.input[position] = cast(name, TensorProto.FLOAT)
        if inside:
            converted.update(floats.intersection(node.output))
        written.append(node)

    for name in sorted(converted_initializers):
        value = np.clip(numpy_helper.to_array(initializers[name]), -_LARGEST, _LARGEST).astype(np.float16)
        model.graph.initializer.append(numpy_helper.from_array(value, f"{name}.half"))
    replace_nodes(model.graph, written)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))
