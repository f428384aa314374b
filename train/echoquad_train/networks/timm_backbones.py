"""Backbones of timm: any network with global pooling and a linear classifier, described by timm's own metadata.

The name of such a backbone is ``timm:`` and timm's name. The names of its stages come from timm's feature info, which
lists the module behind each feature map and the reduction of its side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib import util
from typing import Any, Final

import torch
from torch import nn

from echoquad_runtime.errors import ConfigError, MissingExtraError
from echoquad_train.networks.backbone_parts import Backbone, unknown_backbone

__all__ = ["PREFIX", "build_timm", "check_timm_size", "timm_backbone"]

PREFIX: Final = "timm:"

_LAYER3, _LAYER4 = 16, 32  # reductions of the input's side after layer3 and layer4 of a ResNet


@lru_cache(maxsize=32)
def timm_backbone(name: str) -> Backbone:
    """Return the properties of a network of timm.

    Raises
    ------
    MissingExtraError
        If timm is not installed.
    ConfigError
        If timm does not know the network, or it has no linear classifier or no feature info.
    """
    _require_known(name)
    try:
        network = _on_meta(name, None, classes=1)
        classifier = network.pretrained_cfg.get("classifier")
        linear = network.get_submodule(classifier) if isinstance(classifier, str) else None
        stages = _stages(network)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise _unsuitable(name, str(error).partition("\n")[0]) from error
    if not isinstance(linear, nn.Linear):
        raise _unsuitable(name, "its classifier is not a single linear layer")
    if stages is None:
        raise _unsuitable(name, "timm's feature info does not name its stages")
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    layer3, layer4 = stages
    return Backbone(
        classifier,
        layer4,
        layer3,
        # Depthwise convolutions; see `Backbone.mixed_on_cpu`.
        mixed_on_cpu=all(module.groups == 1 or module.groups < module.in_channels for module in convolutions),
        patch_size=_patch_size(network),
        channels_last=getattr(network, "output_fmt", "NCHW") == "NHWC",
    )


@lru_cache(maxsize=32)
def check_timm_size(name: str, size: int) -> None:
    """Check that a network maps images of an input size to one vector of features each.

    Raises
    ------
    ConfigError
        If it does not.
    """
    try:
        network = _on_meta(name, size, classes=0)
        features = network(torch.empty(2, 3, size, size, device="meta"))
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0] or "it leaves no feature map"
        raise ConfigError(
            f"backbone {name}: input size {size} found, which the network does not accept ({reason}); expected another "
            "--input-size, such as 224"
        ) from error
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        raise _unsuitable(name, "it does not end with global pooling")


def build_timm(name: str, size: int) -> tuple[nn.Module, int]:
    """Build a network with random weights, without its classifier; return it and the number of its features."""
    network = _create(name, size, classes=1)
    features = network.get_submodule(timm_backbone(name).classifier).in_features
    network.reset_classifier(0)
    return network, features


def _require_known(name: str) -> None:
    if util.find_spec("timm") is None:
        raise MissingExtraError(
            f'backbone {name}: this needs timm, which is not installed; do: pip install "echoquad[timm]"'
        )
    import timm

    known = [f"{PREFIX}{own}" for own in timm.list_models()]
    if name not in known:
        raise unknown_backbone(name, known, f"{PREFIX} and a name of timm.list_models()")


def _create(name: str, size: int | None, classes: int) -> Any:
    import timm

    own = name.removeprefix(PREFIX)
    fixed = timm.get_pretrained_cfg_value(own, "fixed_input_size")
    options: dict[str, Any] = {"img_size": size} if fixed and size is not None else {}
    return timm.create_model(own, pretrained=False, num_classes=classes, **options)


def _on_meta(name: str, size: int | None, classes: int) -> Any:
    """Build a network without memory for its weights, which shows its form; no random number is drawn."""
    with torch.device("meta"):
        return _create(name, size, classes).eval()


def _unsuitable(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"backbone {name}: {reason}; expected a network with global pooling and a linear classifier, such as "
        f"{PREFIX}tf_efficientnet_lite0"
    )


def _stages(network: Any) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Return the modules of layer3 and layer4, as `Backbone` defines them; None if they are unknown."""
    info = getattr(network, "feature_info", None)
    maps = list(info if isinstance(info, list) else getattr(info, "info", ()))
    if not maps:
        return None
    names = [entry["module"] for entry in maps]
    reductions = [entry["reduction"] for entry in maps]
    if len(set(reductions)) == 1 and len(names) >= 4:  # a transformer: quarters of its blocks
        quarter = len(names) // 4
        ends = names[-2 * quarter - 1], names[-quarter - 1]
    elif {_LAYER3, _LAYER4} <= set(reductions) and min(reductions) < _LAYER3:
        before, through = (
            [name for name, reduction in zip(names, reductions, strict=True) if reduction <= bound]
            for bound in (_LAYER3 - 1, _LAYER3)
        )
        ends = before[-1], through[-1]
    else:
        return None
    units = list(_units(network, names))
    if not set(ends) <= set(units):
        return None
    first, second = (units.index(end) + 1 for end in ends)
    own_weights = [name for name in units[second:] if any(True for _ in network.get_submodule(name).parameters())]
    classifier = network.pretrained_cfg["classifier"]
    layer4 = tuple(name for name in own_weights if name != classifier)
    return tuple(units[first:second]), layer4


def _units(network: nn.Module, names: Sequence[str], prefix: str = "") -> Iterator[str]:
    """Yield the modules of a network in its order, the largest ones that contain no module of `names` within."""
    for child, module in network.named_children():
        name = f"{prefix}{child}"
        if any(other.startswith(f"{name}.") for other in names):
            yield from _units(module, names, f"{name}.")
        else:
            yield name


def _patch_size(network: Any) -> int:
    """Return the multiple that a fixed input size must be of; 0 for networks that accept any size."""
    if not network.pretrained_cfg.get("fixed_input_size"):
        return 0
    size = getattr(getattr(network, "patch_embed", None), "patch_size", _LAYER4)
    return int(size if isinstance(size, int) else size[0])
