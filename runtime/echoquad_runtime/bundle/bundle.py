"""The bundle: a folder that holds a model, the contract it keeps, and the means to check both.

``bundle.json`` names every file with its SHA-256 and carries its own. Nothing is used before its bytes have
been hashed, and the bytes that were hashed are the ones that are used: a file is read once.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from echoquad_runtime.contract import Contract, canonical_json
from echoquad_runtime.errors import BundleError, BundleNotFoundError, BundleTamperedError, ContractError
from echoquad_runtime.quadrants import Grey
from echoquad_runtime.storage.atomic import read_regular

__all__ = [
    "BF16",
    "GOLDEN",
    "INTENDED_USE",
    "MANIFEST",
    "MODEL_CARD",
    "PRECISIONS",
    "REDUCED_GATE",
    "SCHEMA",
    "SIGNATURE",
    "TF32",
    "Bundle",
    "Golden",
    "encode_golden",
    "encode_manifest",
    "frame_file",
    "model_file",
]

SCHEMA: Final = 1
MANIFEST: Final = "bundle.json"
GOLDEN: Final = "golden.npz"
MODEL_CARD: Final = "MODEL_CARD.md"
SIGNATURE: Final = "model.sig"
"""The one file that the manifest does not list: it comes after, and vouches for the manifest."""
PRECISIONS: Final = ("fp32", "fp16", "int8")
BF16: Final = "bf16"
"""A precision without a graph: the fp32 graph, which OpenVINO computes in bfloat16 when it is told to."""
TF32: Final = "tf32"
"""A precision without a graph: the fp32 graph, which CUDA computes in TF32 when it is told to."""
_OF_FP32: Final[Mapping[str, str]] = {BF16: "openvino", TF32: "cuda"}  # the devices that run the fp32 graph so
REDUCED_GATE: Final[Mapping[str, float]] = {"max_abs_dprobability": 0.05, "max_frame_flip_fraction": 0.01}
"""What every precision below fp32 is held to."""
INTENDED_USE: Final = (
    "Research use only. Not a medical device; not for diagnosis, triage, or any decision on a patient's care."
)

_SELF_HASH: Final = "manifest_sha256"
_MAX_MANIFEST: Final = 1 << 24  # bytes; a thousand times what one has
_MAX_GOLDEN: Final = 1 << 28  # bytes unpacked, so that a small file cannot fill the memory
_REQUIRED: Final[Mapping[str, type]] = {
    "contract": dict,
    "contract_sha256": str,
    "files": dict,
    "precisions": dict,
    "default_precision": str,
    "parity": dict,
    "training": dict,
    "intended_use": str,
}


def model_file(precision: str) -> str:
    """Return the name of the graph that a precision runs; `BF16` and `TF32` run the fp32 graph."""
    return f"model.{'fp32' if precision in _OF_FP32 else precision}.onnx"


def frame_file(precision: str) -> str:
    """Name the graph from frame to decision of a precision within its bundle; only some bundles have one."""
    return f"frame.{precision}.onnx"


Answers = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Golden:
    """Frames with the answers that the training code gave for them.

    Attributes
    ----------
    names
        G names.
    frames
        G grey frames, uint8 [H, W], sizes differing.
    logits, probabilities
        float32 [G, 4, C], quadrants in the contract's order; computed by PyTorch in float32.
    reasons
        G tuples of phrases: what each frame is there for. Empty where it is not recorded.
    exported
        By precision below fp32: logits and probabilities that its graph gave where it was exported and held to PyTorch.
    """

    names: tuple[str, ...]
    frames: tuple[Grey, ...]
    logits: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float32]
    reasons: tuple[tuple[str, ...], ...] = ()
    exported: Mapping[str, Answers] = field(default_factory=dict)

    def expected(self, precision: str) -> Answers:
        """Give the logits and probabilities that a precision is to give.

        A graph of less precision was proved on frames of the data; on a saturated or a striped one, which is far from
        these, it may differ from PyTorch by more, and shows its worth by giving here what it gave where it was proved.
        """
        return self.exported.get(precision, (self.logits, self.probabilities))


class Bundle:
    """A bundle on disk, its manifest checked.

    Parameters
    ----------
    folder
        The bundle's folder.
    public_key
        A PEM file; where given, the bundle is refused unless the key that belongs to it has signed every file of it.

    Attributes
    ----------
    signed_by
        The fingerprint of `public_key`, SHA-256 in hexadecimal; None where no signature was asked for.

    Raises
    ------
    BundleNotFoundError
        If there is no ``bundle.json``.
    SignatureError
        If `public_key` is given and the bundle is unsigned, altered, or another's.
    BundleTamperedError
        If the manifest's bytes are not those that were exported.
    BundleError
        If its schema is unknown or something in it is missing.
    ConfigError, MissingExtraError
        If `public_key` is no key, or the extra ``sign`` is not installed.
    """

    def __init__(self, folder: str | Path, *, public_key: str | Path | None = None) -> None:
        self.folder = Path(folder)
        data = _read_manifest(self.folder)
        self.signed_by: str | None = None
        if public_key is not None:  # before anything is made of the bytes, which are the ones used from here on
            from echoquad_runtime.bundle.signature import check_signature

            self.signed_by = check_signature(self.folder, public_key, {MANIFEST: data})
        self.manifest = _parse_manifest(self._label, data)
        try:
            self.contract = Contract.from_dict(self.manifest["contract"])
        except ContractError as error:
            raise BundleError(f"{self._label}: {error}") from error
        if self.contract.sha256 != self.manifest["contract_sha256"]:
            raise BundleTamperedError(f"{self._label}: the contract is not the one its hash names; export it again")
        for name in self.manifest["precisions"]:
            if model_file(name) not in self.manifest["files"]:
                raise BundleError(f"{self._label}: {model_file(name)} is not among its files; export it again")
        if self.default_precision not in self.precisions:
            raise BundleError(
                f"{self._label}: its default precision is {_short(self.default_precision)}; "
                f"expected one of {', '.join(self.precisions)}"
            )

    @property
    def _label(self) -> str:
        return self.folder.as_posix()

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions that the bundle has a graph for."""
        return tuple(self.manifest["precisions"])

    @property
    def default_precision(self) -> str:
        """The precision that runs when none is asked for."""
        return str(self.manifest["default_precision"])

    def gate(self, precision: str) -> dict[str, float]:
        """Give the parity gate, by name, that the graph of `precision` passed at its export.

        `BF16` and `TF32` were not exported: they are held to `REDUCED_GATE`.

        Raises
        ------
        BundleError
            If the manifest has none.
        """
        if precision in _OF_FP32:
            return dict(REDUCED_GATE)
        figures = self.manifest["parity"].get(precision)
        gate = figures.get("gate") if isinstance(figures, dict) else None
        if (
            not isinstance(gate, dict)
            or not gate.keys() >= {"max_abs_dprobability", "max_frame_flip_fraction"}
            or not all(type(bound) in (int, float) for bound in gate.values())
        ):
            raise BundleError(f"{self._label}: it states no parity gate for {precision}; export it again")
        return cast("dict[str, float]", gate)

    def choose_precision(self, precision: str | None) -> str:
        """Check a precision that was asked for; None is the bundle's default, `BF16` and `TF32` need the fp32 graph.

        Raises
        ------
        BundleError
            If the bundle does not hold it.
        """
        if precision is None:
            return self.default_precision
        if precision in _OF_FP32 and "fp32" in self.precisions:
            return precision
        if precision not in self.precisions:
            precision = "fp32" if precision in _OF_FP32 else precision  # what bf16 and tf32 lack
            raise BundleError(
                f"{self._label}: it holds no {precision} graph, only {', '.join(self.precisions)}; "
                f"ask for one of these, or export with --precision {precision}"
            )
        return precision

    def precisions_on(self, device: str) -> tuple[str, ...]:
        """Return the precisions that a device may compute the bundle in."""
        more = [name for name, where in _OF_FP32.items() if where == device and "fp32" in self.precisions]
        return tuple(name for name in self.precisions if (name, device) != ("int8", "cuda")) + tuple(more)

    def read(self, name: str) -> bytes:
        """Read a file of the bundle and hold its bytes against the manifest.

        Raises
        ------
        BundleError
            If the manifest does not list it, or it is missing.
        BundleTamperedError
            If its bytes are not those that were exported.
        """
        entry = self.manifest["files"].get(name)
        if entry is None:
            raise BundleError(f"{self._label}: {name} is not listed in {MANIFEST}")
        try:
            data = read_regular(self.folder / name, entry["bytes"])
        except OSError as error:
            raise BundleError(
                f"{self._label}: {name} cannot be read ({error.strerror or error}); copy the whole bundle again"
            ) from error
        if len(data) != entry["bytes"]:
            found = f"{len(data)}" if len(data) < entry["bytes"] else "more"
            raise BundleTamperedError(
                f"{self._label}: {name} has {found} bytes, expected {entry['bytes']}: "
                "it was damaged or changed since the export; copy the whole bundle again"
            )
        found = hashlib.sha256(data).hexdigest()
        if found != entry["sha256"]:
            raise BundleTamperedError(
                f"{self._label}: {name} has SHA-256 {found[:12]}..., expected {entry['sha256'][:12]}...: "
                "it was damaged or changed since the export; copy the whole bundle again"
            )
        return data

    def cached_as(self, precision: str) -> tuple[str, int] | None:
        """Give SHA-256 and size of a precision's graph, by which the cache knows what onnxruntime makes of it.

        None where a signature was asked for: what was signed must be what runs, and what onnxruntime has made of it and
        this user has kept is signed by nobody.
        """
        if self.signed_by is not None:
            return None
        entry = self.manifest["files"][model_file(precision)]
        return entry["sha256"], entry["bytes"]

    def read_model(self, precision: str) -> bytes:
        """Read the graph of a precision; see `read`."""
        return self.read(model_file(precision))

    def read_golden(self) -> Golden:
        """Read the golden frames and their expected answers.

        Raises
        ------
        BundleError
            If they cannot be understood; see also `read`.
        """
        data = self.read(GOLDEN)
        try:
            if not data.startswith(b"PK"):  # else numpy says how to load it unsafely
                raise ValueError("it is no zip archive")
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                if sum(part.file_size for part in arrays.zip.infolist()) > _MAX_GOLDEN:
                    raise ValueError(f"it unpacks to more than {_MAX_GOLDEN >> 20} MB")
                names = tuple(str(name) for name in arrays["names"])
                frames = tuple(arrays[f"frame_{index:03d}"] for index in range(len(names)))
                lists = [json.loads(str(line)) for line in arrays["reasons"]] if "reasons" in arrays else []
                reasons = tuple(tuple(map(str, phrases)) for phrases in lists)
                exported = {
                    name: (arrays[f"logits_{name}"], arrays[f"probabilities_{name}"])
                    for name in PRECISIONS
                    if f"logits_{name}" in arrays
                }
                golden = Golden(names, frames, arrays["logits"], arrays["probabilities"], reasons, exported)
        except Exception as error:  # a zip that is none, an array that lacks: numpy has no common class for it
            raise BundleError(f"{self._label}: {GOLDEN} cannot be understood ({error}); export it again") from error
        shape = (len(golden.frames), 4, len(self.contract.classes))
        for answers in ((golden.logits, golden.probabilities), *golden.exported.values()):
            if any(part.shape != shape for part in answers) or not golden.frames:
                raise BundleError(f"{self._label}: {GOLDEN} has answers {answers[0].shape}; expected {shape}")
            if any(part.dtype != np.float32 for part in answers):
                raise BundleError(f"{self._label}: {GOLDEN} has answers that are not float32; export it again")
        if any(frame.ndim != 2 or frame.dtype != np.uint8 or min(frame.shape) < 2 for frame in golden.frames):
            raise BundleError(
                f"{self._label}: {GOLDEN} has a frame that is not uint8 [height, width], 2 x 2 or more; export it again"
            )
        if len(golden.reasons) not in (0, len(golden.frames)):
            raise BundleError(f"{self._label}: {GOLDEN} has reasons for {len(golden.reasons)} of its frames only")
        return golden


