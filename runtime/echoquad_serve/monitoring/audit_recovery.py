"""Where an audit log goes on after a stop: what the last process left, and what of it is complete.

A killed process leaves at most an unfinished write behind the last entry; a power cut may leave zeros. That is a torn
part. It stays where it is, and the log goes on in a new file, whose first entry states the torn part's size and hash.
Entries that the head promises and the files lack are another matter: they were removed or damaged.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from echoquad_runtime.storage.regular_file import open_regular
from echoquad_serve.monitoring.audit_entry import MAX_LINE_BYTES, Entry, decode_entry
from echoquad_serve.monitoring.audit_head import Head, decode_head, log_file, log_files

__all__ = ["Recovered", "hash_rest", "recover"]


@dataclass(slots=True)
class Recovered:
    """Where the log goes on.

    Attributes
    ----------
    head
        The end of the last complete entry.
    file
        Number of the file to write: that of the head, or a new one after a torn part or a fault.
    torn
        Torn parts, as ``log_repaired`` states them: file, bytes and SHA-256.
    fault
        What is wrong with the log; empty if nothing is.
    last_time
        UTC time of the last entry, as ISO 8601; empty if there is none.
    fresh
        Whether there was no log.
    """

    head: Head
    file: int
    torn: list[dict[str, Any]] = field(default_factory=list)
    fault: str = ""
    last_time: str = ""
    fresh: bool = False


def recover(folder: Path, head_data: bytes, key: bytes) -> Recovered:
    """Return where the log in a folder goes on.

    Parameters
    ----------
    folder
        The folder of the log.
    head_data
        Content of its head file; empty if there was none.
    key
        The site key.

    Raises
    ------
    OSError
        If a file cannot be read.
    """
    files = log_files(folder)
    if not files and not head_data:
        return Recovered(Head(), 1, fresh=True)
    last = max(files, default=0)
    found = _at_head(folder, files, head_data, key)
    _read_on(files, found, key)
    if found.fault or found.torn:
        found.file = last + 1
    elif last > found.file:  # it was begun, and has no entry yet
        found.file = last
        found.head = replace(found.head, file=last, bytes=0)
    return found


def hash_rest(stream: IO[bytes]) -> tuple[int, str]:
    """Return the number of bytes from here to the end of a file, and their SHA-256."""
    digest, count = hashlib.sha256(), 0
    while block := stream.read(1 << 20):
        digest.update(block)
        count += len(block)
    return count, digest.hexdigest()


def _at_head(folder: Path, files: dict[int, Path], head_data: bytes, key: bytes) -> Recovered:
    """Return the position that the head states, from which the log is read on, and what is wrong up to there."""
    try:
        head = decode_head(head_data, key)
    except ValueError as error:
        fault = "the head file is damaged" if head_data else "the head file is missing"
        if "site key" in str(error):
            fault = "the head file is of another site key"
        last = max(files, default=0)
        # Without a head, the first entry of the last file is believed.
        head = Head(file=last) if last <= 1 else _first_of(files[last], last, key)
        return Recovered(head, last, fault=fault)
    found = Recovered(head, head.file)
    if head.entries == 0 and head.bytes == 0:
        return found
    path = log_file(folder, head.file)
    if not path.is_file():
        found.fault = "the last file is missing"
        return found
    with open_regular(path) as stream:
        stream.seek(max(head.bytes - MAX_LINE_BYTES, 0))
        before = stream.read(min(head.bytes, MAX_LINE_BYTES))
    entry = _entry(before[before.rfind(b"\n", 0, -1) + 1 :], key)
    if entry is None or (entry.seq, entry.hash) != (head.entries, head.hash):
        found.fault = "entries at the end are missing or changed"
    else:
        found.last_time = entry.time
    return found


def _first_of(path: Path, number: int, key: bytes) -> Head:
    with open_regular(path) as stream:
        line = stream.readline(MAX_LINE_BYTES)
    entry = _entry(line, key)
    return Head(file=number) if entry is None else Head(entry.seq, entry.hash, number, len(line))


def _read_on(files: dict[int, Path], found: Recovered, key: bytes) -> None:
    """Read entries after the head, which a killed process may have written without the head; collect torn parts."""
    for number in [name for name in files if name >= found.head.file]:
        offset = found.head.bytes if number == found.head.file else 0
        with open_regular(files[number]) as stream:
            stream.seek(offset)
            while True:
                line = stream.readline(MAX_LINE_BYTES)
                entry = _entry(line, key)
                if entry is None or (entry.seq, entry.previous) != (found.head.entries + 1, found.head.hash):
                    break
                if entry.event == "log_repaired":
                    found.torn = []  # an earlier start has stated them
                offset += len(line)
                found.head = Head(entry.seq, entry.hash, number, offset)
                found.file, found.last_time = number, entry.time
            if line and not found.fault:
                stream.seek(offset)
                count, digest = hash_rest(stream)
                found.torn.append({"file": files[number].name, "bytes": count, "sha256": digest})


def _entry(line: bytes, key: bytes) -> Entry | None:
    try:
        return decode_entry(line, key)
    except ValueError:
        return None
