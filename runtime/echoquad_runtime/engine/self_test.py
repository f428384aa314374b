"""The power-on self-test: golden frames run through the inference slots and threads of a predictor before it is used.

Each slot runs every bucket twice, with golden frames whose expected outputs differ, and in another order the second
time. The outputs must agree with the expected ones within the precision's parity gate, and two frames with different
expected outputs must not produce equal bits. This detects a slot that keeps reading its first input, a slot that
returns the output of an earlier run, and a device that computes wrong numbers. A failure is an error, never a row.

On the CPU a passed test is saved in the cache, so that the next start does not repeat it. It is valid for the same
bundle, precision, number of threads and frames, onnxruntime, EchoQuad and processor. Other devices are tested at every
start, because a driver or a card can change between starts. So is a bundle whose signature is verified, for which
nothing is taken from the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.typicality import frame_typicality
from echoquad_runtime.contract import canonical_json
from echoquad_runtime.devices.cache_folder import cache_folder, make_private_folder, read_private_file
from echoquad_runtime.devices.host_facts import host_facts
from echoquad_runtime.engine.io_binding import FloatArray, InferenceOutput, InferenceSlot, buckets, new_batch
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.errors import OutputError, VerificationError
from echoquad_runtime.quadrants import frame_quadrants
from echoquad_runtime.storage.atomic import write_json

__all__ = ["PASSED", "SelfTest", "cached_self_tests", "max_abs_differences", "relative_differences"]

PASSED: Final = "passed"

_FRAMES: Final = 4  # golden frames of a test
_DISTINCT: Final = 1e-3  # logit difference beyond which two expected outputs cannot have equal bits

_SCHEMA: Final = 1
_MAX_BYTES: Final = 4096  # of a saved result
_MAX_FILES: Final = 1000  # saved results; beyond it the oldest ones are removed


class _TestFrames(NamedTuple):
    """The frames of a test: quadrants, uint8 [K, 4, 1, S, S]; expected logits and probabilities, float32 [K, 4, C].

    The expected typicality of the frames, float64 [K], is None if the bundle has no such score.
    """

    names: tuple[str, ...]
    quadrants: npt.NDArray[np.uint8]
    logits: FloatArray
    probabilities: FloatArray
    gate: Mapping[str, float]
    typicality: npt.NDArray[np.float64] | None


class SelfTest:
    """Tests the inference slots of an engine.

    Parameters
    ----------
    bundle
        Provides the golden frames and the parity gate.
    engine
        The engine whose slots are tested.
    frames
        Maximal number of frames that a slot runs.

    Attributes
    ----------
    cached
        Whether this host's cache holds a passed test that is still valid.
    passed
        Whether `cached` is True or a slot has passed.

    Raises
    ------
    BundleError
        If the golden frames are needed and cannot be read.
    """

    def __init__(self, bundle: Bundle, engine: OnnxEngine, frames: int) -> None:
        self._bundle, self._engine, self._frames = bundle, engine, frames
        self._file = _result_file(bundle, engine, frames)
        self.cached = self._file is not None and _read(self._file) is not None
        self.passed = self.cached
        # Read now, not with the first slot: the bundle's folder may be gone by then.
        self._golden = None if self.cached else _select_frames(bundle, engine.precision)

    def __call__(self, slot: InferenceSlot) -> None:
        """Test a slot; call this in the thread that will use it.

        Raises
        ------
        VerificationError
            If an output differs from the expected one.
        BundleError
            If the engine fails.
        """
        golden = self._golden
        if golden is None:
            return
        batch = new_batch(self._engine.contract, self._frames)
        count = len(golden.names)
        for bucket in buckets(self._frames):
            previous: InferenceOutput | None = None
            for shift in (0, 1):
                indices = (np.arange(self._frames) + shift) % count
                batch[:] = golden.quadrants[indices]
                output = slot.run(batch, bucket)
                self._compare(golden, indices[:bucket], output, previous, bucket)
                previous = output
        self.passed = True
        if self._file is not None:
            _save(self._file, self._bundle, self._engine, self._frames)

    def _compare(
        self,
        golden: _TestFrames,
        indices: npt.NDArray[np.int64],
        output: InferenceOutput,
        previous: InferenceOutput | None,
        bucket: int,
    ) -> None:
        dlogit = max_abs_differences(output.logits, golden.logits[indices])
        dprobability = max_abs_differences(output.probabilities, golden.probabilities[indices])
        max_dlogit = golden.gate.get("max_abs_dlogit", np.inf)
        max_dprobability = golden.gate["max_abs_dprobability"]
        if not np.isfinite(dlogit).all() or dprobability.max() > max_dprobability or dlogit.max() > max_dlogit:
            worst = int(dprobability.argmax())
            problem = (
                f"the golden frame {golden.names[indices[worst]]} has |dlogit| {dlogit[worst]:.3g} and "
                f"|dprobability| {dprobability[worst]:.3g}; expected at most {max_dlogit:g} and {max_dprobability:g}"
            )
        elif (dtypicality := _typicality_difference(golden, indices, output)) > golden.gate.get(
            "max_rel_dtypicality", np.inf
        ):
            problem = f"the typicality of a golden frame differs by {dtypicality:.3g} of its value"
        elif previous is not None and _is_stuck(golden, indices, output, previous):
            problem = "different golden frames have bitwise equal outputs"
        else:
            return
        engine = self._engine
        raise VerificationError(
            f"{self._bundle.folder.as_posix()}: the self-test failed on {engine.device} in {engine.precision}, "
            f"in batches of {bucket}: {problem}; no frame was judged; do: run echoquad verify, and choose another "
            "device or precision"
        )


def _typicality_difference(golden: _TestFrames, indices: npt.NDArray[np.int64], output: InferenceOutput) -> float:
    if golden.typicality is None:
        return 0.0
    return float(relative_differences(output.typicality, golden.typicality[indices]).max())


def _is_stuck(
    golden: _TestFrames, indices: npt.NDArray[np.int64], output: InferenceOutput, previous: InferenceOutput
) -> bool:
    """Return whether an output has the bits of the previous run although its frame and expected output differ."""
    expected = golden.logits[indices]
    expected_before = golden.logits[(indices - 1) % len(golden.names)]
    differs = max_abs_differences(expected, expected_before) > _DISTINCT
    equal_bits = (output.logits == previous.logits).all(axis=(1, 2))
    return bool((differs & equal_bits).any())


def max_abs_differences(actual: FloatArray, expected: FloatArray) -> npt.NDArray[np.float64]:
    """Return each frame's largest absolute difference, float64 [N], of arrays [N, 4, C]; infinite if one is NaN."""
    difference = np.abs(actual.astype(np.float64) - expected)
    return np.asarray(np.nan_to_num(difference, nan=np.inf).max(axis=(1, 2)))


