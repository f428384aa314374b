"""An inference request: JSON, and the binary data behind it, read with every size checked before it is used."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from echoquad_serve.http.kserve.errors import invalid_request, quote, too_large
from echoquad_serve.http.kserve.served_model import ServedModel
from echoquad_serve.http.kserve.signature import FRAMES, QUADRANT_INPUT, check_shape, output_names
from echoquad_serve.http.kserve.tensors import INPUT_DATATYPES, from_binary, from_json, grey_levels
from echoquad_serve.http.limits import Limits

__all__ = ["InferRequest", "parse_request"]

_MAX_ID: Final = 1000
_MAX_AXES: Final = 8
_BINARY_SIZE: Final = "binary_data_size"
_HEADER: Final = "Inference-Header-Content-Length"


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request whose input is valid.

    Attributes
    ----------
    id
        The client's name of the request, which the answer repeats; None if it has none.
    input
        Name of the input.
    levels
        uint8, in a shape that `signature.check_shape` accepts.
    outputs
        Wanted outputs by name, in their order, and whether each is sent as binary data.
    """

    id: str | None
    input: str
    levels: npt.NDArray[np.uint8]
    outputs: dict[str, bool]


def parse_request(
    body: bytes | bytearray, header_bytes: str | None, model: ServedModel, limits: Limits
) -> InferRequest:
    """Return the request in a body.

    Parameters
    ----------
    body
        The inflated body.
    header_bytes
        The header ``Inference-Header-Content-Length``: how many bytes of the body are JSON; None for all.
    model
        The model, whose inputs and outputs are asked for.
    limits
        Limits of JSON and frames.

    Raises
    ------
    ApiError
        If the request is not valid: 400. If its JSON is too large: 413.
    """
    data = memoryview(body)
    length = _header_length(header_bytes, len(data))
    if length > limits.tensor_json_bytes:
        raise too_large(
            f"the JSON has {length} bytes; expected at most {limits.tensor_json_bytes}; send the tensor as binary data"
        )
    text = bytes(data[:length])
    if text.count(b"[") + text.count(b"{") > limits.tensor_arrays:
        raise too_large(
            f"the JSON has more than {limits.tensor_arrays} arrays and objects; send the numbers in one array, or as "
            "binary data"
        )
    request = _decode_json(text)
    name, levels = _parse_inputs(request, data[length:], model, limits)
    return InferRequest(_parse_id(request), name, levels, _parse_outputs(request, model))


def _header_length(header: str | None, size: int) -> int:
    if header is None:
        return size
    if not (header.isascii() and header.isdigit()) or len(header) > 12 or int(header) > size:
        raise invalid_request(
            f"header {_HEADER} is {quote(header)}; expected a whole number up to {size}, the body's size"
        )
    return int(header)


