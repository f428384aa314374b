"""The code table: what the classes of a model are called in the structured reports of a hospital archive.

A structured report names a finding by a code and not by the name of a class. The table is part of the manifest, so that
it is hashed and signed with the bundle. Codes are those of DICOM PS3.3, 8.8: value, coding scheme, and meaning.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn, TypeGuard

from echoquad_runtime.errors import ConfigError
from echoquad_runtime.storage.regular_file import read_regular

__all__ = ["ENGLISH", "TRANSTHORACIC_ECHO", "ClassCodes", "Code", "CodeTable", "default_codes", "read_code_table"]

_MAX_BYTES: Final = 1 << 20  # of the TOML file
_SNOMED: Final = "SCT"
_LANGUAGES: Final = "RFC5646"
_SCHEME: Final = re.compile(r"[A-Za-z0-9._-]{1,16}")
_LANGUAGE: Final = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*")
_NORMAL: Final = frozenset({"NORM", "NORMAL"})
"""Names of the class without a finding that the default codes know."""

# Verhoeff's check digit, the last digit of every SNOMED CT identifier: it detects each wrong digit and most
# transpositions. J. Verhoeff, Error Detecting Decimal Codes, 1969; SNOMED International, SCTID Check-digit.
_DIHEDRAL: Final = (
    "01234567891234067895234017895634012895674012395678"  # row by row, ten digits each
    "59876043216598710432765982104387659321049876543210"
)
_PERMUTATION: Final = "1576283094"


@dataclass(frozen=True, slots=True)
class Code:
    """A code: its value, at most 16 characters; the designator of its coding scheme; and its meaning, at most 64."""

    value: str
    scheme: str
    meaning: str

    def to_dict(self) -> dict[str, str]:
        """Return the code as JSON values."""
        return {"value": self.value, "scheme": self.scheme, "meaning": self.meaning}

    def __str__(self) -> str:
        return f"{self.meaning} ({self.value} {self.scheme})"


@dataclass(frozen=True, slots=True)
class ClassCodes:
    """The finding that a class stands for, and where in the body it is; None if it has no site."""

    finding: Code
    site: Code | None = None


TRANSTHORACIC_ECHO: Final = Code("433236007", _SNOMED, "Transthoracic echocardiography")
ENGLISH: Final = Code("en-US", _LANGUAGES, "English (United States)")
_DEFECT: Final = ClassCodes(
    Code("70142008", _SNOMED, "Atrial septal defect"), Code("58095006", _SNOMED, "Interatrial septum")
)


@dataclass(frozen=True, slots=True)
class CodeTable:
    """The codes of a model's classes.

    Attributes
    ----------
    classes
        Codes of each class that stands for a finding.
    absent
        The class that means that none of these findings is present; empty if there is none.
    procedure
        The procedure that is reported.
    language
        Language of the meanings.
    """

    classes: Mapping[str, ClassCodes]
    absent: str = ""
    procedure: Code = TRANSTHORACIC_ECHO
    language: Code = field(default=ENGLISH)

    def uncoded(self, classes: Sequence[str]) -> list[str]:
        """Return the classes for which the table has no codes."""
        return [name for name in classes if name not in self.classes and name != self.absent]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON values: the form that it has in the manifest."""
        classes = {
            name: {"finding": codes.finding.to_dict(), **({"site": codes.site.to_dict()} if codes.site else {})}
            for name, codes in sorted(self.classes.items())
        }
        return {
            "class": classes,
            **({"absent": self.absent} if self.absent else {}),
            "procedure": self.procedure.to_dict(),
            "language": self.language.to_dict(),
        }

    @classmethod
    def from_dict(cls, content: object, classes: Sequence[str], label: str) -> CodeTable:
        """Return a checked table from the content of a TOML file or a manifest.

        Parameters
        ----------
        content
            Untrusted.
        classes
            The classes of the contract.
        label
            Begins the error messages.

        Raises
        ------
        ConfigError
            If a key or a class is unknown, or a code is malformed.
        """
        table = _table(content, ("class", "absent", "procedure", "language"), label)
        named = _table(table.get("class", {}), None, f"{label}: class")
        absent = table.get("absent", "")
        for name in [*named, *([absent] if absent != "" else [])]:
            if name not in classes:
                raise ConfigError(f"{label}: unknown class {_short(name)}; expected one of {', '.join(classes)}")
        if absent in named:
            _fail(f"{label}: absent", "the class means that no finding is present; leave its codes out")
        if not named:
            _fail(f"{label}: class", "expected codes for at least one class: [class.NAME.finding]")
        found = {}
        for name, entry in named.items():
            where = f"{label}: class.{name}"
            codes = _table(entry, ("finding", "site"), where)
            site = _code(codes["site"], f"{where}.site") if "site" in codes else None
            found[name] = ClassCodes(_code(codes.get("finding"), f"{where}.finding"), site)
        language = _code(table["language"], f"{label}: language") if "language" in table else ENGLISH
        if language.scheme != _LANGUAGES or not _LANGUAGE.fullmatch(language.value):
            _fail(f"{label}: language", f"expected a value such as en-US, and the scheme {_LANGUAGES}")
        procedure = _code(table["procedure"], f"{label}: procedure") if "procedure" in table else TRANSTHORACIC_ECHO
        return cls(found, absent, procedure, language)


