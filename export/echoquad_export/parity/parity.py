"""Parity: whether the exported graph decides as the training code does. A failure is an error, never a warning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from echoquad_runtime.bundle.typicality import frame_typicality
from echoquad_runtime.contract import Contract
from echoquad_runtime.engine.io_binding import FloatArray
from echoquad_runtime.engine.slot_pool import Engine, flatten, run_in_batches
from echoquad_runtime.errors import ParityError
from echoquad_runtime.voting import aggregate_votes

__all__ = ["BATCH_SIZES", "GATES", "BatchParity", "Gate", "Parity", "compare", "measure_parity"]

BATCH_SIZES: Final = (1, 2, 5, 16)
"""Frames per batch: single, even, odd and large, because the batch size can select a different kernel."""


@dataclass(frozen=True, slots=True)
class Gate:
    """Bounds on the differences of a precision.

    Attributes
    ----------
    max_abs_dlogit
        Largest allowed |difference| of a logit; None is no bound.
    max_abs_dprobability
        Largest allowed |difference| of a probability.
    max_frame_flip_fraction
        Largest allowed fraction of frames with a changed decision.
    max_patch_flip_fraction
        Largest allowed fraction of quadrants with a changed vote; None is no bound.
    max_rel_dtypicality
        Largest allowed |difference| of a frame's typicality, as a share of the expected one; None is no bound.
    """

    max_abs_dlogit: float | None
    max_abs_dprobability: float
    max_frame_flip_fraction: float
    max_patch_flip_fraction: float | None
    max_rel_dtypicality: float | None = None

    def to_dict(self) -> dict[str, float]:
        """Return the bounds that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


GATES: Final[Mapping[str, Gate]] = {
    "fp32": Gate(1e-4, 1e-4, 0.0, 0.0, 1e-3),
    # The thresholds of the typicality are those of the precision, so its bound only excludes another score.
    "fp16": Gate(None, 0.05, 0.01, None, 0.5),
    "int8": Gate(None, 0.05, 0.01, None, 0.5),
}


@dataclass(frozen=True, slots=True)
class BatchParity:
    """The comparison at one batch size; the field names are keys of the manifest.

    Attributes
    ----------
    batch_size
        Frames per batch.
    max_abs_dlogit, max_abs_dprobability
        Largest |difference| of a logit and of a probability.
    patch_flips, frame_flips
        Number of quadrants with a changed vote, and of frames with a changed decision.
    smallest_margin_at_flip
        Smallest lead over the runner-up that the training code had at a change; None if nothing changed.
    max_rel_dtypicality
        Largest |difference| of a frame's typicality, as a share of the expected one; None without this score.
    """

    batch_size: int
    max_abs_dlogit: float
    max_abs_dprobability: float
    patch_flips: int
    frame_flips: int
    smallest_margin_at_flip: float | None
    max_rel_dtypicality: float | None = None


_ALWAYS: Final = ("smallest_margin_at_flip",)  # stated as null if there is none


@dataclass(frozen=True, slots=True)
class Parity:
    """The comparison at all batch sizes, the gate, and the typicality, float64 [F], of frames one at a time."""

    precision: str
    device: str
    frames: int
    source: str
    gate: Gate
    batches: tuple[BatchParity, ...]
    typicality: npt.NDArray[np.float64] | None = field(default=None, compare=False, repr=False)

    @property
    def violations(self) -> list[str]:
        """The bounds that are exceeded, one phrase each."""
        gate, found = self.gate, []
        quadrants = None if gate.max_patch_flip_fraction is None else gate.max_patch_flip_fraction * 4 * self.frames
        for batch in self.batches:
            limits = [
                ("|dlogit|", batch.max_abs_dlogit, gate.max_abs_dlogit),
                ("|dprobability|", batch.max_abs_dprobability, gate.max_abs_dprobability),
                ("changed decisions", batch.frame_flips, gate.max_frame_flip_fraction * self.frames),
                ("changed quadrant votes", batch.patch_flips, quadrants),
                ("relative |dtypicality|", batch.max_rel_dtypicality, gate.max_rel_dtypicality),
            ]
            found += [
                f"{name} {value:.3g} > {limit:.3g} at batch {batch.batch_size}"
                for name, value, limit in limits
                if limit is not None and value is not None and not value <= limit  # NaN is a violation
            ]
        return found

    @property
    def passed(self) -> bool:
        """Whether no bound is exceeded at any batch size."""
        return not self.violations

    def require(self) -> None:
        """Raise ParityError if a bound is exceeded."""
        if self.violations:
            raise ParityError(
                f"parity: the {self.precision} graph does not decide as the training code does on {self.frames} frames "
                f"of the {self.source}: {'; '.join(self.violations)}; no bundle was written"
            )

    def worst(self, name: str) -> float:
        """Return the largest value of a `BatchParity` field over the batch sizes."""
        return max(float(getattr(batch, name)) for batch in self.batches)

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest's entry."""
        return {
            "passed": self.passed,
            "device": self.device,
            "frames": self.frames,
            "source": self.source,
            "gate": self.gate.to_dict(),
            "batches": [
                {name: value for name, value in asdict(batch).items() if value is not None or name in _ALWAYS}
                for batch in self.batches
            ],
        }


