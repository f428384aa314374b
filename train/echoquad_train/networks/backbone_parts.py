"""The parts of a backbone that training, export and typicality refer to."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from echoquad_runtime.errors import ConfigError

__all__ = ["Backbone", "unknown_backbone"]


@dataclass(frozen=True, slots=True)
class Backbone:
    """Parts and limits of a network, by the names of the library that builds it.

    Attributes
    ----------
    classifier
        The linear layer that outputs ImageNet's classes. Everything before it is the backbone, including hidden linear
        layers and the dropout between them.
    layer4, layer3
        The modules that a recipe calls by these names of a ResNet: layer3 reduces feature maps from 1/8 to 1/16 of the
        input's side, layer4 from 1/16 to 1/32. Layers behind the last map belong to layer4. In a transformer, layer4 is
        the last quarter of the blocks and layer3 the quarter before.
    mixed_on_cpu
        Whether mixed precision speeds up training on a CPU with native bfloat16. Depthwise convolutions take twice as
        long in bfloat16 as in float32 (torch 2.14).
    min_input_size
        Smallest input size in pixels that leaves a feature map at the end.
    patch_size
        Side of a vision transformer's patches, which must divide the input size; 0 for other networks. Its position
        embeddings fix the input size.
    unused
        Parts of an ImageNet checkpoint that the backbone does not have.
    renamed
        Regular expressions and replacements for tensor names in ImageNet checkpoints older than the network's code.
    options
        Arguments of torchvision's builder.
    channels_last
        Whether the modules output feature maps as [N, h, w, D] instead of [N, D, h, w].
    """

    classifier: str
    layer4: tuple[str, ...]
    layer3: tuple[str, ...]
    mixed_on_cpu: bool = True
    min_input_size: int = 8
    patch_size: int = 0
    unused: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    channels_last: bool = False


def unknown_backbone(name: str, known: Collection[str], expected: str) -> ConfigError:
    """Build the error for a name that is not among the `known` ones, with the most similar of them."""
    similar = difflib.get_close_matches(name.lower(), known, 1)
    hint = f"did you mean {similar[0]}? " if similar else ""
    return ConfigError(f"backbone {name!r} found; {hint}expected {expected}")