def read_code_table(path: Path, classes: Sequence[str]) -> CodeTable:
    """Read and check a code table.

    Parameters
    ----------
    path
        A TOML file.
    classes
        The classes of the contract.

    Raises
    ------
    ConfigError
        If it cannot be read or is not TOML, a key or a class is unknown, or a code is malformed.
    """
    label = path.as_posix()
    try:
        data = read_regular(path, _MAX_BYTES)
        content = tomllib.loads(data.decode("utf-8-sig")) if len(data) <= _MAX_BYTES else None
    except OSError as error:
        raise ConfigError(f"{label}: the code table cannot be read ({error.strerror or error})") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{label}: the code table is not TOML ({error}); correct it") from error
    return CodeTable.from_dict(content, classes, label)


def default_codes(classes: Sequence[str]) -> CodeTable | None:
    """Return the codes of a bundle without a table: those of an atrial septal defect for the class ``ASD``.

    A class named ``NORM`` or ``NORMAL`` means that it is absent.

    Returns
    -------
    CodeTable or None
        None without a class ``ASD``.
    """
    if "ASD" not in classes:
        return None
    return CodeTable({"ASD": _DEFECT}, next((name for name in classes if name in _NORMAL), ""))


def _table(content: object, keys: Sequence[str] | None, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        _fail(where, "expected a table")
    if keys is not None and (unknown := next((key for key in content if key not in keys), None)) is not None:
        raise ConfigError(f"{where}: unknown key {_short(unknown)}; expected {', '.join(keys)}")
    return content


def _code(content: object, where: str) -> Code:
    table = _table(content, ("value", "scheme", "meaning"), where)
    value, scheme, meaning = (table.get(key) for key in ("value", "scheme", "meaning"))
    if not _is_text(value, 16):
        _fail(f"{where}.value", "expected a text of 1 to 16 characters, such as '70142008'")
    if not isinstance(scheme, str) or not _SCHEME.fullmatch(scheme):
        _fail(f"{where}.scheme", "expected the designator of a coding scheme of 1 to 16 characters, such as 'SCT'")
    if not _is_text(meaning, 64):
        _fail(f"{where}.meaning", "expected a text of 1 to 64 characters")
    if scheme == _SNOMED and not _is_snomed(value):
        _fail(f"{where}.value", "it is no SNOMED CT identifier: its digits or its check digit are wrong; correct it")
    return Code(value, scheme, meaning)


def _is_text(value: object, limit: int) -> TypeGuard[str]:
    """Return whether a value is a text that a DICOM code may contain."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= limit
        and value.isprintable()
        and value == value.strip()
        and "\\" not in value
    )


def _is_snomed(value: str) -> bool:
    if not (value.isascii() and value.isdigit() and 6 <= len(value) <= 18 and value[0] != "0"):
        return False
    check = 0
    for position, digit in enumerate(map(int, reversed(value))):
        for _ in range(position % 8):
            digit = int(_PERMUTATION[digit])  # noqa: PLW2901 - the permutation is applied several times
        check = int(_DIHEDRAL[10 * check + digit])
    return check == 0


def _fail(where: str, message: str) -> NoReturn:
    raise ConfigError(f"{where}: {message}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
