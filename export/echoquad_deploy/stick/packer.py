"""Packing: write a stick, a folder that installs EchoQuad and a bundle on a machine without a network."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Final

from echoquad_deploy.sbom import write_sbom
from echoquad_deploy.stick.check import FORMAT, verify_stick
from echoquad_deploy.stick.licences import write_licences
from echoquad_deploy.stick.own_wheel import make_own_wheel
from echoquad_deploy.stick.sums import public_key_of, sign_sums, write_sums
from echoquad_deploy.stick.target import Target
from echoquad_deploy.stick.texts import default_config, instructions
from echoquad_deploy.stick.wheel_file import WheelFile, canonical_name
from echoquad_deploy.stick.wheelhouse import check_tools, collect_wheels, lock_lines
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.manifest import MANIFEST, SIGNATURE, encode_manifest
from echoquad_runtime.bundle.signing import check_private_key, sign_bundle
from echoquad_runtime.errors import ConfigError, HostError, VerificationError
from echoquad_runtime.storage.atomic import make_folder, write_bytes, write_json
from echoquad_runtime.storage.atomic_folder import atomic_folder
from echoquad_runtime.storage.regular_file import read_regular
from echoquad_runtime.verify.verify import verify

__all__ = ["PackedStick", "pack_stick"]

_logger = logging.getLogger(__name__)


_ENGINES: Final = ("cpu", "gpu", "openvino")
"""Extras of which an environment has exactly one."""

_SCRIPTS: Final = {
    "install.sh": ("install", "install.sh"),
    "install.ps1": ("install", "install.ps1"),
    "systemd/echoquad.service": ("systemd", "echoquad.service"),
}
"""Files of the stick that are package data, and where."""

_MAX_CONFIG: Final = 1 << 20  # bytes
_MAX_SIGNATURE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class PackedStick:
    """A stick that was written.

    Attributes
    ----------
    folder
        The stick.
    wheels
        Number of wheels.
    size
        Bytes of all files.
    fingerprint
        SHA-256 of the public key's DER form; None if the stick is not signed.
    without_licence
        Names of packages whose wheels hold no licence text.
    """

    folder: Path
    wheels: int
    size: int
    fingerprint: str | None
    without_licence: tuple[str, ...]


def pack_stick(
    bundle: Path,
    out: Path,
    target: Target,
    *,
    extras: Sequence[str] = ("serve",),
    key: Path | None = None,
    config: Path | None = None,
    wheel: Path | None = None,
) -> PackedStick:
    """Write a stick: it appears at `out` complete, signed and checked, or not at all.

    Parameters
    ----------
    bundle
        The bundle's folder. Its hashes are checked and its golden frames replayed on this machine's CPU.
    out
        The folder to create; it must not exist, or be empty.
    target
        The machine on which the stick installs.
    extras
        Extras of EchoQuad to install. ``cpu`` is added unless ``gpu`` or ``openvino`` is among them.
    key
        Private key that signs bundle and stick; None leaves the stick unsigned, and a signature of the bundle as it is.
    config
        The configuration to begin with, instead of the default one.
    wheel
        A wheel of EchoQuad; None makes one of the code that runs.

    Raises
    ------
    OutputError
        If `out` is not empty, or cannot be written.
    ConfigError
        If an extra is unknown, or the key or the configuration cannot be used.
    BundleError, VerificationError
        If the bundle is damaged, or does not decide as its golden frames expect.
    WheelhouseError, RegistryError
        If the wheels cannot be had.
    MissingExtraError
        If a package that packing needs is not installed.
    HostError
        If the installation of EchoQuad lacks the scripts of a stick.
    """
    check_tools()
    if key is not None:
        check_private_key(key)
    settings = default_config(target, signed=key is not None).encode() if config is None else _read_config(config)
    scripts = {name: _package_data(*place) for name, place in _SCRIPTS.items()}
    with atomic_folder(out) as stick:
        built = stick / "own"
        own = make_own_wheel(built, wheel)
        _check_python(target, own)
        chosen = _choose_extras(extras, own)
        digest = _copy_bundle(bundle, stick / "bundle", key)
        _logger.info("downloading the wheels for %s, Python %s", target.architecture, target.python)
        # pip's own wheel, since Debian's Python comes without ensurepip; cryptography checks the bundle's signature.
        wanted = [f"{own.name}[{','.join(chosen)}]", "pip", *(["cryptography"] if key is not None else [])]
        wheels = collect_wheels(stick / "wheels", wanted, target, own.path)
        shutil.rmtree(built, ignore_errors=True)
        write_bytes(stick / "requirements.lock", "".join(f"{line}\n" for line in lock_lines(wheels)).encode())
        for name, data in {**scripts, "config/service.toml": settings}.items():
            make_folder((stick / name).parent)
            write_bytes(stick / name, data)
        (stick / "install.sh").chmod(0o755)
        fingerprint = _write_key(stick, key)
        without = write_licences(stick / "licences", wheels)
        created = datetime.now(UTC)
        write_sbom(
            stick / "sbom.cdx.json",
            wheels=[one.path for one in wheels],
            bundle=stick / "bundle",
            name="echoquad-stick",
            version=own.version,
            time=created,
            extras=chosen,
        )
        name = bundle.resolve().name
        facts = {
            "format": FORMAT,
            "echoquad": own.version,
            "target": target.architecture,
            "python": target.python,
            **({} if target.windows else {"glibc": f"2.{target.glibc}"}),
            "extras": chosen,
            "bundle": name,
            "bundle_sha256": digest,
            "created": created.isoformat(timespec="seconds"),
        }
        write_json(stick / "stick.json", facts)
        text = instructions(target, version=own.version, bundle=name, bundle_sha256=digest, signed=key is not None)
        write_bytes(stick / "README.txt", text.encode())
        write_sums(stick)
        if key is not None:
            sign_sums(stick, key)
        verify_stick(stick, stick / "keys" / "bundle.pub" if key is not None else None)
        size = sum(path.stat().st_size for path in stick.rglob("*") if path.is_file())
    return PackedStick(out, len(wheels), size, fingerprint, tuple(without))


def _read_config(path: Path) -> bytes:
    try:
        data = read_regular(path, _MAX_CONFIG)
    except OSError as error:
        raise ConfigError(f"{path.as_posix()}: cannot be read ({error.strerror or error}); check the path") from error
    if len(data) > _MAX_CONFIG:
        raise ConfigError(f"{path.as_posix()}: more than {_MAX_CONFIG} bytes; expected a configuration in TOML")
    return data


def _package_data(folder: str, name: str) -> bytes:
    """Return a script or unit that belongs to this package."""
    try:
        return (resources.files("echoquad_deploy") / folder / name).read_bytes()
    except OSError as error:
        raise HostError(f"{folder}/{name} is not in this installation of EchoQuad; install EchoQuad again") from error


def _check_python(target: Target, own: WheelFile) -> None:
    """Raise a ConfigError if EchoQuad does not run on the target's Python."""
    from packaging.specifiers import SpecifierSet

    needed = own.metadata["Requires-Python"] or ""
    if not SpecifierSet(needed).contains(f"{target.python}.99"):
        raise ConfigError(
            f"Python {target.python!r}: EchoQuad {own.version} needs {needed}; name another with --python"
        )


