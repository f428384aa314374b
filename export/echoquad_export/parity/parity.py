"""Parity: whether the export decides as the training code does. A miss is a refusal, never a warning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from echoquad_runtime.contract import Contract
from echoquad_runtime.engine.io_binding import FloatArray
from echoquad_runtime.engine.slot_pool import Engine, infer_in_batches
from echoquad_runtime.errors import ParityError
from echoquad_runtime.voting import aggregate_votes

__all__ = ["BATCH_SIZES", "GATES", "BatchParity", "Gate", "Parity", "compare", "measure_parity"]

BATCH_SIZES: Final = (1, 2, 5, 16)
"""Frames a batch: single, even, odd, and the largest; a kernel may be chosen by the batch's shape."""


@dataclass(frozen=True, slots=True)
class Gate:
    """What a precision may differ by.

    Attributes
    ----------
    max_abs_dlogit
        Bound on |difference| of a logit; None where logits may differ at will.
    max_abs_dprobability
        Bound on |difference| of a probability.
    max_frame_flip_fraction
        Bound on the share of frames that are decided otherwise.
    max_patch_flip_fraction
        The same for quadrants; None where they are not bounded.
    """

    max_abs_dlogit: float | None
    max_abs_dprobability: float
    max_frame_flip_fraction: float
    max_patch_flip_fraction: float | None

    def to_dict(self) -> dict[str, float]:
        """Give the bounds that there are."""
        return {name: value for name, value in asdict(self).items() if value is not None}


GATES: Final[Mapping[str, Gate]] = {
    "fp32": Gate(1e-4, 1e-4, 0.0, 0.0),
    "fp16": Gate(None, 0.05, 0.01, None),
    "int8": Gate(None, 0.05, 0.01, None),
}


@dataclass(frozen=True, slots=True)
class BatchParity:
    """The comparison at one batch size. `smallest_margin_at_flip` is None where nothing flipped."""

    batch_size: int
    max_abs_dlogit: float
    max_abs_dprobability: float
    patch_flips: int
    frame_flips: int
    smallest_margin_at_flip: float | None


@dataclass(frozen=True, slots=True)
class Parity:
    """The comparison at all batch sizes, and whether the gate was kept."""

    precision: str
    device: str
    frames: int
    source: str
    gate: Gate
    batches: tuple[BatchParity, ...]

    @property
    def misses(self) -> list[str]:
        """What was found beyond the gate, a phrase each."""
        gate, found = self.gate, []
        for batch in self.batches:
            limits = [
                ("|dlogit|", batch.max_abs_dlogit, gate.max_abs_dlogit),
                ("|dprobability|", batch.max_abs_dprobability, gate.max_abs_dprobability),
                ("frame flips", batch.frame_flips, gate.max_frame_flip_fraction * self.frames),
                ("patch flips", batch.patch_flips, _times(gate.max_patch_flip_fraction, 4 * self.frames)),
            ]
            found += [
                f"{name} {value:.3g} > {limit:.3g} at batch {batch.batch_size}"
                for name, value, limit in limits
                if limit is not None and not value <= limit  # so that a NaN is a miss
            ]
        return found

    @property
    def passed(self) -> bool:
        """Whether the gate was kept at every batch size."""
        return not self.misses

    def require(self) -> None:
        """Refuse what has missed.

        Raises
        ------
        ParityError
            If the gate was not kept.
        """
        if self.misses:
            raise ParityError(
                f"parity: the {self.precision} graph does not decide as the training code does on {self.frames} frames "
                f"of the {self.source}: {'; '.join(self.misses)}; no bundle was written"
            )

    def worst(self, name: str) -> float:
        """Give the largest value of a figure over the batch sizes."""
        return max(float(getattr(batch, name)) for batch in self.batches)

    def to_dict(self) -> dict[str, Any]:
        """Give all figures as JSON values."""
        return {
            "passed": self.passed,
            "device": self.device,
            "frames": self.frames,
            "source": self.source,
            "gate": self.gate.to_dict(),
            "batches": [asdict(batch) for batch in self.batches],
        }


def measure_parity(
    reference: tuple[FloatArray, FloatArray],
    engine: Engine,
    quadrants: npt.NDArray[np.uint8],
    source: str,
    *,
    gate: Gate | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Parity:
    """Hold an engine against reference answers at every batch size.

    Parameters
    ----------
    reference
        The training code's logits and probabilities, float32 [F * 4, C].
    engine
        What is to be deployed.
    quadrants
        uint8 [F, 4, S, S].
    source
        What the frames are, for the record.
    gate
        Bounds; the precision's own where not given.
    progress
        Called with the number of batch sizes done and of all.
    """
    found = []
    for done, size in enumerate(BATCH_SIZES, 1):
        found.append(compare(reference, infer_in_batches(engine, quadrants, size), engine.contract, size))
        if progress is not None:
            progress(done, len(BATCH_SIZES))
    chosen = gate or GATES[engine.precision]
    return Parity(engine.precision, engine.device, len(quadrants), source, chosen, tuple(found))


def compare(
    reference: tuple[FloatArray, FloatArray], found: tuple[FloatArray, FloatArray], contract: Contract, batch_size: int
) -> BatchParity:
    """Compare two engines' logits and probabilities, float32 [F * 4, C], and the decisions they lead to."""
    shape = (-1, 4, len(contract.classes))
    expected, decided = (
        aggregate_votes(part[1].reshape(shape), contract.vote, contract.vote_weights) for part in (reference, found)
    )
    frames = expected.labels != decided.labels
    patches = expected.quadrant_labels != decided.quadrant_labels
    # The margin that the training code had where the export decides otherwise: a quadrant's lead over its runner-up.
    ranked = np.sort(reference[1].reshape(shape), axis=2)
    lead = ranked[..., -1] - ranked[..., -2]
    margins = np.concatenate([lead[patches], lead[frames].min(axis=1) if frames.any() else []])
    return BatchParity(
        batch_size=batch_size,
        max_abs_dlogit=_largest(reference[0], found[0]),
        max_abs_dprobability=_largest(reference[1], found[1]),
        patch_flips=int(patches.sum()),
        frame_flips=int(frames.sum()),
        smallest_margin_at_flip=float(margins.min()) if margins.size else None,
    )


def summary(parities: Sequence[Parity]) -> dict[str, Any]:
    """Give the figures of each precision, as the manifest holds them."""
    return {parity.precision: parity.to_dict() for parity in parities}


def _largest(a: FloatArray, b: FloatArray) -> float:
    # A NaN must not pass as no difference; JSON has no infinity, and no logit comes near this.
    return float(np.nan_to_num(np.abs(a.astype(np.float64) - b), nan=1e30, posinf=1e30).max())


def _times(fraction: float | None, count: int) -> float | None:
    return None if fraction is None else fraction * count
