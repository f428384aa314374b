"""int8: from a float graph to one of integers that keeps its decisions, or to a refusal.

A network of plain convolutions and ReLUs is quantised by the extremes that its tensors take. One with depthwise
convolutions, or with activations that have long tails (MobileNet, EfficientNet), often is not; for these, what is known
to help is tried in turn, the least costly first: to cut the ranges' rarest values off (percentile calibration), then to
keep the layers in float that are hurt most (a sensitivity scan). Every attempt is judged by the same parity gate, and
all of them are told.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx

from echoquad_export.graph.memory_session import open_in_memory
from echoquad_export.parity.parity import Parity
from echoquad_export.precision.calibration_set import CalibrationSet, Ranges
from echoquad_export.precision.quantize import float_tensors, layers, prepare, quantize
from echoquad_runtime.bundle.onnx_header import INPUT, OUTPUTS
from echoquad_runtime.contract import Contract
from echoquad_runtime.engine.io_binding import FloatArray
from echoquad_runtime.errors import ConfigError, ParityError

__all__ = ["Attempt", "Quantized", "build_int8"]

PERCENTILES: Final = (None, 99.999, 99.99, 99.9)
"""In the order in which they are tried; None keeps the extremes."""

SCAN_FRAMES: Final = 8  # of the calibration set, on which layers are compared

Judge = Callable[[bytes], Parity]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to quantise, and what parity said of it.

    Attributes
    ----------
    method
        ``min-max`` or ``percentile 99.99``: how ranges were taken.
    float_layers
        Names of the layers that stayed in float, the most sensitive first.
    parity
        Its comparison with the training code.
    """

    method: str
    float_layers: tuple[str, ...]
    parity: Parity

    @property
    def excess(self) -> float:
        """How far from its gate it is: the largest figure over its bound, 1 being the bound."""
        gate, flips = self.parity.gate, self.parity.worst("frame_flips")
        # Where there are so few frames that none may flip, every flip is one beyond.
        allowed = max(gate.max_frame_flip_fraction * self.parity.frames, 1)
        return max(flips / allowed, self.parity.worst("max_abs_dprobability") / gate.max_abs_dprobability)

    def to_dict(self) -> dict[str, Any]:
        """Give what the manifest says of it."""
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
        return f"{self.method}{kept}: |dp| {worst:.3f}, {self.parity.worst('frame_flips'):.0f} frame flips"


@dataclass(frozen=True, slots=True)
class Quantized:
    """A graph that has passed its gate: the ONNX file's bytes, its parity, and how it came about."""

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
    judge: Judge,
    progress: Callable[[str], None] = lambda _: None,
) -> Quantized:
    """Quantise a graph in the first way that passes the gate.

    Parameters
    ----------
    graph
        As `echoquad_export.graph.build.build_graph` makes it.
    contract
        What it was trained under.
    calibration
        Frames that ranges are taken from.
    judge
        Measures the parity of a graph's bytes.
    progress
        Called with a phrase for every attempt that missed.

    Raises
    ------
    ParityError
        If no way passes: int8 is not for this model.
    ConfigError
        If the network does its work in matrix products, which stay in float.
    """
    model = prepare(graph, contract)
    _require_convolutions(model)
    units = layers(model)
    ranges = Ranges(model, calibration.quadrants, float_tensors(model))
    attempts: list[Attempt] = []

    def attempt(percentile: float | None, worst: tuple[tuple[str, ...], ...] = ()) -> Quantized | None:
        kept = [name for unit in worst for name in unit]
        candidate = quantize(model, ranges, percentile=percentile, keep_float=kept)
        method = "min-max" if percentile is None else f"percentile {percentile:g}"
        attempts.append(Attempt(method, tuple(unit[0] for unit in worst), judge(candidate)))
        if not attempts[-1].parity.passed:
            progress(f"int8 missed its gate by {attempts[-1]}")
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
    progress(f"comparing {len(units)} layers")
    ranked = _by_sensitivity(model, ranges, PERCENTILES[best], units, calibration.quadrants[:SCAN_FRAMES])
    half = len(units) // 2  # beyond, little would be left of what int8 is for
    for count in sorted({*(2**power for power in range(half.bit_length())), half}):
        if found := attempt(PERCENTILES[best], tuple(ranked[:count])):
            return found
    closest = min(attempts, key=lambda made: made.excess)
    allowed = ", ".join(f"{name} {value:g}" for name, value in closest.parity.gate.to_dict().items())
    raise ParityError(
        f"parity: no int8 graph of this model decides as the training code does, of {len(attempts)} that were tried "
        f"({len(PERCENTILES)} calibrations, then up to {half} of {len(units)} layers in float) on "
        f"{closest.parity.frames} frames of the {closest.parity.source}; the closest was {closest}; allowed: "
        f"{allowed}; no bundle was written; do: leave int8 out of --precision"
    )


def _require_convolutions(model: onnx.ModelProto) -> None:
    """Refuse a transformer: of its weights, integers would hold those of the first layer alone."""
    sizes = {item.name: math.prod(item.dims) for item in model.graph.initializer}

    def weights(operator: str) -> int:
        return sum(sizes.get(node.input[1], 0) for node in model.graph.node if node.op_type == operator)

    convolutions, products = weights("Conv"), weights("MatMul")
    if products > convolutions:
        raise ConfigError(
            f"precision int8: {products} weights in matrix products found, {convolutions} in convolutions; expected a "
            "network of convolutions, which is what is computed in integers; do: leave int8 out of --precision"
        )


def _by_sensitivity(
    model: onnx.ModelProto,
    ranges: Ranges,
    percentile: float | None,
    units: list[tuple[str, ...]],
    quadrants: npt.NDArray[np.uint8],
) -> list[tuple[str, ...]]:
    """Order layers by what quantising each alone does to the logits, the worst first."""
    flat = quadrants.reshape(-1, 1, *quadrants.shape[2:])

    def logits(graph: bytes) -> FloatArray:
        found: FloatArray = open_in_memory(graph).run(OUTPUTS[:1], {INPUT: flat})[0]
        return found

    reference = logits(model.SerializeToString())
    every = {name for unit in units for name in unit}
    harm = [
        float(
            np.abs(
                logits(quantize(model, ranges, percentile=percentile, keep_float=every.difference(unit))) - reference
            ).mean()
        )
        for unit in units
    ]
    return [units[index] for index in np.argsort(harm, kind="stable")[::-1]]
