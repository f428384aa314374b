"""A bundle as a component of a bill of materials: its hash, its files, what it is for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.manifest import MANIFEST, SIGNATURE, encode_manifest
from echoquad_runtime.storage.regular_file import open_regular

__all__ = ["bundle_component"]


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
    if ancestors := _ancestors(bundle.manifest["training"]):
        component["pedigree"] = {"ancestors": ancestors}
    return component


def _ancestors(training: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the pretrained weights that training began from, those of all members of an ensemble, each once."""
    members = training.get("members")
    parts = [training, *(members if isinstance(members, list) else ())]
    origins = [origin for part in parts if isinstance(origin := part.get("pretrained"), Mapping)]
    found = {}
    for origin in origins:
        component: dict[str, Any] = {"type": "machine-learning-model", "name": str(origin.get("source"))}
        component["hashes"] = [_hash(str(origin.get("sha256")))]
        if licence := origin.get("license"):
            component["licenses"] = [{"license": {"name": str(licence)}}]
        found[str(origin.get("sha256"))] = component
    return [found[sha256] for sha256 in sorted(found)]


def _parameters(bundle: Bundle) -> dict[str, Any]:
    parameters: dict[str, Any] = {"task": "image classification"}
    backbone = bundle.manifest["training"].get("backbone")
    if isinstance(backbone, str):
        parameters["modelArchitecture"] = backbone
    return parameters


def _hash(sha256: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": sha256}
