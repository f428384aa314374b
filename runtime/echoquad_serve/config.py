"""The configuration of the service: a TOML file, each table of which is a dataclass.

Relative paths are relative to the file's folder. An unknown table or key is an error, so that a typing error does not
go unnoticed.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, Union

from echoquad_runtime.errors import ConfigError

__all__ = [
    "Caller",
    "DestinationConfig",
    "DicomNodeConfig",
    "FolderIntakeConfig",
    "HttpConfig",
    "LiveConfig",
    "ModelConfig",
    "MonitoringConfig",
    "ServiceConfig",
    "StoreConfig",
    "TlsConfig",
    "load_config",
]

_Table = TypeVar("_Table")

_YEAR_S: Final = 366 * 86400.0
_RANGES: Final[dict[str, tuple[float, float]]] = {
    "port": (0, 65535),
    "max_body_mb": (1, 65536),
    "every": (1, 1_000_000),
    "threads": (1, 4096),
    "abstain_below": (0, 1),
    "max_waiting": (1, 10_000_000),
    "min_free_mb": (0, 1 << 40),
    "deadline_s": (0.001, _YEAR_S),
    "keep_days": (0, 36600),
    "poll_s": (0.01, 3600),
    "max_associations": (1, 10_000),
    "acse_timeout_s": (0.1, 3600),
    "network_timeout_s": (0.1, 86400),
    "timeout_s": (0.1, 86400),
    "smoothing": (1, 10_000),
    "max_fps": (0.1, 1000),
    "drift_window": (100, 1_000_000),
}
"""Smallest and largest value of each number, by the name of its key."""


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """TLS of a listener or a connection: ``[http.tls]``, ``[dicom.tls]``, ``[destination.tls]``.

    Attributes
    ----------
    certificate, key
        PEM files of this side; for a connection, only if the other side wants a certificate.
    client_ca
        PEM file of the authorities whose certificates the other side must have.
    """

    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """``[http]``: the listener of the page and the API.

    Attributes
    ----------
    host, port
        Address to listen on.
    allowed_hosts
        Names that the ``Host`` header of a request may have, besides the address itself and localhost.
    token_file
        A file with the token of requests that do not come from this machine; needed beyond loopback, unless
        ``tls.client_ca`` is given.
    max_body_mb
        Size of the largest request, in MiB.
    tls
        Certificates; None serves plain HTTP.
    """

    host: str = "127.0.0.1"
    port: int = 8770
    allowed_hosts: tuple[str, ...] = ()
    token_file: Path | None = None
    max_body_mb: int = 512
    tls: TlsConfig | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """``[model]``: how the bundle runs; as the options of `echoquad predict`.

    Attributes
    ----------
    shadow
        A second bundle, which decides beside the first. Its decisions are compared and not sent anywhere.
    bundle_folder
        A watched folder for new bundles; None for none.
    every
        Every N-th frame of a clip.
    """

    device: str = "auto"
    precision: str | None = None
    threads: int | None = None
    vote: str | None = None
    abstain_below: float | None = None
    abstain_unlike: bool = False
    public_key: Path | None = None
    shadow: Path | None = None
    bundle_folder: Path | None = None
    every: int = 1


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """``[store]``: the queue and the results on the disk.

    Attributes
    ----------
    folder
        Where they are.
    max_waiting
        Largest number of objects that wait.
    min_free_mb
        Free space in MiB below which nothing is accepted.
    deadline_s
        Seconds after which an object that waits is not decided any more; None for none.
    keep_days
        Days for which results stay listed after all destinations have them.
    discard
        Names of destinations that are not configured any more: what they have not received is given up at the start.
        Without it, such results are kept.
    """

    folder: Path = Path("echoquad-service")
    max_waiting: int = 1000
    min_free_mb: int = 1024
    deadline_s: float | None = None
    keep_days: float = 30.0
    discard: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FolderIntakeConfig:
    """``[[folder]]``: a watched folder.

    Attributes
    ----------
    path
        The folder, also on a network share.
    poll_s
        Seconds between two looks. A file is taken once its size and time are the same at two of them.
    after
        What happens to a file that was accepted: it stays, is deleted, or moves to the sub-folder ``accepted``.
    """

    path: Path
    poll_s: float = 1.0
    after: Literal["leave", "delete", "move"] = "leave"


@dataclass(frozen=True, slots=True)
class Caller:
    """``[[dicom.caller]]``: who may send.

    Attributes
    ----------
    ae_title
        What the caller calls itself.
    address
        IP address or network, such as ``10.0.0.0/24``; empty for any.
    port
        Where it takes reports of storage commitment; 0 if it waits for them on the association of its request.
    """

    ae_title: str
    address: str = ""
    port: int = 0


@dataclass(frozen=True, slots=True)
class DicomNodeConfig:
    """``[dicom]``: the DICOM node that receives objects.

    Attributes
    ----------
    ae_title, host, port
        What it is called and where it listens.
    caller
        Who may send; empty refuses everybody but this machine.
    max_associations
        Associations at the same time.
    acse_timeout_s, network_timeout_s
        Seconds until a silent connection is closed: before and after it is an association.
    tls
        Certificates; None for none.
    """

    ae_title: str = "ECHOQUAD"
    host: str = "127.0.0.1"
    port: int = 11112
    caller: tuple[Caller, ...] = ()
    max_associations: int = 10
    acse_timeout_s: float = 5.0
    network_timeout_s: float = 30.0
    tls: TlsConfig | None = None


@dataclass(frozen=True, slots=True)
class DestinationConfig:
    """``[[destination]]``: where results go.

    Attributes
    ----------
    name
        Unique name.
    type
        ``folder`` writes JSON and CSV files, ``webhook`` posts JSON, ``dicom`` stores SR and secondary captures.
    path
        Of a folder.
    url, token_file
        Of a webhook, and the token that it wants.
    host, port, ae_title, calling_ae_title, commitment
        Of a DICOM node; `commitment` asks it for storage commitment.
    reports
        What a DICOM node gets: ``sr``, ``sc`` or both.
    origins
        Only results of objects that came so; empty for all.
    timeout_s
        Seconds for one attempt.
    tls
        Certificates; None for none.
    """

    name: str
    type: Literal["folder", "webhook", "dicom"]
    path: Path | None = None
    url: str = ""
    token_file: Path | None = None
    host: str = ""
    port: int = 104
    ae_title: str = ""
    calling_ae_title: str = "ECHOQUAD"
    commitment: bool = False
    reports: tuple[Literal["sr", "sc"], ...] = ("sr", "sc")
    origins: tuple[Literal["http", "folder", "dicom", "live"], ...] = ()
    timeout_s: float = 30.0
    tls: TlsConfig | None = None


@dataclass(frozen=True, slots=True)
class LiveConfig:
    """``[live]``: a live source.

    Attributes
    ----------
    source
        ``v4l2:/dev/video0``, ``rtsp://...``, ``lavfi:testsrc``, or a file.
    smoothing
        Number of frames whose probabilities are averaged; 1 for none.
    max_fps
        Frames decided per second, at most.
    """

    source: str
    smoothing: int = 1
    max_fps: float = 30.0


@dataclass(frozen=True, slots=True)
class MonitoringConfig:
    """``[monitoring]``: logs, audit log and drift.

    Attributes
    ----------
    audit_log
        Whether the audit log is written, to ``audit`` in the store's folder.
    site_key_file
        A file with the secret that UIDs are hashed with; None makes one in the store's folder.
    drift_window
        Number of latest results, and of live frames, that are compared with the bundle's validation figures; at least
        100.
    """

    audit_log: bool = True
    site_key_file: Path | None = None
    drift_window: int = 1000


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """A configuration file."""

    http: HttpConfig = field(default_factory=HttpConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    folder: tuple[FolderIntakeConfig, ...] = ()
    dicom: DicomNodeConfig | None = None
    destination: tuple[DestinationConfig, ...] = ()
    live: LiveConfig | None = None
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)


def load_config(path: Path | None) -> ServiceConfig:
    """Read a configuration file; None is the default configuration.

    Raises
    ------
    ConfigError
        If it cannot be read, is not TOML, or has an unknown key or a value of the wrong type.
    """
    if path is None:
        return ServiceConfig()
    try:
        values = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML ({error}); correct it") from error
    config = _table(ServiceConfig, values, "", path.absolute().parent)
    names = [destination.name for destination in config.destination]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{path}: two destinations are named {repeated!r}; give each a name of its own")
    if used := next((name for name in config.store.discard if name in names), None):
        raise ConfigError(f"{path}: store.discard names {used!r}, which is configured; remove one of the two")
    return config


def _table(kind: type[_Table], values: dict[str, Any], where: str, folder: Path) -> _Table:
    fields = typing.get_type_hints(kind)
    if unknown := next((key for key in values if key not in fields), None):
        raise ConfigError(f"{where}{unknown}: unknown key; expected one of {', '.join(fields)}")
    needed = [
        field.name
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := next((name for name in needed if name not in values), None):
        raise ConfigError(f"{where}{missing}: the key is missing")
    found = {key: _value(fields[key], value, f"{where}{key}", folder) for key, value in values.items()}
    for key, value in found.items():
        low, high = _RANGES.get(key, (-math.inf, math.inf))
        if isinstance(value, int | float) and not low <= value <= high:  # nan is in no range
            raise ConfigError(f"{where}{key}: the value is {value:g}; expected {low:g} to {high:g}")
    return kind(**found)


def _value(kind: Any, value: Any, where: str, folder: Path) -> Any:  # noqa: PLR0911 - a return for each kind
    """Return a value as a type: that of a field."""
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):  # the others are of the kind X | None, and TOML has no None
        return _value(typing.get_args(kind)[0], value, where, folder)
    if origin is tuple and isinstance(value, list):
        item = typing.get_args(kind)[0]
        return tuple(_value(item, one, f"{where}[{index}]", folder) for index, one in enumerate(value))
    if origin is Literal and value in typing.get_args(kind):
        return value
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _table(typing.cast("type[Any]", kind), value, f"{where}.", folder)
    if kind is Path and isinstance(value, str):
        return folder / value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:
        return value
    expected = " or ".join(map(repr, typing.get_args(kind))) if origin is Literal else getattr(kind, "__name__", kind)
    raise ConfigError(f"{where}: the value is {value!r}; expected {expected}")
