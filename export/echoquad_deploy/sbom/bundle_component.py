"""A bundle as a component of a bill of materials: its hash, its files, what it is for."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.manifest import MANIFEST, SIGNATURE, encode_manifest
from echoquad_runtime.storage.regular_file import open_regular

__all__ = ["LICENCE", "bundle_component"]

LICENCE: Final = "license"
"""The manifest's field of the weights' licence, an SPDX expression or a name, which only some bundles have."""


def bundle_component(folder: Path) -> dict[str, Any]:
    """Return a bundle as a component of the type ``machine-learning-model``.

    Every file is read and compared with the manifest. The component's SHA-256 is the bundle's own, ``manifest_sha256``
    of ``bundle.json``, which the service and ``echoquad inspect`` show; it covers every file. The files are components
    within it.

    Raises
    ------
    BundleNotFoundError, BundleTamperedError, BundleError
        If there is no bundle, or its bytes are not those that were exported.
    """
    bundle = Bundle(folder)
    sha256 = str(bundle.manifest["manifest_sha256"])
    reference = f"bundle:{sha256}"
    digests = {name: hashlib.sha256(bundle.read(name)).hexdigest() for name in bundle.manifest["files"]}
    digests[MANIFEST] = hashlib.sha256(encode_manifest(bundle.manifest)).hexdigest()
    if (folder / SIGNATURE).is_file():
        with open_regular(folder / SIGNATURE) as stream:
            digests[SIGNATURE] = hashlib.file_digest(stream, "sha256").hexdigest()
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": reference,
        "name": folder.resolve().name,
        "version": sha256[:12],
        "hashes": [_hash(sha256)],
        "components": [
            {"type": "file", "bom-ref": f"{reference}/{name}", "name": name, "hashes": [_hash(digests[name])]}
            for name in sorted(digests)
        ],
        "modelCard": {
            "modelParameters": _parameters(bundle),
            "considerations": {"useCases": [bundle.manifest["intended_use"]]},
        },
        "properties": [
            {"name": "echoquad:contract_sha256", "value": bundle.contract.sha256},
            {"name": "echoquad:created", "value": str(bundle.manifest.get("created", ""))},
            {"name": "echoquad:precisions", "value": ",".join(bundle.precisions)},
        ],
    }
    licence = bundle.manifest.get(LICENCE)
    if isinstance(licence, str) and licence:
        component["licenses"] = [{"license": {"name": licence}}]
    return component


def _parameters(bundle: Bundle) -> dict[str, Any]:
    parameters: dict[str, Any] = {"task": "image classification"}
    backbone = bundle.manifest["training"].get("backbone")
    if isinstance(backbone, str):
        parameters["modelArchitecture"] = backbone
    return parameters


def _hash(sha256: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": sha256}
