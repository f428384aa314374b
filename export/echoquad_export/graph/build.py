"""Export of a PyTorch model to an ONNX graph from 8-bit quadrants to logits, probabilities and typicality."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Final

import onnx
import torch
from torch import Tensor, nn

from echoquad_export.graph.activation_map import add_activation_maps
from echoquad_export.graph.channel_folding import fold_first_convolution
from echoquad_export.graph.typicality import FeatureTap, Typicality
from echoquad_runtime._version import __version__
from echoquad_runtime.bundle.onnx_header import CONTRACT_HASH_KEY, CONTRACT_KEY, INPUT, OUTPUTS, TYPICALITY
from echoquad_runtime.contract import Contract
from echoquad_train.networks.classifier import QuadrantClassifier
from echoquad_train.networks.ensemble_classifier import EnsembleClassifier, views_of

__all__ = ["IR_VERSION", "OPSET", "DeployedClassifier", "DeployedEnsemble", "build_graph"]

OPSET: Final = 18
IR_VERSION: Final = 10
"""The IR version of ONNX 1.16, which onnxruntime reads from 1.18 on. Pinned for older installations."""


class DeployedClassifier(nn.Module):
    """The deployed form of a classifier: one input channel; normalisation, temperature and softmax inside.

    Parameters
    ----------
    model
        The trained model; it is copied, not changed.
    contract
        Supplies mean, standard deviation and temperature.
    typicality
        The typicality score to compute as a third output; None for none.
    """

    def __init__(self, model: QuadrantClassifier, contract: Contract, typicality: Typicality | None = None) -> None:
        super().__init__()
        self.typicality = typicality
        self.backbone = fold_first_convolution(copy.deepcopy(model.backbone))
        self.parts = model.parts
        self.head = copy.deepcopy(model.head)
        self.mean, self.std, self.temperature = contract.mean, contract.std, contract.temperature
        self.eval()

    def logits(self, quadrants: Tensor) -> Tensor:
        """Return logits, float32 [N, C], for quadrants uint8 [N, 1, S, S]."""
        logits: Tensor = self.head(self.backbone((quadrants.float() / 255 - self.mean) / self.std))
        return logits

    def logits_and_features(self, quadrants: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, float32 [N, C], and the features that the typicality reads, [N, D]."""
        with FeatureTap(self.backbone, self.parts) as tap:
            logits = self.logits(quadrants)
        return logits, tap.features

    def forward(self, quadrants: Tensor) -> tuple[Tensor, ...]:
        """Return logits and probabilities, float32 [N, C], and typicality [N, 4], for quadrants uint8 [N, 1, S, S]."""
        if self.typicality is None:
            return _answers(self.logits(quadrants), self.temperature)
        logits, features = self.logits_and_features(quadrants)
        return (*_answers(logits, self.temperature), self.typicality([features]))


class DeployedEnsemble(nn.Module):
    """The deployed form of an ensemble: its deployed members, the mirrored views and the combination inside.

    Parameters
    ----------
    model
        The ensemble; its members are copied, not changed.
    contract
        The ensemble's contract; its temperature applies to the combined logits.
    typicality
        The typicality score to compute as a third output; None for none.
    """

    def __init__(self, model: EnsembleClassifier, contract: Contract, typicality: Typicality | None = None) -> None:
        super().__init__()
        self.typicality = typicality
        members = [member for member in model.members if isinstance(member, QuadrantClassifier)]
        self.members = nn.ModuleList(DeployedClassifier(member, contract) for member in members)
        self.join, self.flip, self.temperature = model.join, model.flip_tta, contract.temperature
        self.eval()

    def forward(self, quadrants: Tensor) -> tuple[Tensor, ...]:
        """Return logits and probabilities, float32 [N, C], and typicality [N, 4], for quadrants uint8 [N, 1, S, S]."""
        seen = views_of(quadrants, self.flip)
        members = [member for member in self.members if isinstance(member, DeployedClassifier)]
        if self.typicality is None:
            return _answers(self.join([member.logits(seen) for member in members]), self.temperature)
        logits, features = zip(*(member.logits_and_features(seen) for member in members), strict=True)
        own = [part[: quadrants.shape[0]] for part in features]  # without flipped views
        return (*_answers(self.join(logits), self.temperature), self.typicality(own))


def _answers(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return logits and probabilities."""
    return logits, torch.softmax(logits if temperature == 1 else logits / temperature, dim=1)


def build_graph(
    model: QuadrantClassifier | EnsembleClassifier, contract: Contract, typicality: Typicality | None = None
) -> bytes:
    """Export the model of a run or an ensemble to ONNX, in float32.

    Returns
    -------
    bytes
        The ONNX file, with weights: input `INPUT` uint8 [N, 1, S, S], outputs `OUTPUTS` float32 [N, C], then
        `TYPICALITY` float32 [N, 4] if `typicality` is given and, where the network allows it, class activation maps.
        The metadata holds the contract and its hash.
    """
    size = contract.input_size
    # With a batch of one, the exporter would make N the constant 1.
    sample = torch.zeros(2, 1, size, size, dtype=torch.uint8)
    deployed: nn.Module = (
        DeployedEnsemble(model.cpu(), contract, typicality)
        if isinstance(model, EnsembleClassifier)
        else DeployedClassifier(model.cpu(), contract, typicality)
    )
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)  # it reports optional packages that are missing and not needed here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside torch
            program = torch.onnx.export(
                deployed,
                (sample,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[*OUTPUTS, TYPICALITY][: 2 if typicality is None else 3],
                dynamic_shapes={INPUT: {0: torch.export.Dim("N", min=1)}},
                external_data=False,
                verbose=False,
            )
    finally:
        exporter_log.setLevel(level)
    assert program is not None
    proto = program.model_proto
    add_activation_maps(proto.graph)
    _remove_debug_info(proto)
    proto.ir_version = IR_VERSION
    proto.producer_name, proto.producer_version = "echoquad", __version__
    metadata = {CONTRACT_KEY: contract.to_json(), CONTRACT_HASH_KEY: contract.sha256}
    onnx.helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto, full_check=True)
    return bytes(proto.SerializeToString(deterministic=True))


def _remove_debug_info(proto: onnx.ModelProto) -> None:
    """Remove the exporter's stack traces, which contain paths of the exporting machine."""
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
