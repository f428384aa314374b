"""The contract: what training, export and inference must agree on for a frame to get the same decision.

It is stored in every checkpoint, bundle and ONNX file, and identified by the SHA-256 of its canonical JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, get_args

from echoquad_runtime.errors import ConfigError, ContractError

__all__ = [
    "INDETERMINATE",
    "QUADRANTS",
    "QUADRANT_LAYOUTS",
    "QUADRANT_POSITIONS",
    "VOTE_METHODS",
    "Contract",
    "VoteMethod",
    "canonical_json",
    "describe_layout",
    "layout_name",
    "parse_layout",
]

QUADRANTS: Final = ("LA", "RA", "LV", "RV")
"""Names of the quadrants in the order of every array, column and vote weight, whatever the quadrant layout."""

QUADRANT_POSITIONS: Final = ("top left", "top right", "bottom left", "bottom right")
"""The positions of the quadrants in the cropped frame, in the order of a quadrant layout's names."""

QUADRANT_LAYOUTS: Final[Mapping[str, tuple[str, ...]]] = {
    "reference": QUADRANTS,
    "apex-up": ("RV", "LV", "RA", "LA"),
}
"""Quadrant layouts that have a name: the name of the quadrant at each of `QUADRANT_POSITIONS`.

``reference`` is the layout of the reference pipeline. ``apex-up`` is the usual display of the apical four-chamber view:
the apex is up and the left heart is at the right of the picture. C. Mitchell et al., doi:10.1016/j.echo.2018.06.004.
"""

INDETERMINATE: Final = "INDETERMINATE"
"""Replaces the class of a frame when the model abstains; no class may have this name."""

VoteMethod = Literal["majority", "average", "weighted"]
VOTE_METHODS: Final[tuple[VoteMethod, ...]] = get_args(VoteMethod)

SCHEMA: Final = 1
MAX_INPUT_SIZE: Final = 2048  # a quadrant of an 8K frame; a larger value is a typing error


