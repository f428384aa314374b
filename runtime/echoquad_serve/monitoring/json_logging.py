"""Logs as JSON lines, into which no value of a patient gets.

A log record may carry anything: a file name, a DICOM identifier, the text of an exception that quotes one. So nothing
of it is trusted but what has a known form.

- EchoQuad's own loggers: the message is the constant text of the call. Numbers, codes and names of errors, and texts
  of the system are filled in, anything else is withheld. Fields given by ``extra=`` pass if they are listed here and
  have their form.
- Loggers of other packages: at WARNING and above, the name of the package and the level.
- Exceptions: their type and where they were raised. Text passes only from errors about the installation.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TextIO

from echoquad_runtime import errors

__all__ = ["FIELDS", "JsonFormatter", "configure_logging"]

WITHHELD: Final = "[withheld]"

_OWN: Final = ("echoquad", "echoquad_runtime", "echoquad_serve")
_FOREIGN_TEXT: Final = "a message of another package, whose text may hold patient values"

_SAFE_TEXT: Final = (
    errors.BundleError,
    errors.ConfigError,
    errors.ContractError,
    errors.DeviceUnavailableError,
    errors.HostError,
    errors.MissingExtraError,
    errors.VerificationError,
)
"""Errors about the installation, whose text names no object: it passes."""


def _matches(pattern: str) -> Callable[[Any], bool]:
    compiled = re.compile(pattern)
    return lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float)


_digest, _word, _name = _matches("[0-9a-f]{64}"), _matches("[A-Za-z0-9_.+-]{1,64}"), _matches(r"[\w .:-]{1,64}")
FIELDS: Final[Mapping[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("attempts", "bytes", "count", "dropped", "entries", "fps", "frames", "free_mb", "http_status", "ms", "number"),
        _is_number,
    ),
    **dict.fromkeys(("port", "refused", "rows", "seconds", "waiting"), _is_number),
    **dict.fromkeys(("bundle_sha256", "configuration_sha256", "object_hash"), _digest),
    **dict.fromkeys(("device", "precision", "provider", "version"), _word),
    "code": _matches("E_[A-Z0-9_]{1,60}"),
    "destination": _name,
    "job": _matches("[0-9a-f]{32}"),
    "method": _matches("GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS"),
    "origin": _matches("http|folder|dicom|live"),
    "route": _matches(r"[\w/{}.-]{1,80}"),  # the pattern of the path, as the service defines it
    "state": _matches("ok|frozen|no signal|stopped|ready|not ready"),
    "status": _matches("done|failed|expired"),
}
"""The fields that ``extra=`` may add, each with the check of its value. A destination is named in the configuration."""


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON without any value that could be a patient's."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname if record.levelno in _LEVELS else "WARNING",
            "logger": _logger_name(record.name),
        }
        if not _is_own(record.name):
            return json.dumps({**line, "message": _FOREIGN_TEXT})
        line["message"] = _message(record)
        line["location"] = f"{record.module}:{record.lineno}"
        for name, valid in FIELDS.items():
            if name in record.__dict__:
                value = record.__dict__[name]
                line[name] = value if valid(value) else WITHHELD
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = _exception(record.exc_info[1])
        return json.dumps(line, allow_nan=True)


class _Handler(logging.StreamHandler[TextIO]):
    """Writes the lines. A record that cannot be written is dropped: Python would print it with its arguments."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        """Drop the record."""


def configure_logging(stream: TextIO, level: int = logging.INFO) -> Callable[[], None]:
    """Write all logs of this process to a stream as JSON lines, and return a function that undoes it.

    Handlers that other packages have installed are removed: they would print what this module withholds. Warnings and
    exceptions that nobody catches, in any thread, become lines too.

    Parameters
    ----------
    stream
        Where the lines go; each is flushed.
    level
        Lowest level of EchoQuad's own messages. That of other packages is WARNING.
    """
    handler = _Handler(stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    names = [name for name, found in logging.root.manager.loggerDict.items() if isinstance(found, logging.Logger)]
    loggers = [root, *(logging.getLogger(name) for name in names)]
    before = [(it, it.level, list(it.handlers), it.propagate, it.disabled) for it in loggers]
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning
    for found in loggers[1:]:
        found.handlers = [it for it in found.handlers if isinstance(it, logging.NullHandler)]
        found.propagate = True
        if not _is_own(found.name):
            found.setLevel(logging.NOTSET)  # the root's
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    own = [(name, logging.getLogger(name).level) for name in _OWN]
    for name in _OWN:
        logging.getLogger(name).setLevel(level)
    handler.addFilter(lambda record: record.levelno >= (level if _is_own(record.name) else logging.WARNING))
    logging.captureWarnings(True)
    _install_hooks()

    def undo() -> None:
        logging.captureWarnings(False)
        sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning = hooks
        for name, level_before in own:
            logging.getLogger(name).setLevel(level_before)
        for found, level_before, handlers, propagate, disabled in before:
            found.setLevel(level_before)
            found.handlers, found.propagate, found.disabled = handlers, propagate, disabled

    return undo


def _install_hooks() -> None:
    """Log exceptions that nobody catches: Python would print their text, which may quote a patient's name."""
    log = logging.getLogger("echoquad_serve")

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        log.critical("an exception ends the process", exc_info=(kind, error, trace))

    def in_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and args.exc_type is not SystemExit:
            log.critical("an exception ends a thread", exc_info=(args.exc_type, args.exc_value, args.exc_traceback))

    def unraisable(args: Any) -> None:
        log.error("an exception cannot be raised", exc_info=(args.exc_type, args.exc_value, args.exc_traceback))

    sys.excepthook, threading.excepthook, sys.unraisablehook = uncaught, in_thread, unraisable


