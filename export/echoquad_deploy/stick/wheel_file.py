"""Wheel files: their metadata, their SHA-256, and the licence texts in them."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Final

from echoquad_deploy.stick.errors import WheelhouseError

__all__ = ["WheelFile", "canonical_name"]

_FILE_NAME: Final = re.compile(r"(?P<name>\w[\w.]*)-(?P<version>[\w.!+]+)(-\d\w*)?-[\w.]+-[\w.]+-[\w.]+\.whl")
_LICENCE: Final = re.compile(
    r"(licen[cs]e|copying|copyright|notice|authors|patents|third.?party.?(notices?|licen[cs]es?))", re.IGNORECASE
)
_CODE: Final = {".py", ".pyc", ".pyi", ".so", ".h", ".json", ".js"}
_MAX_METADATA: Final = 1 << 24  # bytes; a thousand times the usual size
_MAX_LICENCE: Final = 1 << 24


def canonical_name(name: str) -> str:
    """Return the normalized name of a distribution: lower case, with hyphens."""
    return re.sub(r"[-_.]+", "-", name).lower()


@dataclass(frozen=True)
class WheelFile:
    """A wheel on disk.

    Attributes
    ----------
    path
        The file.

    Raises
    ------
    WheelhouseError
        If its file name is not that of a wheel.
    """

    path: Path

    def __post_init__(self) -> None:
        if not _FILE_NAME.fullmatch(self.path.name):
            raise WheelhouseError(f"{self.path.as_posix()}: not the file name of a wheel; expected NAME-VERSION-...whl")

    @property
    def name(self) -> str:
        """Normalized name of the distribution."""
        return canonical_name(self._field("name"))

    @property
    def version(self) -> str:
        """Version, as in the file name."""
        return self._field("version")

    def _field(self, name: str) -> str:
        match = _FILE_NAME.fullmatch(self.path.name)
        assert match is not None  # __post_init__ has checked it
        return match[name]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 in hexadecimal."""
        with self.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    @cached_property
    def metadata(self) -> Message:
        """The fields of ``METADATA``.

        Raises
        ------
        WheelhouseError
            If the file is not a wheel.
        """
        text = self._read(f"{self._info}/METADATA", _MAX_METADATA)
        return HeaderParser().parsestr(text.decode("utf-8", "replace"))

    @property
    def _info(self) -> str:
        """The ``.dist-info`` folder. Its name may differ from the file's in case and separators."""
        with self._open() as archive:
            folders = {name.partition("/")[0] for name in archive.namelist() if name.count("/") >= 1}
        found = [name for name in folders if name.endswith(".dist-info")]
        if len(found) != 1:
            raise WheelhouseError(f"{self.path.name}: it holds {len(found)} .dist-info folders, expected 1: no wheel")
        return found[0]

    def _open(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile) as error:
            raise WheelhouseError(
                f"{self.path.as_posix()}: it cannot be read as a wheel ({error}); name another"
            ) from error

    def _read(self, member: str, limit: int) -> bytes:
        try:
            with self._open() as archive, archive.open(member) as stream:
                data = stream.read(limit + 1)
        except (KeyError, OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            raise WheelhouseError(f"{self.path.name}: {member} cannot be read ({error}); download it again") from error
        if len(data) > limit:
            raise WheelhouseError(f"{self.path.name}: {member} has more than {limit} bytes, which no text needs")
        return data

    @property
    def requirements(self) -> list[str]:
        """The lines of ``Requires-Dist``, with markers."""
        return list(self.metadata.get_all("Requires-Dist", []))

    @property
    def extras(self) -> set[str]:
        """Normalized names of the extras."""
        return {canonical_name(name) for name in self.metadata.get_all("Provides-Extra", [])}

    @property
    def licence(self) -> str:
        """The licence in one line, as the metadata names it; empty if they do not."""
        expression = self.metadata["License-Expression"] or ""
        if expression:
            return str(expression).strip()
        classifiers = [str(line) for line in self.metadata.get_all("Classifier", [])]
        names = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License :: ")]
        stated = str(self.metadata["License"] or "").strip()
        if stated and len(stated) <= 80 and "\n" not in stated:  # some put the whole text into this field
            return stated
        return ", ".join(name for name in names if name != "OSI Approved")

    def licence_texts(self) -> Iterator[tuple[PurePosixPath, bytes]]:
        """Yield relative name and content of each licence text, sorted by name.

        These are the files of ``.dist-info/licenses``, and those that are called so anywhere in the wheel: some
        projects, such as onnxruntime, keep theirs among the code.

        Raises
        ------
        WheelhouseError
            If the wheel cannot be read.
        """
        info = self._info
        with self._open() as archive:
            members = sorted(name for name in archive.namelist() if not name.endswith("/"))
        for member in members:
            path = PurePosixPath(member)
            called_so = _LICENCE.match(path.name) and path.suffix.lower() not in _CODE
            if not (called_so or member.startswith(f"{info}/licenses/")):
                continue
            parts = path.parts[1:] if path.parts[0] == info else path.parts
            parts = parts[1:] if parts[0] == "licenses" and len(parts) > 1 else parts
            yield PurePosixPath(*map(_portable, parts)), self._read(member, _MAX_LICENCE)


def _portable(part: str) -> str:
    """Return a name that every file system of a USB stick takes, and that leads nowhere else."""
    name = re.sub(r"[^\w.+ -]", "_", part, flags=re.ASCII).lstrip(" .-").rstrip(" .")
    return name or "_"
