"""Verification: check that a bundle is intact, and that it computes on this host what the training code computed.

A parity gate bounds two things. First, the difference of every probability, and of every logit for fp32; a larger
difference always fails. Second, the fraction of golden frames with another decision. Golden frames are chosen for
narrow decision margins, so a decision that a difference within the gate can change is reported separately and does not
count (see `echoquad_runtime.verify.decision_margins`).
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.golden_frames import GoldenFrames
from echoquad_runtime.bundle.manifest import GOLDEN, model_file
from echoquad_runtime.bundle.typicality import frame_typicality
from echoquad_runtime.devices.host_facts import host_facts
from echoquad_runtime.devices.session_factory import Device
from echoquad_runtime.engine.io_binding import FloatArray, buckets
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.engine.self_test import max_abs_differences, relative_differences
from echoquad_runtime.errors import DeviceUnavailableError, EchoQuadError
from echoquad_runtime.predict.predictor import Predictor
from echoquad_runtime.quadrants import Grey
from echoquad_runtime.verify.decision_margins import frame_margins, quadrant_margins, within_tolerance
from echoquad_runtime.voting import aggregate_votes

__all__ = ["DeviceCheck", "GoldenFrameResult", "Verification", "VerificationReport", "verify", "verify_all"]

SCHEMA: Final = 1
"""Schema of `VerificationReport.to_dict`."""


@dataclass(frozen=True, slots=True)
class GoldenFrameResult:
    """The result of one golden frame.

    Attributes
    ----------
    name, reasons
        The frame's name, and why it was chosen as a golden frame.
    max_abs_dlogit, max_abs_dprobability
        Largest |difference| from the expected answers; infinite if one of the two is not a number.
    expected, found
        The class that the training code decided, and the bundle's; if its batches disagree, the one that differs.
    tolerated
        Whether a difference within the gate can change the decision so; True if both are the same.
    """

    name: str
    reasons: tuple[str, ...]
    max_abs_dlogit: float
    max_abs_dprobability: float
    expected: str
    found: str
    tolerated: bool


@dataclass(frozen=True, slots=True)
class Verification:
    """The results of a bundle's golden frames on one device in one precision.

    Attributes
    ----------
    device, provider, precision, provider_note
        The device and precision in use, the name of the execution provider, and why it is not another one.
    files
        Number of files whose hash is right.
    frames
        Number of golden frames.
    max_abs_dlogit, max_abs_dprobability
        Largest |difference| from the expected answers; see `GoldenFrames.expected`.
    max_rel_dtypicality
        Largest |difference| of a frame's typicality, as a share of the expected one; None without this score.
    frame_flips, quadrant_flips
        Number of changed decisions that no difference within the gate explains.
    tolerated_frame_flips, tolerated_quadrant_flips
        Number of changed decisions that a difference within the gate can explain.
    worst_frame
        The golden frame with the largest difference of a probability.
    gate
        The bounds.
    passed
        Whether all bounds hold.
    golden
        The result of each golden frame.
    """

    device: str
    provider: str
    precision: str
    provider_note: str
    files: int
    frames: int
    max_abs_dlogit: float
    max_abs_dprobability: float
    frame_flips: int
    quadrant_flips: int
    tolerated_frame_flips: int
    tolerated_quadrant_flips: int
    worst_frame: str
    gate: dict[str, float]
    passed: bool
    golden: tuple[GoldenFrameResult, ...]
    max_rel_dtypicality: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values; an infinite one is None."""
        return cast("dict[str, Any]", _finite(asdict(self)))


@dataclass(frozen=True, slots=True)
class DeviceCheck:
    """The check of one requested device and precision: its `verification`, or the `error` that prevented it."""

    device: str
    precision: str | None
    verification: Verification | None
    error: EchoQuadError | None

    @property
    def usable(self) -> bool:
        """Whether the device can run this precision."""
        return not isinstance(self.error, DeviceUnavailableError)

    @property
    def passed(self) -> bool:
        """Whether the golden frames are within the gate."""
        return self.verification is not None and self.verification.passed

    def to_dict(self) -> dict[str, Any]:
        """Return the check as JSON values."""
        head = {"device": self.device, "precision": self.precision, "passed": self.passed}
        if self.verification is not None:
            return {**head, **self.verification.to_dict()}
        return {**head, "usable": self.usable, "error": str(self.error)}


