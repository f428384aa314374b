"""Check of a frame graph before Triton gets it: what it takes and returns, its decisions, and its batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from echoquad_runtime.bundle.onnx_header import (
    CONTRACT_HASH_KEY,
    CONTRACT_KEY,
    TYPICALITY,
    GraphHeader,
    ValueInfo,
    read_graph_header,
)
from echoquad_runtime.contract import QUADRANTS, Contract
from echoquad_runtime.errors import BundleError, ParityError

if TYPE_CHECKING:
    from echoquad_runtime.predict.prediction import Prediction
    from echoquad_runtime.quadrants import Grey

__all__ = ["FRAMES", "SCORES", "FrameGraph", "batches_agree", "check_decisions", "check_frame_graph"]

FRAMES: Final = "frames"
SCORES: Final = "probabilities"
MAX_DPROBABILITY: Final = 0.05
"""Allowed difference of a probability, as at the export: one grey level of a resized pixel may differ."""
MAX_DTYPICALITY: Final = 0.5
"""Allowed difference of a typicality, as a share of the predictor's; as at the export."""
MAX_BATCH_DPROBABILITY: Final = 1e-4
"""Allowed difference of a probability between a batch and single frames: float32 rounding stays far below."""

FrameGraph = Callable[["npt.NDArray[np.uint8]"], "dict[str, npt.NDArray[Any]]"]
"""Returns the outputs by name for frames, uint8 [N, H, W]."""


def check_frame_graph(graph: bytes, contract: Contract, label: str) -> GraphHeader:
    """Check that the bytes are the frame graph of a contract, and return its header.

    Parameters
    ----------
    graph
        Bytes of ``frame.<precision>.onnx``.
    contract
        The bundle's contract.
    label
        Beginning of error messages.

    Raises
    ------
    BundleError
        If it has another contract, or other inputs and outputs.
    """
    header = read_graph_header(graph, label)
    found = (header.metadata.get(CONTRACT_KEY), header.metadata.get(CONTRACT_HASH_KEY))
    if found != (contract.to_json(), contract.sha256):
        raise BundleError(f"{label} has another contract than the bundle; expected the same; export the bundle again")
    classes, quadrants = len(contract.classes), len(QUADRANTS)
    inputs = [ValueInfo(FRAMES, "uint8", ("N", "N", "N"))]
    outputs = [
        ValueInfo("quadrant_probabilities", "float32", ("N", quadrants, classes)),
        ValueInfo(SCORES, "float32", ("N", classes)),
        ValueInfo("votes", "int64", ("N", quadrants)),
        ValueInfo("label", "int64", ("N",)),
    ]
    if len(header.outputs) > len(outputs):
        outputs.append(ValueInfo(TYPICALITY, "float32", ("N",)))
    if header.inputs != inputs or header.outputs != outputs:
        names = ", ".join(value.name[:40] for value in (*header.inputs[:4], *header.outputs[:8]))
        expected = ", ".join(value.name for value in (*inputs, *outputs))
        raise BundleError(f"{label} has the inputs and outputs {names}; expected {expected}; export the bundle again")
    return header


def check_decisions(
    run: FrameGraph, frames: Sequence[Grey], predictions: Sequence[Prediction], contract: Contract, label: str
) -> None:
    """Compare the decisions of a frame graph with those of the predictor.

    Parameters
    ----------
    run
        The graph in an inference session.
    frames
        uint8 [H, W] each.
    predictions
        What the predictor decided for each, by the vote rule of the contract.
    contract
        The bundle's contract.
    label
        Beginning of error messages.

    Raises
    ------
    ParityError
        If a decision or a vote differs, a probability by more than `MAX_DPROBABILITY`, or a typicality by more than
        `MAX_DTYPICALITY`.
    """
    differing, worst, worst_typicality = 0, 0.0, 0.0
    for frame, prediction in zip(frames, predictions, strict=True):
        outputs = run(frame[None])
        labels = [contract.classes[int(index)] for index in (*outputs["label"], *outputs["votes"][0])]
        differing += labels != [prediction.predicted_class, *prediction.quadrant_labels]
        pairs = (("quadrant_probabilities", prediction.quadrant_probabilities), (SCORES, prediction.probabilities))
        worst = max(worst, *(_largest(outputs[name][0] - np.array(expected)) for name, expected in pairs))
        if TYPICALITY in outputs and prediction.typicality is not None:
            worst_typicality = max(worst_typicality, _largest(outputs[TYPICALITY] / prediction.typicality - 1))
    found = [
        ("frames with another decision or vote", differing, 0),
        ("|dprobability|", worst, MAX_DPROBABILITY),
        ("relative |dtypicality|", worst_typicality, MAX_DTYPICALITY),
    ]
    if violations := [f"{name} {value:.3g} > {limit:g}" for name, value, limit in found if value > limit]:
        raise ParityError(
            f"{label}: on this machine it does not decide the {len(frames)} golden frames as the predictor does: "
            f"{'; '.join(violations)}; nothing was written; choose another --precision"
        )


def _largest(difference: npt.NDArray[np.floating]) -> float:
    """Return the largest |difference|; one that is not a number counts as a large one."""
    return float(np.nan_to_num(np.abs(difference), nan=1e30, posinf=1e30).max())


def batches_agree(run: FrameGraph, frames: Sequence[Grey], largest: int) -> bool:
    """Return whether a batch of frames has the answers of the single frames.

    Each frame forms a batch with shifted and mirrored copies, which are other frames of the same size.

    Parameters
    ----------
    run
        The graph in an inference session.
    frames
        uint8 [H, W] each.
    largest
        Frames in the batch of the first one; of the others, 5.
    """
    return all(_batch_agrees(run, frame, 5 if index else largest) for index, frame in enumerate(frames))


def _batch_agrees(run: FrameGraph, frame: Grey, size: int) -> bool:
    shifted = [np.roll(frame, index * frame.shape[1] // size, axis=1) for index in range(size)]
    batch = np.stack([one[::-1] if index % 2 else one for index, one in enumerate(shifted)])
    together, single = run(batch), [run(one[None]) for one in batch]
    for name, values in together.items():
        expected = np.concatenate([outputs[name] for outputs in single])
        if values.shape != expected.shape:
            return False
        if np.issubdtype(values.dtype, np.integer):
            if not np.array_equal(values, expected):
                return False
        elif not np.allclose(values, expected, rtol=1e-3, atol=MAX_BATCH_DPROBABILITY):  # NaN is no agreement
            return False
    return True
