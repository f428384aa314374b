"""Verification of an audit log: every entry, the chain over all files, and the head."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echoquad_runtime.errors import InputNotFoundError
from echoquad_runtime.storage.regular_file import open_regular, read_regular
from echoquad_serve.errors import AuditLogError
from echoquad_serve.monitoring.audit_entry import KEY_BYTES, MAX_LINE_BYTES, NO_HASH, Entry, decode_entry
from echoquad_serve.monitoring.audit_head import HEAD, HEAD_BYTES, Head, decode_head, log_files
from echoquad_serve.monitoring.audit_recovery import hash_rest

__all__ = ["AuditSummary", "read_site_key", "verify_audit_log"]


@dataclass(slots=True)
class AuditSummary:
    """What a verified log holds.

    Attributes
    ----------
    files, entries
        Numbers of files and of entries.
    first, last
        UTC times of the first and the last entry.
    hash
        Hash of the last entry.
    repaired
        Number of unfinished writes that the log states.
    unfinished
        Bytes of an unfinished write at the end, which the service states at its next start.
    whole
        Whether the log was verified from its first entry to its head; False for a single file.
    keyed
        Whether the entries were verified with the site key.
    """

    files: int = 0
    entries: int = 0
    first: str = ""
    last: str = ""
    hash: str = NO_HASH
    repaired: int = 0
    unfinished: int = 0
    whole: bool = True
    keyed: bool = False

    def __str__(self) -> str:
        """Return the summary as one line."""
        plural = "" if self.files == 1 else "s"
        parts = [f"{self.entries} entries in {self.files} file{plural}"]
        if self.entries:
            parts.append(f"{self.first} to {self.last}; last hash {self.hash}")
        parts.append("site key verified" if self.keyed else "without the site key, so a forged log is not found")
        if self.repaired:
            parts.append(f"{self.repaired} unfinished writes on record")
        if self.unfinished:
            parts.append(f"{self.unfinished} bytes of an unfinished write at the end")
        if not self.whole:
            parts.append("this file alone: not what is before and after it")
        return "; ".join(parts)


@dataclass(slots=True)
class _Chain:
    """The state of a verification: the last entry, and torn parts that no entry has stated yet."""

    key: bytes | None
    summary: AuditSummary
    head: Head | None
    seq: int | None = None  # None before the first entry of a single file, which may have any number
    torn: list[dict[str, Any]] = field(default_factory=list)
    torn_at: str = ""
    unfinished: bool = False  # whether the last torn part is a line without an end
    fault: str = ""
    at_head: str | None = None


def read_site_key(path: Path) -> bytes:
    """Return the site key of a file, which must exist.

    Raises
    ------
    InputNotFoundError
        If it cannot be read, or is no site key.
    """
    try:
        key = read_regular(path, KEY_BYTES)
    except OSError as error:
        raise InputNotFoundError(
            f"{path.as_posix()}: the site key cannot be read ({error.strerror or error})"
        ) from error
    if len(key) != KEY_BYTES:
        raise InputNotFoundError(f"{path.as_posix()}: is no site key; expected a file of {KEY_BYTES} bytes")
    return key


def verify_audit_log(path: Path, key: bytes | None = None) -> AuditSummary:
    """Verify an audit log, also while the service writes it.

    Parameters
    ----------
    path
        The folder of the log, or one of its files.
    key
        The site key; None verifies the chain alone.

    Raises
    ------
    AuditLogError
        If the log was changed; the message names the file, the line and the fault.
    InputNotFoundError
        If there is no audit log, or it cannot be read.
    """
    try:
        return _verify(path, key)
    except (AuditLogError, InputNotFoundError):
        raise
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputNotFoundError(
            f"{path.as_posix()}: the audit log cannot be read ({reason}); check the path"
        ) from error


def _verify(path: Path, key: bytes | None) -> AuditSummary:
    if not path.is_dir():
        chain = _Chain(key, AuditSummary(files=1, whole=False, keyed=key is not None), None)
        _verify_file(path, chain)
        if not chain.summary.entries and not chain.torn:
            raise InputNotFoundError(f"{path.as_posix()}: holds no entry of an audit log; expected audit-NNNNNN.jsonl")
        return _finish(chain)
    head = _read_head(path, key)  # before the files: the service writes it after them
    files = log_files(path)
    if not files and head is None:
        raise InputNotFoundError(f"{path.as_posix()}: no audit log here; expected audit-000001.jsonl and {HEAD}")
    if head is None:
        raise AuditLogError(f"{(path / HEAD).as_posix()}:1: the head file is missing: the end of the log may be too")
    for expected, (number, file) in enumerate(files.items(), 1):
        if number != expected:
            raise AuditLogError(f"{file.as_posix()}:1: audit-{expected:06d}.jsonl, the file before, is missing")
    chain = _Chain(key, AuditSummary(files=len(files), keyed=key is not None), head, seq=0)
    for file in files.values():
        _verify_file(file, chain)
    summary = chain.summary
    if summary.entries < head.entries:
        where = chain.torn_at or f"{(path / HEAD).as_posix()}:1: entries at the end were removed"
        raise AuditLogError(f"{where}; the log ends after entry {summary.entries}, but the head states {head.entries}")
    if head.entries and chain.at_head != head.hash:
        raise AuditLogError(f"{(path / HEAD).as_posix()}:1: entry {head.entries} is another one than the head states")
    return _finish(chain)


def _finish(chain: _Chain) -> AuditSummary:
    """Return the summary, unless the rest of the log is no unfinished write, or the service has found a fault."""
    if chain.torn and not chain.unfinished:
        raise AuditLogError(chain.torn_at)
    if chain.fault:
        raise AuditLogError(chain.fault)
    chain.summary.unfinished = sum(part["bytes"] for part in chain.torn)
    return chain.summary


def _read_head(folder: Path, key: bytes | None) -> Head | None:
    path, before = folder / HEAD, None
    while True:
        try:
            data = read_regular(path, HEAD_BYTES)
            return decode_head(data, key)
        except FileNotFoundError:
            return None
        except ValueError as error:
            if data == before:
                raise AuditLogError(f"{path.as_posix()}:1: {error}") from None
        before = data  # the service may just have been writing it


def _verify_file(file: Path, chain: _Chain) -> None:
    """Verify the entries of a file up to the first that is wrong. A later entry may state the rest as unfinished."""
    with open_regular(file) as stream:
        for number in itertools.count(1):
            offset = stream.tell()
            line = stream.readline(MAX_LINE_BYTES)
            if not line:
                return
            try:
                _add(decode_entry(line, chain.key), chain, f"{file.as_posix()}:{number}")
            except ValueError as error:
                stream.seek(offset)
                size, digest = hash_rest(stream)
                chain.torn_at = chain.torn_at or f"{file.as_posix()}:{number}: {error}"
                chain.unfinished = not line.endswith(b"\n")
                chain.torn.append({"file": file.name, "bytes": size, "sha256": digest})
                return


def _add(entry: Entry, chain: _Chain, where: str) -> None:
    """Add an entry to the chain.

    Raises
    ------
    AuditLogError
        If what is before it is neither complete nor stated by it.
    ValueError
        If it does not follow the entry before.
    """
    summary = chain.summary
    if chain.torn:
        if entry.event != "log_repaired" or entry.content.get("torn") != chain.torn:
            raise AuditLogError(chain.torn_at)
        summary.repaired += len(chain.torn)
        chain.torn, chain.torn_at = [], ""
    elif entry.event == "log_repaired" and chain.seq is not None and summary.whole:
        raise ValueError("the entry states an unfinished write that is not there")
    if chain.seq is not None and entry.seq != chain.seq + 1:
        raise ValueError(
            f"entry {entry.seq} follows entry {chain.seq}: entries were removed, repeated or exchanged, or the file "
            "between is missing"
        )
    expected = NO_HASH if entry.seq == 1 else summary.hash if chain.seq is not None else entry.previous
    if entry.previous != expected:
        raise ValueError(f"entry {entry.seq} does not follow the entry before: that one was replaced")
    if entry.event == "log_fault" and not chain.fault:
        reason = entry.content.get("reason", "a fault")
        chain.fault = f"{where}: the service states at its start: {reason}; restore the log from a copy, and compare"
    if chain.head is not None and entry.seq == chain.head.entries:
        chain.at_head = entry.hash
    chain.seq, summary.hash, summary.last = entry.seq, entry.hash, entry.time
    summary.first = summary.first or entry.time
    summary.entries += 1
