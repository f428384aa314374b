"""``SHA256SUMS``: the SHA-256 of every file of a folder, and an ECDSA signature of them.

``sha256sum --check`` and ``openssl dgst -sha256 -verify`` read both, so that a machine without EchoQuad can check them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from echoquad_deploy.stick.errors import StickError
from echoquad_runtime.bundle.signature import import_extra, read_key
from echoquad_runtime.storage.atomic import sync_folder, write_bytes
from echoquad_runtime.storage.regular_file import open_regular, read_regular

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

__all__ = [
    "SUMS",
    "SUMS_SIGNATURE",
    "check_sums",
    "der_fingerprint",
    "public_key_of",
    "read_sums",
    "sign_sums",
    "verify_sums",
    "write_sums",
]

SUMS: Final = "SHA256SUMS"
SUMS_SIGNATURE: Final = "SHA256SUMS.sig"

_LINE: Final = re.compile(r"([0-9a-f]{64})  ([\w.+!][\w.+! -]*(?:/[\w.+!][\w.+! -]*)*)", re.ASCII)
_MAX_BYTES: Final = 1 << 24


def write_sums(folder: Path) -> None:
    """Write `SUMS` for every file below a folder but itself and its signature, and flush all of them to the disk.

    Raises
    ------
    StickError
        If the folder holds something that is no regular file, or a name that a USB stick cannot hold.
    OutputError
        If it cannot be written.
    """
    lines = []
    names = _list_files(folder)
    if clash := _case_clash(names):
        raise StickError(f"{clash}: another file has the same name in other case, which a USB stick cannot hold")
    for name in sorted(names):
        with contextlib.suppress(OSError), open_regular(folder / name) as stream:  # Windows flushes only its writers
            os.fsync(stream.fileno())
        line = f"{_hash(folder, name)}  {name}"
        if not _LINE.fullmatch(line):
            raise StickError(f"{name!r}: expected a file name of letters, digits and .+!-_; rename the file")
        lines.append(f"{line}\n")
    write_bytes(folder / SUMS, "".join(lines).encode("ascii"))
    for place in sorted({(folder / name).parent for name in names}):
        sync_folder(place)


def _case_clash(names: set[str]) -> str | None:
    seen: dict[str, str] = {}
    return next((name for name in sorted(names) if seen.setdefault(name.lower(), name) != name), None)


def sign_sums(folder: Path, private_key: Path) -> None:
    """Write `SUMS_SIGNATURE`: the ECDSA signature, with SHA-256, of the bytes of `SUMS`.

    Raises
    ------
    ConfigError
        If the key is no elliptic-curve private key.
    MissingExtraError
        If the extra ``sign`` is not installed.
    """
    key = read_key(private_key, private=True)
    write_bytes(folder / SUMS_SIGNATURE, key.sign((folder / SUMS).read_bytes(), _ecdsa()))


def _ecdsa() -> Any:
    """Return the signature's algorithm: SHA-256 for every curve, so that one line of openssl verifies it."""
    ec = import_extra("cryptography.hazmat.primitives.asymmetric.ec")
    return ec.ECDSA(import_extra("cryptography.hazmat.primitives.hashes").SHA256())


def read_sums(folder: Path) -> bytes:
    """Return the bytes of `SUMS`, which are verified, parsed and compared as they were read.

    Raises
    ------
    StickError
        If they cannot be read.
    """
    return _read(folder, SUMS)


def verify_sums(folder: Path, data: bytes, public_key: Path) -> str:
    """Verify the signature of the bytes of `SUMS`, and return the key's fingerprint; see `der_fingerprint`.

    Raises
    ------
    StickError
        If there is no signature, or it is not by this key.
    ConfigError
        If the key is no elliptic-curve public key.
    MissingExtraError
        If the extra ``sign`` is not installed.
    """
    key = read_key(public_key, private=False)
    label = folder.as_posix()
    signature = _read(folder, SUMS_SIGNATURE)
    try:
        key.verify(signature, data, _ecdsa())
    except import_extra("cryptography.exceptions").InvalidSignature:
        raise StickError(
            f"{label}: {SUMS} was not signed by the key of {public_key.as_posix()}: it was changed, or signed by "
            "another key; pack it again, or ask its sender for the key"
        ) from None
    return der_fingerprint(key)


