"""Half precision: float16 weights and activations, for GPUs, which have units of their own for it.

Grey levels are still normalised in float32, and all from the last pooling on is still computed in it: it costs nothing,
and it is there that decisions are close. So are layer normalisations, whose squares overflow float16, and whose float16
kernel in onnxruntime gives other answers from its second run on (its issue 27768).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from echoquad_export.graph.build import replace_nodes
from echoquad_export.graph.float_tail import float_end

__all__ = ["to_fp16"]

_KEPT: Final = ("LayerNormalization",)
_MOVED: Final = ("Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Values that are only moved keep their type: cast before a transposition that a product follows, the graph makes
onnxruntime 1.32 crash as it opens it on a CPU."""
_LARGEST: Final = float(np.finfo(np.float16).max)


def to_fp16(graph: bytes) -> bytes:
    """Convert an exported float32 graph.

    Parameters
    ----------
    graph
        As `echoquad_export.graph.build.build_graph` makes it.

    Returns
    -------
    bytes
        The ONNX file: inputs, outputs and metadata are the same; from the first convolution to the last linear layer
        it is float16. Weights beyond float16's range are cut to it: parity judges what comes of that.
    """
    model = onnx.load_from_string(graph)
    nodes = list(model.graph.node)
    begin, single = [node.op_type for node in nodes].index("Conv"), float_end(model.graph)
    constants = {item.name: item for item in model.graph.initializer}
    # Sizes are computed too, in a transformer: they are integers and stay so.
    known = onnx.shape_inference.infer_shapes(model).graph.value_info
    floats = {item.name for item in known if item.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    halved: set[str] = set()  # tensors that are float16 now
    half_constants: set[str] = set()
    written: list[onnx.NodeProto] = []
    casts: dict[tuple[str, int], str] = {}

    def cast(name: str, kind: int) -> str:
        """Name `name` in another type, by one cast however many read it."""
        key = (name, kind)
        if key not in casts:
            casts[key] = f"{name}.{'half' if kind == onnx.TensorProto.FLOAT16 else 'single'}"
            written.append(helper.make_node("Cast", [name], [casts[key]], name=f"{casts[key]}.Cast", to=kind))
        return casts[key]

    for index, node in enumerate(nodes):
        moved = node.op_type in _MOVED and node.input[0] not in halved
        inside = index >= begin and node.output[0] not in single and node.op_type not in _KEPT and not moved
        for position, name in enumerate(node.input):
            if name in constants:
                if inside and constants[name].data_type == onnx.TensorProto.FLOAT:
                    half_constants.add(name)
                    node.input[position] = f"{name}.half"
            elif inside and name in floats and name not in halved:
                node.input[position] = cast(name, onnx.TensorProto.FLOAT16)
            elif not inside and name in halved:
                node.input[position] = cast(name, onnx.TensorProto.FLOAT)
        if inside:
            halved.update(floats.intersection(node.output))
        written.append(node)

    for name in sorted(half_constants):
        value = np.clip(numpy_helper.to_array(constants[name]), -_LARGEST, _LARGEST).astype(np.float16)
        model.graph.initializer.append(numpy_helper.from_array(value, f"{name}.half"))
    replace_nodes(model.graph, written)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))
