"""int8 export: quantize a float32 graph so that it passes the parity gate, or refuse.

In a network with depthwise convolutions, the biases take back the mean error of the rounded weights. A network of
convolutions and ReLUs then usually passes with the activations' extremes as ranges. Activations with long tails
(MobileNetV3, EfficientNet) often fail. For these the usual remedies are tried, the cheapest first: percentile
calibration, which cuts off the rarest values; then float32 for the most sensitive layers (sensitivity scan). The same
parity gate applies to each attempt, and the manifest lists all attempts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx

from echoquad_export.graph.onnx_graph import open_in_memory
from echoquad_export.parity.parity import Parity
from echoquad_export.precision.bias_correction import mean_rounding_errors
from echoquad_export.precision.calibration_set import CalibrationSet, Ranges
from echoquad_export.precision.quantize import activation_tensors, biased_convolutions, layers, prepare, quantize
from echoquad_runtime.bundle.onnx_header import INPUT, OUTPUTS
from echoquad_runtime.contract import Contract
from echoquad_runtime.engine.io_binding import FloatArray
from echoquad_runtime.errors import ConfigError, ParityError

__all__ = ["Attempt", "Quantized", "build_int8"]

PERCENTILES: Final = (None, 99.999, 99.99, 99.9)
"""Percentiles in the order of the attempts; None keeps the extremes."""

SCAN_FRAMES: Final = 8  # calibration frames of the sensitivity scan


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to quantize, and its parity.

    Attributes
    ----------
    method
        Calibration method: ``min-max``, or for example ``percentile 99.99``.
    float_layers
        Names of the layers that stay in float32, the most sensitive first.
    parity
        Comparison with the training code.
    """

    method: str
    float_layers: tuple[str, ...]
    parity: Parity

    @property
    def excess(self) -> float:
        """Distance from the gate: the largest ratio of a figure to its bound; 1 is at the bound."""
        gate, changed = self.parity.gate, self.parity.worst("frame_flips")
        # With so few frames that no decision may change, each changed decision counts as one bound.
        allowed = max(gate.max_frame_flip_fraction * self.parity.frames, 1)
        return max(changed / allowed, self.parity.worst("max_abs_dprobability") / gate.max_abs_dprobability)

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest's entry."""
        return {
            "method": self.method,
            "float_layers": list(self.float_layers),
            "max_abs_dprobability": self.parity.worst("max_abs_dprobability"),
            "frame_flips": int(self.parity.worst("frame_flips")),
            "passed": self.parity.passed,
        }

    def __str__(self) -> str:
        kept = f", {len(self.float_layers)} layers in float" if self.float_layers else ""
        worst = self.parity.worst("max_abs_dprobability")
        return f"{self.method}{kept}: |dp| {worst:.3f}, {self.parity.worst('frame_flips'):.0f} changed decisions"


@dataclass(frozen=True, slots=True)
class Quantized:
    """A graph that passed the gate: the bytes of the ONNX file, its parity, and the manifest's details."""

    graph: bytes
    parity: Parity
    details: dict[str, Any]

    def __str__(self) -> str:
        calibration, kept = self.details["calibration"], self.details["float_layers"]
        left = f"; in float: {', '.join(kept)} of {self.details['layers']} layers" if kept else ""
        return f"{calibration['method']} calibration on {calibration['frames']} training frames{left}"