def check_sums(folder: Path, data: bytes) -> dict[str, str]:
    """Compare every file of a folder with the bytes of `SUMS`.

    Returns
    -------
    dict
        SHA-256 of each file by name.

    Raises
    ------
    StickError
        For the first file, by name, that is missing, changed, or not named in `SUMS`.
    """
    label = folder.as_posix()
    expected = _parse(data, label)
    names = _list_files(folder)
    if added := sorted(names - expected.keys()):
        raise StickError(f"{label}: {added[0]!r} is not named in {SUMS}; expected no other files; remove it")
    for name in sorted(expected):
        if name not in names:
            raise StickError(f"{label}: {name!r} is missing; copy the whole folder again")
        if _hash(folder, name) != expected[name]:
            raise StickError(f"{label}: {name!r} was damaged or changed; copy the whole folder again")
    return expected


def _parse(data: bytes, label: str) -> dict[str, str]:
    matches = [_LINE.fullmatch(line) for line in data.decode("ascii", "replace").splitlines()]
    sums = {match[2]: match[1] for match in matches if match}
    if not sums or len(sums) != len(matches) or any(".." in name.split("/") for name in sums):
        raise StickError(f"{label}: {SUMS} is damaged; expected one line 'SHA-256  NAME' for each file; copy it again")
    return sums


def _read(folder: Path, name: str) -> bytes:
    try:
        data = read_regular(folder / name, _MAX_BYTES)
    except FileNotFoundError:
        raise StickError(
            f"{folder.as_posix()}: {name} is missing; expected a folder that `echoquad pack` wrote"
        ) from None
    except OSError as error:
        raise StickError(f"{folder.as_posix()}: {name} cannot be read ({error.strerror or error})") from error
    if len(data) > _MAX_BYTES:
        raise StickError(f"{folder.as_posix()}: {name} is too large; expected at most {_MAX_BYTES} bytes")
    return data


def _hash(folder: Path, name: str) -> str:
    try:
        with open_regular(folder / name) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise StickError(f"{folder.as_posix()}: {name!r} cannot be read ({error.strerror or error})") from error


def _list_files(folder: Path) -> set[str]:
    """Return the names of all files below a folder, with forward slashes, without `SUMS` and its signature.

    Raises
    ------
    StickError
        If the folder cannot be listed, or holds a link or anything else that is no regular file or folder.
    """
    names: set[str] = set()
    waiting = [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                    elif entry.is_file(follow_symlinks=False):
                        names.add(Path(entry.path).relative_to(folder).as_posix())
                    else:
                        name = Path(entry.path).relative_to(folder).as_posix()
                        raise StickError(f"{folder.as_posix()}: {name!r} is a link or no regular file; remove it")
        except OSError as error:
            raise StickError(f"{folder.as_posix()}: it cannot be listed ({error.strerror or error})") from error
    return names - {SUMS, SUMS_SIGNATURE}


def public_key_of(private_key: Path) -> tuple[bytes, str]:
    """Return the public key of a private key in PEM form, and its fingerprint; see `der_fingerprint`.

    Raises
    ------
    ConfigError, MissingExtraError
        As `sign_sums`.
    """
    serialization = import_extra("cryptography.hazmat.primitives.serialization")
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    key = read_key(private_key, private=True).public_key()
    return key.public_bytes(*form), der_fingerprint(key)


def der_fingerprint(key: EllipticCurvePublicKey) -> str:
    """Return the SHA-256, in hexadecimal, of a public key's DER form.

    ``openssl pkey -pubin -in PUB.pem -outform DER | sha256sum`` prints it.
    """
    serialization = import_extra("cryptography.hazmat.primitives.serialization")
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(key.public_bytes(*form)).hexdigest()