_SYSTEM_TEXTS: Final = frozenset(os.strerror(number) for number in errno.errorcode)
_KIND: Final = re.compile("E_[A-Z0-9_]{1,60}|[A-Z][A-Za-z]{1,40}(Error|Exception|Timeout)")
"""The code of an error, or the name of an exception."""

_LEVELS: Final = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)


def _is_own(name: str) -> bool:
    return name.partition(".")[0] in _OWN


def _logger_name(name: str) -> str:
    """Return the name of a logger: a module's, else the package that it begins with, else ``other``."""
    if name in sys.modules:
        return name
    package = name.partition(".")[0]
    return package if package in sys.modules else "other"


def _message(record: logging.LogRecord) -> str:
    """Return the text of the call, with its numbers. A test holds that own calls have constant texts."""
    if not isinstance(record.msg, str):
        return WITHHELD
    if not record.args:
        return record.msg
    given = record.args
    args: object = (
        {key: _safe(value) for key, value in given.items()}
        if isinstance(given, Mapping)
        else tuple(_safe(value) for value in given)
    )
    try:
        return record.msg % args
    except (TypeError, ValueError, KeyError):
        return record.msg


def _safe(value: object) -> object:
    """Return what a message may show of an argument."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, BaseException):
        return _exception(value).get("code") or type(value).__name__
    if isinstance(value, str) and (value in _SYSTEM_TEXTS or _KIND.fullmatch(value)):
        return value
    return WITHHELD


def _exception(error: BaseException) -> dict[str, str]:
    """Return type and place of an exception; the code of an EchoQuadError, and the text of one of the installation."""
    kind = type(error)
    found = {"type": kind.__name__ if kind.__module__ in sys.modules else "Exception"}
    frames = traceback.extract_tb(error.__traceback__)
    if frames:
        found["location"] = " < ".join(f"{Path(it.filename).stem}:{it.lineno}" for it in reversed(frames[-6:]))
    if isinstance(error, errors.EchoQuadError):
        found["code"] = error.code
        if isinstance(error, _SAFE_TEXT):
            found["text"] = " ".join(str(error).split())
    return found
