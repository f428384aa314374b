"""Backbones: torchvision's supported networks and their properties; timm's are described by `timm_backbones`.

All receive grey levels on three equal channels, with mean 0.5 and standard deviation 0.5, as in the reference pipeline.
GoogLeNet's ImageNet weights expect exactly that. The others were trained with a mean and standard deviation for each
colour; training compensates for the shift. GoogLeNet's auxiliary heads are removed: they only help without batch
normalisation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

import torchvision
from torch import nn

from echoquad_runtime.errors import ConfigError
from echoquad_train.networks.backbone_parts import Backbone, unknown_backbone
from echoquad_train.networks.timm_backbones import PREFIX, build_timm, check_timm_size, timm_backbone

__all__ = ["BACKBONES", "backbone_parts", "build_backbone", "check_backbone"]

MOMENTUM: Final = 0.1
"""Of batch statistics: the default of torch and the ResNets. MobileNet's 0.01 averages over hundreds of batches, which
suits ImageNet; an epoch here has ten to a few hundred, and validation uses the statistics that they leave."""


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
    # The hidden layer of the classifier stays, with its ImageNet weights: without it the head has half the features.
    "mobilenet_v3_small": Backbone("classifier.3", (*_features(9, 12), "classifier"), _features(4, 8), False),
    "mobilenet_v3_large": Backbone("classifier.3", (*_features(13, 16), "classifier"), _features(7, 12), False),
    "efficientnet_b0": Backbone("classifier.1", _features(6, 8), _features(4, 5), False),
    "efficientnet_v2_s": Backbone("classifier.1", _features(6, 7), _features(4, 5), False),
    "densenet121": Backbone(
        "classifier",
        ("features.transition3", "features.denseblock4", "features.norm5"),
        ("features.transition2", "features.denseblock3"),
        min_input_size=29,
        renamed=((r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2"),),
    ),
    # A stage is a block of convolutions and the pooling after it.
    "vgg16": Backbone("classifier.6", (*_features(24, 30), "classifier"), _features(17, 23), min_input_size=32),
    "alexnet": Backbone("classifier.6", (*_features(6, 12), "classifier"), _features(3, 5), min_input_size=63),
    "googlenet": Backbone(
        "fc",
        ("maxpool4", "inception5a", "inception5b"),
        ("maxpool3", *(f"inception4{letter}" for letter in "abcde")),
        min_input_size=15,
        unused=("aux1", "aux2"),
        options={"aux_logits": False, "init_weights": True},
    ),
    "convnext_tiny": Backbone(
        "classifier.2", (*_features(6, 7), "classifier"), _features(4, 5), False, min_input_size=32
    ),
    "vit_b_16": Backbone(
        "heads.head",
        (*_blocks(9, 11), "encoder.ln"),
        _blocks(6, 8),
        min_input_size=16,
        patch_size=16,
        renamed=((r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3.")),
    ),
}


def backbone_parts(name: str) -> Backbone:
    """Return the properties of a backbone.

    Parameters
    ----------
    name
        A name from `BACKBONES`, or ``timm:`` and the name of a network of timm.

    Raises
    ------
    ConfigError
        If the backbone is unknown or unsuitable, or timm is not installed.
    """
    if name.startswith(PREFIX):
        return timm_backbone(name)
    if name not in BACKBONES:
        listed = f"one of {', '.join(BACKBONES)}, or {PREFIX}NAME with a network of timm"
        raise unknown_backbone(name, BACKBONES, listed)
    return BACKBONES[name]


def check_backbone(name: str, size: int) -> None:
    """Check the name of a backbone and its input size.

    Raises
    ------
    ConfigError
        If the backbone is unknown or does not accept the input size.
    """
    parts = backbone_parts(name)
    patch, least = parts.patch_size, parts.min_input_size
    if patch and size % patch:
        lower = max(size // patch, 1) * patch
        raise ConfigError(
            f"backbone {name}: input size {size} found; expected a multiple of its patch size {patch}; "
            f"do: --input-size {lower} or {lower + patch}"
        )
    if size < least:
        raise ConfigError(
            f"backbone {name}: input size {size} found; expected at least {least}, because smaller inputs leave no "
            f"feature map; do: --input-size {least} or more, or use another backbone"
        )
    if name.startswith(PREFIX):
        check_timm_size(name, size)


def build_backbone(name: str, size: int = 224) -> tuple[nn.Module, int]:
    """Build a network with random weights, without its classifier and the dropout before it.

    Parameters
    ----------
    name
        A name that `backbone_parts` accepts.
    size
        The input size, which the position embeddings of vision transformers depend on.

    Returns
    -------
    tuple of nn.Module and int
        The network, [N, 3, H, W] to [N, F], and F.
    """
    network, features = build_timm(name, size) if name.startswith(PREFIX) else _build_torchvision(name, size)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = MOMENTUM
    return network, features


def _build_torchvision(name: str, size: int) -> tuple[nn.Module, int]:
    options = {**BACKBONES[name].options, **({"image_size": size} if BACKBONES[name].patch_size else {})}
    network: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    classifier = BACKBONES[name].classifier
    linear = network.get_submodule(classifier)
    assert isinstance(linear, nn.Linear)
    features = linear.in_features
    parent, _, child = classifier.rpartition(".")
    layers = list(network.get_submodule(parent).named_children())
    del layers[[key for key, _ in layers].index(child) :]
    removed = [child]
    while layers and isinstance(layers[-1][1], nn.Dropout):
        removed.append(layers.pop()[0])
    if parent:
        setattr(network, parent, nn.Sequential(OrderedDict(layers)))
    else:
        for key in removed:
            setattr(network, key, nn.Identity())
    return network, features
