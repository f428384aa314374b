"""The latest lines of the service's JSON log, reduced to known fields with values of known forms.

The service writes no value of a patient into its log. A file may hold other lines: those of another program, or of a
version with a fault. So nothing passes here that is not a text of the program's source, a number in a numeric field, a
time or a hash.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from echoquad_deploy.support_report.program_texts import WITHHELD, ProgramTexts, finite_number
from echoquad_deploy.support_report.pseudonyms import Pseudonyms
from echoquad_runtime.storage.regular_file import open_regular

__all__ = ["FIELDS", "MAX_LINES", "LogFilter", "read_tail"]

MAX_LINES: Final = 2000
_MAX_BYTES: Final = 4 << 20
"""Of the end of a log file that is read."""

_TIME: Final = re.compile(r"20[2-9]\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
_ERROR_LINE: Final = re.compile(r"error\[(E_[A-Z0-9_]{1,60})\]:.*")
"""The line with which a command ends that fails; the text behind the code may quote a path."""
_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_PACKAGES: Final = (
    *("uvicorn", "starlette", "pynetdicom", "pydicom", "highdicom", "PIL", "onnxruntime", "av", "asyncio"),
    *("py", "h11", "anyio", "other"),
)
FIELDS: Final[Mapping[str, str]] = {
    "time": "time",
    "level": "level",
    "logger": "logger",
    "message": "message",
    "location": "location",
    "exception": "exception",
    **dict.fromkeys(("attempts", "bytes", "count", "dropped", "entries", "fps", "frames", "free_mb"), "number"),
    **dict.fromkeys(("http_status", "ms", "number", "port", "refused", "rows", "seconds", "waiting"), "number"),
    **dict.fromkeys(("bundle_sha256", "configuration_sha256"), "digest"),
    **dict.fromkeys(("code", "device", "precision", "provider"), "constant"),
    **dict.fromkeys(("method", "origin", "route", "state", "status"), "constant"),
    "version": "version",
    "destination": "destination",
    "job": "job",
    "object_hash": "withheld",
}
"""The form of each field; others are counted only. The hash of an object is withheld: it stands for a patient's."""


class LogFilter:
    """Reduces log lines, and counts what it leaves out.

    Parameters
    ----------
    texts
        The texts that may pass.
    pseudonyms
        Those of the configuration: destinations are named as there.

    Attributes
    ----------
    counts
        Number of lines read, of lines that are neither the service's JSON nor an error of a command, and of fields left
        out.
    """

    def __init__(self, texts: ProgramTexts, pseudonyms: Pseudonyms) -> None:
        self.counts: Counter[str] = Counter(lines=0, other_lines=0, unknown_fields=0)
        self._texts, self._names = texts, pseudonyms
        self._forms: Mapping[str, Callable[[Any], Any]] = {
            "time": lambda value: _match(value, _TIME),
            "level": lambda value: value if value in _LEVELS else WITHHELD,
            "logger": self._logger,
            "message": texts.message,
            "location": texts.location,
            "exception": self._exception,
            "number": finite_number,
            "digest": lambda value: _match(value, re.compile("[0-9a-f]{64}")),
            "constant": texts.constant,
            "version": lambda value: _match(value, re.compile(r"\d{1,3}(\.\d{1,4}){1,3}")),
            "destination": lambda value: pseudonyms.find("destination", value) or WITHHELD,
            "job": lambda value: pseudonyms.replace("job", value) if isinstance(value, str) else WITHHELD,
            "withheld": lambda _: WITHHELD,
        }

    def reduce(self, lines: Iterable[bytes]) -> list[str]:
        """Return the reduced lines, the last `MAX_LINES` of them, as JSON without line ends."""
        return [line for line in map(self._reduce, list(lines)[-MAX_LINES:]) if line]

    def _reduce(self, line: bytes) -> str:
        self.counts["lines"] += 1
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if (found := _ERROR_LINE.fullmatch(line.decode("utf-8", "replace").strip())) is not None:
            return json.dumps({"code": self._texts.constant(found[1]), "message": WITHHELD})
        if not isinstance(values, dict) or not {"time", "level", "logger", "message"} <= values.keys():
            self.counts["other_lines"] += 1
            return ""
        self.counts["unknown_fields"] += len(values.keys() - FIELDS.keys())
        return json.dumps({key: self._forms[FIELDS[key]](value) for key, value in values.items() if key in FIELDS})

    def _logger(self, value: object) -> str:
        if not isinstance(value, str):
            return WITHHELD
        known = value in self._texts.modules or value in self._texts.constants or value in _PACKAGES
        return value if known else WITHHELD

    def _exception(self, value: object) -> Any:
        if not isinstance(value, dict):
            return WITHHELD
        kind = value.get("type")
        shown = {"type": kind if isinstance(kind, str) and kind in self._texts.exceptions else WITHHELD}
        if "location" in value:
            shown["location"] = self._texts.location(value["location"])
        if "code" in value:
            shown["code"] = self._texts.constant(value["code"])
        return shown


def read_tail(path: Path) -> list[bytes]:
    """Return the last lines of a file, at most `MAX_LINES`, without their ends.

    Raises
    ------
    OSError
        If it cannot be read, or is no regular file.
    """
    with open_regular(path) as stream:  # a pipe would block
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _MAX_BYTES))
        lines = stream.read(_MAX_BYTES).splitlines()
    return (lines[1:] if size > _MAX_BYTES else lines)[-MAX_LINES:]


def _match(value: object, pattern: re.Pattern[str]) -> str:
    return value if isinstance(value, str) and pattern.fullmatch(value) else WITHHELD
