"""The bundle: a folder that holds a model, the contract it keeps, and the means to check both.

``bundle.json`` names every file with its SHA-256 and carries its own. Nothing is used before its bytes have
been hashed, and the bytes that were hashed are the ones that are used: a file is read once.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from echoquad_runtime.contract import Contract, canonical_json
from echoquad_runtime.errors import BundleError, BundleNotFoundError, BundleTamperedError, ContractError
from echoquad_runtime.quadrants import Grey

__all__ = [
    "GOLDEN",
    "INTENDED_USE",
    "MANIFEST",
    "MODEL_CARD",
    "PRECISIONS",
    "SCHEMA",
    "Bundle",
    "Golden",
    "encode_golden",
    "encode_manifest",
    "model_file",
]

SCHEMA: Final = 1
MANIFEST: Final = "bundle.json"
GOLDEN: Final = "golden.npz"
MODEL_CARD: Final = "MODEL_CARD.md"
PRECISIONS: Final = ("fp32", "fp16", "int8")
INTENDED_USE: Final = (
    "Research use only. Not a medical device; not for diagnosis, triage, or any decision on a patient's care."
)

_SELF_HASH: Final = "manifest_sha256"
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
    """Name the graph of a precision within its bundle."""
    return f"model.{precision}.onnx"


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
    """

    names: tuple[str, ...]
    frames: tuple[Grey, ...]
    logits: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float32]


class Bundle:
    """A bundle on disk, its manifest checked.

    Parameters
    ----------
    folder
        The bundle's folder.

    Raises
    ------
    BundleNotFoundError
        If there is no ``bundle.json``.
    BundleTamperedError
        If the manifest's bytes are not those that were exported.
    BundleError
        If its schema is unknown or something in it is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
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
                f"{self._label}: its default precision is {self.default_precision!r}; "
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

        Raises
        ------
        BundleError
            If the manifest has none.
        """
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
        """Check a precision that was asked for; None is the bundle's default.

        Raises
        ------
        BundleError
            If the bundle does not hold it.
        """
        if precision is None:
            return self.default_precision
        if precision not in self.precisions:
            raise BundleError(
                f"{self._label}: it holds no {precision} graph, only {', '.join(self.precisions)}; "
                f"ask for one of these, or export with --precision {precision}"
            )
        return precision

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
            data = (self.folder / name).read_bytes()
        except OSError as error:
            raise BundleError(
                f"{self._label}: {name} cannot be read ({error.strerror or error}); copy the whole bundle again"
            ) from error
        found = hashlib.sha256(data).hexdigest()
        if found != entry["sha256"]:
            raise BundleTamperedError(
                f"{self._label}: {name} has SHA-256 {found[:12]}..., expected {entry['sha256'][:12]}...: "
                "it was damaged or changed since the export; copy the whole bundle again"
            )
        return data

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
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                names = tuple(str(name) for name in arrays["names"])
                frames = tuple(np.asarray(arrays[f"frame_{index:03d}"], np.uint8) for index in range(len(names)))
                golden = Golden(names, frames, arrays["logits"], arrays["probabilities"])
        except Exception as error:  # a zip that is none, an array that lacks: numpy has no common class for it
            raise BundleError(f"{self._label}: {GOLDEN} cannot be understood ({error}); export it again") from error
        shape = (len(golden.frames), 4, len(self.contract.classes))
        if golden.logits.shape != shape or golden.probabilities.shape != shape or not golden.frames:
            raise BundleError(f"{self._label}: {GOLDEN} has answers {golden.logits.shape}; expected {shape}")
        if any(frame.ndim != 2 for frame in golden.frames):
            raise BundleError(f"{self._label}: {GOLDEN} has a frame that is not [height, width]; export it again")
        return golden


def encode_golden(golden: Golden) -> bytes:
    """Write golden frames as the bytes of an ``.npz`` file; equal input gives equal bytes."""
    arrays: dict[str, Any] = {f"frame_{i:03d}": frame for i, frame in enumerate(golden.frames)}
    arrays |= {
        "names": np.array(golden.names),
        "logits": golden.logits,
        "probabilities": golden.probabilities,
    }
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def encode_manifest(manifest: Mapping[str, Any]) -> bytes:
    """Write a manifest in the one form that a reader accepts, with its own hash inside."""
    content = {key: value for key, value in manifest.items() if key != _SELF_HASH}
    digest = hashlib.sha256(canonical_json(content).encode("ascii")).hexdigest()
    text = json.dumps({**content, _SELF_HASH: digest}, indent=2, sort_keys=True, allow_nan=False)
    return f"{text}\n".encode("ascii")


def _read_manifest(folder: Path) -> dict[str, Any]:
    label, path = folder.as_posix(), folder / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BundleNotFoundError(
            f"{label}: no bundle here ({MANIFEST} is missing); expected a folder that `echoquad export` wrote"
        ) from None
    except OSError as error:
        raise BundleNotFoundError(f"{label}: {MANIFEST} cannot be read ({error.strerror or error})") from error
    try:
        manifest = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError):
        raise BundleTamperedError(f"{label}: {MANIFEST} is not valid JSON; copy the whole bundle again") from None
    if not isinstance(manifest, dict) or "schema" not in manifest:
        raise BundleError(f"{label}: {MANIFEST} is not a bundle's manifest; expected a `schema` field")
    if manifest["schema"] != SCHEMA or isinstance(manifest["schema"], bool):
        raise BundleError(
            f"{label}: the bundle has schema {manifest['schema']!r}; this EchoQuad reads {SCHEMA}; install the release "
            "that wrote it, or export it again"
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
        if not plain or not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            raise BundleError(f"{label}: {MANIFEST} lists the file {name!r}; expected a plain name with its SHA-256")
    return manifest
