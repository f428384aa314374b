"""The model's signature: its inputs and outputs, and how predictions become outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from echoquad_runtime.bundle.onnx_header import INPUT
from echoquad_runtime.contract import INDETERMINATE, QUADRANTS, Contract
from echoquad_runtime.predict.prediction import Prediction
from echoquad_serve.http.kserve.errors import invalid_request, quote
from echoquad_serve.http.kserve.served_model import ServedModel
from echoquad_serve.http.kserve.tensors import OutputTensor, OutputType

__all__ = [
    "FRAMES",
    "QUADRANT_INPUT",
    "check_shape",
    "input_metadata",
    "output_metadata",
    "output_names",
    "output_tensors",
]

FRAMES: Final = "frames"
"""Input: whole frames, grey [N, H, W] or [N, H, W, 1], or RGB [N, H, W, 3]."""

QUADRANT_INPUT: Final = INPUT
"""Input: quadrants that the client has cut and resized, [N, 4, 1, S, S], LA, RA, LV, RV."""

_GREY_AXES: Final = 3
_CHANNELS: Final = (1, 3)


# ---------------------------------------------------------------------------------------------- inputs


def input_metadata(contract: Contract) -> list[dict[str, Any]]:
    """Return the inputs for the model's metadata; -1 is any size. A request has one of them."""
    quadrants = [-1, *_quadrants_shape(contract)]
    return [
        {"name": FRAMES, "datatype": "UINT8", "shape": [-1] * _GREY_AXES},
        {"name": QUADRANT_INPUT, "datatype": "UINT8", "shape": quadrants},
    ]


def check_shape(name: str, shape: Sequence[int], contract: Contract, max_frames: int) -> None:
    """Return if an input may have that shape, whose sides are positive.

    Raises
    ------
    ApiError
        If not, or if it has more frames than a request may have: 400.
    """
    if name == QUADRANT_INPUT:
        expected = _quadrants_shape(contract)
        if tuple(shape[1:]) != expected:
            raise invalid_request(
                f"input {quote(name)} has the shape {quote(shape)}; expected {['N', *expected]}: the quadrants "
                f"{', '.join(QUADRANTS)} of N frames; send whole frames as {FRAMES!r}"
            )
    elif not (len(shape) == _GREY_AXES or (len(shape) == _GREY_AXES + 1 and shape[-1] in _CHANNELS)):
        raise invalid_request(
            f"input {quote(name)} has the shape {quote(shape)}; expected [N, height, width] of grey levels, or "
            "[N, height, width, 3] of RGB"
        )
    if shape[0] > max_frames:
        raise invalid_request(
            f"the request has {shape[0]} frames; expected at most {max_frames}; send several requests"
        )


def _quadrants_shape(contract: Contract) -> tuple[int, ...]:
    return len(QUADRANTS), 1, contract.input_size, contract.input_size


# ---------------------------------------------------------------------------------------------- outputs


@dataclass(frozen=True, slots=True)
class _Output:
    """An output: its name, datatype, axes after the first one, which counts frames, and its values for a frame."""

    name: str
    datatype: OutputType
    axes: Callable[[int], tuple[int, ...]]
    values: Callable[[Prediction, Contract], Sequence[Any]]


def _votes(prediction: Prediction) -> list[int]:
    return [prediction.quadrant_labels.count(name) for name in prediction.classes]


_OUTPUTS: Final = (
    _Output("label", "BYTES", lambda _: (), lambda p, _: [p.label]),
    _Output("confidence", "FP32", lambda _: (), lambda p, contract: [p.confidence(contract)]),
    _Output("abstained", "BOOL", lambda _: (), lambda p, _: [p.label == INDETERMINATE]),
    _Output("predicted_class", "BYTES", lambda _: (), lambda p, _: [p.predicted_class]),
    _Output("probabilities", "FP32", lambda classes: (classes,), lambda p, _: p.probabilities),
    _Output("votes", "INT32", lambda classes: (classes,), lambda p, _: _votes(p)),
    _Output("quadrant_labels", "BYTES", lambda _: (len(QUADRANTS),), lambda p, _: p.quadrant_labels),
    _Output(
        "quadrant_probabilities",
        "FP32",
        lambda classes: (len(QUADRANTS), classes),
        lambda p, _: list(chain.from_iterable(p.quadrant_probabilities)),
    ),
    _Output("flags", "BYTES", lambda _: (), lambda p, _: [";".join(p.flags)]),
)
_TYPICALITY: Final = _Output("typicality", "FP32", lambda _: (), lambda p, _: [p.typicality])


def _outputs(model: ServedModel) -> tuple[_Output, ...]:
    return (*_OUTPUTS, _TYPICALITY) if model.has_typicality else _OUTPUTS


def output_names(model: ServedModel) -> tuple[str, ...]:
    """Return the names of all outputs."""
    return tuple(output.name for output in _outputs(model))


def output_metadata(model: ServedModel) -> list[dict[str, Any]]:
    """Return the outputs for the model's metadata; -1 is the number of frames."""
    classes = len(model.contract.classes)
    return [
        {"name": output.name, "datatype": output.datatype, "shape": [-1, *output.axes(classes)]}
        for output in _outputs(model)
    ]


def output_tensors(model: ServedModel, predictions: Sequence[Prediction], names: Sequence[str]) -> list[OutputTensor]:
    """Return the outputs of those names, in their order, of N predictions."""
    contract, known = model.contract, {output.name: output for output in _outputs(model)}
    tensors = []
    for name in names:
        output = known[name]
        shape = (len(predictions), *output.axes(len(contract.classes)))
        values = [value for prediction in predictions for value in output.values(prediction, contract)]
        tensors.append(OutputTensor(name, output.datatype, shape, values))
    return tensors
