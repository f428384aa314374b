"""The bill of materials: a CycloneDX 1.6 document in JSON, the same bytes for the same content.

The document is written here rather than with ``cyclonedx-python-lib``: it is one dictionary, and the library would
bring ten packages to every workstation that packs a stick. The tests validate the result with it.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import uuid
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from echoquad_deploy.sbom.bundle_component import bundle_component
from echoquad_deploy.sbom.dependencies import resolve_dependencies, target_environment
from echoquad_deploy.sbom.wheel import Wheel, read_wheel
from echoquad_runtime._version import __version__
from echoquad_runtime.contract import canonical_json
from echoquad_runtime.errors import ConfigError
from echoquad_runtime.storage.atomic import write_json

__all__ = ["write_sbom"]


def write_sbom(
    path: Path,
    *,
    wheels: Sequence[Path],
    bundle: Path | None,
    name: str,
    version: str,
    time: datetime | None = None,
    environment: Mapping[str, str] | None = None,
    extras: Collection[str] | None = None,
) -> None:
    """Write the bill of materials of wheels and a bundle, as CycloneDX 1.6 in JSON.

    Each wheel is a library with package URL, SHA-256, licence and dependencies; the bundle is a machine-learning model
    with its SHA-256 and those of its files. The same content gives the same bytes: everything is sorted, and the
    serial number is derived from the content.

    Parameters
    ----------
    path
        The file to write.
    wheels
        The wheels, in any order; each package once.
    bundle
        The bundle's folder; None for none.
    name, version
        What the document is about.
    time
        Time of the document, aware of its zone. None takes it from the environment variable ``SOURCE_DATE_EPOCH``;
        without that, the document has no time.
    environment
        Variables of environment markers of the target. None derives them from the wheels' tags.
    extras
        Extras of EchoQuad that were asked for. None takes those of which the wheels hold everything that they need.

    Raises
    ------
    ConfigError
        If a file is not a wheel, a package is there twice, or ``SOURCE_DATE_EPOCH`` is not a number of seconds.
    BundleNotFoundError, BundleTamperedError, BundleError
        If there is no bundle, or its bytes are not those that were exported.
    MissingExtraError
        If the package ``packaging`` is not installed.
    OutputError
        If the file cannot be written.
    """
    read = sorted((read_wheel(wheel) for wheel in wheels), key=lambda wheel: wheel.name)
    for first, second in itertools.pairwise(read):
        if first.name == second.name:
            raise ConfigError(f"{first.file} and {second.file}: a package is there twice; remove one of them")
    model = None if bundle is None else bundle_component(bundle)
    graph = resolve_dependencies(read, environment or target_environment([wheel.file for wheel in read]), extras)
    references = {wheel.name: wheel.file for wheel in read}
    subject = f"subject:{name}@{version}"
    edges = {references[it]: sorted(references[need] for need in needs) for it, needs in graph.edges.items()}
    edges[subject] = sorted(references[it] for it in graph.roots)
    if model is not None:
        edges[subject] = sorted([*edges[subject], model["bom-ref"]])
        edges[model["bom-ref"]] = []
    metadata: dict[str, Any] = {
        "tools": {"components": [{"type": "application", "name": "echoquad", "version": __version__}]},
        "component": {"type": "application", "bom-ref": subject, "name": name, "version": version},
        "properties": [{"name": "echoquad:missing_requirement", "value": missing} for missing in graph.missing],
    }
    if (moment := _time(time)) is not None:
        metadata["timestamp"] = moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    document: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": metadata,
        "components": [*map(_wheel_component, read), *([] if model is None else [model])],
        "dependencies": [{"ref": reference, "dependsOn": edges[reference]} for reference in sorted(edges)],
        "compositions": [
            {"aggregate": "incomplete" if graph.missing else "complete", "dependencies": [subject]},
        ],
    }
    digest = hashlib.sha256(canonical_json(document).encode("ascii")).hexdigest()
    document["serialNumber"] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'urn:sha256:{digest}')}"
    write_json(path, document)


def _wheel_component(wheel: Wheel) -> dict[str, Any]:
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": wheel.file,
        "name": wheel.name,
        "version": wheel.version,
        "purl": wheel.purl,
        "hashes": [{"alg": "SHA-256", "content": wheel.sha256}],
        "properties": [
            {"name": "echoquad:bytes", "value": str(wheel.bytes)},
            {"name": "echoquad:file", "value": wheel.file},
        ],
    }
    if wheel.summary:
        component["description"] = wheel.summary
    if wheel.expression:
        component["licenses"] = [{"expression": wheel.expression, "acknowledgement": "declared"}]
    elif wheel.licences:
        component["licenses"] = [
            {"license": {"name": licence, "acknowledgement": "declared"}} for licence in wheel.licences
        ]
    return component


def _time(given: datetime | None) -> datetime | None:
    """Return the time of the document.

    Raises
    ------
    ConfigError
        If ``SOURCE_DATE_EPOCH`` is not a number of seconds.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    if given is not None or not epoch:
        return given
    try:
        return datetime.fromtimestamp(int(epoch), UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise ConfigError(f"SOURCE_DATE_EPOCH is {epoch!r}; expected whole seconds since 1970") from error
