"""The frame graph: one ONNX file from raw grey frames to decisions, for clients in other languages.

`echoquad_export.graph.resize_graph` provides crop, split and resize. The network is the bundle's graph, unchanged. The
vote repeats `echoquad_runtime.voting` operation by operation. Input and outputs:

========================  ==================  ==========================================================================
`FRAMES` (in)             uint8 [N, H, W]     grey levels; N frames of one size, H and W at least 2
quadrant_probabilities    float32 [N, 4, C]   LA, RA, LV, RV; columns in the order of the classes
probabilities             float32 [N, C]      mean over the quadrants, for every vote rule
votes                     int64 [N, 4]        class of each quadrant
label                     int64 [N]           class of the frame by the vote rule
typicality                float32 [N]         how near the frame lies to the training frames, if the network computes it
========================  ==================  ==========================================================================
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, compose, helper

from echoquad_export.graph.onnx_graph import open_in_memory, replace_nodes
from echoquad_export.graph.resize_graph import FRAMES, Nodes, add_quadrants
from echoquad_runtime._version import __version__
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.onnx_header import CONTRACT_KEY, INPUT, OUTPUTS, TYPICALITY
from echoquad_runtime.bundle.typicality import frame_typicality
from echoquad_runtime.contract import QUADRANTS, Contract
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.engine.slot_pool import Engine, SlotPool
from echoquad_runtime.errors import BundleError, FrameError, ParityError
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.frames.reader import load_grey
from echoquad_runtime.quadrants import Grey, crop_box, frame_quadrants
from echoquad_runtime.voting import aggregate_votes
from echoquad_train.data.dataset import Split

__all__ = [
    "CLASSES_KEY",
    "FRAME_OUTPUTS",
    "MAX_GREY_DIFFERENCE",
    "FrameParity",
    "build_frame_graph",
    "load_frames",
    "make_frame_graph",
    "measure_frame_parity",
    "quadrants_part",
]

FRAME_OUTPUTS: Final = ("quadrant_probabilities", "probabilities", "votes", "label")
_TYPES: Final = (TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT64)
CLASSES_KEY: Final = "echoquad.classes"
"""Metadata key of the class names, a JSON list."""

MAX_GREY_DIFFERENCE: Final = 1
"""Allowed difference of a resized pixel in grey levels; it is 0 where Pillow and the graph round alike."""
MAX_DPROBABILITY: Final = 0.05
MAX_DTYPICALITY: Final = 0.5  # as a share of the runtime's, as in the gate of int8: one grey level may move activations

_NETWORK: Final = "network/"  # prefix of the network's names
_QUADRANTS: Final = f"{_NETWORK}{INPUT}"
_OPSET: Final = 18  # the lowest that has the operators used here


def build_frame_graph(model: bytes, contract: Contract) -> bytes:
    """Build a frame graph around a bundle's graph.

    Parameters
    ----------
    model
        The bytes of ``model.<precision>.onnx``, of any precision.
    contract
        The bundle's contract.

    Returns
    -------
    bytes
        The bytes of ``frame.<precision>.onnx``, with the opset, IR version and metadata of `model` and `CLASSES_KEY`.
        Equal arguments give equal bytes.

    Raises
    ------
    BundleError
        If the graph has another contract, or an opset before 18.
    """
    network = onnx.load_model_from_string(model)
    metadata = {item.key: item.value for item in network.metadata_props}
    if metadata.get(CONTRACT_KEY) != contract.to_json():
        raise BundleError("frame graph: the model's graph has another contract than the bundle; export it again")
    opsets = {item.domain: item.version for item in network.opset_import}
    if opsets.get("", 0) < _OPSET:
        raise BundleError(f"frame graph: the model's graph has opset {opsets.get('', 0)}; expected {_OPSET} or later")

    network = compose.add_prefix(network, _NETWORK)
    graph, classes = network.graph, len(contract.classes)
    _rename_batch(graph)
    before, after = Nodes("frame/"), Nodes("vote/")
    add_quadrants(before, contract, _QUADRANTS)
    _add_decision(after, contract, f"{_NETWORK}{OUTPUTS[1]}")
    names, shapes, types = list(FRAME_OUTPUTS), [(4, classes), (classes,), (4,), ()], [*_TYPES]
    if f"{_NETWORK}{TYPICALITY}" in [output.name for output in graph.output]:
        _add_typicality(after, f"{_NETWORK}{TYPICALITY}")
        names, shapes, types = [*names, TYPICALITY], [*shapes, ()], [*types, TensorProto.FLOAT]

    nodes = [*before.nodes, *graph.node, *after.nodes]
    constants = [*before.constants, *graph.initializer, *after.constants]
    inner = [*graph.input, *graph.value_info, *graph.output]
    outputs = [
        helper.make_tensor_value_info(name, dtype, ["N", *shape])
        for name, dtype, shape in zip(names, types, shapes, strict=True)
    ]
    frames = helper.make_tensor_value_info(FRAMES, TensorProto.UINT8, ["N", "H", "W"])
    combined = helper.make_model(
        helper.make_graph(nodes, "frame_graph", [frames], outputs, constants, value_info=inner),
        opset_imports=network.opset_import,
        ir_version=network.ir_version,
        producer_name="echoquad",
        producer_version=__version__,
    )
    helper.set_model_props(combined, {**metadata, CLASSES_KEY: json.dumps(contract.classes)})
    onnx.checker.check_model(combined, full_check=True)
    return bytes(combined.SerializeToString(deterministic=True))


def _rename_batch(graph: onnx.GraphProto) -> None:
    """Rename symbolic dimensions: the network's N counts quadrants, that of the frame graph counts frames."""
    for item in (*graph.input, *graph.value_info, *graph.output):
        for dimension in item.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_param = f"{_NETWORK}{dimension.dim_param}"


