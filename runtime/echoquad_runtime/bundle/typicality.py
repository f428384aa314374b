"""The typicality of a frame: how near it lies to the training frames, and from which value on it is unlike them.

The graph scores quadrants (`echoquad_runtime.bundle.onnx_header.TYPICALITY`). The score of a frame is the harmonic mean
of its four quadrants. Export measures two thresholds on the validation frames, for each precision, and stores them in
the manifest. Bundles of earlier releases have neither score nor thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from echoquad_runtime.bundle.manifest import FP32_DEVICES

__all__ = ["LEVELS", "UNLIKE_TRAINING", "frame_typicality", "typicality_threshold", "typicality_thresholds"]

UNLIKE_TRAINING: Final = "unlike-training"
"""Flag of a frame whose typicality is lower than that of 99 % of the validation frames."""

LEVELS: Final[Mapping[str, float]] = {"95": 0.05, "99": 0.01}
"""Names of the thresholds, and the share of frames like the training frames that falls below each."""


def frame_typicality(scores: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Return the typicality of F frames, float64 [F]: the harmonic mean of their quadrants' scores, [F, 4]."""
    return np.asarray(1 / (1 / scores.astype(np.float64)).mean(axis=1))


def typicality_thresholds(typicality: npt.NDArray[np.floating]) -> dict[str, float]:
    """Return the thresholds, by name, that F validation frames of the given typicality, [F], determine.

    Below a threshold lies at most the share `LEVELS` of further frames of this kind, on average. That is the k-th
    smallest value, k = floor(share * (F + 1)). With fewer than 99 frames it is the smallest one, below which one frame
    in F + 1 lies (S. Bates et al., "Testing for Outliers with Conformal p-values", arXiv:2104.08279).
    """
    ordered = np.sort(typicality)
    return {name: float(ordered[max(math.floor(share * (len(ordered) + 1)) - 1, 0)]) for name, share in LEVELS.items()}


def typicality_threshold(manifest: Mapping[str, Any], precision: str) -> float | None:
    """Return the typicality below which a frame has the flag `UNLIKE_TRAINING`; None if the manifest states none."""
    found: Any = manifest
    for key in ("typicality", "thresholds", "fp32" if precision in FP32_DEVICES else precision, "99"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None
