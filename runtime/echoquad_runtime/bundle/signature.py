"""Signatures: who vouches for a bundle, told before anything of it is used.

A signature is one of OpenSSF Model Signing with a key: the file `SIGNATURE` in the bundle, a Sigstore bundle around a
DSSE envelope around an in-toto statement that gives the SHA-256 of every other file. The package ``model-signing``
makes it, and anybody can check it with that package's own command. Here it is checked with ``cryptography`` alone:

- What was checked has to be what is used. That package reads files by their paths and forgets them; by the time a
  file is opened, another can lie in its place. Here ``bundle.json`` is checked as the bytes that its reader holds, and
  every other file is held against the SHA-256 in it as it is read to be used.
- The package passes over files with the names that git uses, and prints to stdout.
- It brings an HTTP client and more than twenty packages, which a cart without a network has no use for.

No key ever leaves the machine, and nothing here uses a network.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from echoquad_runtime.bundle.bundle import MANIFEST, SIGNATURE, Bundle, encode_manifest
from echoquad_runtime.errors import BundleError, ConfigError, MissingExtraError, SignatureError
from echoquad_runtime.storage.atomic import open_regular, read_regular, write_bytes

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

__all__ = ["check_private_key", "check_signature", "sign_bundle"]

_HASHES: Final = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
_KINDS: Final = "an elliptic-curve key (prime256v1, secp384r1 or secp521r1)"
_MAX_FILE: Final = 1 << 20  # of a key or a signature, in bytes
_LARGEST: Final = 1 << 31  # of any file of a bundle, in bytes: what protocol buffers, and so ONNX, can hold

_MEDIA: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD: Final = "application/vnd.in-toto+json"
_STATEMENT: Final = "https://in-toto.io/Statement/v1"
_PREDICATE: Final = "https://model_signing/signature/v1.0"


def check_signature(folder: Path, public_key: str | Path, held: Mapping[str, bytes]) -> str:
    """Refuse a bundle that is not, file by file, what the holder of a key has signed.

    Parameters
    ----------
    folder
        The bundle's folder.
    public_key
        A PEM file with the public key that belongs to the one that signed.
    held
        Files by name that the caller has read already and will use: these bytes are checked, not the disk's.

    Returns
    -------
    str
        The key's fingerprint: SHA-256, hexadecimal, of its PEM form.

    Raises
    ------
    SignatureError
        If there is no signature, it is another key's or damaged, or a file was altered, added or taken away.
    ConfigError
        If the public key cannot be read or is none.
    MissingExtraError
        If the extra ``sign`` is not installed.
    """
    path = Path(public_key)
    key = _public_key(path)
    try:
        data = read_regular(folder / SIGNATURE, _MAX_FILE)
    except FileNotFoundError:
        raise SignatureError(
            f"{folder.as_posix()}: it is not signed ({SIGNATURE} is missing); expected a signature by the key of "
            f"{path.as_posix()}; get the signed bundle, or sign it with echoquad sign"
        ) from None
    except OSError as error:
        raise SignatureError(f"{folder.as_posix()}: {SIGNATURE} cannot be read ({error.strerror or error})") from error
    signed = _signed_files(data, key, folder.as_posix(), path.as_posix())
    _compare(folder, signed, held)
    return _fingerprint(key)


def check_private_key(path: Path) -> None:
    """Refuse a key that cannot sign, before any work is done for it.

    Raises
    ------
    ConfigError
        If it cannot be read, is encrypted, or is no elliptic-curve private key.
    MissingExtraError
        If the extra ``sign`` is not installed.
    """
    _private_key(path)
    _model_signing()


def sign_bundle(folder: Path, private_key: Path) -> str:
    """Sign a whole bundle: write `SIGNATURE` into it, in place of an older one.

    Parameters
    ----------
    folder
        The bundle's folder. It must hold the files that its manifest lists, each with its hash, and no other.
    private_key
        A PEM file with an elliptic-curve private key, not encrypted.

    Returns
    -------
    str
        The key's fingerprint: SHA-256, hexadecimal, of its public half's PEM form.

    Raises
    ------
    BundleError
        If the bundle is missing, damaged, or holds other files than it lists.
    ConfigError, MissingExtraError
        As `check_private_key`.
    OutputError
        If the signature cannot be written.
    """
    key = _private_key(private_key)
    signing = _model_signing()
    bundle = Bundle(folder)
    for name in bundle.manifest["files"]:
        bundle.read(name)
    others = sorted(_listing(folder) - {MANIFEST, *bundle.manifest["files"]})
    if others:
        raise BundleError(f"{folder.as_posix()}: it holds {others[0]!r}, which is no part of it; move that away first")
    files = signing.hashing.Config().use_file_serialization(hashing_algorithm="sha256")
    files.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    signer = signing.signing.Config().use_elliptic_key_signer(private_key=private_key).set_hashing_config(files)
    with tempfile.TemporaryDirectory() as private:
        path = Path(private) / SIGNATURE
        try:
            signer.sign(folder.resolve(), path)
        except (OSError, ValueError) as error:  # a link, which it does not follow; a file that has gone
            raise BundleError(
                f"{folder.as_posix()}: model-signing refuses it ({error}); copy the whole bundle"
            ) from error
        data = path.read_bytes()
    # That package has read every file again: what it signed has to be the bundle that was checked above.
    signed = _signed_files(data, key.public_key(), folder.as_posix(), private_key.as_posix())
    expected = {name: entry["sha256"] for name, entry in bundle.manifest["files"].items()}
    expected[MANIFEST] = hashlib.sha256(encode_manifest(bundle.manifest)).hexdigest()
    if signed != expected:
        raise BundleError(f"{folder.as_posix()}: it changed while it was signed; sign it again")
    write_bytes(folder / SIGNATURE, data)
    return _fingerprint(key.public_key())


def _compare(folder: Path, signed: Mapping[str, str], held: Mapping[str, bytes]) -> None:
    """Refuse files that are not as they were signed, the first of them by its name."""
    label, names = folder.as_posix(), _listing(folder)
    for what, which in (("was added", names - signed.keys()), ("was taken away", signed.keys() - names)):
        if which:
            raise SignatureError(
                f"{label}: {min(which)!r} {what} since the bundle was signed; copy the whole bundle again"
            )
    for name in sorted(signed):
        try:
            if name in held:
                found = hashlib.sha256(held[name]).hexdigest()
            else:
                with open_regular(folder / name) as stream:
                    # Whatever was put there, it is not gone through for hours.
                    large = os.fstat(stream.fileno()).st_size > _LARGEST
                    found = "of too many bytes" if large else hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise SignatureError(f"{label}: {name!r} cannot be read ({error.strerror or error})") from error
        if found != signed[name]:
            raise SignatureError(
                f"{label}: {name!r} was altered since the bundle was signed (SHA-256 {found[:17]}, signed "
                f"{signed[name][:17]}); copy the whole bundle again"
            )


def _listing(folder: Path) -> set[str]:
    """Give the names of all that lies in a bundle's folder, the signature left out."""
    try:
        return {entry.name for entry in folder.iterdir()} - {SIGNATURE}
    except OSError as error:
        raise SignatureError(f"{folder.as_posix()}: it cannot be listed ({error.strerror or error})") from error


