"""The bundle: a folder that holds a model, its contract, and the means to verify both.

Every file is read once. Its bytes are hashed before they are used, and the bytes that were hashed are the bytes that
are used.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import cast

from echoquad_runtime.bundle.code_table import CodeTable
from echoquad_runtime.bundle.golden_frames import GoldenFrames, decode_golden
from echoquad_runtime.bundle.manifest import (
    CODES,
    FP32_DEVICES,
    GOLDEN,
    MANIFEST,
    REDUCED_GATE,
    VALIDATION,
    decode_manifest,
    model_file,
    read_manifest,
    shorten,
)
from echoquad_runtime.bundle.validation_figures import ValidationFigures
from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import BundleError, BundleTamperedError, ConfigError, ContractError
from echoquad_runtime.storage.regular_file import read_regular

__all__ = ["Bundle"]


class Bundle:
    """A bundle on disk with a valid manifest.

    Parameters
    ----------
    folder
        The bundle's folder.
    public_key
        A PEM file. If given, every file of the bundle must be signed by the matching private key.

    Attributes
    ----------
    signed_by
        Fingerprint of `public_key`, SHA-256 in hexadecimal; None if no signature was verified.

    Raises
    ------
    BundleNotFoundError
        If there is no ``bundle.json``.
    SignatureError
        If `public_key` is given and the bundle is unsigned, altered, or signed by another key.
    BundleTamperedError
        If the manifest's bytes are not those that were exported.
    BundleError
        If the schema is unknown or a required part is missing.
    ConfigError, MissingExtraError
        If `public_key` is not a valid key, or the extra ``sign`` is not installed.
    """

    def __init__(self, folder: str | Path, *, public_key: str | Path | None = None) -> None:
        self.folder = Path(folder)
        self._manifest_bytes = data = read_manifest(self.folder)
        self.signed_by: str | None = None
        if public_key is not None:  # verify the bytes before parsing them; these bytes are parsed below
            from echoquad_runtime.bundle.signature import verify_signature

            self.signed_by = verify_signature(self.folder, public_key, data)
        self.manifest = decode_manifest(data, self._label)
        try:
            self.contract = Contract.from_dict(self.manifest["contract"])
        except ContractError as error:
            raise BundleError(f"{self._label}: {error}") from error
        if self.contract.sha256 != self.manifest["contract_sha256"]:
            raise BundleTamperedError(f"{self._label}: the contract does not match its SHA-256; export it again")
        for name in self.manifest["precisions"]:
            if model_file(name) not in self.manifest["files"]:
                raise BundleError(f"{self._label}: {model_file(name)} is not among its files; export it again")
        if self.default_precision not in self.precisions:
            raise BundleError(
                f"{self._label}: its default precision is {shorten(self.default_precision)}; "
                f"expected one of {', '.join(self.precisions)}"
            )

    @property
    def _label(self) -> str:
        return self.folder.as_posix()

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions that have a graph in the bundle."""
        return tuple(self.manifest["precisions"])

    @property
    def default_precision(self) -> str:
        """The precision that runs if none is requested."""
        return str(self.manifest["default_precision"])

    @property
    def codes(self) -> CodeTable | None:
        """The code table of structured reports; None if the bundle was exported without one.

        Raises
        ------
        BundleError
            If it is malformed.
        """
        content = self.manifest.get(CODES)
        if content is None:
            return None
        try:
            return CodeTable.from_dict(content, self.contract.classes, f"{self._label}: {CODES}")
        except ConfigError as error:
            raise BundleError(f"{error}; export it again") from error

    def precisions_on(self, device: str) -> tuple[str, ...]:
        """Return the precisions in which a device can compute the bundle."""
        derived = [name for name, required in FP32_DEVICES.items() if required == device and "fp32" in self.precisions]
        return tuple(name for name in self.precisions if (name, device) != ("int8", "cuda")) + tuple(derived)

    def choose_precision(self, precision: str | None) -> str:
        """Return the requested precision, or the default for None; ``bf16`` and ``tf32`` require the fp32 graph.

        Raises
        ------
        BundleError
            If the bundle has no graph for it.
        """
        if precision is None:
            return self.default_precision
        graph = "fp32" if precision in FP32_DEVICES else precision
        if graph not in self.precisions:
            raise BundleError(
                f"{self._label}: it holds no {graph} graph, only {', '.join(self.precisions)}; "
                f"ask for one of these, or export with --precision {graph}"
            )
        return precision

    def gate(self, precision: str) -> dict[str, float]:
        """Return the parity gate that a precision passed at the export, by name of the bound.

        ``bf16`` and ``tf32`` were not exported and are held to `REDUCED_GATE`.

        Raises
        ------
        BundleError
            If the manifest has no gate for the precision.
        """
        if precision in FP32_DEVICES:
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

    def validation(self, precision: str) -> ValidationFigures | None:
        """Return the validation figures of a precision; ``bf16`` and ``tf32`` have those of fp32.

        None if the bundle states none for it.

        Raises
        ------
        BundleError
            If they are malformed.
        """
        content, label = self.manifest.get(VALIDATION), f"{self._label}: {VALIDATION}"
        if content is None:
            return None
        if not isinstance(content, dict):
            raise BundleError(f"{label}: expected the figures of each precision; export the bundle again")
        name = "fp32" if precision in FP32_DEVICES else precision
        return ValidationFigures.from_dict(content[name], f"{label}.{name}") if name in content else None

    def cache_key(self, precision: str) -> tuple[str, int] | None:
        """Return SHA-256 and size of a precision's graph, the key of its entry in the graph cache.

        None if a signature was verified: the signed graph itself must run, and the cached graph has no signature.
        """
        if self.signed_by is not None:
            return None
        entry = self.manifest["files"][model_file(precision)]
        return entry["sha256"], entry["bytes"]

    def read(self, name: str) -> bytes:
        """Read a file of the bundle and compare its bytes with the manifest.

        Raises
        ------
        BundleError
            If the manifest does not list it, or it is missing.
        BundleTamperedError
            If its bytes are not those that were exported, or if the bundle was replaced since it was opened.
        """
        entry = self.manifest["files"].get(name)
        if entry is None:
            raise BundleError(f"{self._label}: {name} is not listed in {MANIFEST}")
        try:
            data = read_regular(self.folder / name, entry["bytes"])
        except OSError as error:
            advice = self._advice() if self._was_replaced() else "copy the whole bundle again"
            raise BundleError(f"{self._label}: {name} cannot be read ({error.strerror or error}); {advice}") from error
        digest = hashlib.sha256(data).hexdigest()
        if len(data) != entry["bytes"]:
            size = f"{len(data)}" if len(data) < entry["bytes"] else "more"
            difference = f"{size} bytes, expected {entry['bytes']}"
        elif digest != entry["sha256"]:
            difference = f"SHA-256 {digest[:12]}..., expected {entry['sha256'][:12]}..."
        else:
            return data
        raise BundleTamperedError(f"{self._label}: {name} has {difference}: {self._advice()}")

    def _advice(self) -> str:
        if self._was_replaced():
            return "the bundle was replaced since it was opened; open it again, or restart the program that uses it"
        return "it was damaged or changed after the export; copy the whole bundle again"

    def _was_replaced(self) -> bool:
        """Return whether the folder holds another manifest than it did: an export may replace a bundle in use."""
        try:
            return read_manifest(self.folder) != self._manifest_bytes
        except BundleError:  # it is missing as well
            return False

    def read_model(self, precision: str) -> bytes:
        """Read the graph of a precision; raises as `read`."""
        return self.read(model_file(precision))

    def read_golden(self) -> GoldenFrames:
        """Read the golden frames and their expected outputs.

        Raises
        ------
        BundleError
            If they cannot be parsed; see also `read`.
        """
        return decode_golden(self.read(GOLDEN), len(self.contract.classes), self._label)
