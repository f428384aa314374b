"""A bundle in a report: its hashes, numbers of its manifest, its signature, and its self-test on this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

from echoquad_deploy.support_report.pseudonyms import Pseudonyms
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.manifest import (
    GOLDEN,
    MANIFEST,
    MODEL_CARD,
    PRECISIONS,
    SIGNATURE,
    frame_graph_file,
    model_file,
)
from echoquad_runtime.devices.session_factory import Device
from echoquad_runtime.errors import EchoQuadError

__all__ = ["bundle_facts", "self_test"]

_FILES: Final = frozenset(
    {MANIFEST, GOLDEN, MODEL_CARD, SIGNATURE, *map(model_file, PRECISIONS), *map(frame_graph_file, PRECISIONS)}
)
_VERSION: Final = re.compile(r"[0-9][0-9A-Za-z.+]{0,30}")
_PACKAGES: Final = (
    "echoquad",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pillow",
    "python",
    "torch",
    "torchvision",
)
_TIME: Final = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(\+00:00|Z)")
_FIGURES: Final = (
    *("device", "provider", "precision", "files", "frames", "max_abs_dlogit", "max_abs_dprobability", "passed"),
    *("frame_flips", "quadrant_flips", "tolerated_frame_flips", "tolerated_quadrant_flips", "max_rel_dtypicality"),
)


def bundle_facts(folder: Path | None, public_key: Path | None, pseudonyms: Pseudonyms) -> dict[str, Any]:
    """Return hashes and numbers of a bundle; names of classes, of frames and of unknown files are left out.

    Parameters
    ----------
    folder
        The bundle's folder; None if it is not known.
    public_key
        The key that the service wants bundles to be signed with; None for none.
    pseudonyms
        Where unknown file names get theirs.
    """
    if folder is None:
        return {"bundle": "none given or found"}
    try:
        bundle = Bundle(folder)
    except EchoQuadError as error:
        return {"bundle": "cannot be opened", "code": error.code}
    manifest = bundle.manifest
    created = manifest.get("created")
    return {
        "bundle": "opened",
        "sha256": _digest(manifest.get("manifest_sha256")),
        "contract_sha256": bundle.contract.sha256,
        "schema": manifest["schema"] if type(manifest["schema"]) is int else None,
        "created": created if isinstance(created, str) and _TIME.fullmatch(created) else None,
        "classes": len(bundle.contract.classes),
        "input_size": bundle.contract.input_size,
        "vote": bundle.contract.vote,
        "precisions": [name for name in bundle.precisions if name in PRECISIONS],
        "versions": _versions(manifest.get("versions")),
        "codes": "codes" in manifest,
        "validation": "validation" in manifest,
        "files": {_name(name, pseudonyms): _file(bundle, name) for name in manifest["files"]},
        "unlisted_files": _unlisted(folder, set(manifest["files"])),
        "signature": _signature(folder, public_key),
    }


def self_test(folder: Path | None, device: Device) -> dict[str, Any]:
    """Replay the bundle's golden frames on a device, and return the differences from the expected answers."""
    if folder is None:
        return {"self_test": "no bundle"}
    from echoquad_runtime.verify.verify import verify

    try:
        figures = verify(folder, device=device).to_dict()
    except EchoQuadError as error:
        return {"self_test": "failed", "code": error.code}
    passed = figures.get("passed") is True
    return {"self_test": "passed" if passed else "failed", **{name: figures.get(name) for name in _FIGURES}}


def _digest(value: object) -> str | None:
    return value if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else None


def _versions(value: object) -> dict[str, str]:
    known = value if isinstance(value, dict) else {}
    found = {name: known.get(name) for name in _PACKAGES}
    return {name: text for name, text in found.items() if isinstance(text, str) and _VERSION.fullmatch(text)}


def _name(name: str, pseudonyms: Pseudonyms) -> str:
    return name if name in _FILES else pseudonyms.replace("file", name)


def _file(bundle: Bundle, name: str) -> dict[str, Any]:
    entry = bundle.manifest["files"][name]
    try:
        bundle.read(name)
        state = "intact"
    except EchoQuadError as error:
        state = error.code
    return {"sha256": _digest(entry["sha256"]), "bytes": entry["bytes"], "state": state}


def _unlisted(folder: Path, listed: set[str]) -> int | str:
    try:
        return len({entry.name for entry in folder.iterdir()} - listed - {MANIFEST, SIGNATURE})
    except OSError as error:
        return os.strerror(error.errno or 0)


def _signature(folder: Path, public_key: Path | None) -> dict[str, Any]:
    found: dict[str, Any] = {"present": (folder / SIGNATURE).is_file(), "required": public_key is not None}
    if public_key is None:
        return found
    try:
        return {**found, "valid": True, "key": _digest(Bundle(folder, public_key=public_key).signed_by)}
    except EchoQuadError as error:
        return {**found, "valid": False, "code": error.code}
