"""The power-on self-test: golden frames go through the very slots and threads that will judge, before they judge.

Each slot runs every bucket twice, with golden frames whose expected answers differ, in another order the second time.
The answers must agree with the expected ones within the precision's parity gate, and two frames of different expected
answers must not get the same bits. This finds a slot that keeps reading its first input, one that returns answers of
an earlier run, and a device that computes something else. A miss is an error, never a row.

On the CPU a pass is remembered in the cache, so that the next start does not repeat it: by bundle, precision, number
of threads and frames, onnxruntime, EchoQuad and processor. Other devices are tested at every start, since a driver or
a card can change between two of them; so is a bundle whose signature was asked for, for which nothing is taken from
the cache.
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
from echoquad_runtime.contract import canonical_json
from echoquad_runtime.devices.graph_cache import cache_folder, is_ours
from echoquad_runtime.devices.host_facts import host_facts
from echoquad_runtime.engine.io_binding import Answers, FloatArray, InferenceSlot, buckets, new_batch
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.errors import OutputError, VerificationError
from echoquad_runtime.quadrants import frame_quadrants
from echoquad_runtime.storage.atomic import read_regular, write_json

__all__ = ["PASSED", "SelfTest", "largest_differences", "passes_on_this_host"]

PASSED: Final = "passed"

FRAMES: Final = 4  # golden frames: those whose expected answers differ most
DISTINCT: Final = 1e-3  # difference of a logit from which two expected answers are different for certain

_SCHEMA: Final = 1
_MAX_BYTES: Final = 4096  # of a remembered pass
_MAX_FILES: Final = 1000  # remembered passes; beyond it the oldest go


class _Golden(NamedTuple):
    """The frames of the test: quadrants, uint8 [K, 4, 1, S, S]; logits, probabilities, float32 [K, 4, C]; the gate."""

    names: tuple[str, ...]
    quadrants: npt.NDArray[np.uint8]
    logits: FloatArray
    probabilities: FloatArray
    gate: Mapping[str, float]


class SelfTest:
    """Tests the slots of an engine.

    Parameters
    ----------
    bundle
        Gives the golden frames and the gate.
    engine
        Whose slots are tested.
    frames
        Frames that a slot runs at most.

    Attributes
    ----------
    remembered
        Whether this host's cache has a pass for all that the result depends on.
    passed
        Whether that is so, or a slot has passed.

    Raises
    ------
    BundleError
        If the golden frames are needed and cannot be read.
    """

    def __init__(self, bundle: Bundle, engine: OnnxEngine, frames: int) -> None:
        self._bundle, self._engine, self._frames = bundle, engine, frames
        self._file = _file_of(bundle, engine, frames)
        self.remembered = self._file is not None and _read(self._file) is not None
        self.passed = self.remembered
        # Now, and not with the first slot: by then the bundle's folder may be gone.
        self._golden = None if self.remembered else _choose(bundle, engine.precision)

    def __call__(self, slot: InferenceSlot) -> None:
        """Test a slot in the thread that will use it.

        Raises
        ------
        VerificationError
            If an answer is not the expected one.
        BundleError
            If the engine fails.
        """
        golden = self._golden
        if golden is None:
            return
        batch = new_batch(self._engine.contract, self._frames)
        count = len(golden.names)
        for bucket in buckets(self._frames):
            before: Answers | None = None
            for shift in (0, 1):
                places = (np.arange(self._frames) + shift) % count
                batch[:] = golden.quadrants[places]
                found = slot.run(batch, bucket)
                self._compare(golden, places[:bucket], found, before, bucket)
                before = found
        self.passed = True
        if self._file is not None:
            _remember(self._file, self._bundle, self._engine, self._frames)

    def _compare(
        self, golden: _Golden, places: npt.NDArray[np.int64], found: Answers, before: Answers | None, bucket: int
    ) -> None:
        logits, probabilities = golden.logits[places], golden.probabilities[places]
        dlogit, dprobability = (
            largest_differences(a, b) for a, b in ((found.logits, logits), (found.probabilities, probabilities))
        )
        allowed = golden.gate["max_abs_dprobability"]
        worst = int(dprobability.argmax())
        if (
            not np.isfinite(dlogit).all()
            or dprobability.max() > allowed
            or (dlogit.max() > golden.gate.get("max_abs_dlogit", np.inf))
        ):
            what = (
                f"the golden frame {golden.names[places[worst]]} gets |dlogit| {dlogit[worst]:.3g} and "
                f"|dprobability| {dprobability[worst]:.3g}; allowed are {golden.gate.get('max_abs_dlogit', np.inf):g} "
                f"and {allowed:g}"
            )
        elif before is not None and _stuck(golden, places, found, before):
            what = "different golden frames get the same answer, to the last bit"
        else:
            return
        engine = self._engine
        raise VerificationError(
            f"{self._bundle.folder.as_posix()}: the self-test failed on {engine.device} in {engine.precision}, "
            f"in batches of {bucket}: {what}; no frame was judged; do: run echoquad verify, and choose another "
            "device or precision"
        )


def _stuck(golden: _Golden, places: npt.NDArray[np.int64], found: Answers, before: Answers) -> bool:
    """Return whether a place has the bits of the run before, though its frame and the expected answer differ."""
    expected = golden.logits[places]
    earlier = golden.logits[(places - 1) % len(golden.names)]
    differs = largest_differences(expected, earlier) > DISTINCT
    same = (found.logits == before.logits).all(axis=(1, 2))
    return bool((differs & same).any())


def largest_differences(found: FloatArray, expected: FloatArray) -> npt.NDArray[np.float64]:
    """Return each frame's largest |difference|, float64 [N], of arrays [N, 4, C]; infinite where one is no number."""
    difference = np.abs(found.astype(np.float64) - expected)
    return np.asarray(np.nan_to_num(difference, nan=np.inf).max(axis=(1, 2)))