def _signed_files(data: bytes, key: EllipticCurvePublicKey, label: str, key_label: str) -> dict[str, str]:
    """Give the SHA-256 by name of the files that a signature vouches for, once `key` has vouched for the signature."""
    exceptions, hashes = _cryptography("exceptions"), _cryptography("hazmat.primitives.hashes")
    ec = _cryptography("hazmat.primitives.asymmetric.ec")
    opened = _open_envelope(data)
    if opened is None:
        raise SignatureError(
            f"{label}: {SIGNATURE} is no signature that a key has made: it was damaged or changed, or made in another "
            "way; get the bundle again, or sign it with echoquad sign"
        )
    hint, payload, signature = opened
    if hint != _fingerprint(key):
        raise SignatureError(
            f"{label}: it was signed by another key ({hint[:12]!r}) than that of {key_label} "
            f"({_fingerprint(key)[:12]!r}); find out whose before you use it"
        )
    message = b"DSSEv1 %d %b %d %b" % (len(_PAYLOAD), _PAYLOAD.encode(), len(payload), payload)
    try:
        key.verify(signature, message, ec.ECDSA(getattr(hashes, _HASHES[key.curve.name])()))
    except exceptions.InvalidSignature:
        raise SignatureError(
            f"{label}: {SIGNATURE} was not made by the key of {key_label}, though it says so: it was damaged or "
            "forged; get the bundle again"
        ) from None
    files = _read_statement(payload)
    if files is None:
        raise SignatureError(
            f"{label}: {SIGNATURE} is by the right key, but does not give the SHA-256 of each file; sign the bundle "
            "with echoquad sign"
        )
    return files


