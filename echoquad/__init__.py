"""EchoQuad: from a folder of labelled echo frames to a checked ONNX bundle that a bedside cart can run.

Research use only. Importing the package imports nothing else: `Predictor` and the other names are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echoquad_runtime._version import __version__

if TYPE_CHECKING:
    from echoquad_runtime.bundle.bundle import Bundle
    from echoquad_runtime.contract import Contract
    from echoquad_runtime.errors import EchoQuadError
    from echoquad_runtime.frames.frame_file import Failure
    from echoquad_runtime.predict.prediction import Prediction
    from echoquad_runtime.predict.predictor import Predictor
    from echoquad_runtime.verify.verify import Verification, verify

__all__ = [
    "Bundle",
    "Contract",
    "EchoQuadError",
    "Failure",
    "Prediction",
    "Predictor",
    "Verification",
    "__version__",
    "verify",
]

_MODULES = {
    "Bundle": "echoquad_runtime.bundle.bundle",
    "Contract": "echoquad_runtime.contract",
    "EchoQuadError": "echoquad_runtime.errors",
    "Failure": "echoquad_runtime.frames.frame_file",
    "Prediction": "echoquad_runtime.predict.prediction",
    "Predictor": "echoquad_runtime.predict.predictor",
    "Verification": "echoquad_runtime.verify.verify",
    "verify": "echoquad_runtime.verify.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'echoquad' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