def _add_decision(nodes: Nodes, contract: Contract, probabilities: str) -> None:
    """Add the vote of `echoquad_runtime.voting.aggregate_votes` on probabilities, float32 [4 N, C]."""
    each, mean_name, votes_name, label = FRAME_OUTPUTS
    classes, count = len(contract.classes), len(QUADRANTS)
    nodes("Reshape", probabilities, [-1, count, classes], output=each)
    votes = nodes("ArgMax", each, output=votes_name, axis=2, keepdims=0)
    doubles = nodes("Cast", each, to=TensorProto.DOUBLE)
    quadrants = [nodes("Squeeze", part, [1]) for part in nodes.split(doubles, [1] * count, count, axis=1)]
    mean = nodes("Mul", _sum(nodes, quadrants), 1 / count)
    nodes("Cast", mean, output=mean_name, to=TensorProto.FLOAT)
    score = mean
    if contract.vote == "weighted":
        weights = np.asarray(contract.vote_weights) / np.sum(contract.vote_weights)
        score = _sum(nodes, [nodes("Mul", *pair) for pair in zip(quadrants, weights.tolist(), strict=True)])
    elif contract.vote == "majority":
        mine = nodes("Equal", nodes("Unsqueeze", votes, [2]), list(range(classes)))
        counts = nodes("ReduceSum", nodes("Cast", mine, to=TensorProto.INT64), [1], keepdims=0)
        tied = nodes("Equal", counts, nodes("ReduceMax", counts, [1]))
        score = nodes("Where", tied, mean, -1.0)
    nodes("ArgMax", score, output=label, axis=1, keepdims=0)


def _add_typicality(nodes: Nodes, scores: str) -> None:
    """Add `echoquad_runtime.bundle.typicality.frame_typicality` of scores at every position, float32 [4 N, 4]."""
    count = len(QUADRANTS)
    distances = nodes("Reciprocal", nodes("Reshape", scores, [-1, count, count]))
    own = nodes("Mul", distances, np.eye(count, dtype=np.float32))
    mean = nodes("Mul", nodes("ReduceSum", own, [1, 2], keepdims=0), np.array(1 / count, np.float32))
    nodes("Reciprocal", mean, output=TYPICALITY)


def _sum(nodes: Nodes, terms: list[str]) -> str:
    """Add from left to right, as numpy does, so that a tie stays a tie."""
    total = terms[0]
    for term in terms[1:]:
        total = nodes("Add", total, term)
    return total


