"""Check for optional packages before a command starts its work."""

from __future__ import annotations

from importlib import util
from typing import Final, Literal

from echoquad_runtime.errors import MissingExtraError

__all__ = ["EXTRAS", "missing_extra", "require_extra"]

Extra = Literal["train", "export", "tensorboard", "serve", "pacs"]

EXTRAS: Final[dict[str, Extra]] = {
    "onnx": "export",
    "onnxscript": "export",
    "torch": "train",
    "torchvision": "train",
    "safetensors": "train",
    "sklearn": "train",
    "matplotlib": "train",
    "scipy": "train",
    "imagehash": "train",
    "jinja2": "train",
    "starlette": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "pynetdicom": "pacs",
    "pydicom": "pacs",
    "highdicom": "pacs",
}
"""The extra that installs each optional package."""

_INCLUDED: Final[dict[Extra, tuple[Extra, ...]]] = {"export": ("export", "train")}


def require_extra(extra: Extra) -> None:
    """Check that the packages of an extra are installed.

    Raises
    ------
    MissingExtraError
        If one of them is not installed.
    """
    included = _INCLUDED.get(extra, (extra,))
    for name, provider in EXTRAS.items():
        if provider in included and util.find_spec(name) is None:
            raise missing_extra(name, extra)


def missing_extra(name: str, extra: Extra) -> MissingExtraError:
    """Build the error for a missing package."""
    return MissingExtraError(f'this needs {name}, which is not installed; do: pip install "echoquad[{extra}]"')
