"""Checking a stick: who signed it, that no file was changed, added or removed, and that its parts agree."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from echoquad_deploy.stick.errors import StickError, WheelhouseError
from echoquad_deploy.stick.sums import SUMS_SIGNATURE, check_sums, read_sums, verify_sums
from echoquad_deploy.stick.wheel_file import WheelFile
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.errors import BundleError

__all__ = ["FORMAT", "StickCheck", "verify_stick"]

FORMAT: Final = 1
"""Version of the layout, in ``stick.json``."""

_KEY: Final = "keys/bundle.pub"
_LOCKED: Final = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>\S+) --hash=sha256:(?P<sha256>[0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class StickCheck:
    """A stick that is intact.

    Attributes
    ----------
    files
        Number of files, without ``SHA256SUMS`` and its signature.
    facts
        The content of ``stick.json``.
    fingerprint
        SHA-256 of the DER form of the key that signed the stick; None if it is not signed.
    trusted
        Whether the signature was verified with a key that the caller gave, and not with the stick's own.
    """

    files: int
    facts: dict[str, Any]
    fingerprint: str | None
    trusted: bool


def verify_stick(folder: Path, public_key: Path | None = None) -> StickCheck:
    """Check a stick without installing it.

    Parameters
    ----------
    folder
        The stick.
    public_key
        A PEM file. If given, the matching private key must have signed the stick and its bundle. If not, a signature is
        verified with the key on the stick: this shows damage, but not whose stick it is.

    Raises
    ------
    StickError
        If it or its bundle is not signed by the key; if a file is missing, changed or added; or if its parts do not
        agree.
    ConfigError, MissingExtraError
        If the key is not valid, or the extra ``sign`` is not installed.
    """
    label = folder.as_posix()
    fingerprint, data = None, read_sums(folder)
    if public_key is not None:
        fingerprint = verify_sums(folder, data, public_key)
    elif (folder / SUMS_SIGNATURE).exists():
        fingerprint = verify_sums(folder, data, folder / _KEY)
    sums = check_sums(folder, data)
    facts = _read_facts(folder, label)
    _compare_lock(folder, sums, label)
    try:
        bundle = Bundle(folder / "bundle", public_key=public_key)
    except BundleError as error:
        raise StickError(f"{label}: its bundle is not in order: {error}") from error
    found = bundle.manifest["manifest_sha256"]
    if found != facts.get("bundle_sha256"):
        raise StickError(f"{label}: it holds another bundle ({found[:12]}...) than stick.json names; pack it again")
    return StickCheck(len(sums), facts, fingerprint, public_key is not None)


def _read_facts(folder: Path, label: str) -> dict[str, Any]:
    try:
        facts = json.loads((folder / "stick.json").read_bytes())
        found = facts["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StickError(
            f"{label}: stick.json is missing or malformed; expected a folder that `echoquad pack` wrote"
        ) from error
    if found != FORMAT:
        raise StickError(f"{label}: format {found!r}; expected {FORMAT}: use the release of EchoQuad that packed it")
    return dict(facts)


def _compare_lock(folder: Path, sums: dict[str, str], label: str) -> None:
    """Compare ``requirements.lock`` with the wheels: each is locked, and each locked one is there."""
    lines = (folder / "requirements.lock").read_text("utf-8").splitlines() if "requirements.lock" in sums else []
    matches = [_LOCKED.fullmatch(line) for line in lines]
    locked = {(match["name"], match["version"], match["sha256"]) for match in matches if match}
    if not locked or len(locked) != len(lines):
        raise StickError(f"{label}: requirements.lock is missing or malformed; pack the stick again")
    wheels = set()
    for name, digest in sums.items():
        if name.startswith("wheels/"):
            try:
                wheel = WheelFile(folder / name)
            except WheelhouseError as error:
                raise StickError(f"{label}: {name} is no wheel; pack the stick again") from error
            wheels.add((wheel.name, wheel.version, digest))
    if different := sorted(wheels ^ locked):
        name, version, _ = different[0]
        raise StickError(
            f"{label}: {name} {version} is a wheel that is not locked, or locked without a wheel; pack it again"
        )