def build_int8(
    graph: bytes,
    contract: Contract,
    calibration: CalibrationSet,
    measure: Callable[[bytes], Parity],
    progress: Callable[[str], None] = lambda _: None,
) -> Quantized:
    """Quantize a graph; return the first attempt that passes the gate.

    Parameters
    ----------
    graph
        The ONNX file from `echoquad_export.graph.build.build_graph`.
    contract
        The contract of the run.
    calibration
        Frames that ranges are computed from.
    measure
        Measures the parity of an ONNX file.
    progress
        Called with a line about each attempt that fails.

    Raises
    ------
    ParityError
        If all attempts fail.
    ConfigError
        If most weights are in matrix products, which stay in float32.
    """
    model = prepare(graph, contract)
    _require_convolutions(model)
    units = layers(model)
    ranges = Ranges(model, calibration.quadrants, activation_tensors(model))
    errors = mean_rounding_errors(model, biased_convolutions(model), calibration.quadrants)
    attempts: list[Attempt] = []

    def attempt(percentile: float | None, worst: tuple[tuple[str, ...], ...] = ()) -> Quantized | None:
        kept = [name for unit in worst for name in unit]
        candidate = quantize(model, ranges, errors=errors, percentile=percentile, keep_float=kept)
        method = "min-max" if percentile is None else f"percentile {percentile:g}"
        attempts.append(Attempt(method, tuple(unit[0] for unit in worst), measure(candidate)))
        if not attempts[-1].parity.passed:
            progress(f"int8 failed parity with {attempts[-1]}")
            return None
        details = {
            "calibration": {**calibration.to_dict(), "method": method},
            "layers": len(units),
            "float_layers": list(attempts[-1].float_layers),
            "attempts": [made.to_dict() for made in attempts],
        }
        return Quantized(candidate, attempts[-1].parity, details)

    for percentile in PERCENTILES:
        if found := attempt(percentile):
            return found
    best = min(range(len(PERCENTILES)), key=lambda index: attempts[index].excess)
    progress(f"measuring the sensitivity of {len(units)} layers")
    ranked = _by_sensitivity(model, ranges, errors, PERCENTILES[best], units, calibration.quadrants[:SCAN_FRAMES])
    half = len(units) // 2  # with more, int8 would no longer be worthwhile
    for count in sorted({*(2**power for power in range(half.bit_length())), half}):
        if found := attempt(PERCENTILES[best], tuple(ranked[:count])):
            return found
    closest = min(attempts, key=lambda made: made.excess)
    allowed = ", ".join(f"{name} {value:g}" for name, value in closest.parity.gate.to_dict().items())
    raise ParityError(
        f"parity: no int8 graph of this model decides as the training code does on {closest.parity.frames} frames of "
        f"the {closest.parity.source}; {len(attempts)} attempts ({len(PERCENTILES)} calibrations, then up to {half} of "
        f"{len(units)} layers in float); the closest was {closest}; allowed: {allowed}; no bundle was written; "
        "leave int8 out of --precision"
    )


def _require_convolutions(model: onnx.ModelProto) -> None:
    """Raise ConfigError for a transformer: only its first layer would be quantized."""
    sizes = {item.name: math.prod(item.dims) for item in model.graph.initializer}

    def weights(operator: str) -> int:
        return sum(sizes.get(node.input[1], 0) for node in model.graph.node if node.op_type == operator)

    convolutions, products = weights("Conv"), weights("MatMul")
    if products > convolutions:
        raise ConfigError(
            f"precision int8: {products} weights in matrix products, {convolutions} in convolutions; int8 needs a "
            "network of convolutions; leave int8 out of --precision"
        )


def _by_sensitivity(
    model: onnx.ModelProto,
    ranges: Ranges,
    errors: Mapping[str, npt.NDArray[np.float64]],
    percentile: float | None,
    units: list[tuple[str, ...]],
    quadrants: npt.NDArray[np.uint8],
) -> list[tuple[str, ...]]:
    """Sort layers by the mean change of the logits when only that layer is quantized, the most sensitive first."""
    flat = quadrants.reshape(-1, 1, *quadrants.shape[2:])

    def logits(graph: bytes) -> FloatArray:
        found: FloatArray = open_in_memory(graph).run(OUTPUTS[:1], {INPUT: flat})[0]
        return found

    reference = logits(model.SerializeToString())
    names = {name for unit in units for name in unit}

    def harm(unit: tuple[str, ...]) -> float:
        graph = quantize(model, ranges, errors=errors, percentile=percentile, keep_float=names.difference(unit))
        return float(np.abs(logits(graph) - reference).mean())

    order = np.argsort([harm(unit) for unit in units], kind="stable")[::-1]
    return [units[index] for index in order]
