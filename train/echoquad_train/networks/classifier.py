"""The model: a torchvision backbone that judges one quadrant at a time."""

from __future__ import annotations

import contextlib
import math
import pickle
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Final

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import ConfigError
from echoquad_train.networks.backbones import BACKBONES, build_body, check_backbone
from echoquad_train.recipe import Recipe

__all__ = ["QuadrantClassifier", "build_model", "first_line", "load_pretrained", "set_trained"]

# What torch raises for a file that it cannot read as tensors, besides OSError.
_UNREADABLE: Final = (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile)

_PLACES: Final = "encoder.pos_embedding"  # of a network with patches: an embedding for each, float [1, 1 + patches, F]


class QuadrantClassifier(nn.Module):
    """A backbone and a head, fed with grey levels.

    Parameters
    ----------
    backbone
        A name from `echoquad_train.networks.backbones.BACKBONES`.
    contract
        Gives the number of classes, the input size, the mean and the standard deviation.
    dropout
        Before the head's linear layer.

    Raises
    ------
    ConfigError
        If the backbone is unknown, or cannot take the input size.
    """

    def __init__(self, backbone: str, contract: Contract, dropout: float = 0.0) -> None:
        super().__init__()
        check_backbone(backbone, contract.input_size)
        self.backbone, features = build_body(backbone, contract.input_size)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(features, len(contract.classes)))
        self.mean, self.std = contract.mean, contract.std
        self.name, self.parts = backbone, BACKBONES[backbone]

    def forward(self, quadrants: Tensor) -> Tensor:
        """Give logits, float [N, C], for grey levels 0 to 255, uint8 or float [N, 1, S, S]."""
        x = (quadrants.float() / 255 - self.mean) / self.std
        logits: Tensor = self.head(self.backbone(x.expand(-1, 3, -1, -1)))
        return logits


def build_model(recipe: Recipe, contract: Contract) -> QuadrantClassifier:
    """Build the recipe's model and bring in the weights it names.

    Raises
    ------
    ConfigError
        If the backbone is unknown or cannot take the input size, or the weights cannot be had or do not fit.
    """
    model = QuadrantClassifier(recipe.backbone, contract, recipe.dropout)
    if recipe.weights != "none":
        load_pretrained(model.backbone, recipe.backbone, recipe.weights)
    return model


def load_pretrained(body: nn.Module, backbone: str, weights: str) -> None:
    """Load ``imagenet`` weights or a file's into a backbone; a classifier at its end is left out.

    A file is ``.safetensors``, a run's ``best.safetensors`` among them, or a ``.pt`` that holds tensors alone. What
    torchvision's own checkpoints differ in from its networks is evened out: names and heads of former days, counts
    of batches that were not kept then, and embeddings of another input size, which are interpolated.

    Raises
    ------
    ConfigError
        If they cannot be downloaded, read, or do not fit.
    """
    state = _download(backbone) if weights == "imagenet" else _read_weights(Path(weights))
    # A run's checkpoint names its backbone's tensors so, and brings a head that was made for its own classes.
    prefix = "backbone."
    if any(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    own = body.state_dict()
    state = _as_built(state, own, backbone)
    wrong = sorted(
        [name for name in own if name not in state]
        + [name for name, value in state.items() if name not in own or own[name].shape != value.shape]
    )
    if wrong:
        raise ConfigError(
            f"weights {weights}: {len(wrong)} of {len(own)} tensors do not fit {backbone} (first: {wrong[0]}); "
            f"expected weights of a {backbone}"
        )
    body.load_state_dict(state)


def _as_built(state: Mapping[str, Tensor], own: Mapping[str, Tensor], backbone: str) -> dict[str, Tensor]:
    """Bring a checkpoint's tensors to the names and the shapes that torchvision's code has today."""
    parts = BACKBONES[backbone]
    dropped = tuple(f"{part}." for part in (parts.end, *parts.unused))
    found: dict[str, Tensor] = {}
    for old, value in state.items():
        name = old
        for pattern, now in parts.renamed:
            name = re.sub(pattern, now, name)
        if not name.startswith(dropped):
            found[name] = value
    for name, value in own.items():
        if name.endswith(".num_batches_tracked"):  # of no influence where momentum is a number
            found.setdefault(name, value)
    places = found.get(_PLACES)
    if parts.patch and places is not None and places.ndim == 3 and places.shape[0] == 1:
        side = math.isqrt(own[_PLACES].shape[1] - 1)  # a place for each patch, and one for the class token
        if math.isqrt(places.shape[1] - 1) ** 2 == places.shape[1] - 1:
            found = dict(interpolate_embeddings(side * parts.patch, parts.patch, OrderedDict(found)))
    return found


def set_trained(model: QuadrantClassifier, layers: Mapping[str, float]) -> list[dict[str, object]]:
    """Freeze all but the named layers and give the optimizer's parameter groups.

    Parameters
    ----------
    model
        The model; its frozen layers are put in evaluation mode, so that their batch statistics stay as they are.
    layers
        Learning rate by layer: ``head``, ``layer4``, ``layer3``, or ``all``; what the numbered ones are in a network
        that does not call its stages so, `echoquad_train.networks.backbones` says.
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
        with contextlib.redirect_stdout(sys.stderr):  # where torch says what it downloads; stdout is for results
            state: Mapping[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        return state
    # No network, one that breaks off, a full disk, a file whose hash is not the promised, a damaged one in the cache.
    except (OSError, HTTPException, *_UNREADABLE) as error:
        reason = getattr(error, "reason", None) or first_line(error)
        raise ConfigError(
            f"weights imagenet: the {backbone} weights cannot be downloaded ({reason}); connect once, "
            "or give --weights FILE, or train from random weights with --recipe scratch --weights none"
        ) from error


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch did not write; an error says so here
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"weights {path.as_posix()}: no such file; expected imagenet, none, or a file") from None
    except (OSError, *_UNREADABLE) as error:
        # torch's own words for a pickle that holds code are advice on how to run it.
        reason = "it holds more than tensors" if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise ConfigError(
            f"weights {path.as_posix()}: cannot be read as tensors ({reason}); "
            "expected .safetensors, or a .pt that holds tensors alone"
        ) from error
    except safetensors.SafetensorError as error:
        raise ConfigError(f"weights {path.as_posix()}: damaged or no safetensors file ({error})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"weights {path.as_posix()}: no state dict found; expected names and tensors")
    return state


def first_line(error: Exception) -> str:
    """Give what an error says, without the pages that torch appends."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
