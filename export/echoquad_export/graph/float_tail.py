"""The end of a graph: what is computed in float32 in every precision, since it costs nothing and decisions are close.

It begins at the pooling behind the last feature map, or at the head's linear layer where there is no such pooling; of
an ensemble, at those of each member, and what joins the members belongs to it.
"""

from __future__ import annotations

import onnx

from echoquad_export.graph.activation_map import last_pooling
from echoquad_runtime.bundle.onnx_header import CAM, OUTPUTS

__all__ = ["float_end"]

_HEAD = "Gemm"


def float_end(graph: onnx.GraphProto) -> set[str]:
    """Name the tensors that a graph's end computes; its nodes are in an order in which it can be computed."""
    producers = {name: node for node in graph.node for name in node.output}
    found: set[str] = {CAM}
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
    for node in graph.node:  # what lies between pooling and head, and what follows the logits
        if found.intersection(node.input):
            found.update(node.output)
    return found