def relative_differences(scores: FloatArray | None, expected: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return each frame's |difference| of typicality as a share of the expected one, float64 [N].

    `scores` are those of the quadrants, float32 [N, 4], and `expected` those of the frames, [N]. The difference is
    infinite if there are no scores, or one is not a number.
    """
    if scores is None:
        return np.full(len(expected), np.inf)
    return np.asarray(np.nan_to_num(np.abs(frame_typicality(scores) / expected - 1), nan=np.inf))


def _select_frames(bundle: Bundle, precision: str) -> _TestFrames:
    """Select the golden frames whose expected outputs differ most, by farthest-point sampling."""
    golden = bundle.read_golden()
    logits, probabilities = golden.expected(precision)
    typicality = golden.expected_typicality(precision)
    rows = probabilities.reshape(len(golden.names), -1).astype(np.float64)
    distance = np.abs(rows[:, None] - rows[None]).max(axis=2)
    selected = [int(np.nan_to_num(distance.max(axis=1)).argmax())]
    while len(selected) < min(_FRAMES, len(rows)):
        nearest = np.nan_to_num(distance[:, selected].min(axis=1))
        nearest[selected] = -1.0
        selected.append(int(nearest.argmax()))
    return _TestFrames(
        tuple(golden.names[index] for index in selected),
        np.stack([frame_quadrants(golden.frames[index], bundle.contract) for index in selected]),
        logits[selected],
        probabilities[selected],
        bundle.gate(precision),
        None if typicality is None else frame_typicality(typicality[selected]),
    )


# ---------------------------------------------------------------------------------------------- saved results


def _folder() -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / "self-tests"


def _facts(bundle: Bundle, engine: OnnxEngine, frames: int) -> dict[str, Any]:
    return {
        "bundle": bundle.manifest["manifest_sha256"],
        "precision": engine.precision,
        "device": engine.device,
        "threads": engine.threads,
        "frames": frames,
        "host": host_facts(),
    }


def _result_file(bundle: Bundle, engine: OnnxEngine, frames: int) -> Path | None:
    """Return the file of a saved result; None if the result must not be saved."""
    folder = _folder()
    if folder is None or engine.device != "cpu" or bundle.signed_by is not None:
        return None
    facts = canonical_json(_facts(bundle, engine, frames))
    return folder / f"{hashlib.sha256(facts.encode('ascii')).hexdigest()}.json"


def _read(path: Path) -> dict[str, Any] | None:
    """Read a saved result; None if there is none or other users may write it."""
    try:
        content = json.loads(read_private_file(path, _MAX_BYTES))
        return content if content["schema"] == _SCHEMA and content["self_test"] == PASSED else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _save(path: Path, bundle: Bundle, engine: OnnxEngine, frames: int) -> None:
    """Save a passed test. A cache that cannot be written is not an error: the next start repeats the test."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"schema": _SCHEMA, "self_test": PASSED, "created": created, **_facts(bundle, engine, frames)}
    with contextlib.suppress(OSError, OutputError):
        make_private_folder(path.parent)
        write_json(path, content)
        for old in sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)[:-_MAX_FILES]:
            old.unlink(missing_ok=True)


def cached_self_tests(bundle: Bundle | None = None) -> list[dict[str, Any]]:
    """Return the saved self-tests that are valid on this host, oldest first: of one bundle, or of all.

    Returns
    -------
    list of dict
        Each with ``bundle`` (the manifest's SHA-256), ``precision``, ``device``, ``threads``, ``frames`` of a batch,
        and ``created`` (ISO 8601, UTC).
    """
    folder, host = _folder(), host_facts()
    if folder is None:
        return []
    results = []
    with contextlib.suppress(OSError):
        for path in folder.glob("*.json"):
            content = _read(path)
            if content is None or content.get("host") != host:
                continue
            if bundle is None or content.get("bundle") == bundle.manifest["manifest_sha256"]:
                results.append(content)
    return sorted(results, key=lambda content: str(content.get("created")))