@dataclass(frozen=True, slots=True)
class VerificationReport:
    """What was verified of a bundle, where, when, and the outcome.

    Attributes
    ----------
    bundle
        The folder, as given.
    manifest_sha256, contract_sha256
        Hashes that identify the bundle; None if its manifest cannot be read.
    signed_by
        Fingerprint of the key whose signature was checked and is valid; None if no check was requested.
    created
        Time of the verification, ISO 8601 in UTC.
    versions
        What the figures depend on: CPU, platform, onnxruntime, EchoQuad, Python.
    files
        Number of files whose hash is right.
    checks
        One per usable device and precision.
    unavailable_devices
        Why a device cannot be used at all, by device.
    error
        Why nothing could be checked, for a bundle that is damaged; else None.
    """

    bundle: str
    manifest_sha256: str | None
    contract_sha256: str | None
    signed_by: str | None
    created: str
    versions: dict[str, str]
    files: int
    checks: tuple[DeviceCheck, ...]
    unavailable_devices: dict[str, str]
    error: EchoQuadError | None

    @property
    def passed(self) -> bool:
        """Whether the bundle is intact, at least one device was checked, and no check failed."""
        tried = [check for check in self.checks if check.usable]
        return self.error is None and bool(tried) and all(check.passed for check in tried)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "schema": SCHEMA,
            "verdict": "passed" if self.passed else "failed",
            "error": None if self.error is None else str(self.error),
            "bundle": self.bundle,
            "manifest_sha256": self.manifest_sha256,
            "contract_sha256": self.contract_sha256,
            "signed_by": self.signed_by,
            "created": self.created,
            "versions": self.versions,
            "files": self.files,
            "checks": [check.to_dict() for check in self.checks],
            "devices_not_usable": self.unavailable_devices,
        }


def verify(
    folder: str | Path,
    *,
    device: Device = "auto",
    precision: str | None = None,
    threads: int | None = None,
    cuda_graphs: bool = False,
    nhwc: bool = False,
    public_key: str | Path | None = None,
) -> Verification:
    """Hash every file of a bundle, then replay its golden frames through a predictor on one device.

    The frames take every path that `predict` has: one at a time on all threads; and concurrently like the frames of a
    folder, with the same workers and inference slots, once for each bucket, since a batch can select other kernels.

    Raises
    ------
    BundleError
        If the bundle is missing, malformed or changed, or onnxruntime cannot run it; if a `public_key` is given, also
        if the matching private key has not signed the bundle.
    DeviceUnavailableError
        If the device is not available.
    """
    bundle = Bundle(folder, public_key=public_key)
    precision = bundle.choose_precision(precision)
    golden = _hash_files(bundle, [precision])
    return _replay(bundle, golden, device, precision, threads, cuda_graphs=cuda_graphs, nhwc=nhwc)


