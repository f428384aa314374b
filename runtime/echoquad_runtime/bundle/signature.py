"""Signature verification: which key signed a bundle, checked before any of its content is used.

A signature is one of OpenSSF Model Signing with an elliptic-curve key. The file `SIGNATURE` is a Sigstore bundle around
a DSSE envelope around an in-toto statement, which contains the SHA-256 of every other file. The package
``model-signing`` creates it (see `echoquad_runtime.bundle.signing`), and its own command can verify it. This module
verifies it with ``cryptography`` alone, for three reasons:

- The verified bytes must be the bytes that are used. ``model-signing`` reads files by path and forgets them; a file may
  be replaced before it is opened again. Here ``bundle.json`` is verified as the bytes that its reader holds, and every
  other file is compared with the SHA-256 in it when it is read.
- The package ignores files that git ignores, and prints to stdout.
- It needs an HTTP client and more than twenty packages, which are of no use on a cart without a network.

Keys never leave the machine, and nothing here uses a network.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from echoquad_runtime.bundle.manifest import MANIFEST, SIGNATURE
from echoquad_runtime.errors import ConfigError, MissingExtraError, SignatureError
from echoquad_runtime.storage.regular_file import open_regular, read_regular

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

__all__ = [
    "import_extra",
    "key_fingerprint",
    "list_files",
    "read_key",
    "verify_envelope",
    "verify_signature",
]

_HASHES: Final = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
_EXPECTED_KEY: Final = "an elliptic-curve key (prime256v1, secp384r1 or secp521r1)"
_MAX_BYTES: Final = 1 << 20  # of a key or a signature
_MAX_FILE: Final = 1 << 31  # bytes of a file in a bundle: the limit of protocol buffers, and so of ONNX

_MEDIA_TYPE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
_STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE: Final = "https://model_signing/signature/v1.0"


def verify_signature(folder: Path, public_key: str | Path, manifest: bytes) -> str:
    """Verify that every file of a bundle is as the holder of a private key has signed it.

    Parameters
    ----------
    folder
        The bundle's folder.
    public_key
        A PEM file with the public key of the signer.
    manifest
        The bytes of ``bundle.json`` that the caller has read and will use; they are verified in place of the file.

    Returns
    -------
    str
        The key's fingerprint: SHA-256, in hexadecimal, of its PEM form.

    Raises
    ------
    SignatureError
        If there is no signature, it is damaged or by another key, or a file was altered, added or removed.
    ConfigError
        If the public key cannot be read or is invalid.
    MissingExtraError
        If the extra ``sign`` is not installed.
    """
    label, path = folder.as_posix(), Path(public_key)
    key: EllipticCurvePublicKey = read_key(path, private=False)
    try:
        data = read_regular(folder / SIGNATURE, _MAX_BYTES)
    except FileNotFoundError:
        raise SignatureError(
            f"{label}: it is not signed ({SIGNATURE} is missing); expected a signature by the key of "
            f"{path.as_posix()}; get the signed bundle, or sign it with echoquad sign"
        ) from None
    except OSError as error:
        raise SignatureError(f"{label}: {SIGNATURE} cannot be read ({error.strerror or error})") from error
    _compare_files(folder, verify_envelope(data, key, label, path.as_posix()), manifest)
    return key_fingerprint(key)


def _compare_files(folder: Path, signed: Mapping[str, str], manifest: bytes) -> None:
    """Raise a SignatureError for the first file, by name, that differs from the signed one."""
    label, names = folder.as_posix(), list_files(folder)
    for change, changed in (("was added", names - signed.keys()), ("was removed", signed.keys() - names)):
        if changed:
            raise SignatureError(
                f"{label}: {min(changed)!r} {change} after the bundle was signed; copy the whole bundle again"
            )
    for name in sorted(signed):
        try:
            if name == MANIFEST:
                digest = hashlib.sha256(manifest).hexdigest()
            else:
                with open_regular(folder / name) as stream:
                    # Do not hash a huge file for hours.
                    too_large = os.fstat(stream.fileno()).st_size > _MAX_FILE
                    digest = "of too many bytes" if too_large else hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise SignatureError(f"{label}: {name!r} cannot be read ({error.strerror or error})") from error
        if digest != signed[name]:
            raise SignatureError(
                f"{label}: {name!r} was altered after the bundle was signed (SHA-256 {digest[:17]}, signed "
                f"{signed[name][:17]}); copy the whole bundle again"
            )


def list_files(folder: Path) -> set[str]:
    """Return the names of everything in a bundle's folder except the signature.

    Raises
    ------
    SignatureError
        If the folder cannot be listed.
    """
    try:
        return {entry.name for entry in folder.iterdir()} - {SIGNATURE}
    except OSError as error:
        raise SignatureError(f"{folder.as_posix()}: it cannot be listed ({error.strerror or error})") from error


def verify_envelope(data: bytes, key: EllipticCurvePublicKey, label: str, key_label: str) -> dict[str, str]:
    """Verify the bytes of a signature file and return the SHA-256 of each signed file, by name.

    Raises
    ------
    SignatureError
        If the bytes are not a signature, or not one by `key`.
    """
    exceptions, hashes = import_extra("cryptography.exceptions"), import_extra("cryptography.hazmat.primitives.hashes")
    ec = import_extra("cryptography.hazmat.primitives.asymmetric.ec")
    envelope = _parse_envelope(data)
    if envelope is None:
        raise SignatureError(
            f"{label}: {SIGNATURE} is not a signature by a key: it was damaged or changed, or created by another "
            "method; get the bundle again, or sign it with echoquad sign"
        )
    fingerprint, payload, signature = envelope
    if fingerprint != key_fingerprint(key):
        raise SignatureError(
            f"{label}: it was signed by another key ({fingerprint[:12]!r}) than that of {key_label} "
            f"({key_fingerprint(key)[:12]!r}); find out whose key that is before you use the bundle"
        )
    message = b"DSSEv1 %d %b %d %b" % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(payload), payload)
    try:
        key.verify(signature, message, ec.ECDSA(getattr(hashes, _HASHES[key.curve.name])()))
    except exceptions.InvalidSignature:
        raise SignatureError(
            f"{label}: {SIGNATURE} was not created by the key of {key_label}, although it names that key: it was "
            "damaged or forged; get the bundle again"
        ) from None
    files = _parse_statement(payload)
    if files is None:
        raise SignatureError(
            f"{label}: {SIGNATURE} is by the right key, but does not contain the SHA-256 of each file; sign the bundle "
            "with echoquad sign"
        )
    return files


def _parse_envelope(data: bytes) -> tuple[str, bytes, bytes] | None:
    """Return key fingerprint, payload and signature of an untrusted signature file; None if it has another form."""
    try:
        content = json.loads(data)
        fingerprint, envelope = content["verificationMaterial"]["publicKey"]["hint"], content["dsseEnvelope"]
        (entry,) = envelope["signatures"]
        payload, signature = (base64.b64decode(text, validate=True) for text in (envelope["payload"], entry["sig"]))
        types = (content["mediaType"], envelope["payloadType"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    valid = isinstance(fingerprint, str) and types == (_MEDIA_TYPE, _PAYLOAD_TYPE)
    return (fingerprint, payload, signature) if valid else None


def _parse_statement(payload: bytes) -> dict[str, str] | None:
    """Return the SHA-256 of each file from a payload whose signature was verified; None if it has another form."""
    try:
        statement = json.loads(payload)
        predicate = statement["predicate"]
        resources = predicate["resources"]
        files = {resource["name"]: resource["digest"] for resource in resources}
        valid = (
            (statement["_type"], statement["predicateType"]) == (_STATEMENT_TYPE, _PREDICATE_TYPE)
            and predicate["serialization"]["method"] == "files"
            and all(resource["algorithm"] == "sha256" for resource in resources)
            and all(isinstance(text, str) for item in files.items() for text in item)
            and len(files) == len(resources)
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return files if valid else None


# ---------------------------------------------------------------------------------------------- keys


def read_key(path: Path, *, private: bool) -> Any:
    """Read an elliptic-curve key, private or public, from a PEM file.

    Raises
    ------
    ConfigError
        If it cannot be read, is encrypted, or is not an elliptic-curve key of the expected kind.
    MissingExtraError
        If the extra ``sign`` is not installed.
    """
    label, expected = path.as_posix(), "a private key" if private else "a public key"
    try:
        data = read_regular(path, _MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"{label}: the key cannot be read ({error.strerror or error}); check the path") from error
    if private and b"ENCRYPTED" in data:
        raise ConfigError(
            f"{label}: the private key is encrypted; expected an unencrypted key, since no password is asked for; "
            "decrypt it for signing: openssl pkey -in KEY.pem -out PLAIN.pem"
        )
    if not private and b"PRIVATE KEY-----" in data:
        raise ConfigError(
            f"{label}: found a private key; expected a public key, the only one that belongs on a cart; create it: "
            "openssl pkey -in KEY.pem -pubout -out PUB.pem"
        )
    unsupported = import_extra("cryptography.exceptions").UnsupportedAlgorithm
    load = import_extra("cryptography.hazmat.primitives.serialization")
    try:
        key = load.load_pem_private_key(data, None) if private else load.load_pem_public_key(data)
    except (ValueError, TypeError, unsupported) as error:
        raise ConfigError(
            f"{label}: it is not {expected} in PEM form; expected {_EXPECTED_KEY}, as openssl writes it"
        ) from error
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in _HASHES:
        found = f"the curve {curve}" if curve else type(key).__name__.strip("_")
        raise ConfigError(f"{label}: found {found}; expected {_EXPECTED_KEY}")
    return key


def key_fingerprint(key: EllipticCurvePublicKey) -> str:
    """Return the SHA-256, in hexadecimal, of a public key's PEM form."""
    serialization = import_extra("cryptography.hazmat.primitives.serialization")
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(key.public_bytes(*form)).hexdigest()


def import_extra(name: str) -> ModuleType:
    """Import a module of the extra ``sign``.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = (error.name or name).partition(".")[0]
        raise MissingExtraError(
            f'signatures need {missing}, which cannot be imported ({error}); do: pip install "echoquad[sign]"'
        ) from error