def measure_parity(
    reference: tuple[FloatArray, FloatArray],
    engine: Engine,
    quadrants: npt.NDArray[np.uint8],
    source: str,
    *,
    gate: Gate | None = None,
    typicality: FloatArray | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Parity:
    """Compare an engine with reference answers at each batch size.

    Parameters
    ----------
    reference
        Logits and probabilities of the training code, float32 [F * 4, C].
    engine
        The engine to be deployed.
    quadrants
        uint8 [F, 4, S, S].
    source
        Description of the frames, for the manifest.
    gate
        Bounds; None is the default of the engine's precision.
    typicality
        Typicality of the quadrants by the training code, float32 [F, 4]; None if it has no such score.
    progress
        Called with the number of finished batch sizes and their total.
    """
    found = []
    expected, scores = None if typicality is None else frame_typicality(typicality), None
    for done, size in enumerate(BATCH_SIZES, 1):
        output = run_in_batches(engine, quadrants, size)
        batch = compare(reference, flatten(output), engine.contract, size)
        if expected is not None:
            # An engine without the score differs by all of it.
            actual = np.zeros_like(expected) if output.typicality is None else frame_typicality(output.typicality)
            batch = replace(batch, max_rel_dtypicality=_largest(actual / expected, np.ones_like(expected)))
            scores = actual if scores is None else scores
        found.append(batch)
        if progress is not None:
            progress(done, len(BATCH_SIZES))
    chosen = gate or GATES[engine.precision]
    return Parity(engine.precision, engine.device, len(quadrants), source, chosen, tuple(found), scores)


def compare(
    reference: tuple[FloatArray, FloatArray], found: tuple[FloatArray, FloatArray], contract: Contract, batch_size: int
) -> BatchParity:
    """Compare two engines' logits and probabilities, float32 [F * 4, C], and the decisions based on them."""
    shape = (-1, 4, len(contract.classes))
    expected, decided = (
        aggregate_votes(part[1].reshape(shape), contract.vote, contract.vote_weights) for part in (reference, found)
    )
    frames = expected.labels != decided.labels
    quadrants = expected.quadrant_labels != decided.quadrant_labels
    # The margin of a change is the lead over the runner-up that the training code had in the quadrant.
    ranked = np.sort(reference[1].reshape(shape), axis=2)
    lead = ranked[..., -1] - ranked[..., -2]
    margins = np.concatenate([lead[quadrants], lead[frames].min(axis=1) if frames.any() else []])
    return BatchParity(
        batch_size=batch_size,
        max_abs_dlogit=_largest(reference[0], found[0]),
        max_abs_dprobability=_largest(reference[1], found[1]),
        patch_flips=int(quadrants.sum()),
        frame_flips=int(frames.sum()),
        smallest_margin_at_flip=float(margins.min()) if margins.size else None,
    )


def _largest(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> float:
    # NaN must not count as no difference, and JSON has no infinity. No real logit is near 1e30.
    return float(np.nan_to_num(np.abs(a.astype(np.float64) - b), nan=1e30, posinf=1e30).max())