def verify_all(
    folder: str | Path,
    *,
    devices: Mapping[str, str | None],
    precisions: Sequence[str | None] | None = None,
    threads: int | None = None,
    public_key: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerificationReport:
    """Hash every file of a bundle, then replay its golden frames on several devices. Failures go into the report.

    Parameters
    ----------
    folder
        The bundle.
    devices
        Device names, including ``auto``, each with the reason why it is unavailable or None, as
        `echoquad_runtime.devices.session_factory.probe_devices` returns them.
    precisions
        Precisions to check on each device; None in it is the bundle's default. None is every precision of the bundle,
        bf16 on OpenVINO and tf32 on CUDA included.
    threads
        Threads per inference; None is what affinity and cgroup allow.
    public_key
        A PEM file. If given, the matching private key must have signed the bundle.
    progress
        Called with the number of finished checks and of all checks.
    """
    label = Path(folder).as_posix()
    created = datetime.now(UTC).isoformat(timespec="seconds")
    versions = {**host_facts(), "python": platform.python_version()}
    unavailable = {name: reason for name, reason in devices.items() if reason is not None}
    try:
        bundle = Bundle(folder, public_key=public_key)
    except EchoQuadError as error:
        return VerificationReport(label, None, None, None, created, versions, 0, (), unavailable, error)
    manifest = bundle.manifest
    head = (label, str(manifest["manifest_sha256"]), bundle.contract.sha256, bundle.signed_by, created, versions)
    requested = [
        (device, precision)
        for device in devices
        if device not in unavailable
        for precision in (bundle.precisions_on(device) if precisions is None else precisions)
    ]
    try:
        golden = _hash_files(bundle, [bundle.choose_precision(precision) for _, precision in requested])
    except EchoQuadError as error:
        return VerificationReport(*head, 0, (), unavailable, error)
    checks: list[DeviceCheck] = []
    for device, precision in requested:
        if progress is not None:
            progress(len(checks), len(requested))
        try:
            chosen = bundle.choose_precision(precision)
            verification = _replay(bundle, golden, cast("Device", device), chosen, threads)
            checks.append(DeviceCheck(device, chosen, verification, None))
        except EchoQuadError as error:
            checks.append(DeviceCheck(device, precision, None, error))
    return VerificationReport(*head, len(manifest["files"]), tuple(checks), unavailable, None)


def _hash_files(bundle: Bundle, precisions: Sequence[str]) -> GoldenFrames:
    """Hash every file except the graphs of `precisions`, which are hashed when they are loaded.

    Raises
    ------
    BundleError
        If a file is missing, malformed or changed.
    """
    later = {GOLDEN, *map(model_file, precisions)}
    for name in bundle.manifest["files"]:
        if name not in later:
            bundle.read(name)
    return bundle.read_golden()


def _replay(
    bundle: Bundle, golden: GoldenFrames, device: Device, precision: str, threads: int | None, **options: Any
) -> Verification:
    gate = bundle.gate(precision)
    predictor = Predictor(
        bundle, device=device, precision=precision, threads=threads, concurrent=True, self_test=False, **options
    )
    engine = cast("OnnxEngine", predictor.engine)
    contract, count = bundle.contract, len(golden.frames)
    expected_logits, expected_p = golden.expected(precision)
    expected = aggregate_votes(expected_p, contract.vote, contract.vote_weights)
    margins = frame_margins(expected_p, contract.vote, contract.vote_weights)
    margins_of_quadrants, allowed = quadrant_margins(expected_p), gate["max_abs_dprobability"]

    scores = golden.expected_typicality(precision)
    expected_typicality = None if scores is None else frame_typicality(scores)
    dlogit, dprobability, dtypicality = np.zeros(count), np.zeros(count), np.zeros(count)
    labels, tolerated = expected.labels.copy(), np.ones(count, np.bool_)
    flips = []
    # `max_abs_differences` is infinite for an answer that is not a number, so such an answer cannot pass.
    for logits, probabilities, typicality in _passes(predictor, golden.frames):
        if expected_typicality is not None:
            dtypicality = np.maximum(dtypicality, relative_differences(typicality, expected_typicality))
        dlogit = np.maximum(dlogit, max_abs_differences(logits, expected_logits))
        dprobability = np.maximum(dprobability, max_abs_differences(probabilities, expected_p))
        found = aggregate_votes(probabilities, contract.vote, contract.vote_weights)
        frames, quadrants = found.labels != expected.labels, found.quadrant_labels != expected.quadrant_labels
        within = within_tolerance(margins, found.labels, allowed)
        quadrants_within = within_tolerance(margins_of_quadrants, found.quadrant_labels, allowed)
        changed = (frames & ~within, quadrants & ~quadrants_within, frames & within, quadrants & quadrants_within)
        flips.append([int(mask.sum()) for mask in changed])
        labels, tolerated = np.where(frames, found.labels, labels), tolerated & (within | ~frames)
    frame_flips, quadrant_flips, tolerated_frame_flips, tolerated_quadrant_flips = map(max, zip(*flips, strict=True))
    passed = (
        frame_flips <= gate["max_frame_flip_fraction"] * count
        and bool(np.isfinite(dlogit).all())
        and float(dlogit.max()) <= gate.get("max_abs_dlogit", np.inf)
        and float(dprobability.max()) <= allowed
        and float(dtypicality.max()) <= gate.get("max_rel_dtypicality", np.inf)
    )
    reasons = golden.reasons or ((),) * count
    return Verification(
        device=engine.device,
        provider=engine.provider,
        precision=engine.precision,
        provider_note=engine.note,
        files=len(bundle.manifest["files"]),
        frames=count,
        max_abs_dlogit=float(dlogit.max()),
        max_abs_dprobability=float(dprobability.max()),
        frame_flips=frame_flips,
        quadrant_flips=quadrant_flips,
        tolerated_frame_flips=tolerated_frame_flips,
        tolerated_quadrant_flips=tolerated_quadrant_flips,
        worst_frame=golden.names[int(dprobability.argmax())],
        gate=gate,
        passed=bool(passed),
        golden=tuple(
            GoldenFrameResult(
                golden.names[i],
                reasons[i],
                float(dlogit[i]),
                float(dprobability[i]),
                contract.classes[expected.labels[i]],
                contract.classes[labels[i]],
                bool(tolerated[i]),
            )
            for i in range(count)
        ),
        max_rel_dtypicality=None if expected_typicality is None else float(dtypicality.max()),
    )


def _passes(predictor: Predictor, frames: Sequence[Grey]) -> Iterator[tuple[FloatArray, FloatArray, FloatArray | None]]:
    """Run golden frames through every path of a predictor.

    Yields
    ------
    logits, probabilities, typicality
        float32 [G, 4, C], [G, 4, C] and [G, 4]: first of the frames one at a time; then, for each bucket, of as many
        repetitions of all frames as give every worker two batches.
    """
    single = predictor.replay(frames, concurrent=False)
    yield single.logits, single.probabilities, single.typicality
    for batch_size in buckets(predictor.batch_size):
        rounds = math.ceil(2 * predictor.workers * batch_size / len(frames))
        output = predictor.replay(list(frames) * rounds, concurrent=True, batch_size=batch_size)
        typicality = [None] * rounds if output.typicality is None else np.split(output.typicality, rounds)
        yield from zip(np.split(output.logits, rounds), np.split(output.probabilities, rounds), typicality, strict=True)


def _finite(value: Any) -> Any:
    """Replace infinite numbers in JSON values by None: JSON cannot represent them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
