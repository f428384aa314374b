"""Golden frames: frames with the outputs that the training code computed for them, stored as ``golden.npz``."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from echoquad_runtime.bundle.manifest import GOLDEN, PRECISIONS
from echoquad_runtime.contract import canonical_json
from echoquad_runtime.errors import BundleError
from echoquad_runtime.quadrants import Grey

__all__ = ["GoldenFrames", "decode_golden", "encode_golden"]

_MAX_UNPACKED: Final = 1 << 28  # bytes, so that a small file cannot exhaust the memory

Outputs = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class GoldenFrames:
    """Frames with expected logits and probabilities.

    Attributes
    ----------
    names
        G names.
    frames
        G grey frames, uint8 [H, W], of different sizes.
    logits, probabilities
        float32 [G, 4, C], quadrants LA, RA, LV, RV, computed by PyTorch in float32.
    reasons
        G tuples of phrases that say what each frame tests; empty if they were not recorded.
    exported
        For each precision below fp32, the logits and probabilities that its graph computed during the export.
    typicality, exported_typicality
        The same for the typicality of the quadrants, float32 [G, 4]: by PyTorch, and by the graphs of the precisions
        below fp32. None and empty in a bundle without this score.
    """

    names: tuple[str, ...]
    frames: tuple[Grey, ...]
    logits: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float32]
    reasons: tuple[tuple[str, ...], ...] = ()
    exported: Mapping[str, Outputs] = field(default_factory=dict)
    typicality: npt.NDArray[np.float32] | None = None
    exported_typicality: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    def expected(self, precision: str) -> Outputs:
        """Return the logits and probabilities that a precision must reproduce.

        The parity of a reduced precision was measured on frames of the data set. On saturated or striped frames, which
        are far from these, it may differ more from PyTorch; there it must reproduce what it computed during the export.
        """
        return self.exported.get(precision, (self.logits, self.probabilities))

    def expected_typicality(self, precision: str) -> npt.NDArray[np.float32] | None:
        """Return the typicality that a precision must reproduce, float32 [G, 4]; None if there is none."""
        return self.exported_typicality.get(precision, self.typicality)


def encode_golden(golden: GoldenFrames) -> bytes:
    """Return golden frames as the bytes of an ``.npz`` file; equal input gives equal bytes."""
    arrays: dict[str, Any] = {f"frame_{i:03d}": frame for i, frame in enumerate(golden.frames)}
    arrays |= {
        "names": np.array(golden.names),
        "logits": golden.logits,
        "probabilities": golden.probabilities,
    }
    for name, (logits, probabilities) in golden.exported.items():
        arrays |= {f"logits_{name}": logits, f"probabilities_{name}": probabilities}
    if golden.typicality is not None:
        arrays["typicality"] = golden.typicality
    arrays |= {f"typicality_{name}": scores for name, scores in golden.exported_typicality.items()}
    if golden.reasons:
        arrays["reasons"] = np.array([canonical_json(phrases) for phrases in golden.reasons])
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def decode_golden(data: bytes, classes: int, label: str) -> GoldenFrames:
    """Parse and check the bytes of ``golden.npz``; error messages begin with `label`.

    Raises
    ------
    BundleError
        If the bytes are not a valid archive, or an array has a wrong shape or type.
    """
    try:
        if not data.startswith(b"PK"):  # otherwise numpy's message suggests loading it with pickle
            raise ValueError("it is not a zip archive")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            if sum(part.file_size for part in arrays.zip.infolist()) > _MAX_UNPACKED:
                raise ValueError(f"it unpacks to more than {_MAX_UNPACKED >> 20} MB")
            names = tuple(str(name) for name in arrays["names"])
            frames = tuple(arrays[f"frame_{index:03d}"] for index in range(len(names)))
            lists = [json.loads(str(line)) for line in arrays["reasons"]] if "reasons" in arrays else []
            reasons = tuple(tuple(map(str, phrases)) for phrases in lists)
            exported = {
                name: (arrays[f"logits_{name}"], arrays[f"probabilities_{name}"])
                for name in PRECISIONS
                if f"logits_{name}" in arrays
            }
            scores = {name: arrays[f"typicality_{name}"] for name in PRECISIONS if f"typicality_{name}" in arrays}
            golden = GoldenFrames(
                names,
                frames,
                arrays["logits"],
                arrays["probabilities"],
                reasons,
                exported,
                arrays.get("typicality"),
                scores,
            )
    except Exception as error:  # numpy's exceptions for a damaged archive or a missing array share no base class
        raise BundleError(f"{label}: {GOLDEN} cannot be parsed ({error}); export it again") from error
    shape = (len(frames), 4, classes)
    for outputs in (golden.expected("fp32"), *exported.values()):
        if any(part.shape != shape for part in outputs) or not frames:
            raise BundleError(f"{label}: {GOLDEN} has outputs {outputs[0].shape}; expected {shape}; export it again")
        if any(part.dtype != np.float32 for part in outputs):
            raise BundleError(f"{label}: {GOLDEN} has outputs that are not float32; export it again")
    for part in (golden.typicality, *scores.values()):
        if part is not None and (part.shape != shape[:2] or part.dtype != np.float32):
            raise BundleError(
                f"{label}: {GOLDEN} has typicality {part.dtype} {part.shape}; expected float32 {shape[:2]}; export it "
                "again"
            )
    if any(frame.ndim != 2 or frame.dtype != np.uint8 or min(frame.shape) < 2 for frame in frames):
        raise BundleError(
            f"{label}: {GOLDEN} has an invalid frame; expected uint8 [height, width], at least 2 x 2; export it again"
        )
    if len(reasons) not in (0, len(frames)):
        raise BundleError(
            f"{label}: {GOLDEN} has reasons for {len(reasons)} of {len(frames)} frames; expected all; export it again"
        )
    return golden