def encode_golden(golden: Golden) -> bytes:
    """Write golden frames as the bytes of an ``.npz`` file; equal input gives equal bytes."""
    arrays: dict[str, Any] = {f"frame_{i:03d}": frame for i, frame in enumerate(golden.frames)}
    arrays |= {
        "names": np.array(golden.names),
        "logits": golden.logits,
        "probabilities": golden.probabilities,
    }
    for name, (logits, probabilities) in golden.exported.items():
        arrays |= {f"logits_{name}": logits, f"probabilities_{name}": probabilities}
    if golden.reasons:
        arrays["reasons"] = np.array([canonical_json(phrases) for phrases in golden.reasons])
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def encode_manifest(manifest: Mapping[str, Any]) -> bytes:
    """Write a manifest in the one form that a reader accepts, with its own hash inside."""
    content = {key: value for key, value in manifest.items() if key != _SELF_HASH}
    digest = hashlib.sha256(canonical_json(content).encode("ascii")).hexdigest()
    text = json.dumps({**content, _SELF_HASH: digest}, indent=2, sort_keys=True, allow_nan=False)
    return f"{text}\n".encode("ascii")


def _read_manifest(folder: Path) -> bytes:
    label, path = folder.as_posix(), folder / MANIFEST
    try:
        data = read_regular(path, _MAX_MANIFEST)
    except FileNotFoundError:
        raise BundleNotFoundError(
            f"{label}: no bundle here ({MANIFEST} is missing); expected a folder that `echoquad export` wrote"
        ) from None
    except OSError as error:
        raise BundleNotFoundError(f"{label}: {MANIFEST} cannot be read ({error.strerror or error})") from error
    if len(data) > _MAX_MANIFEST:
        raise BundleTamperedError(f"{label}: {MANIFEST} is larger than any manifest is; copy the whole bundle again")
    return data


