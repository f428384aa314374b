"""What a wheel states about itself: name, version, licence, requirements, and the SHA-256 of its bytes.

The package ``packaging`` parses names, versions, licence expressions and requirements. It is not imported with this
module: a cart does not need it.
"""

from __future__ import annotations

import hashlib
import importlib
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from types import ModuleType
from typing import Final
from urllib.parse import quote

from echoquad_runtime.errors import ConfigError, MissingExtraError

__all__ = ["Wheel", "import_packaging", "read_wheel"]

_MAX_METADATA: Final = 1 << 22  # bytes; METADATA holds a package's whole README
_MAX_LICENCE: Final = 120  # characters; some packages put the whole text of their licence into the field


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel.

    Attributes
    ----------
    file
        File name.
    name
        Normalised name of the package: lower case, with hyphens.
    version
        Version, as METADATA states it.
    sha256
        Of the file, in hexadecimal.
    bytes
        Size of the file.
    summary
        One line about the package; may be empty.
    expression
        SPDX licence expression; empty if the wheel states none.
    licences
        Names of licences in other words, if there is no expression; may be empty.
    requirements
        Lines of ``Requires-Dist``.
    extras
        Names of ``Provides-Extra``.
    """

    file: str
    name: str
    version: str
    sha256: str
    bytes: int
    summary: str
    expression: str
    licences: tuple[str, ...]
    requirements: tuple[str, ...]
    extras: tuple[str, ...]

    @property
    def purl(self) -> str:
        """The package URL, as ``pkg:pypi/numpy@2.4.6``."""
        return f"pkg:pypi/{self.name}@{quote(self.version, safe='')}"


def import_packaging(module: str) -> ModuleType:
    """Import a module of ``packaging``.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    try:
        return importlib.import_module(f"packaging.{module}")
    except ImportError as error:
        raise MissingExtraError(
            f'a bill of materials needs packaging 24.2 or newer ({error}); do: pip install "echoquad[deploy]"'
        ) from error


def read_wheel(path: Path) -> Wheel:
    """Read a wheel's metadata and hash its bytes.

    Raises
    ------
    ConfigError
        If the file is not a wheel, or its name does not match its metadata.
    MissingExtraError
        If ``packaging`` is not installed.
    """
    utils = import_packaging("utils")
    try:
        name, version, _, _ = utils.parse_wheel_filename(path.name)
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            size = stream.tell()
        metadata = _metadata(path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path.name}: expected a wheel ({reason}); download or build it again") from error
    stated = (utils.canonicalize_name(metadata["Name"] or ""), metadata["Version"] or "")
    if stated[0] != name or utils.canonicalize_version(stated[1]) != utils.canonicalize_version(version):
        raise ConfigError(f"{path.name}: its metadata names {stated[0]} {stated[1]}; download or build it again")
    expression, licences = _licence(metadata)
    summary = " ".join((metadata["Summary"] or "").split())
    return Wheel(
        file=path.name,
        name=str(name),
        version=stated[1],
        sha256=digest,
        bytes=size,
        summary="" if summary == "UNKNOWN" else summary,
        expression=expression,
        licences=licences,
        requirements=tuple(metadata.get_all("Requires-Dist", [])),
        extras=tuple(sorted(utils.canonicalize_name(extra) for extra in metadata.get_all("Provides-Extra", []))),
    )


def _metadata(path: Path) -> Message:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith(".dist-info/METADATA")]
        if len(names) != 1:
            raise ValueError(f"it holds {len(names)} files METADATA")
        if archive.getinfo(names[0]).file_size > _MAX_METADATA:
            raise ValueError("its METADATA is too large")
        return HeaderParser().parsestr(archive.read(names[0]).decode("utf-8"))


def _licence(metadata: Message) -> tuple[str, tuple[str, ...]]:
    """Return the licence: an SPDX expression, or else names in the package's own words."""
    licenses = import_packaging("licenses")
    field = " ".join((metadata["License"] or "").split())
    for text in (metadata["License-Expression"], field):
        try:
            if text:
                return str(licenses.canonicalize_license_expression(text)), ()
        except ValueError:  # such as "Apache 2.0", or the whole text of a licence
            continue
    classifiers = {
        line.rpartition("::")[2].strip()
        for line in metadata.get_all("Classifier", [])
        if line.startswith("License ::") and not line.endswith("OSI Approved")
    }
    if classifiers:
        return "", tuple(sorted(classifiers))
    return "", (field,) if 0 < len(field) <= _MAX_LICENCE and field != "UNKNOWN" else ()
