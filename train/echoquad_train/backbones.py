"""Backbones: what is particular to each of torchvision's networks, a record a network."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torchvision
from torch import nn

__all__ = ["BACKBONES", "Backbone", "build_body"]

MOMENTUM: Final = 0.1
"""Of batch statistics: torch's own and the ResNets'. MobileNet's 0.01 averages over some hundred batches, which suits
ImageNet's long courses; an epoch here has from ten to some hundred, and is validated with what they left."""


@dataclass(frozen=True, slots=True)
class Backbone:
    """Where a network's parts are, by torchvision's names.

    Attributes
    ----------
    end
        The linear layer that gives ImageNet's classes; what comes before it is the backbone.
    layer4, layer3
        What a recipe means by these names: the modules that work at 1/32 and at 1/16 of the input's side, which in a
        ResNet are called so. Layers between the pooling and `end` belong to the former.
    mixed_on_cpu
        Whether mixed precision makes its training faster on a CPU that computes in bfloat16. Depthwise convolutions
        take twice as long in it as in float32 (torch 2.14).
    """

    end: str
    layer4: tuple[str, ...]
    layer3: tuple[str, ...]
    mixed_on_cpu: bool = True


_RESNET: Final = Backbone("fc", ("layer4",), ("layer3",))


def _features(first: int, last: int) -> tuple[str, ...]:
    return tuple(f"features.{index}" for index in range(first, last + 1))


BACKBONES: Final[Mapping[str, Backbone]] = {
    "resnet18": _RESNET,
    "resnet34": _RESNET,
    "resnet50": _RESNET,
    # Its hidden layer stays, with the weights that ImageNet gave it: without, the head would see half the features.
    "mobilenet_v3_small": Backbone("classifier.3", (*_features(9, 12), "classifier"), _features(4, 8), False),
    "efficientnet_b0": Backbone("classifier.1", _features(6, 8), _features(4, 5), False),
}


def build_body(name: str) -> tuple[nn.Module, int]:
    """Build a network with random weights, without its end and the dropout before it.

    Parameters
    ----------
    name
        A name from `BACKBONES`.

    Returns
    -------
    tuple of nn.Module and int
        The network, [N, 3, H, W] to [N, F], and F.
    """
    body: nn.Module = torchvision.models.get_model(name, weights=None)
    end = BACKBONES[name].end
    linear = body.get_submodule(end)
    assert isinstance(linear, nn.Linear)
    features = linear.in_features
    parent, _, child = end.rpartition(".")
    if parent:
        kept = list(body.get_submodule(parent).named_children())
        del kept[[key for key, _ in kept].index(child) :]
        while kept and isinstance(kept[-1][1], nn.Dropout):
            kept.pop()
        setattr(body, parent, nn.Sequential(OrderedDict(kept)))
    else:
        setattr(body, child, nn.Identity())
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = MOMENTUM
    return body, features
