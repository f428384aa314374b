"""The graph: from 8-bit quadrants to logits and probabilities, with all that lies between inside it."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable
from typing import Final

import onnx
import torch
from torch import Tensor, nn

from echoquad_export.graph.activation_map import add_cam
from echoquad_export.graph.channel_folding import fold_first_convolution
from echoquad_runtime._version import __version__
from echoquad_runtime.bundle.onnx_header import CONTRACT_HASH_KEY, CONTRACT_KEY, INPUT, OUTPUTS
from echoquad_runtime.contract import Contract
from echoquad_train.networks.classifier import QuadrantClassifier
from echoquad_train.networks.ensemble_classifier import EnsembleClassifier, views_of

__all__ = ["IR_VERSION", "OPSET", "DeployedClassifier", "DeployedEnsemble", "build_graph", "replace_nodes"]

OPSET: Final = 18
IR_VERSION: Final = 10
"""ONNX 1.16's; onnxruntime reads it from 1.18 on. Pinned, so that a newer exporter does not shut out an older cart."""


class DeployedClassifier(nn.Module):
    """The classifier as it is deployed: one input channel, normalisation, temperature and softmax inside.

    Parameters
    ----------
    model
        The trained model; it is copied, not changed.
    contract
        Gives mean, standard deviation and temperature.
    """

    def __init__(self, model: QuadrantClassifier, contract: Contract) -> None:
        super().__init__()
        self.backbone = fold_first_convolution(copy.deepcopy(model.backbone))
        self.head = copy.deepcopy(model.head)
        self.mean, self.std, self.temperature = contract.mean, contract.std, contract.temperature
        self.eval()

    def forward(self, quadrants: Tensor) -> tuple[Tensor, Tensor]:
        """Give logits and probabilities, float32 [N, C], for uint8 [N, 1, S, S]."""
        x = (quadrants.float() / 255 - self.mean) / self.std
        logits = self.head(self.backbone(x))
        scaled = logits if self.temperature == 1 else logits / self.temperature
        return logits, torch.softmax(scaled, dim=1)


class DeployedEnsemble(nn.Module):
    """An ensemble as it is deployed: its members as they would be, flips and vote inside.

    Parameters
    ----------
    model
        The ensemble; its members are copied, not changed.
    contract
        The ensemble's own, whose temperature comes after the vote.
    """

    def __init__(self, model: EnsembleClassifier, contract: Contract) -> None:
        super().__init__()
        members = [member for member in model.members if isinstance(member, QuadrantClassifier)]
        self.members = nn.ModuleList(DeployedClassifier(member, contract) for member in members)
        self.join, self.flip, self.temperature = model.join, model.flip_tta, contract.temperature
        self.eval()

    def forward(self, quadrants: Tensor) -> tuple[Tensor, Tensor]:
        """Give logits and probabilities, float32 [N, C], for uint8 [N, 1, S, S]."""
        seen = views_of(quadrants, self.flip)
        logits = self.join([member(seen)[0] for member in self.members])
        scaled = logits if self.temperature == 1 else logits / self.temperature
        return logits, torch.softmax(scaled, dim=1)


def build_graph(model: QuadrantClassifier | EnsembleClassifier, contract: Contract) -> bytes:
    """Export a run's or an ensemble's model to ONNX: float32, one file, any number of quadrants.

    Returns
    -------
    bytes
        The ONNX file: `INPUT` uint8 [N, 1, S, S] in, `OUTPUTS` float32 [N, C] out, contract and hash in its metadata.
    """
    size = contract.input_size
    # With a single sample the exporter would take N for the constant 1.
    sample = torch.zeros(2, 1, size, size, dtype=torch.uint8)
    deployed: nn.Module = (
        DeployedEnsemble(model.cpu(), contract)
        if isinstance(model, EnsembleClassifier)
        else DeployedClassifier(model.cpu(), contract)
    )
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)  # it reports optional packages that are missing; nothing here needs them
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations, which nobody here can act on
            program = torch.onnx.export(
                deployed,
                (sample,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                dynamic_shapes={INPUT: {0: torch.export.Dim("N", min=1)}},
                external_data=False,
                verbose=False,
            )
    finally:
        exporter_log.setLevel(level)
    assert program is not None
    proto = program.model_proto
    add_cam(proto.graph)
    _clean(proto)
    proto.ir_version = IR_VERSION
    proto.producer_name, proto.producer_version = "echoquad", __version__
    metadata = {CONTRACT_KEY: contract.to_json(), CONTRACT_HASH_KEY: contract.sha256}
    onnx.helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto, full_check=True)
    return bytes(proto.SerializeToString(deterministic=True))


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Give a graph other nodes, and take out the constants that none of them reads and what was noted of shapes."""
    chosen = list(nodes)
    used = {name for node in chosen for name in node.input}
    constants = [item for item in graph.initializer if item.name in used]
    for field in (graph.node, graph.initializer, graph.value_info):
        del field[:]
    graph.node.extend(chosen)
    graph.initializer.extend(constants)


def _clean(proto: onnx.ModelProto) -> None:
    """Take out the exporter's notes: stack traces with paths of the machine that exported, of no use to a runtime."""
    proto.doc_string = ""
    proto.graph.doc_string = ""
    del proto.functions[:]
    for group in (
        proto.graph.node,
        proto.graph.initializer,
        proto.graph.input,
        proto.graph.output,
        proto.graph.value_info,
    ):
        for item in group:
            item.doc_string = ""
            del item.metadata_props[:]
    del proto.graph.metadata_props[:]