def _decode_json(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise invalid_request(
            f"the body is no JSON in UTF-8; expected an inference request, and header {_HEADER} before binary data"
        ) from error
    return _object(value, "the request")


def _refuse_constant(name: str) -> NoReturn:
    raise invalid_request(f"the JSON has {name}; expected finite numbers")


# ---------------------------------------------------------------------------------------------- inputs


def _parse_inputs(
    request: dict[str, Any], binary: memoryview, model: ServedModel, limits: Limits
) -> tuple[str, npt.NDArray[np.uint8]]:
    """Return name and levels of the one input."""
    inputs = request.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1:
        found = len(inputs) if isinstance(inputs, list) else "no array of"
        raise invalid_request(f"the request has {found} inputs; expected one, either {FRAMES!r} or {QUADRANT_INPUT!r}")
    tensor = _object(inputs[0], "the input")
    name, datatype = tensor.get("name"), tensor.get("datatype")
    if name not in (FRAMES, QUADRANT_INPUT):
        raise invalid_request(f"the model has no input {quote(name)}; expected {FRAMES!r} or {QUADRANT_INPUT!r}")
    if not isinstance(datatype, str) or datatype not in INPUT_DATATYPES:
        raise invalid_request(f"input {quote(name)} has the datatype {quote(datatype)}; expected UINT8")
    shape = _parse_shape(name, tensor.get("shape"))
    check_shape(name, shape, model.contract, limits.tensor_frames)
    parameters = _parameters(tensor, f"input {quote(name)}")
    if any(key.startswith("shared_memory") for key in parameters):
        raise invalid_request("shared memory is not supported; send the tensor as binary data")
    size = parameters.get(_BINARY_SIZE)
    if size is None:
        if "data" not in tensor:
            raise invalid_request(f"input {quote(name)} has no data; expected data or the parameter {_BINARY_SIZE}")
        if len(binary):
            raise invalid_request(
                f"{len(binary)} bytes follow the JSON; expected the parameter {_BINARY_SIZE} for them"
            )
        return name, grey_levels(name, from_json(name, datatype, shape, tensor["data"]))
    if "data" in tensor:
        raise invalid_request(f"input {quote(name)} has data and {_BINARY_SIZE}; expected one of them")
    if type(size) is not int or size != len(binary):
        raise invalid_request(
            f"{_BINARY_SIZE} is {quote(size)}, and {len(binary)} bytes follow the JSON; expected the same number; "
            f"header {_HEADER} is the number of bytes of the JSON"
        )
    return name, grey_levels(name, from_binary(name, datatype, shape, binary))


def _parse_shape(name: str, shape: object) -> Sequence[int]:
    if (
        not isinstance(shape, list)
        or not 1 <= len(shape) <= _MAX_AXES
        or not all(type(side) is int and side > 0 for side in shape)
    ):
        raise invalid_request(f"input {quote(name)} has the shape {quote(shape)}; expected positive whole numbers")
    if math.prod(shape) >= 1 << 62:
        raise invalid_request(f"input {quote(name)} has the shape {quote(shape)}; expected as many numbers as it has")
    return shape


# ---------------------------------------------------------------------------------------------- the rest


def _parse_outputs(request: dict[str, Any], model: ServedModel) -> dict[str, bool]:
    """Return the wanted outputs, by default all, and whether each is wanted as binary data."""
    default = _switch(_parameters(request, "the request"), "binary_data_output", default=False)
    wanted = request.get("outputs")
    known = output_names(model)
    if wanted is None or wanted == []:
        return dict.fromkeys(known, default)
    if not isinstance(wanted, list):
        raise invalid_request("the outputs are no array; expected an array of objects with a name")
    found: dict[str, bool] = {}
    for value in wanted:
        output = _object(value, "an output")
        name = output.get("name")
        if not isinstance(name, str) or name not in known:
            raise invalid_request(f"the model has no output {quote(name)}; expected some of {', '.join(known)}")
        if name in found:
            raise invalid_request(f"output {quote(name)} is asked for twice; expected it once")
        parameters = _parameters(output, f"output {quote(name)}")
        for key in parameters:
            if key == "classification" or key.startswith("shared_memory"):
                raise invalid_request(f"output {quote(name)} has the parameter {quote(key)}, which is not supported")
        found[name] = _switch(parameters, "binary_data", default=default)
    return found


def _parse_id(request: dict[str, Any]) -> str | None:
    value = request.get("id")
    if value is not None and (not isinstance(value, str) or len(value) > _MAX_ID):
        raise invalid_request(f"the id is {quote(value)}; expected a text of at most {_MAX_ID} characters")
    return value


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise invalid_request(f"{what} is {quote(value)}; expected a JSON object")
    return value


def _parameters(value: dict[str, Any], what: str) -> dict[str, Any]:
    """Return the parameters of a request or a tensor. Those that the service does not know change nothing."""
    found = value.get("parameters")
    return {} if found is None else _object(found, f"parameters of {what}")


def _switch(parameters: dict[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise invalid_request(f"parameter {name} is {quote(value)}; expected true or false")
    return value