def _choose_extras(extras: Sequence[str], own: WheelFile) -> list[str]:
    """Return the extras to install, sorted, with one that computes."""
    chosen = {canonical_name(name) for name in extras}
    if unknown := sorted(chosen - own.extras):
        known = ", ".join(sorted(own.extras))
        raise ConfigError(
            f"extra {unknown[0]!r}: EchoQuad {own.version} has none of this name; expected some of {known}"
        )
    engines = [name for name in _ENGINES if name in chosen]
    if len(engines) > 1:
        raise ConfigError(f"extras {' and '.join(engines)}: they exclude each other; name one")
    return sorted(chosen | ({"cpu"} if not engines else set()))


def _copy_bundle(source: Path, copy: Path, key: Path | None) -> str:
    """Copy a bundle, verify and sign the copy, and return the bundle's hash.

    Raises
    ------
    BundleError
        If a file is missing or was changed.
    VerificationError
        If the bundle does not decide as its golden frames expect.
    """
    opened = Bundle(source)
    make_folder(copy)
    for name in opened.manifest["files"]:
        write_bytes(copy / name, opened.read(name))
    write_bytes(copy / MANIFEST, encode_manifest(opened.manifest))
    if key is not None:
        sign_bundle(copy, key)
    elif (source / SIGNATURE).is_file():
        write_bytes(copy / SIGNATURE, read_regular(source / SIGNATURE, _MAX_SIGNATURE))
    _logger.info("verifying the bundle")
    found = verify(copy, device="cpu")
    if not found.passed:
        raise VerificationError(
            f"{source.as_posix()}: FAILED on this machine: {found.frame_flips} golden frames have other decisions; "
            "run echoquad verify, and do not deploy the bundle"
        )
    return str(opened.manifest["manifest_sha256"])


def _write_key(stick: Path, key: Path | None) -> str | None:
    """Write the public key to the stick and return its fingerprint; do nothing without a key."""
    if key is None:
        return None
    pem, fingerprint = public_key_of(key)
    make_folder(stick / "keys")
    write_bytes(stick / "keys" / "bundle.pub", pem)
    return fingerprint
