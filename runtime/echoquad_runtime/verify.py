"""Verification: whether a bundle is whole, and computes here what the training code computed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echoquad_runtime.bundle import GOLDEN, Bundle, model_file
from echoquad_runtime.devices import Device
from echoquad_runtime.quadrants import frame_quadrants
from echoquad_runtime.session import OnnxEngine
from echoquad_runtime.vote import decide

__all__ = ["Verification", "verify"]


@dataclass(frozen=True, slots=True)
class Verification:
    """What a bundle's golden frames showed.

    Attributes
    ----------
    device, precision, provider_note
        What really ran, and why not another.
    files
        How many files were hashed and found whole.
    frames
        How many golden frames were replayed.
    max_abs_dlogit, max_abs_dprobability
        Worst |difference| from PyTorch's answers.
    frame_flips, quadrant_flips
        Decisions that came out otherwise.
    worst_frame
        The golden frame with the worst difference of a probability.
    gate
        What was allowed.
    passed
        Whether all of it was kept.
    """

    device: str
    precision: str
    provider_note: str
    files: int
    frames: int
    max_abs_dlogit: float
    max_abs_dprobability: float
    frame_flips: int
    quadrant_flips: int
    worst_frame: str
    gate: dict[str, float]
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """Give the figures as JSON values."""
        return asdict(self)


def verify(
    folder: str | Path, *, device: Device = "auto", precision: str | None = None, threads: int | None = None
) -> Verification:
    """Hash every file of a bundle, then replay its golden frames on the device at hand.

    Each golden frame goes through alone and all go through together, since a batch can take other kernels.

    Raises
    ------
    BundleError
        If the bundle is missing, malformed or changed.
    DeviceUnavailableError
        If the device is not there.
    """
    bundle = Bundle(folder)
    precision = bundle.choose_precision(precision)
    for name in bundle.manifest["files"]:
        if name not in (GOLDEN, model_file(precision)):  # these two are hashed below, as they are read to be used
            bundle.read(name)
    golden = bundle.read_golden()
    engine = OnnxEngine(bundle, device=device, precision=precision, threads=threads)
    contract, count = bundle.contract, len(golden.frames)
    quadrants = np.stack([frame_quadrants(frame, contract) for frame in golden.frames])
    single = [engine.infer(frame) for frame in quadrants]
    together = engine.infer(quadrants.reshape(-1, *quadrants.shape[2:]))
    expected = decide(golden.probabilities, contract.vote, contract.vote_weights)

    dlogit = np.zeros(count)
    dprobability = np.zeros(count)
    frame_flips = quadrant_flips = 0
    for answers in (tuple(np.concatenate(parts) for parts in zip(*single, strict=True)), together):
        logits, probabilities = (part.reshape(golden.logits.shape) for part in answers)
        # A NaN compares as no difference at all; as an infinite one it cannot pass.
        dlogit = np.maximum(dlogit, _largest(logits - golden.logits))
        dprobability = np.maximum(dprobability, _largest(probabilities - golden.probabilities))
        found = decide(probabilities, contract.vote, contract.vote_weights)
        frame_flips = max(frame_flips, int((found.labels != expected.labels).sum()))
        quadrant_flips = max(quadrant_flips, int((found.quadrant_labels != expected.quadrant_labels).sum()))
    gate = bundle.gate(engine.precision)
    passed = (
        frame_flips <= gate["max_frame_flip_fraction"] * count
        and bool(np.isfinite(dlogit).all())
        and float(dlogit.max()) <= gate.get("max_abs_dlogit", np.inf)
        and float(dprobability.max()) <= gate["max_abs_dprobability"]
    )
    return Verification(
        device=engine.device,
        precision=engine.precision,
        provider_note=engine.note,
        files=len(bundle.manifest["files"]),
        frames=count,
        max_abs_dlogit=float(dlogit.max()),
        max_abs_dprobability=float(dprobability.max()),
        frame_flips=frame_flips,
        quadrant_flips=quadrant_flips,
        worst_frame=golden.names[int(dprobability.argmax())],
        gate=gate,
        passed=bool(passed),
    )


def _largest(difference: np.ndarray) -> np.ndarray:
    return np.asarray(np.nan_to_num(np.abs(difference), nan=np.inf).max(axis=(1, 2)))
