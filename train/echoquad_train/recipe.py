"""Recipes: every number that training depends on, in one frozen dataclass that a TOML file holds."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal

from echoquad_runtime.contract import Contract, VoteMethod
from echoquad_runtime.errors import ConfigError, ContractError

__all__ = ["SHIPPED", "Recipe"]

SHIPPED: Final = ("transfer", "scratch")
"""Recipes that come with EchoQuad, by the names that ``--recipe`` takes."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a classifier is trained. The defaults are the document's.

    Raises
    ------
    ConfigError
        If a value has the wrong type or cannot be.
    """

    # The model
    backbone: str = "resnet18"  # a name from echoquad_train.networks.backbones
    weights: str = "imagenet"  # imagenet, none, or a file of weights
    dropout: float = 0.5  # before the head's linear layer

    # The contract's share; see echoquad_runtime.contract
    input_size: int = 224
    keep: float = 0.9
    mean: float = 0.5
    std: float = 0.5
    temperature: float = (
        0.0  # of each quadrant's softmax; 0 is fitted, see echoquad_train.evaluation.temperature_scaling
    )
    positive: str = ""
    vote: VoteMethod = "majority"
    vote_weights: tuple[float, float, float, float] = (1.0, 1.0, 1.5, 1.5)

    # The course
    epochs: int = 20
    batch_size: int = 32  # quadrants
    warmup_epochs: int = 3  # head only, backbone frozen
    warmup_lr: float = 3e-4
    trained_layers: Literal["head", "layer4", "all"] = "layer4"  # after the warm-up, the head always with them
    # In a network without layers of these names, layer4 is what works at 1/32 of the input's side, layer3 at 1/16.
    lr: float = 1e-4
    layer3_epoch: int = 0  # first epoch, from 1, in which layer3 is trained as well; 0 is never
    layer3_lr: float = 5e-5
    optimizer: Literal["adamw", "adam", "rmsprop", "momentum", "sgd"] = "adamw"  # momentum is sgd with one of 0.9
    weight_decay: float = 1e-4  # adamw shrinks weights by lr * this; the others add this * weight to the gradient
    schedule: Literal["plateau", "onecycle", "constant"] = "plateau"
    small_share: float = 0.0  # of the epochs, the first: on smaller quadrants, which cost less
    small_scale: float = 0.5  # their side over the input size; see echoquad_train.training.optimizer_schedule
    plateau_factor: float = 0.5
    plateau_patience: int = 2
    stop_patience: int = 3  # epochs without a better one, after the warm-up; 0 is never
    balanced_sampler: bool = True  # drawn with weights 1 / class count, with replacement
    class_weights: bool = True  # in the loss: 1 / class count, mean 1
    label_smoothing: float = 0.05
    weight_average: float = 0.0  # what a step leaves of the averaged weights, which are then the run's; 0 is none
    mixed_precision: bool = True  # where the device computes in bfloat16 or float16 natively

    # Augmentation, a quadrant at a time; see echoquad_train.training.augmentation
    crop_scale: tuple[float, float] = (0.5, 1.0)  # of the area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height
    flip: float = 0.5  # probability
    rotate: float = 10.0  # degrees, either way
    translate: float = 0.05  # of the side, either way
    zoom: tuple[float, float] = (0.95, 1.05)
    shear: float = 5.0  # degrees, either way
    erase: float = 0.5  # probability
    neighbours: bool = False  # beyond a quadrant's inner edges lie its frame's other quadrants, else black
    gamma: float = 0.0  # of the grey map, as an exponent of e, either way; see intensity_augmentation
    gain: float = 0.0  # likewise a factor
    attenuation: float = 0.0  # likewise a factor at one edge, its inverse at the other
    shadow: float = 0.0  # probability
    speckle: float = 0.0  # of the grey level, at most

    # Distillation, with `--teacher` alone; without one these do nothing. See echoquad_train.training.distillation
    distill_weight: float = 0.7  # the teacher's share of the loss, 0 to 1; the labels have the rest
    distill_temperature: float = 4.0  # by which both models' logits are divided

    calibrate: bool = True  # fit the contract's temperature on the validation frames at the end

    seed: int = 0

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _coerce(field.name, getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)
        self._require(self.epochs >= 1, "epochs", "at least 1")
        self._require(self.batch_size >= 2, "batch_size", "at least 2, for batch normalisation")
        for name in ("warmup_epochs", "layer3_epoch", "plateau_patience", "stop_patience"):
            self._require(getattr(self, name) >= 0, name, "0 or more")
        self._require(0 <= self.seed < 2**63, "seed", "0 or more, below 2**63")
        for name in ("distill_weight", "small_share"):
            self._require(0 <= getattr(self, name) <= 1, name, "a share from 0 to 1")
        self._require(0 < self.small_scale <= 1, "small_scale", "a fraction above 0, at most 1")
        for name in ("lr", "warmup_lr", "layer3_lr", "distill_temperature"):
            self._require(getattr(self, name) > 0, name, "a positive number")
        self._require(0 < self.plateau_factor < 1, "plateau_factor", "a fraction above 0, below 1")
        for name in ("flip", "erase", "shadow"):
            self._require(0 <= getattr(self, name) <= 1, name, "a probability from 0 to 1")
        for name in ("dropout", "label_smoothing", "weight_average"):
            self._require(0 <= getattr(self, name) < 1, name, "a fraction from 0 to below 1")
        for name in ("crop_scale", "crop_ratio", "zoom"):
            low, high = getattr(self, name)
            self._require(0 < low <= high, name, "two positive numbers, the lower first")
        self._require(self.crop_scale[1] <= 1, "crop_scale", "fractions of the area, at most 1")
        for name in (
            "temperature",
            "weight_decay",
            "rotate",
            "translate",
            "shear",
            "gamma",
            "gain",
            "attenuation",
            "speckle",
        ):
            self._require(getattr(self, name) >= 0, name, "0 or more")
        self._require(self.shear < 90, "shear", "degrees below 90")
        try:
            self.contract(("a", "b") if not self.positive else (self.positive, f"{self.positive}_"))
        except ContractError as error:
            raise ConfigError(str(error).replace("contract:", "recipe:", 1)) from error

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ConfigError(f"recipe: {name} is {getattr(self, name)!r}; expected {expected}")

    def contract(self, classes: Sequence[str]) -> Contract:
        """Make the contract that a model trained by this recipe keeps.

        Raises
        ------
        ContractError
            If the classes or one of the recipe's values cannot be.
        """
        return Contract(
            classes=tuple(classes),
            positive=self.positive,
            keep=self.keep,
            input_size=self.input_size,
            mean=self.mean,
            std=self.std,
            vote=self.vote,
            vote_weights=self.vote_weights,
            temperature=self.temperature or 1.0,
        )

    @classmethod
    def load(cls, name: str) -> Recipe:
        """Read a recipe that ships, by its name, or any TOML file, by its path.

        Raises
        ------
        ConfigError
            If there is no such recipe or file, or it holds an unknown name or a value that cannot be.
        """
        if name in SHIPPED:
            return cls.from_toml(
                resources.files("echoquad_train").joinpath("recipes", f"{name}.toml").read_text("utf-8"), name
            )
        path = Path(name)
        try:
            return cls.from_toml(path.read_text("utf-8-sig"), path.as_posix())  # Notepad may set a mark before it
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"recipe {name!r}: neither {' nor '.join(SHIPPED)} nor a readable TOML file "
                f"({getattr(error, 'strerror', None) or error})"
            ) from error

    @classmethod
    def from_toml(cls, text: str, label: str = "recipe") -> Recipe:
        """Read a recipe from TOML text; names it does not give keep the document's values.

        Raises
        ------
        ConfigError
            If the text is not TOML, or holds an unknown name or a value that cannot be.
        """
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{label}: not TOML ({error})") from error
        _refuse_unknown(values, label)
        return cls(**values)

    def to_toml(self) -> str:
        """Write every field as TOML; `from_toml` gives the same recipe back."""
        lines = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # JSON's strings, numbers, booleans and lists of numbers are TOML's, but for its surrogate pairs and DEL.
            text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
            lines.append(f"{field.name} = {text}".replace("\x7f", "\\u007f"))
        return "\n".join(lines) + "\n"

    def replace(self, settings: Sequence[str] = (), **values: Any) -> Recipe:
        """Change fields: by `values`, then by settings of the form ``name=value``.

        Raises
        ------
        ConfigError
            If a setting has no ``=``, names no field, or its value cannot be.
        """
        for setting in settings:
            name, equals, text = setting.partition("=")
            name, text = name.strip(), text.strip()
            if not equals:
                raise ConfigError(f"--set {setting}: no '=' found; expected name=value")
            _refuse_unknown({name: text}, "--set")
            try:
                values[name] = tomllib.loads(f"value = {text}")["value"]
            except tomllib.TOMLDecodeError:
                values[name] = text  # a bare word, as in --set schedule=onecycle
        return dataclasses.replace(self, **values)


def _refuse_unknown(values: dict[str, Any], label: str) -> None:
    names = [field.name for field in dataclasses.fields(Recipe)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise ConfigError(f"{label}: unknown name {', '.join(unknown)}; expected some of {', '.join(names)}")


def _coerce(name: str, value: Any, kind: Any) -> Any:
    """Hold a value against its annotation; a whole number may stand for a float, a list for a tuple."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in arguments:
            return value
        raise ConfigError(f"recipe: {name} is {value!r}; expected one of {', '.join(arguments)}")
    if origin is tuple:
        if isinstance(value, list | tuple) and len(value) == len(arguments):
            return tuple(_coerce(name, item, argument) for item, argument in zip(value, arguments, strict=True))
        raise ConfigError(f"recipe: {name} is {value!r}; expected a list of {len(arguments)} numbers")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"recipe: {name} is {value!r}; expected a finite number")
    if type(value) is not kind:
        words = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
        raise ConfigError(f"recipe: {name} is {value!r}; expected {words[kind]}")
    return value