@dataclass(frozen=True, slots=True)
class FrameParity:
    """Comparison of a frame graph with the runtime; the field names are keys of the manifest.

    Attributes
    ----------
    precision
        Precision of the graph.
    frames
        Number of frames.
    max_grey_difference
        Largest |difference| of a resized pixel, in grey levels of 255.
    max_abs_dprobability
        Largest |difference| of a probability of a quadrant or a frame.
    flips
        Number of frames with a changed decision or a changed quadrant vote.
    max_rel_dtypicality
        Largest |difference| of a frame's typicality, as a share of the runtime's; None if there is no such score.
    """

    precision: str
    frames: int
    max_grey_difference: int
    max_abs_dprobability: float
    flips: int
    max_rel_dtypicality: float | None = None

    def require(self) -> None:
        """Raise ParityError if a figure exceeds its bound; no decision may change."""
        limits = [
            ("grey levels", self.max_grey_difference, MAX_GREY_DIFFERENCE),
            ("|dprobability|", self.max_abs_dprobability, MAX_DPROBABILITY),
            ("changed decisions", self.flips, 0),
            ("relative |dtypicality|", self.max_rel_dtypicality or 0, MAX_DTYPICALITY),
        ]
        violations = [f"{name} {value:.3g} > {limit:.3g}" for name, value, limit in limits if not value <= limit]
        if violations:
            raise ParityError(
                f"parity: the {self.precision} frame graph does not decide as the runtime does on {self.frames} "
                f"frames: {'; '.join(violations)}; no bundle was written"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest's entry."""
        return {key: value for key, value in asdict(self).items() if key != "precision" and value is not None}


def measure_frame_parity(frame_graph: bytes, engine: Engine, frames: Iterable[Grey]) -> FrameParity:
    """Compare a frame graph with the runtime on the CPU.

    Parameters
    ----------
    frame_graph
        The ONNX file from `build_frame_graph`.
    engine
        The same network, run by the runtime.
    frames
        uint8 [H, W] each, at least 2 x 2, at full size; consumed one at a time.
    """
    contract, slots = engine.contract, SlotPool(engine, 1)
    session, resizing = open_in_memory(frame_graph), open_in_memory(quadrants_part(frame_graph))
    count = grey = flips = 0
    dprobability, dtypicality = 0.0, None
    for frame in frames:
        quadrants = frame_quadrants(frame, contract)
        output = slots.run(quadrants[None], 1)
        (expected,) = output.probabilities
        decision = aggregate_votes(expected[None], contract.vote, contract.vote_weights)
        (resized,) = resizing.run([_QUADRANTS], {FRAMES: frame[None]})
        each, mean, votes, label = session.run(FRAME_OUTPUTS, {FRAMES: frame[None]})
        if output.typicality is not None:
            (found,) = session.run([TYPICALITY], {FRAMES: frame[None]})
            ratio = np.nan_to_num(np.abs(found / frame_typicality(output.typicality) - 1), nan=1e30, posinf=1e30)
            dtypicality = max(dtypicality or 0.0, float(ratio.max()))
        count += 1
        grey = max(grey, int(np.abs(resized.astype(np.int16) - quadrants).max()))
        for found, wanted in ((each, expected), (mean, decision.probabilities)):
            # NaN must not count as no difference, and JSON has no infinity.
            dprobability = max(dprobability, float(np.nan_to_num(np.abs(found - wanted), nan=1e30, posinf=1e30).max()))
        flips += bool((votes != decision.quadrant_labels).any() or (label != decision.labels).any())
    return FrameParity(engine.precision, count, grey, dprobability, flips, dtypicality)


def make_frame_graph(bundle: Bundle, precision: str, frames: Iterable[Grey]) -> tuple[bytes, FrameParity]:
    """Build the frame graph of a precision and compare it on the golden frames and on `frames`, uint8 [H, W].

    Raises
    ------
    ParityError
        If it does not decide as the runtime does.
    """
    graph = build_frame_graph(bundle.read_model(precision), bundle.contract)
    engine = OnnxEngine(bundle, precision=precision, device="cpu")
    parity = measure_frame_parity(graph, engine, chain(bundle.read_golden().frames, frames))
    parity.require()
    return graph, parity


def load_frames(split: Split, contract: Contract) -> Iterator[Grey]:
    """Yield the frames of a split, uint8 [H, W], at full size; skip those that cannot be read or split."""
    for file in split.files():
        if isinstance(file, Failure):
            continue
        try:
            frame = load_grey(file)
            crop_box(frame.shape[1], frame.shape[0], contract.keep)
        except FrameError:  # counted by `load_quadrants`
            continue
        yield frame


def quadrants_part(frame_graph: bytes) -> bytes:
    """Return the part of a frame graph that computes the quadrants, as an ONNX file."""
    model = onnx.load_model_from_string(frame_graph)
    graph = model.graph
    end = next(index for index, node in enumerate(graph.node) if _QUADRANTS in node.output)
    output = next(item for item in graph.value_info if item.name == _QUADRANTS)
    del graph.output[:]
    graph.output.append(output)
    replace_nodes(graph, graph.node[: end + 1])
    return bytes(model.SerializeToString())
