"""Verification: whether a bundle is whole, and computes here what the training code computed.

A gate bounds two things. The differences: of a probability, and for fp32 of a logit. None beyond its bound is ever
passed. And the share of frames that are decided otherwise: golden frames are chosen for how little their decisions
hang on, so one that a difference within the gate can turn is told apart and not counted against it (see
`echoquad_runtime.verify.decision_margins`).
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
from echoquad_runtime.devices.host_facts import host_facts
from echoquad_runtime.devices.session_factory import Device
from echoquad_runtime.engine.io_binding import FloatArray, buckets
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.engine.self_test import max_abs_differences
from echoquad_runtime.errors import DeviceUnavailableError, EchoQuadError
from echoquad_runtime.predict.predictor import Predictor
from echoquad_runtime.quadrants import Grey
from echoquad_runtime.verify.decision_margins import frame_leads, quadrant_leads, within_tolerance
from echoquad_runtime.voting import aggregate_votes

__all__ = ["Check", "GoldenCheck", "Record", "Verification", "verify", "verify_all"]

RECORD_SCHEMA: Final = 1


@dataclass(frozen=True, slots=True)
class GoldenCheck:
    """What one golden frame showed.

    Attributes
    ----------
    name, reasons
        Which it is, and what it is there for.
    max_abs_dlogit, max_abs_dprobability
        Worst |difference| from the answers expected; infinite where one of the two is no number.
    expected, found
        Class decided by the training code, and by the bundle; where its batches disagree, the other one.
    tolerated
        Whether a difference within the gate can lead from the one to the other; True where they are the same.
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
    """What a bundle's golden frames showed on one device in one precision.

    Attributes
    ----------
    device, provider, precision, provider_note
        What really ran, onnxruntime's name of it, and why not another.
    files
        How many files were hashed and found whole.
    frames
        How many golden frames were replayed.
    max_abs_dlogit, max_abs_dprobability
        Worst |difference| from the answers expected; see `GoldenFrames.expected`.
    frame_flips, quadrant_flips
        Decisions that came out otherwise, and no difference within the gate can account for it.
    tolerated_frame_flips, tolerated_quadrant_flips
        Decisions that came out otherwise, as a difference within the gate can account for.
    worst_frame
        The golden frame with the worst difference of a probability.
    gate
        What was allowed.
    passed
        Whether all of it was kept.
    golden
        The golden frames one by one.
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
    golden: tuple[GoldenCheck, ...]

    def to_dict(self) -> dict[str, Any]:
        """Give the figures as JSON values; one that is infinite is None."""
        return cast("dict[str, Any]", _finite(asdict(self)))


@dataclass(frozen=True, slots=True)
class Check:
    """One device and precision that were asked for, and what came of it: `found`, or the `error` that prevented it."""

    device: str
    precision: str | None
    found: Verification | None
    error: EchoQuadError | None

    @property
    def usable(self) -> bool:
        """Whether the device could be made to run this precision."""
        return not isinstance(self.error, DeviceUnavailableError)

    @property
    def passed(self) -> bool:
        """Whether the golden frames were replayed within the gate."""
        return self.found is not None and self.found.passed

    def to_dict(self) -> dict[str, Any]:
        """Give it as JSON values."""
        head = {"device": self.device, "precision": self.precision, "passed": self.passed}
        if self.found is not None:
            return {**head, **self.found.to_dict()}
        return {**head, "usable": self.usable, "error": str(self.error)}


@dataclass(frozen=True, slots=True)
class Record:
    """What was checked of a bundle, on what, when, and how it ended.

    Attributes
    ----------
    bundle
        The folder, as it was given.
    manifest_sha256, contract_sha256
        Which bundle it is; None where its manifest cannot be read.
    signed_by
        The fingerprint of the key whose signature was asked for and is good; None where none was asked for.
    created
        When, ISO 8601 in UTC.
    versions
        What the figures depend on: CPU, platform, the wheel of onnxruntime, EchoQuad, Python.
    files
        How many files were hashed and found whole.
    checks
        One a usable device and precision.
    obstacles
        For each device that cannot be used at all, why not.
    error
        Why nothing could be checked: a bundle that is not whole. None where it is.
    """

    bundle: str
    manifest_sha256: str | None
    contract_sha256: str | None
    signed_by: str | None
    created: str
    versions: dict[str, str]
    files: int
    checks: tuple[Check, ...]
    obstacles: dict[str, str]
    error: EchoQuadError | None

    @property
    def passed(self) -> bool:
        """Whether the bundle is whole, something was checked, and nothing of it failed."""
        tried = [check for check in self.checks if check.usable]
        return self.error is None and bool(tried) and all(check.passed for check in tried)

    def to_dict(self) -> dict[str, Any]:
        """Give it as JSON values."""
        return {
            "schema": RECORD_SCHEMA,
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
            "devices_not_usable": self.obstacles,
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
    """Hash every file of a bundle, then replay its golden frames through a predictor on the device at hand.

    They go the ways that `predict` has: one at a time on all threads; and as a folder's frames, by as many workers and
    through the same inference slots, once for each bucket, since a batch can take other kernels.

    Raises
    ------
    BundleError
        If the bundle is missing, malformed or changed, or onnxruntime cannot run it; where a `public_key` is given,
        also if the key that belongs to it has not signed the bundle.
    DeviceUnavailableError
        If the device is not there.
    """
    bundle = Bundle(folder, public_key=public_key)
    precision = bundle.choose_precision(precision)
    golden = _hash_all(bundle, [precision])
    return _replay(bundle, golden, device, precision, threads, cuda_graphs=cuda_graphs, nhwc=nhwc)


def verify_all(
    folder: str | Path,
    *,
    devices: Mapping[str, str | None],
    precisions: Sequence[str | None] | None = None,
    threads: int | None = None,
    public_key: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Record:
    """Hash every file of a bundle, then replay its golden frames on several devices; whatever happens is in the record.

    Parameters
    ----------
    folder
        The bundle.
    devices
        Names of devices, ``auto`` among them, each with what is in the way of it or None, as
        `echoquad_runtime.devices.session_factory.probe_devices` gives them.
    precisions
        What to replay on each, None among them being the bundle's default. None is every precision that the bundle
        holds, and bf16 on OpenVINO.
    threads
        Threads of one inference; None is what affinity and cgroup allow.
    public_key
        A PEM file; where given, the key that belongs to it must have signed the bundle.
    progress
        Called with the number of checks done and of all.
    """
    label = Path(folder).as_posix()
    created = datetime.now(UTC).isoformat(timespec="seconds")
    versions = {**host_facts(), "python": platform.python_version()}
    obstacles = {name: why for name, why in devices.items() if why is not None}
    try:
        bundle = Bundle(folder, public_key=public_key)
    except EchoQuadError as error:
        return Record(label, None, None, None, created, versions, 0, (), obstacles, error)
    manifest = bundle.manifest
    known = (label, str(manifest["manifest_sha256"]), bundle.contract.sha256, bundle.signed_by, created, versions)
    wanted = [
        (device, precision)
        for device in devices
        if device not in obstacles
        for precision in (bundle.precisions_on(device) if precisions is None else precisions)
    ]
    try:
        golden = _hash_all(bundle, [bundle.choose_precision(precision) for _, precision in wanted])
    except EchoQuadError as error:
        return Record(*known, 0, (), obstacles, error)
    checks: list[Check] = []
    for device, precision in wanted:
        if progress is not None:
            progress(len(checks), len(wanted))
        try:
            chosen = bundle.choose_precision(precision)
            checks.append(Check(device, chosen, _replay(bundle, golden, cast("Device", device), chosen, threads), None))
        except EchoQuadError as error:
            checks.append(Check(device, precision, None, error))
    return Record(*known, len(manifest["files"]), tuple(checks), obstacles, None)


def _hash_all(bundle: Bundle, precisions: Sequence[str]) -> GoldenFrames:
    """Hash every file but the graphs of `precisions`, which are hashed as they are read to be used.

    Raises
    ------
    BundleError
        If one is missing, malformed or changed.
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
        bundle, device=device, precision=precision, threads=threads, many=True, self_test=False, **options
    )
    engine = cast("OnnxEngine", predictor.engine)
    contract, count = bundle.contract, len(golden.frames)
    true_logits, true = golden.expected(precision)
    passes = _passes(predictor, golden.frames)
    expected = aggregate_votes(true, contract.vote, contract.vote_weights)
    leads = frame_leads(true, contract.vote, contract.vote_weights)
    patch_leads, allowed = quadrant_leads(true), gate["max_abs_dprobability"]

    dlogit, dprobability = np.zeros(count), np.zeros(count)
    labels, tolerated = expected.labels.copy(), np.ones(count, np.bool_)
    flips = []
    # What is no number differs infinitely, and cannot pass.
    for logits, probabilities in passes:
        dlogit = np.maximum(dlogit, max_abs_differences(logits, true_logits))
        dprobability = np.maximum(dprobability, max_abs_differences(probabilities, true))
        found = aggregate_votes(probabilities, contract.vote, contract.vote_weights)
        frames, patches = found.labels != expected.labels, found.quadrant_labels != expected.quadrant_labels
        within = within_tolerance(leads, found.labels, allowed)
        patches_within = within_tolerance(patch_leads, found.quadrant_labels, allowed)
        counted = (frames & ~within, patches & ~patches_within, frames & within, patches & patches_within)
        flips.append([int(turned.sum()) for turned in counted])
        labels, tolerated = np.where(frames, found.labels, labels), tolerated & (within | ~frames)
    frame_flips, quadrant_flips, tolerated_frame_flips, tolerated_quadrant_flips = map(max, zip(*flips, strict=True))
    passed = (
        frame_flips <= gate["max_frame_flip_fraction"] * count
        and bool(np.isfinite(dlogit).all())
        and float(dlogit.max()) <= gate.get("max_abs_dlogit", np.inf)
        and float(dprobability.max()) <= allowed
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
            GoldenCheck(
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
    )


def _passes(predictor: Predictor, frames: Sequence[Grey]) -> Iterator[tuple[FloatArray, FloatArray]]:
    """Run golden frames through every path of a predictor.

    Yields
    ------
    logits, probabilities
        float32 [G, 4, C] each: of the frames one at a time; then for each bucket of as many rounds of all frames as
        give every worker two batches.
    """
    yield predictor.replay(frames, many=False)
    for together in buckets(predictor.batch_size):
        rounds = -(-2 * predictor.workers * together // len(frames))
        logits, probabilities = predictor.replay(list(frames) * rounds, many=True, together=together)
        yield from zip(np.split(logits, rounds), np.split(probabilities, rounds), strict=True)


def _finite(value: Any) -> Any:
    """Give JSON values with None in place of the infinite ones, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