def _choose(bundle: Bundle, precision: str) -> _Golden:
    """Choose the golden frames whose expected answers differ most: each next one lies farthest from those before."""
    golden = bundle.read_golden()
    logits, probabilities = golden.expected(precision)
    rows = probabilities.reshape(len(golden.names), -1).astype(np.float64)
    distance = np.abs(rows[:, None] - rows[None]).max(axis=2)
    chosen = [int(np.nan_to_num(distance.max(axis=1)).argmax())]
    while len(chosen) < min(FRAMES, len(rows)):
        nearest = np.nan_to_num(distance[:, chosen].min(axis=1))
        nearest[chosen] = -1.0
        chosen.append(int(nearest.argmax()))
    return _Golden(
        tuple(golden.names[index] for index in chosen),
        np.stack([frame_quadrants(golden.frames[index], bundle.contract) for index in chosen]),
        logits[chosen],
        probabilities[chosen],
        bundle.gate(precision),
    )


# ---------------------------------------------------------------------------------------------- remembered passes


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


def _file_of(bundle: Bundle, engine: OnnxEngine, frames: int) -> Path | None:
    """Return where a pass is remembered; None where it is not to be."""
    folder = _folder()
    if folder is None or engine.device != "cpu" or bundle.signed_by is not None:
        return None
    facts = canonical_json(_facts(bundle, engine, frames))
    return folder / f"{hashlib.sha256(facts.encode('ascii')).hexdigest()}.json"


def _read(path: Path) -> dict[str, Any] | None:
    """Read a remembered pass; None where there is none, or it is not this user's alone."""
    try:
        if not is_ours(path.parent.lstat(), folder=True) or not is_ours(path.lstat(), folder=False):
            return None
        content = json.loads(read_regular(path, _MAX_BYTES))
        return content if content["schema"] == _SCHEMA and content["self_test"] == PASSED else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(path: Path, bundle: Bundle, engine: OnnxEngine, frames: int) -> None:
    """Write a pass. A cache that cannot be written is no error: the next start tests again."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"schema": _SCHEMA, "self_test": PASSED, "created": created, **_facts(bundle, engine, frames)}
    with contextlib.suppress(OSError, OutputError):
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if is_ours(path.parent.lstat(), folder=True):
            write_json(path, content)
            for old in sorted(path.parent.glob("*.json"), key=lambda one: one.stat().st_mtime)[:-_MAX_FILES]:
                old.unlink(missing_ok=True)


def passes_on_this_host(bundle: Bundle | None = None) -> list[dict[str, Any]]:
    """Return the remembered passes that hold on this host, oldest first: of a bundle, or of all.

    Returns
    -------
    list of dict
        Each with ``bundle`` (the manifest's SHA-256), ``precision``, ``device``, ``threads``, ``frames`` at a time, and
        ``created``, ISO 8601 in UTC.
    """
    folder, here = _folder(), host_facts()
    if folder is None:
        return []
    found = []
    with contextlib.suppress(OSError):
        for path in folder.glob("*.json"):
            content = _read(path)
            if content is None or content.get("host") != here:
                continue
            if bundle is None or content.get("bundle") == bundle.manifest["manifest_sha256"]:
                found.append(content)
    return sorted(found, key=lambda content: str(content.get("created")))