def _open_envelope(data: bytes) -> tuple[str, bytes, bytes] | None:
    """Take a signature file apart, believing nothing: which key it names, what was signed, and the signature of it."""
    try:
        whole = json.loads(data)
        hint, envelope = whole["verificationMaterial"]["publicKey"]["hint"], whole["dsseEnvelope"]
        (entry,) = envelope["signatures"]
        parts = [base64.b64decode(text, validate=True) for text in (envelope["payload"], entry["sig"])]
        fits = isinstance(hint, str) and (whole["mediaType"], envelope["payloadType"]) == (_MEDIA, _PAYLOAD)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return (hint, parts[0], parts[1]) if fits else None


def _read_statement(payload: bytes) -> dict[str, str] | None:
    """Read what was signed; its signature has been checked."""
    try:
        statement = json.loads(payload)
        predicate = statement["predicate"]
        resources = predicate["resources"]
        files = {resource["name"]: resource["digest"] for resource in resources}
        fits = (
            (statement["_type"], statement["predicateType"]) == (_STATEMENT, _PREDICATE)
            and predicate["serialization"]["method"] == "files"
            and all(resource["algorithm"] == "sha256" for resource in resources)
            and all(isinstance(text, str) for item in files.items() for text in item)
            and len(files) == len(resources)
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return files if fits else None


def _public_key(path: Path) -> EllipticCurvePublicKey:
    data = _read_key(path)
    if b"PRIVATE KEY-----" in data:
        raise ConfigError(
            f"{path.as_posix()}: a private key found; expected the public one, which alone belongs on a cart; make it: "
            "openssl pkey -in KEY.pem -pubout -out PUB.pem"
        )
    key: EllipticCurvePublicKey = _load_key("load_pem_public_key", "a public key", path, data)
    return key


def _private_key(path: Path) -> EllipticCurvePrivateKey:
    data = _read_key(path)
    if b"ENCRYPTED" in data:
        raise ConfigError(
            f"{path.as_posix()}: the private key is encrypted, and no password is asked for; decrypt it for the time "
            "of signing: openssl pkey -in KEY.pem -out PLAIN.pem"
        )
    key: EllipticCurvePrivateKey = _load_key("load_pem_private_key", "a private key", path, data, None)
    return key


def _read_key(path: Path) -> bytes:
    try:
        return read_regular(path, _MAX_FILE)
    except OSError as error:
        raise ConfigError(
            f"{path.as_posix()}: the key cannot be read ({error.strerror or error}); check the path"
        ) from error


def _load_key(load: str, kind: str, path: Path, data: bytes, *arguments: None) -> Any:
    unsupported = _cryptography("exceptions").UnsupportedAlgorithm
    try:
        key = getattr(_cryptography("hazmat.primitives.serialization"), load)(data, *arguments)
    except (ValueError, TypeError, unsupported) as error:
        raise ConfigError(
            f"{path.as_posix()}: it is not {kind} in PEM form; expected {_KINDS}, as openssl writes it"
        ) from error
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in _HASHES:
        found = f"the curve {curve}" if curve else type(key).__name__.strip("_")
        raise ConfigError(f"{path.as_posix()}: {found} found; expected {_KINDS}")
    return key


def _fingerprint(key: EllipticCurvePublicKey) -> str:
    serialization = _cryptography("hazmat.primitives.serialization")
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(key.public_bytes(*form)).hexdigest()


def _cryptography(module: str) -> ModuleType:
    return _import(f"cryptography.{module}")


def _model_signing() -> ModuleType:
    return _import("model_signing")


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        lacking = (error.name or name).partition(".")[0]
        raise MissingExtraError(
            f'signatures need {lacking}, which cannot be imported ({error}); do: pip install "echoquad[sign]"'
        ) from error
