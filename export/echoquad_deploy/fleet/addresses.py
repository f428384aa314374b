"""The services to ask, and what proves to them who asks: URLs, token, certificates."""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, urlsplit

from echoquad_runtime.errors import ConfigError, InputNotFoundError, UsageError

__all__ = ["MAX_BOXES", "BoxAddress", "parse_addresses", "read_token", "read_urls", "tls_context"]

MAX_BOXES: Final = 10_000

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_MAX_FILE: Final = 1 << 20  # bytes
_MAX_TOKEN: Final = 4096  # characters
_LOOPBACK: Final = ("localhost", "::1")


@dataclass(frozen=True, slots=True)
class BoxAddress:
    """Where a service listens.

    Attributes
    ----------
    url
        ``http://HOST:PORT`` or ``https://HOST:PORT``; the port is left out if it is that of the scheme.
    host, port
        Where to connect.
    encrypted
        Whether it speaks TLS.
    """

    url: str
    host: str
    port: int
    encrypted: bool

    @property
    def authority(self) -> str:
        """Host and port as in the URL: the ``Host`` header of a request, and the short name of the box."""
        return self.url.partition("://")[2]

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine, so that nobody can listen on the way."""
        return self.host in _LOOPBACK or self.host.startswith("127.")


def parse_addresses(urls: Iterable[str]) -> list[BoxAddress]:
    """Return the addresses of URLs, in order and each once.

    Raises
    ------
    UsageError
        If one is not ``http://HOST[:PORT]`` or ``https://HOST[:PORT]``, or there are none or more than `MAX_BOXES`.
    """
    found = list({address.url: address for address in map(_parse, urls)}.values())
    if not 0 < len(found) <= MAX_BOXES:
        raise UsageError(f"{len(found)} services are named; expected 1 to {MAX_BOXES}: give URLs, or --file URLS.txt")
    return found


def _parse(text: str) -> BoxAddress:
    try:
        parts = urlsplit(text)
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
    except ValueError:  # a port that is no number, brackets that do not match
        parts, port = SplitResult("", "", "", "", ""), 0
    plain = not (parts.query or parts.fragment or parts.username or parts.password) and parts.path in ("", "/")
    host = (parts.hostname or "").rstrip(".")
    named = ":" in host or all(0 < len(label) < 64 for label in host.split("."))
    if not (port and named and plain and text.isascii() and text.isprintable() and " " not in text):
        # The text may hold a password, so it is not repeated beyond its host.
        raise UsageError(
            f"{host[:60] or 'a service'}: expected a URL such as http://cart-7:8770 or https://cart-7:8770"
        )
    shown = f"[{host}]" if ":" in host else host
    suffix = "" if port == _DEFAULT_PORTS[parts.scheme] else f":{port}"
    return BoxAddress(f"{parts.scheme}://{shown}{suffix}", host, port, parts.scheme == "https")


def read_urls(path: Path) -> list[str]:
    """Return the URLs of a file: one a line; blank lines and those that begin with ``#`` are skipped.

    Raises
    ------
    InputNotFoundError
        If it cannot be read.
    """
    lines = _read(path, _MAX_FILE, "--file").decode("utf-8-sig", "replace").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def read_token(path: Path) -> str:
    """Return the token in a file.

    Raises
    ------
    InputNotFoundError
        If it cannot be read.
    ConfigError
        If others may read it, or it does not hold one line of printable ASCII.
    """
    token = _read(path, _MAX_TOKEN, "--token-file").decode("latin-1").strip()
    if os.name == "posix" and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"--token-file: others may access {path.as_posix()}; run chmod 600 on it")
    if not token or not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError(f"--token-file: {path.as_posix()} has no usable token; expected one line of printable ASCII")
    return token


def _read(path: Path, limit: int, option: str) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(limit)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputNotFoundError(f"{option}: {path.as_posix()} cannot be read ({reason}); check the path") from error


def tls_context(ca: Path | None, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """Return what checks the certificates of the services, and proves who asks.

    Parameters
    ----------
    ca
        PEM file of the authorities whose certificates are accepted; None for those of the system.
    certificate, key
        PEM files of this side, for services that ask for a certificate. None for the key: it is in the same file.

    Raises
    ------
    ConfigError
        If a file cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"--ca: {ca} is no PEM file of authorities ({_reason(error)}); check the path") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if certificate is not None:
        try:
            context.load_cert_chain(certificate, key, password="")  # an encrypted key is an error, not a question
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"--certificate: {certificate} cannot be used ({_reason(error)}); expected PEM files of a certificate "
                "and its key without a password"
            ) from error
    return context


def _reason(error: OSError) -> str:
    return getattr(error, "reason", "") or error.strerror or type(error).__name__
