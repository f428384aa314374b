"""The float tail of a graph: its last nodes, which stay in float32 in every precision.

They cost next to nothing, and decisions depend on small differences there. The tail begins at the pooling after the
last feature map, or at the head's linear layer if there is no such pooling. In an ensemble it begins there in each
member and includes the nodes that combine the members. The typicality score is part of it.
"""

from __future__ import annotations

import onnx

from echoquad_export.graph.activation_map import last_pooling
from echoquad_export.graph.typicality import typicality_branch
from echoquad_runtime.bundle.onnx_header import CAM, OUTPUTS

__all__ = ["float_tail"]

_HEAD = "Gemm"


def float_tail(graph: onnx.GraphProto) -> set[str]:
    """Return the names of the tensors that the tail computes; the nodes must be sorted topologically."""
    producers = {name: node for node in graph.node for name in node.output}
    found: set[str] = {CAM, *typicality_branch(graph)}
    waiting = [OUTPUTS[0]]
    while waiting:
        node = producers.get(waiting.pop())
        if node is None or node.output[0] in found:
            continue
        found.update(node.output)
        if node.op_type != _HEAD:
            waiting += node.input
        elif (pooling := last_pooling(graph, node.output[0])) is not None:
            found.update(pooling.output)
    for node in graph.node:  # the nodes between pooling and head, and those after the logits
        if found.intersection(node.input):
            found.update(node.output)
    return found
