"""The entries of the audit log: what they may contain, how they are encoded, hashed and signed.

An entry is one line: canonical JSON and a line feed. ``previous`` is the hash of the entry before, so that entries form
a chain. ``mac`` is an HMAC with the site key, which somebody without the key cannot make. ``hash`` is the SHA-256 of
everything else, so that a damaged entry is found without the key too.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from echoquad_runtime.contract import canonical_json
from echoquad_runtime.errors import ConfigError
from echoquad_runtime.storage.atomic import output_errors, sync_folder
from echoquad_runtime.storage.regular_file import read_regular, refuse_link

__all__ = [
    "EVENTS",
    "MAX_LINE_BYTES",
    "NO_HASH",
    "Entry",
    "decode_entry",
    "encode_entry",
    "hash_sender",
    "hash_uid",
    "mac",
    "prepare_fields",
    "site_key",
]

NO_HASH: Final = "0" * 64
"""What the first entry has in place of the hash of an entry before."""

MAX_LINE_BYTES: Final = 1 << 16
"""Size of the largest entry; one has about 600 bytes."""

KEY_BYTES: Final = 32

EVENTS: Final = frozenset(
    {
        "service_started",
        "service_stopped",
        "configuration",
        "bundle_loaded",
        "bundle_rolled_back",
        "bundle_refused",
        "accepted",
        "refused",
        "decided",
        "delivered",
        "delivery_refused",
        "clock_jump",
        "log_repaired",
        "log_fault",
    }
)
"""What an entry may report. ``docs/reference/audit-log.md`` describes each."""

_OWN: Final = ("seq", "time", "event", "previous", "mac", "hash")  # keys that every entry has, and no field


def _matches(pattern: str) -> Callable[[Any], bool]:
    compiled = re.compile(pattern)
    return lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and 0 < len(key) <= 64 and _is_count(count) for key, count in value.items()
    )


def _is_name(value: Any) -> bool:
    """Return whether a value may be a name of the configuration: any line of text."""
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


def _are_torn_parts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(part, dict) and part.keys() == {"file", "bytes", "sha256"} for part in value
    )


_digest, _word = _matches("[0-9a-f]{64}"), _matches(r"[A-Za-z0-9_.+-]{1,64}")
_FIELDS: Final[Mapping[str, Callable[[Any], bool]]] = {
    "attempts": _is_count,
    "bundle": _digest,
    "code": _matches("E_[A-Z0-9_]{1,60}"),
    "configuration": _digest,
    "decisions": _are_counts,
    "destination": _is_name,
    "device": _word,
    "entries": _is_count,
    "failures": _are_counts,
    "flags": _are_counts,
    "job": _matches("[0-9a-f]{32}"),
    "object": _digest,
    "origin": _matches("http|folder|dicom|live"),
    "precision": _word,
    "previous_bundle": _digest,
    "provider": _word,
    "reason": _matches("[a-z ,]{1,80}"),
    "seconds": lambda value: type(value) in (int, float),
    "sender": _is_name,
    "status": _matches("done|failed|expired"),
    "torn": _are_torn_parts,
    "version": _word,
}
"""The fields that an entry may have, each with the check of its value: nothing else gets into the log."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A valid entry.

    Attributes
    ----------
    seq
        Its number, from 1.
    previous, hash
        Hashes of the entry before and of this one.
    time
        UTC, as ISO 8601.
    event
        One of `EVENTS`.
    content
        Everything that `hash` covers.
    """

    seq: int
    previous: str
    hash: str
    time: str
    event: str
    content: dict[str, Any]


def prepare_fields(event: str, fields: Mapping[str, Any], key: bytes, senders: Collection[str] = ()) -> dict[str, Any]:
    """Return the fields of an entry as they are written, after checking them.

    Parameters
    ----------
    event
        One of `EVENTS`.
    fields
        ``sop_instance_uid`` becomes ``object``, its hash with the site key; ``sender`` is hashed unless it is an
        address or one of `senders`. Empty values are left out.
    key
        The site key.
    senders
        Names that the configuration knows, which are written as they are.

    Raises
    ------
    ValueError
        If the event or a field is unknown, or a value has not the form that its field has.
    """
    if event not in EVENTS:
        raise ValueError(f"the event is {event!r}; expected one of {', '.join(sorted(EVENTS))}")
    found = {name: value for name, value in fields.items() if value is not None and value not in ("", {})}
    if uid := found.pop("sop_instance_uid", None):
        found["object"] = hash_uid(key, uid)
    if sender := found.get("sender"):
        found["sender"] = sender if sender in senders or _is_address(sender) else hash_sender(key, sender)
    for name, value in found.items():
        if name not in _FIELDS:
            raise ValueError(f"the audit log has no field {name!r}; expected some of {', '.join(_FIELDS)}")
        if not _FIELDS[name](value):
            raise ValueError(f"the value of the audit log's field {name!r} has not the form that the field has")
    return found


def hash_uid(key: bytes, uid: str) -> str:
    """Return the hash of a SOP instance UID with the site key, 64 hexadecimal digits."""
    return mac(key, "uid", uid)


def hash_sender(key: bytes, sender: str) -> str:
    """Return the name of a sender that the configuration does not know: ``unknown-`` and 16 hexadecimal digits."""
    return f"unknown-{mac(key, 'sender', sender)[:16]}"


def mac(key: bytes, purpose: str, text: str) -> str:
    """Return the HMAC-SHA256 of ``PURPOSE:TEXT`` in UTF-8, 64 hexadecimal digits; the purposes keep uses apart."""
    return hmac.new(key, f"{purpose}:{text}".encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def encode_entry(
    seq: int, previous: str, unix_time: float, event: str, fields: Mapping[str, Any], key: bytes
) -> tuple[bytes, str]:
    """Return the line of an entry, and its hash; `fields` are those of `prepare_fields`."""
    time = datetime.fromtimestamp(unix_time, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    content: dict[str, Any] = {**fields, "seq": seq, "previous": previous, "time": time, "event": event}
    content["mac"] = mac(key, "entry", canonical_json(content))
    digest = hashlib.sha256(canonical_json(content).encode("ascii")).hexdigest()
    return f"{canonical_json({**content, 'hash': digest})}\n".encode("ascii"), digest


def decode_entry(line: bytes, key: bytes | None = None) -> Entry:
    """Return the entry of a line, after checking its form, its hash, and with a key its MAC.

    Raises
    ------
    ValueError
        If a check fails; the message states what is wrong.
    """
    if not line.endswith(b"\n"):
        raise ValueError("the line has no end")
    try:
        found = json.loads(line.decode("ascii"))
        intact = isinstance(found, dict) and f"{canonical_json(found)}\n".encode("ascii") == line
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise ValueError("the line is no entry in canonical JSON: it was changed or damaged")
    digest = found.pop("hash", None)
    if digest != hashlib.sha256(canonical_json(found).encode("ascii")).hexdigest():
        raise ValueError("the entry does not match its own hash: it was changed")
    if key is not None:
        signed = {name: value for name, value in found.items() if name != "mac"}
        stated = found.get("mac")
        if not isinstance(stated, str) or not hmac.compare_digest(stated, mac(key, "entry", canonical_json(signed))):
            raise ValueError(
                "the entry was not written with this site key: it was forged, or the key is that of another site"
            )
    seq, previous, time, event = (found.get(name) for name in ("seq", "previous", "time", "event"))
    if type(seq) is not int or not all(isinstance(value, str) for value in (previous, time, event)):
        raise ValueError("the entry lacks its number, hash, time or event")
    return Entry(seq, str(previous), digest, str(time), str(event), found)


def site_key(path: Path) -> bytes:
    """Return the site key, 32 bytes; create the file, readable by its owner alone, if it does not exist.

    Raises
    ------
    ConfigError
        If the file cannot be read, has another size, or can be read by others.
    OutputError
        If it cannot be created.
    """
    if not os.path.lexists(path):
        _create_key(path)
    try:
        refuse_link(path)
        key, mode = read_regular(path, KEY_BYTES), path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"{path.as_posix()}: the site key cannot be read ({error.strerror or error})") from error
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"{path.as_posix()}: the file is no site key; expected {KEY_BYTES} bytes; restore it from a backup"
        )
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(f"{path.as_posix()}: other users can read the site key; do: chmod 600 {path.as_posix()}")
    return key


def _create_key(path: Path) -> None:
    """Create a site key. It takes its name complete, and never that of another one."""
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(6)}.partial")
    with output_errors(path):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(secrets.token_bytes(KEY_BYTES))
                stream.flush()
                os.fsync(stream.fileno())
            with contextlib.suppress(FileExistsError):  # another process was first: its key is the key
                os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.absolute().parent)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
