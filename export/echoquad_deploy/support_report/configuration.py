"""The service's configuration for a report: keys that the service knows, numbers and choices; names are replaced.

The file is read here and not by the service's reader, because a file that the service refuses is a common reason for a
report.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from echoquad_deploy.support_report.program_texts import WITHHELD, finite_number
from echoquad_deploy.support_report.pseudonyms import Pseudonyms
from echoquad_runtime.storage.regular_file import read_regular

__all__ = ["SCHEMA", "Configuration", "read_configuration", "show_values"]

_MAX_BYTES: Final = 1 << 20

Rule = str | frozenset[str] | Mapping[str, Any]
"""How a value is shown: ``number``, ``host``, ``path``, ``url``, ``source`` or a kind of pseudonym; the texts that are
shown as they are; or the rules of a table."""


def _choice(*texts: str) -> frozenset[str]:
    return frozenset(texts)


_TLS: Final = {"certificate": "path", "key": "path", "client_ca": "path"}
SCHEMA: Final[Mapping[str, Any]] = {
    "http": {
        **dict.fromkeys(("port", "max_body_mb"), "number"),
        **dict.fromkeys(("host", "allowed_hosts"), "host"),
        "token_file": "path",
        "tls": _TLS,
    },
    "model": {
        "device": _choice("auto", "cpu", "cuda", "openvino"),
        "precision": _choice("fp32", "fp16", "int8", "bf16", "tf32"),
        "vote": _choice("majority", "average", "weighted"),
        **dict.fromkeys(("threads", "abstain_below", "abstain_unlike", "every"), "number"),
        **dict.fromkeys(("public_key", "shadow", "bundle_folder"), "path"),
    },
    "store": {
        "folder": "path",
        **dict.fromkeys(("max_waiting", "min_free_mb", "deadline_s", "keep_days"), "number"),
        "discard": "destination",
    },
    "folder": {"path": "path", "poll_s": "number", "after": _choice("leave", "delete", "move")},
    "dicom": {
        "ae_title": "ae-title",
        "host": "host",
        **dict.fromkeys(("port", "max_associations", "acse_timeout_s", "network_timeout_s"), "number"),
        "caller": {"ae_title": "ae-title", "address": "host", "port": "number"},
        "tls": _TLS,
    },
    "destination": {
        "name": "destination",
        "type": _choice("folder", "webhook", "dicom"),
        **dict.fromkeys(("path", "token_file"), "path"),
        "url": "url",
        "host": "host",
        **dict.fromkeys(("port", "commitment", "timeout_s"), "number"),
        **dict.fromkeys(("ae_title", "calling_ae_title"), "ae-title"),
        "reports": _choice("sr", "sc"),
        "origins": _choice("http", "folder", "dicom", "live"),
        "tls": _TLS,
    },
    "live": {"source": "source", "smoothing": "number", "max_fps": "number"},
    "monitoring": {"audit_log": "number", "site_key_file": "path", "drift_window": "number"},
}
"""The rule of every key of the service's configuration; a test compares it with the service's own."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """A configuration file, as far as a report uses it.

    Attributes
    ----------
    shown
        What the report shows.
    store
        Folder of the queue; None if it is not known.
    public_key
        The key that bundles must be signed with, if one is configured.
    port
        Port of the service on this machine, if it listens without TLS where a loopback connection reaches it.
    """

    shown: dict[str, Any]
    store: Path | None = None
    public_key: Path | None = None
    port: int | None = None


def read_configuration(path: Path | None, pseudonyms: Pseudonyms) -> Configuration:
    """Read a configuration file for a report. Whatever is wrong with it becomes part of what is shown."""
    if path is None:
        return Configuration({"file": "none given or found"})
    try:
        values = tomllib.loads(read_regular(path, _MAX_BYTES).decode("utf-8-sig"))
    except OSError as error:
        return Configuration({"file": "cannot be read", "reason": os.strerror(error.errno or 0)})
    except (UnicodeDecodeError, RecursionError):
        return Configuration({"file": "is not TOML"})
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
        where = {} if place is None else {"line": int(place[1]), "column": int(place[2])}
        return Configuration({"file": "is not TOML", **where})
    folder = path.absolute().parent
    shown = {"file": "read", **show_values(values, folder, pseudonyms)}
    http, store = _dict(values.get("http")), _dict(values.get("store"))
    host, port = http.get("host", "127.0.0.1"), http.get("port", 8770)
    reachable = host in ("127.0.0.1", "localhost", "0.0.0.0") and "tls" not in http and type(port) is int
    return Configuration(
        shown,
        _path(store.get("folder", "echoquad-service"), folder),
        _path(_dict(values.get("model")).get("public_key"), folder),
        port if reachable else None,
    )


def show_values(values: Mapping[str, Any], folder: Path, pseudonyms: Pseudonyms) -> dict[str, Any]:
    """Return what a report shows of the values of a configuration file in a folder."""
    return _table(values, SCHEMA, pseudonyms, folder)


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _path(value: object, folder: Path) -> Path | None:
    return folder / value if isinstance(value, str) and "\0" not in value else None


def _table(values: Mapping[str, Any], rules: Mapping[str, Any], names: Pseudonyms, folder: Path) -> dict[str, Any]:
    shown = {key: _value(values[key], rules[key], names, folder) for key in rules if key in values}
    unknown = len(values.keys() - rules.keys())
    return {**shown, "unknown_keys": unknown} if unknown else shown


def _value(value: object, rule: Rule, names: Pseudonyms, folder: Path) -> Any:
    if isinstance(value, list):
        return [_value(one, rule, names, folder) for one in value]
    if isinstance(rule, Mapping):
        return _table(value, rule, names, folder) if isinstance(value, dict) else WITHHELD
    if rule == "number":
        return finite_number(value)
    if not isinstance(value, str):
        return WITHHELD
    if isinstance(rule, frozenset):
        return value if value in rule else WITHHELD
    special: Mapping[str, Callable[[str], Any]] = {
        "host": lambda text: _host(text, names),
        "path": lambda text: _path_facts(text, names, folder),
        "url": lambda text: _scheme(text, ("http", "https"), names),
        "source": lambda text: _scheme(text, ("v4l2", "rtsp", "rtsps", "lavfi"), names),
    }
    return special[rule](value) if rule in special else names.replace(rule, value)


def _host(text: str, names: Pseudonyms) -> str:
    """Return an address that means this machine, or all of its addresses; else a pseudonym."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return text if text in ("", "localhost") else names.replace("host", text)
    return text if address.is_loopback or address.is_unspecified else names.replace("host", text)


def _scheme(text: str, known: tuple[str, ...], names: Pseudonyms) -> str:
    scheme = text.partition(":")[0].lower()
    return f"{scheme}: {names.replace('address', text)}" if scheme in known else names.replace("path", text)


def _path_facts(text: str, names: Pseudonyms, folder: Path) -> dict[str, Any]:
    """Return what is at a path, without the path: names of folders may be those of patients."""
    shown: dict[str, Any] = {"path": names.replace("path", text)}
    try:
        path = folder / text
        found = path.stat()
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None)
        return {**shown, "is": os.strerror(number) if number else "not a path"}
    kind = "folder" if stat.S_ISDIR(found.st_mode) else "file" if stat.S_ISREG(found.st_mode) else "other"
    user = os.getuid() if hasattr(os, "getuid") else None
    owner = "root" if found.st_uid == 0 else "this user" if found.st_uid == user else "another user"
    return {
        **shown,
        "is": kind,
        "mode": f"{stat.S_IMODE(found.st_mode):04o}",
        "owner": owner,
        "readable": os.access(path, os.R_OK),
        "writable": os.access(path, os.W_OK),
    }
