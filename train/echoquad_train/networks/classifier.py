"""The quadrant classifier: a torchvision backbone with a linear head, and its pretrained weights."""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torchvision
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import ConfigError
from echoquad_train.networks.backbones import BACKBONES, build_backbone, check_backbone
from echoquad_train.networks.weight_files import TensorFileError, first_line, read_archive, read_safetensors
from echoquad_train.recipe import Recipe

__all__ = ["QuadrantClassifier", "build_model", "load_pretrained", "set_trainable"]

_POSITION_EMBEDDINGS: Final = "encoder.pos_embedding"  # of a vision transformer: float [1, 1 + patches, F]


class QuadrantClassifier(nn.Module):
    """A backbone and a linear head, with grey levels as input.

    Parameters
    ----------
    backbone
        A name from `echoquad_train.networks.backbones.BACKBONES`.
    contract
        Defines the number of classes, the input size, the mean and the standard deviation.
    dropout
        Before the head's linear layer.

    Raises
    ------
    ConfigError
        If the backbone is unknown or does not accept the input size.
    """

    def __init__(self, backbone: str, contract: Contract, dropout: float = 0.0) -> None:
        super().__init__()
        check_backbone(backbone, contract.input_size)
        self.backbone, features = build_backbone(backbone, contract.input_size)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(features, len(contract.classes)))
        self.mean, self.std = contract.mean, contract.std
        self.name, self.parts = backbone, BACKBONES[backbone]

    def forward(self, quadrants: Tensor) -> Tensor:
        """Return logits, float [N, C], for grey levels 0 to 255, uint8 or float [N, 1, S, S]."""
        x = (quadrants.float() / 255 - self.mean) / self.std
        logits: Tensor = self.head(self.backbone(x.expand(-1, 3, -1, -1)))
        return logits


def build_model(recipe: Recipe, contract: Contract) -> QuadrantClassifier:
    """Build the recipe's model with its initial weights.

    Raises
    ------
    ConfigError
        If the backbone is unknown or does not accept the input size, or the weights cannot be loaded.
    """
    model = QuadrantClassifier(recipe.backbone, contract, recipe.dropout)
    if recipe.weights != "none":
        load_pretrained(model.backbone, recipe.backbone, recipe.weights)
    return model


def load_pretrained(body: nn.Module, backbone: str, weights: str) -> None:
    """Load ``imagenet`` weights or those of a file into a backbone, without the classifier.

    A file is ``.safetensors``, such as the ``best.safetensors`` of a run, or a ``.pt`` that holds only tensors. Older
    torchvision checkpoints are converted: former tensor names, auxiliary heads, missing counts of batches, and position
    embeddings of another input size, which are interpolated.

    Raises
    ------
    ConfigError
        If the weights cannot be downloaded or read, or do not match the backbone.
    """
    state = _download(backbone) if weights == "imagenet" else _read_weights(Path(weights))
    # The checkpoint of a run has this prefix, and a head for its own classes.
    prefix = "backbone."
    if any(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    expected = body.state_dict()
    state = _convert(state, expected, backbone)
    wrong = sorted(
        [name for name in expected if name not in state]
        + [name for name, value in state.items() if name not in expected or expected[name].shape != value.shape]
    )
    if wrong:
        raise ConfigError(
            f"weights {weights}: {len(wrong)} of {len(expected)} tensors do not match {backbone} (first: {wrong[0]}); "
            f"expected weights of a {backbone}"
        )
    try:
        body.load_state_dict(state)
    except (RuntimeError, NotImplementedError) as error:  # a tensor of another kind, such as a sparse one
        raise ConfigError(f"weights {weights}: cannot be loaded ({first_line(error)})") from error


def _convert(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], backbone: str) -> dict[str, Tensor]:
    """Convert the tensors of a checkpoint to the names and shapes of torchvision's current code."""
    parts = BACKBONES[backbone]
    removed = tuple(f"{part}." for part in (parts.classifier, *parts.unused))
    converted: dict[str, Tensor] = {}
    for former_name, value in state.items():
        name = former_name
        for pattern, replacement in parts.renamed:
            name = re.sub(pattern, replacement, name)
        if not name.startswith(removed):
            converted[name] = value
    for name, value in expected.items():
        if name.endswith(".num_batches_tracked"):  # without effect if momentum is a number
            converted.setdefault(name, value)
    embeddings = converted.get(_POSITION_EMBEDDINGS)
    if parts.patch_size and embeddings is not None and embeddings.ndim == 3 and embeddings.shape[0] == 1:
        side = math.isqrt(expected[_POSITION_EMBEDDINGS].shape[1] - 1)  # without the class token's embedding
        if math.isqrt(embeddings.shape[1] - 1) ** 2 == embeddings.shape[1] - 1:
            size = side * parts.patch_size
            converted = dict(interpolate_embeddings(size, parts.patch_size, OrderedDict(converted)))
    return converted


def set_trainable(model: QuadrantClassifier, layers: Mapping[str, float]) -> list[dict[str, object]]:
    """Freeze all but the named layers and return the optimizer's parameter groups.

    Parameters
    ----------
    model
        The model. Its frozen layers are set to evaluation mode, so that their batch statistics do not change.
    layers
        Learning rate by layer: ``head``, ``layer4``, ``layer3``, or ``all``; `echoquad_train.networks.backbones`
        defines the numbered ones for each network.
    """
    model.requires_grad_(False).eval()
    groups: list[dict[str, object]] = []
    stages = {"layer4": model.parts.layer4, "layer3": model.parts.layer3}
    for name, rate in layers.items():
        modules = [model.backbone.get_submodule(part) for part in stages.get(name, ())]
        modules = modules or [{"all": model, "head": model.head}[name]]
        for module in modules:
            module.requires_grad_(True).train()
        groups.append({"params": [weight for module in modules for weight in module.parameters()], "lr": rate})
    return groups


def _download(backbone: str) -> Mapping[str, Tensor]:
    try:
        weights = torchvision.models.get_model_weights(backbone)["IMAGENET1K_V1"]
        with contextlib.redirect_stdout(sys.stderr):  # torch prints the download; stdout is for results
            state: Mapping[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        return state
    except Exception as error:  # no network, an interrupted download, a full disk, a wrong hash, a damaged cache
        reason = getattr(error, "reason", None) or first_line(error)
        raise ConfigError(
            f"weights imagenet: the {backbone} weights cannot be downloaded ({reason}); connect once, "
            "or give --weights FILE, or train from random weights with --recipe scratch --weights none"
        ) from error


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    label = f"weights {path.as_posix()}"
    try:
        state = read_safetensors(path).tensors if path.suffix == ".safetensors" else read_archive(path)
    except FileNotFoundError:
        raise ConfigError(f"{label}: no such file; expected imagenet, none, or a file") from None
    except TensorFileError as error:
        if path.suffix == ".safetensors":
            raise ConfigError(f"{label}: damaged or not a safetensors file ({error})") from error
        raise ConfigError(
            f"{label}: cannot be read as tensors ({error}); expected .safetensors, or a .pt that holds only tensors"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ConfigError(f"{label}: no state dict found; expected a mapping of names to tensors")
    return state
