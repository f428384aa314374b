"""Backbones: what is particular to each of torchvision's networks, a record a network.

All are fed alike: grey levels on three equal channels, mean 0.5 and standard deviation 0.5, as the document has it.
GoogLeNet's ImageNet weights were made for that (torchvision transforms its inputs to it; here there is nothing to
transform). The others' were trained on each colour's own statistics; training makes up for the shift.
GoogLeNet's auxiliary heads are left out, with their weights: they are of use where there is no batch normalisation.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torchvision
from torch import nn

from echoquad_runtime.errors import ConfigError

__all__ = ["BACKBONES", "Backbone", "build_body", "check_backbone"]

MOMENTUM: Final = 0.1
"""Of batch statistics: torch's own and the ResNets'. MobileNet's 0.01 averages over some hundred batches, which suits
ImageNet's long courses; an epoch here has from ten to some hundred, and is validated with what they left."""


@dataclass(frozen=True, slots=True)
class Backbone:
    """Where a network's parts are, by torchvision's names.

    Attributes
    ----------
    end
        The linear layer that gives ImageNet's classes; what comes before it is the backbone, hidden linear layers and
        the dropout between them included.
    layer4, layer3
        What a recipe means by these names: the modules that bring maps of 1/8 of the input's side to 1/16, and those
        that bring these to 1/32, which in a ResNet are called layer3 and layer4. Layers behind the last map belong to
        the latter. A transformer has no maps that shrink: they are its last quarter of blocks and the one before.
    mixed_on_cpu
        Whether mixed precision makes its training faster on a CPU that computes in bfloat16. Depthwise convolutions
        take twice as long in it as in float32 (torch 2.14).
    smallest
        The least input size, in pixels, of which anything is left to the end.
    patch
        The side of the patches that the input is cut into, whose multiple the input size has to be; 0 for none. A
        network with patches has an embedding for each place, and so is built for one input size.
    unused
        Parts of an ImageNet checkpoint that the backbone does not have.
    renamed
        Names of tensors in ImageNet checkpoints that are older than the network's code: regular expressions, and what
        torchvision makes of them.
    options
        What torchvision's builder is told.
    """

    end: str
    layer4: tuple[str, ...]
    layer3: tuple[str, ...]
    mixed_on_cpu: bool = True
    smallest: int = 8
    patch: int = 0
    unused: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


_RESNET: Final = Backbone("fc", ("layer4",), ("layer3",))


def _features(first: int, last: int) -> tuple[str, ...]:
    return tuple(f"features.{index}" for index in range(first, last + 1))


def _blocks(first: int, last: int) -> tuple[str, ...]:
    return tuple(f"encoder.layers.encoder_layer_{index}" for index in range(first, last + 1))


BACKBONES: Final[Mapping[str, Backbone]] = {
    "resnet18": _RESNET,
    "resnet34": _RESNET,
    "resnet50": _RESNET,
    "mobilenet_v2": Backbone("classifier.1", _features(14, 18), _features(7, 13), False),
    # Its hidden layer stays, with the weights that ImageNet gave it: without, the head would see half the features.
    "mobilenet_v3_small": Backbone("classifier.3", (*_features(9, 12), "classifier"), _features(4, 8), False),
    "mobilenet_v3_large": Backbone("classifier.3", (*_features(13, 16), "classifier"), _features(7, 12), False),
    "efficientnet_b0": Backbone("classifier.1", _features(6, 8), _features(4, 5), False),
    "efficientnet_v2_s": Backbone("classifier.1", _features(6, 7), _features(4, 5), False),
    "densenet121": Backbone(
        "classifier",
        ("features.transition3", "features.denseblock4", "features.norm5"),
        ("features.transition2", "features.denseblock3"),
        smallest=29,
        renamed=((r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2"),),
    ),
    # A stage of these is a block of convolutions with the pooling behind it.
    "vgg16": Backbone("classifier.6", (*_features(24, 30), "classifier"), _features(17, 23), smallest=32),
    "alexnet": Backbone("classifier.6", (*_features(6, 12), "classifier"), _features(3, 5), smallest=63),
    "googlenet": Backbone(
        "fc",
        ("maxpool4", "inception5a", "inception5b"),
        ("maxpool3", *(f"inception4{letter}" for letter in "abcde")),
        smallest=15,
        unused=("aux1", "aux2"),
        options={"aux_logits": False, "init_weights": True},
    ),
    "convnext_tiny": Backbone("classifier.2", (*_features(6, 7), "classifier"), _features(4, 5), False, smallest=32),
    "vit_b_16": Backbone(
        "heads.head",
        (*_blocks(9, 11), "encoder.ln"),
        _blocks(6, 8),
        smallest=16,
        patch=16,
        renamed=((r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3.")),
    ),
}


def check_backbone(name: str, size: int) -> None:
    """Refuse a network that is unknown, or an input size that it cannot take.

    Raises
    ------
    ConfigError
        If it is so.
    """
    if name not in BACKBONES:
        near = difflib.get_close_matches(name.lower(), BACKBONES, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"backbone {name!r} found; {meant}expected one of {', '.join(BACKBONES)}")
    parts = BACKBONES[name]
    if parts.patch and size % parts.patch:
        below = max(size // parts.patch, 1) * parts.patch
        raise ConfigError(
            f"backbone {name}: input size {size} found; expected a multiple of {parts.patch}, the side of its patches; "
            f"do: --input-size {below} or {below + parts.patch}"
        )
    if size < parts.smallest:
        raise ConfigError(
            f"backbone {name}: input size {size} found; expected at least {parts.smallest}, since below it nothing is "
            f"left at its end; do: --input-size {parts.smallest} or more, or take another backbone"
        )


def build_body(name: str, size: int = 224) -> tuple[nn.Module, int]:
    """Build a network with random weights, without its end and the dropout before it.

    Parameters
    ----------
    name
        A name from `BACKBONES`.
    size
        The input size, of which networks with patches have an embedding for each place.

    Returns
    -------
    tuple of nn.Module and int
        The network, [N, 3, H, W] to [N, F], and F.
    """
    options = {**BACKBONES[name].options, **({"image_size": size} if BACKBONES[name].patch else {})}
    body: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    end = BACKBONES[name].end
    linear = body.get_submodule(end)
    assert isinstance(linear, nn.Linear)
    features = linear.in_features
    parent, _, child = end.rpartition(".")
    kept = list(body.get_submodule(parent).named_children())
    del kept[[key for key, _ in kept].index(child) :]
    dropped = [child]
    while kept and isinstance(kept[-1][1], nn.Dropout):
        dropped.append(kept.pop()[0])
    if parent:
        setattr(body, parent, nn.Sequential(OrderedDict(kept)))
    else:
        for key in dropped:
            setattr(body, key, nn.Identity())
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = MOMENTUM
    return body, features
