"""The files of an audit log: their names, and the head, a small file that states where the log ends.

The head is overwritten in place after each write of the log, and has always the same size. Whoever removes entries at
the end of the log has to forge the head too, which takes the site key.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from echoquad_runtime.contract import canonical_json
from echoquad_serve.monitoring.audit_entry import NO_HASH, mac

__all__ = ["HEAD", "HEAD_BYTES", "Head", "decode_head", "encode_head", "log_file", "log_files"]

HEAD: Final = "head.json"
HEAD_BYTES: Final = 512
"""Size of the file, padded with spaces: a disk writes a sector wholly or not at all."""

_NAME: Final = re.compile(r"audit-([0-9]{6,9})\.jsonl")


@dataclass(frozen=True, slots=True)
class Head:
    """Where the log ends: number of entries, hash of the last, number of its file, and bytes of the file up to it."""

    entries: int = 0
    hash: str = NO_HASH
    file: int = 1
    bytes: int = 0


def log_file(folder: Path, number: int) -> Path:
    """Return the path of a log file; the first is number 1."""
    return folder / f"audit-{number:06d}.jsonl"


def log_files(folder: Path) -> dict[int, Path]:
    """Return the log files of a folder by number, in order.

    Raises
    ------
    OSError
        If the folder cannot be read.
    """
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    by_number = {int(match[1]): path for match, path in found if match is not None}
    return dict(sorted(by_number.items()))


def encode_head(head: Head, key: bytes) -> bytes:
    """Return the content of the head file."""
    content: dict[str, object] = asdict(head)
    content["mac"] = mac(key, "head", canonical_json(content))
    content["sha256"] = hashlib.sha256(canonical_json(content).encode("ascii")).hexdigest()
    return canonical_json(content).encode("ascii").ljust(HEAD_BYTES - 1) + b"\n"


def decode_head(data: bytes, key: bytes | None) -> Head:
    """Return the head of a file's content, after checking every byte, and with a key its MAC.

    Raises
    ------
    ValueError
        If a check fails; the message states what is wrong.
    """
    try:
        found = json.loads(data.decode("ascii"))
        if canonical_json(found).encode("ascii").ljust(HEAD_BYTES - 1) + b"\n" != data:
            raise ValueError
        digest = found.pop("sha256")
        if digest != hashlib.sha256(canonical_json(found).encode("ascii")).hexdigest():
            raise ValueError
        stated = found.pop("mac")
        head = Head(**found)
        if [type(value) for value in asdict(head).values()] != [int, str, int, int]:
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError("the head file was changed or damaged") from None
    if key is not None and not hmac.compare_digest(str(stated), mac(key, "head", canonical_json(found))):
        raise ValueError("the head file was not written with this site key")
    return head