def _parse_manifest(label: str, data: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError):
        raise BundleTamperedError(f"{label}: {MANIFEST} is not valid JSON; copy the whole bundle again") from None
    if not isinstance(manifest, dict) or "schema" not in manifest:
        raise BundleError(f"{label}: {MANIFEST} is not a bundle's manifest; expected a `schema` field")
    if manifest["schema"] != SCHEMA or isinstance(manifest["schema"], bool):
        raise BundleError(
            f"{label}: the bundle has schema {_short(manifest['schema'])}; this EchoQuad reads {SCHEMA}; install the "
            "release that wrote it, or export it again"
        )
    # Comparing with the one form in which a manifest is written catches what the hash of its content
    # cannot see: a changed blank, a key given twice.
    try:
        whole = encode_manifest(manifest) == data
    except (ValueError, RecursionError):  # NaN or infinity, which json.loads lets in, as it does deeper nesting
        whole = False
    if not whole:
        raise BundleTamperedError(
            f"{label}: {MANIFEST} was damaged or changed since the export; copy the whole bundle again"
        )
    for key, kind in _REQUIRED.items():
        if not isinstance(manifest.get(key), kind):
            raise BundleError(f"{label}: {MANIFEST} lacks a proper `{key}`; export it again")
    for name, entry in manifest["files"].items():
        plain = name and not name.startswith(".") and not set(name) & set("/\\:\0")
        if not plain or not _is_entry(entry):
            raise BundleError(
                f"{label}: {MANIFEST} lists the file {_short(name)}; expected a plain name with its SHA-256 and size"
            )
    return manifest


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    size = entry.get("bytes")
    return isinstance(entry.get("sha256"), str) and type(size) is int and 0 <= size < 1 << 40


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
