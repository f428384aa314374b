"""The manifest ``bundle.json``: its fields, file names and precisions, and its only valid encoding.

The manifest lists every file of the bundle with size and SHA-256, and contains the hash of its own content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from echoquad_runtime.contract import canonical_json
from echoquad_runtime.errors import BundleError, BundleNotFoundError, BundleTamperedError
from echoquad_runtime.storage.regular_file import read_regular

__all__ = [
    "BF16",
    "CODES",
    "FP32_DEVICES",
    "GOLDEN",
    "INTENDED_USE",
    "MANIFEST",
    "MODEL_CARD",
    "PRECISIONS",
    "REDUCED_GATE",
    "SCHEMA",
    "SIGNATURE",
    "TF32",
    "VALIDATION",
    "decode_manifest",
    "encode_manifest",
    "frame_graph_file",
    "model_file",
    "read_manifest",
    "shorten",
]

SCHEMA: Final = 1
MANIFEST: Final = "bundle.json"
GOLDEN: Final = "golden.npz"
MODEL_CARD: Final = "MODEL_CARD.md"
SIGNATURE: Final = "model.sig"
"""The signature file. It covers the manifest, so the manifest does not list it."""
CODES: Final = "codes"
"""The manifest's field of the code table, which only some bundles have."""
VALIDATION: Final = "validation"
"""The manifest's field of the validation figures of each precision, which only some bundles have."""
PRECISIONS: Final = ("fp32", "fp16", "int8")
BF16: Final = "bf16"
"""The precision of an fp32 graph that OpenVINO computes in bfloat16; it has no graph of its own."""
TF32: Final = "tf32"
"""The precision of an fp32 graph that CUDA computes in TF32; it has no graph of its own."""
FP32_DEVICES: Final[Mapping[str, str]] = {BF16: "openvino", TF32: "cuda"}
"""The device that a precision without a graph of its own requires."""
REDUCED_GATE: Final[Mapping[str, float]] = {
    "max_abs_dprobability": 0.05,
    "max_frame_flip_fraction": 0.01,
    "max_rel_dtypicality": 0.5,
}
"""The parity gate of every precision below fp32."""
INTENDED_USE: Final = (
    "Research use only. Not a medical device; not for diagnosis, triage, or any decision on a patient's care."
)

_SELF_HASH: Final = "manifest_sha256"
_MAX_MANIFEST: Final = 1 << 24  # bytes; a thousand times the usual size
_REQUIRED: Final[Mapping[str, type]] = {
    **dict.fromkeys(("contract", "files", "precisions", "parity", "training"), dict),
    **dict.fromkeys(("contract_sha256", "default_precision", "intended_use"), str),
}


def model_file(precision: str) -> str:
    """Return the file name of the graph that a precision runs; `BF16` and `TF32` run the fp32 graph."""
    return f"model.{'fp32' if precision in FP32_DEVICES else precision}.onnx"


def frame_graph_file(precision: str) -> str:
    """Return the file name of a precision's graph from frame to decision, which only some bundles have."""
    return f"frame.{precision}.onnx"


def encode_manifest(manifest: Mapping[str, Any]) -> bytes:
    """Return the bytes of ``bundle.json``, with the hash of its content; readers accept no other encoding.

    Raises
    ------
    ValueError
        If a value has no JSON form, such as NaN.
    """
    content = {key: value for key, value in manifest.items() if key != _SELF_HASH}
    digest = hashlib.sha256(canonical_json(content).encode("ascii")).hexdigest()
    text = json.dumps({**content, _SELF_HASH: digest}, indent=2, sort_keys=True, allow_nan=False)
    return f"{text}\n".encode("ascii")


def read_manifest(folder: Path) -> bytes:
    """Read the bytes of a bundle's ``bundle.json``.

    Raises
    ------
    BundleNotFoundError
        If it is missing or cannot be read.
    BundleTamperedError
        If it is too large.
    """
    label = folder.as_posix()
    try:
        data = read_regular(folder / MANIFEST, _MAX_MANIFEST)
    except FileNotFoundError:
        raise BundleNotFoundError(
            f"{label}: no bundle here ({MANIFEST} is missing); expected a folder that `echoquad export` wrote"
        ) from None
    except OSError as error:
        raise BundleNotFoundError(f"{label}: {MANIFEST} cannot be read ({error.strerror or error})") from error
    if len(data) > _MAX_MANIFEST:
        raise BundleTamperedError(
            f"{label}: {MANIFEST} is too large; expected at most {_MAX_MANIFEST} bytes; copy the whole bundle again"
        )
    return data


def decode_manifest(data: bytes, label: str) -> dict[str, Any]:
    """Parse and check the bytes of ``bundle.json``; error messages begin with `label`.

    Raises
    ------
    BundleTamperedError
        If the bytes are not those that `encode_manifest` returns for their content.
    BundleError
        If the schema is unknown, or a field is missing or has a wrong type.
    """
    try:
        manifest = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError):
        raise BundleTamperedError(f"{label}: {MANIFEST} is not valid JSON; copy the whole bundle again") from None
    if not isinstance(manifest, dict) or "schema" not in manifest:
        raise BundleError(f"{label}: {MANIFEST} is not a bundle's manifest; expected a `schema` field")
    if manifest["schema"] != SCHEMA or isinstance(manifest["schema"], bool):
        raise BundleError(
            f"{label}: the bundle has schema {shorten(manifest['schema'])}; this EchoQuad reads {SCHEMA}; install the "
            "release that wrote it, or export it again"
        )
    # Comparing the bytes detects what the hash of the content does not cover, such as whitespace or a repeated key.
    try:
        intact = encode_manifest(manifest) == data
    except (ValueError, RecursionError):  # json.loads accepts NaN, infinity and deeper nesting than json.dumps
        intact = False
    if not intact:
        raise BundleTamperedError(
            f"{label}: {MANIFEST} was damaged or changed after the export; copy the whole bundle again"
        )
    for key, expected_type in _REQUIRED.items():
        if not isinstance(manifest.get(key), expected_type):
            raise BundleError(
                f"{label}: {MANIFEST} has no valid `{key}`; expected a {expected_type.__name__}; export it again"
            )
    for name, entry in manifest["files"].items():
        plain = name and not name.startswith(".") and not set(name) & set("/\\:\0")
        if not plain or not _is_file_entry(entry):
            raise BundleError(
                f"{label}: {MANIFEST} lists the file {shorten(name)}; expected a plain name with its SHA-256 and size"
            )
    return manifest


def _is_file_entry(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    size = entry.get("bytes")
    return isinstance(entry.get("sha256"), str) and type(size) is int and 0 <= size < 1 << 40


def shorten(value: object) -> str:
    """Return the repr of an untrusted value, truncated to 60 characters for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