def canonical_json(value: object) -> str:
    """Return `value` as JSON in the form that is hashed: sorted keys, no spaces, ASCII, shortest floats.

    Raises
    ------
    ValueError
        If a number is NaN or infinite, which JSON cannot represent.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


@dataclass(frozen=True, slots=True)
class Contract:
    """How a grey frame becomes a decision.

    Parameters
    ----------
    classes
        Two or more class names in sorted order. The index of a name is its column in logits and probabilities.
    positive
        The class of ROC curves and operating points. Empty: the first of `classes`.
    keep
        Fraction of the frame's width and height that the centre crop keeps, in (0, 1]; 1 is no crop.
    input_size
        Side S, in pixels, of the square to which each quadrant is resized.
    mean, std
        Normalisation of a grey level g in 0..255: ``(g / 255 - mean) / std``. One number for all three channels, so
        that the first convolution can be summed over its input channels, with equal results at the zero-padded border.
    vote, vote_weights
        The rule that aggregates the quadrants (see `echoquad_runtime.voting`), and the weights of the ``weighted`` rule
        in the order of `QUADRANTS`.
    temperature
        Divides the logits before the softmax. Positive; 1 changes nothing.
    frame_temperature
        Temperature of the quadrants' mean after the vote: the frame's confidence is the decided class's share of the
        mean probabilities to the power of 1 / frame_temperature. Positive; 1 changes nothing and is omitted from the
        JSON, so that contracts older than this field keep their hash.
    quadrants
        The quadrant layout: the names at `QUADRANT_POSITIONS`, a permutation of `QUADRANTS`. It decides where a
        quadrant is cut, see `echoquad_runtime.quadrants`. It does not change the order of arrays and columns.
    interpolation
        Fixed in this schema; stored for readers in other languages.

    Raises
    ------
    ContractError
        If a value is invalid.
    """

    classes: tuple[str, ...]
    positive: str = ""
    keep: float = 0.9
    input_size: int = 224
    mean: float = 0.5
    std: float = 0.5
    vote: VoteMethod = "majority"
    vote_weights: tuple[float, float, float, float] = (1.0, 1.0, 1.5, 1.5)
    temperature: float = 1.0
    interpolation: str = "bilinear"
    quadrants: tuple[str, ...] = QUADRANTS
    schema: int = SCHEMA
    frame_temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("classes", "vote_weights", "quadrants"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple):
                raise ContractError(f"contract: {name} is {repr(value)[:200]}; expected a list")
            object.__setattr__(self, name, tuple(value))
        if self.positive == "" and self.classes:
            object.__setattr__(self, "positive", self.classes[0])
        for name in ("keep", "mean", "std", "temperature", "frame_temperature"):
            object.__setattr__(self, name, _finite(name, getattr(self, name)))
        weights = tuple(_finite("vote_weights", weight) for weight in self.vote_weights)
        object.__setattr__(self, "vote_weights", weights)
        self._check()

    def _check(self) -> None:
        def require(valid: bool, name: str, expected: str) -> None:
            if not valid:
                raise ContractError(f"contract: {name} is {repr(getattr(self, name))[:200]}; expected {expected}")

        require(
            type(self.schema) is int and self.schema == SCHEMA,
            "schema",
            f"{SCHEMA}; install the release of EchoQuad that wrote the file",
        )
        require(
            len(self.classes) >= 2 and all(isinstance(name, str) and name for name in self.classes),
            "classes",
            "two or more names",
        )
        require(list(self.classes) == sorted(set(self.classes)), "classes", "distinct names in sorted order")
        require(INDETERMINATE not in self.classes, "classes", f"no class named {INDETERMINATE}; rename the folder")
        require(self.positive in self.classes, "positive", f"one of {', '.join(self.classes)}")
        require(0 < self.keep <= 1, "keep", "a fraction above 0, at most 1")
        require(
            type(self.input_size) is int and 8 <= self.input_size <= MAX_INPUT_SIZE,
            "input_size",
            f"a whole number of pixels from 8 to {MAX_INPUT_SIZE}",
        )
        require(self.std > 0, "std", "a positive number")
        require(self.temperature > 0, "temperature", "a positive number")
        require(self.frame_temperature > 0, "frame_temperature", "a positive number")
        require(self.vote in VOTE_METHODS, "vote", f"one of {', '.join(VOTE_METHODS)}")
        require(
            len(self.vote_weights) == len(QUADRANTS) and min(self.vote_weights) >= 0 and sum(self.vote_weights) > 0,
            "vote_weights",
            "four numbers of 0 or more, not all 0",
        )
        require(self.interpolation == "bilinear", "interpolation", "'bilinear'")
        require(
            len(self.quadrants) == len(QUADRANTS) and all(name in self.quadrants for name in QUADRANTS),
            "quadrants",
            f"{', '.join(QUADRANTS)}, each once, in the order of their positions",
        )

    @property
    def positive_index(self) -> int:
        """Index of the positive class."""
        return self.classes.index(self.positive)

    @property
    def quadrant_layout(self) -> str:
        """Name of the quadrant layout, or its four names with commas between them."""
        return layout_name(self.quadrants)

    def to_dict(self) -> dict[str, Any]:
        """Return the contract as JSON values."""
        values = asdict(self)
        if self.frame_temperature == 1:
            del values["frame_temperature"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def to_json(self) -> str:
        """Return the canonical JSON, which `sha256` hashes."""
        return canonical_json(self.to_dict())

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the canonical JSON: the contract's identity."""
        return hashlib.sha256(self.to_json().encode("ascii")).hexdigest()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Contract:
        """Return the contract of JSON values, with all fields and no others; `frame_temperature` is optional.

        Raises
        ------
        ContractError
            If a field is missing, unknown or invalid.
        """
        expected = {field.name for field in fields(cls)}
        missing, unknown = expected - {"frame_temperature"} - set(values), set(values) - expected
        if missing or unknown:
            faults = [f"lacks {', '.join(sorted(missing))}"] if missing else []
            faults += [f"has the unknown {', '.join(sorted(unknown))}"] if unknown else []
            raise ContractError(f"contract: it {' and '.join(faults)}; expected the fields of schema {SCHEMA}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ContractError(f"contract: a value has the wrong type ({error})") from error

    @classmethod
    def from_json(cls, text: str) -> Contract:
        """Return the contract of a JSON text.

        Raises
        ------
        ContractError
            As `from_dict`, or if the text is not a JSON object.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ContractError(f"contract: not JSON ({error})") from error
        if not isinstance(values, dict):
            raise ContractError(f"contract: {type(values).__name__} found; expected a JSON object")
        return cls.from_dict(values)


def parse_layout(text: str) -> tuple[str, ...]:
    """Return the quadrant names at `QUADRANT_POSITIONS` of a layout, given by its name or by four names with commas.

    Raises
    ------
    ConfigError
        If the text is neither a key of `QUADRANT_LAYOUTS` nor a permutation of `QUADRANTS`.
    """
    if text in QUADRANT_LAYOUTS:
        return QUADRANT_LAYOUTS[text]
    names = tuple(name.strip().upper() for name in text.split(","))
    if sorted(names) != sorted(QUADRANTS):
        raise ConfigError(
            f"quadrant_layout is {repr(text)[:80]}; expected {', '.join(QUADRANT_LAYOUTS)}, or the names "
            f"{', '.join(QUADRANTS)} in the order {', '.join(QUADRANT_POSITIONS)}, such as RV,LV,RA,LA"
        )
    return names


def layout_name(names: Sequence[str]) -> str:
    """Return the name of a quadrant layout, or its names with commas if it has none; `parse_layout` reads both."""
    known = {layout: name for name, layout in QUADRANT_LAYOUTS.items()}
    return known.get(tuple(names), ",".join(names))


def describe_layout(names: Sequence[str]) -> str:
    """Return a quadrant layout in words: ``apex-up (RV top left, LV top right, RA bottom left, LA bottom right)``."""
    where = ", ".join(f"{name} {position}" for name, position in zip(names, QUADRANT_POSITIONS, strict=True))
    return f"{layout_name(names)} ({where})"


def _finite(name: str, value: object) -> float:
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer of hundreds of digits
            number = float(value)
    if not math.isfinite(number):
        raise ContractError(f"contract: {name} has {repr(value)[:40]}; expected a finite number")
    return number + 0.0  # turns -0.0 into 0.0, which would have another hash
