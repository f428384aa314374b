"""Which extra brings the packages that a command needs, said before the work and not in the middle of it."""

from __future__ import annotations

from importlib import util
from typing import Final, Literal

from echoquad_runtime.errors import MissingExtraError

__all__ = ["EXTRAS", "missing_extra", "require_extra"]

Extra = Literal["train", "export", "tensorboard"]

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
}
"""The extra of each package that some command imports when it runs; ``export`` brings those of ``train`` too."""


def require_extra(extra: Extra) -> None:
    """Refuse at once what would fail later, halfway through.

    Raises
    ------
    MissingExtraError
        If a package of the extra is not installed.
    """
    for name, brings in EXTRAS.items():
        if extra in (brings, "export") and util.find_spec(name) is None:
            raise missing_extra(name, extra)


def missing_extra(name: str, extra: Extra) -> MissingExtraError:
    """Word the error for a missing package."""
    return MissingExtraError(f'this needs {name}, which is not installed; do: pip install "echoquad[{extra}]"')
