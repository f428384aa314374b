"""The zip file of a report, with a list of what is in it."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from echoquad_runtime.storage.atomic import write_atomically

__all__ = ["MANIFEST", "WARNING", "Member", "write_archive"]

MANIFEST: Final = "MANIFEST.txt"
WARNING: Final = "Send this archive to nobody before you have read every file in it."
_LEFT_OUT: Final = """\
Left out on purpose: names, identifiers, dates and UIDs of patients and studies; names of files, folders, hosts, AE
titles, destinations and classes; tokens, passwords and keys; texts of other programs. A numbered word such as path-2
stands for the same name everywhere in this archive.
"""


@dataclass(frozen=True, slots=True)
class Member:
    """A file of the archive: its name, one line about it, its text."""

    name: str
    about: str
    text: str


def write_archive(path: Path, members: Sequence[Member], heading: str) -> None:
    """Write the members and `MANIFEST` as a zip file, atomically and for its owner only (mode 0600).

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    contents = [(member, member.text.encode("utf-8")) for member in members]
    lines = [
        f"{hashlib.sha256(data).hexdigest()}  {member.name}  ({len(data)} bytes; {member.about})"
        for member, data in contents
    ]
    manifest = "\n".join([WARNING, "", f"Support report of {heading}. SHA-256 and name of each file:", "", *lines, ""])
    with write_atomically(path) as stream:
        if hasattr(os, "fchmod"):  # before the first byte is written
            os.fchmod(stream.fileno(), 0o600)
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in [
                (MANIFEST, f"{manifest}\n{_LEFT_OUT}".encode()),
                *((it.name, data) for it, data in contents),
            ]:
                info = zipfile.ZipInfo(name)  # of 1980: the manifest has the time
                info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o600 << 16
                archive.writestr(info, data)
