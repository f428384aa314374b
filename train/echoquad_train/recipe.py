"""Recipes: every number that training depends on, in one frozen dataclass that can be stored as TOML."""

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

from echoquad_runtime.contract import Contract, VoteMethod, layout_name, parse_layout
from echoquad_runtime.errors import ConfigError, ContractError
from echoquad_runtime.storage.regular_file import read_regular

__all__ = ["SHIPPED", "Recipe"]

SHIPPED: Final = ("transfer", "scratch", "lite")
"""Names of the recipes that come with EchoQuad, as ``--recipe`` takes them."""

_MAX_BYTES: Final = 1 << 20  # of a recipe file

_RENAMED: Final = {
    "keep": "center_crop",
    "neighbours": "context_padding",
    "small_share": "progressive_fraction",
    "small_scale": "progressive_scale",
    "weight_average": "ema_decay",
    "stop_patience": "early_stopping_patience",
    "flip": "horizontal_flip",
    "calibrate": "temperature_scaling",
}
"""Former field names, which recipe files of earlier runs hold, and the current ones."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train a classifier. The defaults are those of the reference pipeline, the method that EchoQuad implements.

    Raises
    ------
    ConfigError
        If a value has the wrong type or is out of range.
    """

    # Model
    backbone: str = "resnet18"  # a name that echoquad_train.networks.backbones.backbone_parts accepts
    weights: str = "imagenet"  # imagenet, none, or a file of weights
    dropout: float = 0.5  # before the head's linear layer

    # Fields of the contract; see echoquad_runtime.contract
    input_size: int = 224
    center_crop: float = 0.9  # fraction of each side; the contract's field `keep`
    quadrant_layout: str = "reference"  # a name of QUADRANT_LAYOUTS, or four names with commas: the field `quadrants`
    mean: float = 0.5
    std: float = 0.5
    temperature: float = 0.0  # of each quadrant's softmax; 0 fits it, see evaluation.temperature_scaling
    positive: str = ""
    vote: VoteMethod = "majority"
    vote_weights: tuple[float, float, float, float] = (1.0, 1.0, 1.5, 1.5)

    # Optimization
    epochs: int = 20
    batch_size: int = 32  # quadrants
    warmup_epochs: int = 3  # train the head only, the backbone is frozen
    warmup_lr: float = 3e-4
    trained_layers: Literal["head", "layer4", "all"] = "layer4"  # after the warm-up; the head is always trained
    # In other networks layer4 stands for the maps of 1/32 of the input's side, and layer3 for those of 1/16.
    lr: float = 1e-4
    layer3_epoch: int = 0  # first epoch, from 1, that also trains layer3; 0 never does
    layer3_lr: float = 5e-5
    optimizer: Literal["adamw", "adam", "rmsprop", "momentum", "sgd"] = "adamw"  # momentum is SGD with momentum 0.9
    weight_decay: float = 1e-4  # decoupled in adamw; an L2 term of the gradient in the others
    schedule: Literal["plateau", "onecycle", "constant"] = "plateau"
    progressive_fraction: float = (
        0.0  # progressive resizing: this fraction of the epochs, the first, uses small quadrants
    )
    progressive_scale: float = 0.5  # their side over the input size; see training.optimizer_schedule
    plateau_factor: float = 0.5
    plateau_patience: int = 2
    early_stopping_patience: int = 3  # epochs without improvement, after the warm-up; 0 disables early stopping
    model_epoch: Literal["best", "last"] = "best"  # whose weights are the model: best on the validation frames, or last
    balanced_sampler: bool = True  # sample with weights 1 / class count, with replacement
    class_weights: bool = True  # in the loss: 1 / class count, normalised to mean 1
    label_smoothing: float = 0.05
    ema_decay: float = 0.0  # of the exponential moving average of the weights, which is then the run's model; 0 is none
    mixed_precision: bool = True  # where the device computes in bfloat16 or float16 natively

    # Augmentation of each quadrant; see echoquad_train.training.augmentation
    crop_scale: tuple[float, float] = (0.5, 1.0)  # fraction of the area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height
    horizontal_flip: float = 0.5  # probability
    rotate: float = 10.0  # degrees, either way
    translate: float = 0.05  # fraction of the side, either way
    zoom: tuple[float, float] = (0.95, 1.05)
    shear: float = 5.0  # degrees, either way
    erase: float = 0.5  # probability
    context_padding: bool = False  # fill beyond a quadrant's inner edges with the rest of the frame, not with black
    gamma: float = 0.0  # of the grey map, as an exponent of e, either way; see training.intensity_augmentation
    gain: float = 0.0  # brightness factor, as an exponent of e, either way
    attenuation: float = 0.0  # likewise, at one edge; its inverse at the opposite edge
    shadow: float = 0.0  # probability
    speckle: float = 0.0  # fraction of the grey level, at most
    mixup: float = 0.0  # probability of blending a quadrant with another; see training.mixup

    # Distillation, without effect unless there is a `--teacher`; see echoquad_train.training.distillation
    distill_weight: float = 0.7  # of the teacher's loss, 0 to 1; the labels' loss has the rest
    distill_temperature: float = 4.0  # divides both models' logits

    temperature_scaling: bool = True  # fit the contract's temperatures on the validation frames after training

    seed: int = 0

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _coerce(field.name, getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)
        try:
            object.__setattr__(self, "quadrant_layout", layout_name(parse_layout(self.quadrant_layout)))
        except ConfigError as error:
            raise ConfigError(f"recipe: {error}") from error
        self._require(self.epochs >= 1, "at least 1", "epochs")
        self._require(self.batch_size >= 2, "at least 2, for batch normalisation", "batch_size")
        self._require(0 <= self.seed < 2**63, "0 or more, below 2**63", "seed")
        self._require(0 < self.progressive_scale <= 1, "a fraction above 0, at most 1", "progressive_scale")
        self._require(0 < self.plateau_factor < 1, "a fraction above 0, below 1", "plateau_factor")
        for name in ("warmup_epochs", "layer3_epoch", "plateau_patience", "early_stopping_patience", "temperature"):
            self._require(getattr(self, name) >= 0, "0 or more", name)
        for name in ("weight_decay", "rotate", "translate", "shear", "gamma", "gain", "attenuation", "speckle"):
            self._require(getattr(self, name) >= 0, "0 or more", name)
        for name in ("distill_weight", "progressive_fraction"):
            self._require(0 <= getattr(self, name) <= 1, "a fraction from 0 to 1", name)
        for name in ("lr", "warmup_lr", "layer3_lr", "distill_temperature"):
            self._require(getattr(self, name) > 0, "a positive number", name)
        for name in ("horizontal_flip", "erase", "shadow", "mixup"):
            self._require(0 <= getattr(self, name) <= 1, "a probability from 0 to 1", name)
        for name in ("dropout", "label_smoothing", "ema_decay"):
            self._require(0 <= getattr(self, name) < 1, "a fraction from 0 to below 1", name)
        for name in ("crop_scale", "crop_ratio", "zoom"):
            low, high = getattr(self, name)
            self._require(0 < low <= high, "two positive numbers, the lower first", name)
        if self.model_epoch == "last":  # then no validation frame may influence the weights
            last = 'with model_epoch = "last", which leaves the validation frames unused until the weights are final'
            self._require(self.early_stopping_patience == 0, f"0 {last}", "early_stopping_patience")
            self._require(self.schedule != "plateau", f"onecycle or constant {last}", "schedule")
        self._require(self.crop_scale[1] <= 1, "fractions of the area, at most 1", "crop_scale")
        self._require(self.shear < 90, "degrees below 90", "shear")
        try:
            self.contract(("a", "b") if not self.positive else (self.positive, f"{self.positive}_"))
        except ContractError as error:
            message = str(error).replace("contract:", "recipe:", 1).replace(": keep ", ": center_crop ", 1)
            raise ConfigError(message) from error

    def _require(self, holds: bool, expected: str, name: str) -> None:
        if not holds:
            raise ConfigError(f"recipe: {name} is {_shown(getattr(self, name))}; expected {expected}")

    def contract(self, classes: Sequence[str]) -> Contract:
        """Return the contract of a model that this recipe trains.

        Raises
        ------
        ContractError
            If the classes or a value of the recipe are invalid.
        """
        return Contract(
            classes=tuple(classes),
            positive=self.positive,
            keep=self.center_crop,
            quadrants=parse_layout(self.quadrant_layout),
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
            If there is no such recipe or file, or it holds an unknown field or an invalid value.
        """
        if name in SHIPPED:
            text = resources.files("echoquad_train").joinpath("recipes", f"{name}.toml").read_text("utf-8")
            return cls.from_toml(text, name)
        path = Path(name)
        try:
            data = read_regular(path, _MAX_BYTES)
            if len(data) > _MAX_BYTES:
                raise ValueError(f"it has more than {_MAX_BYTES} bytes")
            text = data.decode("utf-8-sig")  # Notepad may write a byte order mark
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"recipe {_shown(name)}: none of {', '.join(SHIPPED)}, and no readable TOML file "
                f"({getattr(error, 'strerror', None) or error})"
            ) from error
        return cls.from_toml(text, path.as_posix())

    @classmethod
    def from_toml(cls, text: str, label: str = "recipe") -> Recipe:
        """Read a recipe from TOML text. Missing fields have their defaults; former field names are accepted.

        Raises
        ------
        ConfigError
            If the text is not TOML, or holds an unknown field or an invalid value.
        """
        try:
            values = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits, and deep nesting
            raise ConfigError(f"{label}: not TOML ({error})") from error
        for old, new in _RENAMED.items():
            if old in values and new not in values:
                values[new] = values.pop(old)
        _refuse_unknown(values, label)
        return cls(**values)

    def to_toml(self) -> str:
        """Return every field as TOML, from which `from_toml` makes an equal recipe."""
        lines = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # JSON's strings, numbers, booleans and lists of numbers are valid TOML, except surrogate pairs and DEL.
            text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
            lines.append(f"{field.name} = {text}".replace("\x7f", "\\u007f"))
        return "\n".join(lines) + "\n"

    def replace(self, settings: Sequence[str] = (), **values: Any) -> Recipe:
        """Return a recipe with some fields changed: first by `values`, then by settings of the form ``name=value``.

        Raises
        ------
        ConfigError
            If a setting has no ``=``, names no field, or has an invalid value.
        """
        for setting in settings:
            name, equals, text = setting.partition("=")
            name, text = name.strip(), text.strip()
            if not equals:
                raise ConfigError(f"--set {setting[:100]}: no '=' found; expected name=value")
            _refuse_unknown({name: text}, "--set")
            try:
                values[name] = tomllib.loads(f"value = {text}")["value"]
            except (ValueError, RecursionError):
                values[name] = text  # a bare word, as in --set schedule=onecycle
        return dataclasses.replace(self, **values)


def _refuse_unknown(values: dict[str, Any], label: str) -> None:
    names = [field.name for field in dataclasses.fields(Recipe)]
    if unknown := sorted(set(values) - set(names)):
        listed = ", ".join(name[:60] for name in unknown[:6])
        raise ConfigError(f"{label}: unknown name {listed}; expected some of {', '.join(names)}")


def _coerce(name: str, value: Any, annotation: Any) -> Any:
    """Check a value against its annotation. An integer may stand for a float, a list for a tuple."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal and isinstance(value, str) and value in arguments:
        return value
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(arguments):
        return tuple(_coerce(name, item, argument) for item, argument in zip(value, arguments, strict=True))
    if annotation is float and type(value) is int and abs(value) < 1 << 1023:  # the range of a float
        return float(value)
    if type(value) is annotation and not (annotation is float and not math.isfinite(value)):
        return value
    if origin is Literal:
        expected = f"one of {', '.join(arguments)}"
    elif origin is tuple:
        expected = f"a list of {len(arguments)} numbers"
    elif type(value) is annotation:
        expected = "a finite number"
    else:
        expected = {float: "a number", int: "an integer", bool: "true or false", str: "a string"}[annotation]
    raise ConfigError(f"recipe: {name} is {_shown(value)}; expected {expected}")


def _shown(value: object) -> str:
    """Return the repr of a value for a message, at most 100 characters of it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or deep nesting
        return f"an {type(value).__name__} that is too long"
    return text if len(text) <= 100 else f"{text[:97]}..."
