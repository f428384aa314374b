"""Signing: create a bundle's signature with the package ``model-signing``; see `echoquad_runtime.bundle.signature`."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.manifest import MANIFEST, SIGNATURE, encode_manifest
from echoquad_runtime.bundle.signature import import_extra, key_fingerprint, list_files, read_key, verify_envelope
from echoquad_runtime.errors import BundleError
from echoquad_runtime.storage.atomic import write_bytes

__all__ = ["check_private_key", "sign_bundle"]


def check_private_key(path: Path) -> None:
    """Check that a private key can sign; call this before a long export.

    Raises
    ------
    ConfigError
        If it cannot be read, is encrypted, or is not an elliptic-curve private key.
    MissingExtraError
        If the extra ``sign`` is not installed.
    """
    read_key(path, private=True)
    import_extra("model_signing")


def sign_bundle(folder: Path, private_key: Path) -> str:
    """Sign every file of a bundle: write `SIGNATURE` into it and replace an older one.

    Parameters
    ----------
    folder
        The bundle's folder. It must hold exactly the files that its manifest lists, unchanged.
    private_key
        A PEM file with an unencrypted elliptic-curve private key.

    Returns
    -------
    str
        The fingerprint of the public key: SHA-256, in hexadecimal, of its PEM form.

    Raises
    ------
    BundleError
        If the bundle is missing, damaged, or holds other files than it lists.
    ConfigError, MissingExtraError
        As `check_private_key`.
    OutputError
        If the signature cannot be written.
    """
    key = read_key(private_key, private=True)
    signing = import_extra("model_signing")
    bundle, label = Bundle(folder), folder.as_posix()
    for name in bundle.manifest["files"]:
        bundle.read(name)
    unlisted = sorted(list_files(folder) - {MANIFEST, *bundle.manifest["files"]})
    if unlisted:
        raise BundleError(f"{label}: it holds {unlisted[0]!r}, which {MANIFEST} does not list; move it away first")
    hashing = signing.hashing.Config().use_file_serialization(hashing_algorithm="sha256")
    hashing.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    signer = signing.signing.Config().use_elliptic_key_signer(private_key=private_key).set_hashing_config(hashing)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / SIGNATURE
        try:
            signer.sign(folder.resolve(), path)
        except (OSError, ValueError) as error:  # a symlink, which it does not follow, or a file that has disappeared
            raise BundleError(f"{label}: model-signing rejects it ({error}); copy the whole bundle") from error
        data = path.read_bytes()
    # model-signing has read every file again: compare what it signed with the bundle that was checked above.
    signed = verify_envelope(data, key.public_key(), label, private_key.as_posix())
    expected = {name: entry["sha256"] for name, entry in bundle.manifest["files"].items()}
    expected[MANIFEST] = hashlib.sha256(encode_manifest(bundle.manifest)).hexdigest()
    if signed != expected:
        raise BundleError(f"{label}: it changed while it was being signed; sign it again")
    write_bytes(folder / SIGNATURE, data)
    return key_fingerprint(key.public_key())
