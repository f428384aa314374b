"""Tensors of the protocol: their numbers in JSON or binary, little-endian and row by row."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from echoquad_serve.http.kserve.errors import invalid_request, quote

__all__ = ["INPUT_DATATYPES", "OutputTensor", "OutputType", "from_binary", "from_json", "grey_levels"]

INPUT_DATATYPES: Final[dict[str, np.dtype[Any]]] = {"UINT8": np.dtype("u1"), "FP32": np.dtype("<f4")}
"""Datatypes of inputs. FP32 is for clients that cannot send UINT8, and has to hold the same numbers."""

OutputType = Literal["FP32", "INT32", "BOOL", "BYTES"]

_WHITE: Final = 255
_OUTPUT_DATATYPES: Final = {"FP32": "<f4", "INT32": "<i4", "BOOL": "?"}


# ---------------------------------------------------------------------------------------------- inputs


def from_binary(name: str, datatype: str, shape: Sequence[int], data: memoryview) -> npt.NDArray[Any]:
    """Return a view of binary data as an array.

    Raises
    ------
    ApiError
        If the data do not have as many bytes as the shape needs: 400.
    """
    dtype = INPUT_DATATYPES[datatype]
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise invalid_request(
            f"input {quote(name)} has {len(data)} bytes; expected {expected} for {datatype} {quote(shape)}"
        )
    return np.frombuffer(data, dtype).reshape(shape)


def from_json(name: str, datatype: str, shape: Sequence[int], data: object) -> npt.NDArray[Any]:
    """Return the numbers of a JSON array, nested as the shape or flat.

    Raises
    ------
    ApiError
        If it is no array of numbers, or has another shape: 400.
    """
    values = _flatten(name, shape, data)
    if not set(map(type, values)) <= {int, float}:
        raise invalid_request(f"the data of input {quote(name)} hold something else than numbers; expected numbers")
    try:
        numbers = np.array(values, np.float64)
    except OverflowError:  # a whole number of hundreds of digits
        numbers = np.full(len(values), np.inf)
    if datatype == "UINT8" and not _are_levels(numbers):
        raise invalid_request(
            f"the data of input {quote(name)} are no UINT8; expected whole numbers from 0 to {_WHITE}"
        )
    with np.errstate(over="ignore"):  # what overflows is infinite, and refused as such
        return numbers.astype(INPUT_DATATYPES[datatype]).reshape(shape)


def _flatten(name: str, shape: Sequence[int], data: object) -> list[Any]:
    """Return the numbers of an array that is nested as the shape, or flat."""
    count = math.prod(shape)
    if not isinstance(data, list):
        raise invalid_request(f"the data of input {quote(name)} are no array; expected an array of numbers")
    if len(data) == count and not isinstance(data[0], list):
        return data
    values: list[Any] = [data]
    for side in shape:
        if any(not isinstance(value, list) or len(value) != side for value in values):
            raise invalid_request(
                f"the data of input {quote(name)} do not have the shape {quote(shape)}; expected {count} numbers, flat "
                "or nested as the shape"
            )
        values = list(chain.from_iterable(values))
    return values


def grey_levels(name: str, values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return an input as grey levels or colours, uint8 of the same shape; nothing is scaled or rounded.

    Raises
    ------
    ApiError
        If a number is not finite, or no whole number from 0 to 255: 400.
    """
    if values.dtype == np.uint8:
        return values
    if not np.isfinite(values).all():
        raise invalid_request(f"input {quote(name)} has NaN or infinity; expected whole numbers from 0 to {_WHITE}")
    if not _are_levels(values):
        raise invalid_request(
            f"input {quote(name)} has numbers from {values.min():g} to {values.max():g}, or fractions; expected whole "
            f"numbers from 0 to {_WHITE}, not normalised, best as UINT8"
        )
    return values.astype(np.uint8)


def _are_levels(values: npt.NDArray[Any]) -> bool:
    return bool(values.min() >= 0 and values.max() <= _WHITE and (values == np.floor(values)).all())


# ---------------------------------------------------------------------------------------------- outputs


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of an answer.

    Attributes
    ----------
    name, datatype, shape
        As the model's metadata describe it.
    values
        Its numbers or texts, row by row.
    """

    name: str
    datatype: OutputType
    shape: tuple[int, ...]
    values: Sequence[Any]

    def to_json(self) -> list[Any]:
        """Return the values for JSON, flat."""
        if self.datatype == "BYTES":
            return list(self.values)
        found: list[Any] = np.asarray(self.values, _OUTPUT_DATATYPES[self.datatype]).tolist()
        return found

    def to_binary(self) -> bytes:
        """Return the values as bytes; each text has its number of bytes before it."""
        if self.datatype != "BYTES":
            return np.asarray(self.values, _OUTPUT_DATATYPES[self.datatype]).tobytes()
        texts = [str(value).encode("utf-8", "replace") for value in self.values]
        return b"".join(part for text in texts for part in (struct.pack("<I", len(text)), text))
