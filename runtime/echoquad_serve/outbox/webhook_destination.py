"""A webhook as destination: posts each result as JSON."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import ipaddress
import json
import socket
import ssl
import threading
import time
from typing import Final
from urllib.parse import SplitResult, urlsplit

from echoquad_runtime._version import __version__
from echoquad_runtime.errors import ConfigError
from echoquad_serve.config import DestinationConfig
from echoquad_serve.errors import DeliveryError, DeliveryRefusedError
from echoquad_serve.outbox.deadline_socket import connect
from echoquad_serve.records import Delivery

__all__ = ["WebhookDestination"]

_CONNECT_S: Final = 10.0
_MAX_RESPONSE_BYTES: Final = 1 << 16  # read, and not used: a server may take an early end for an error
_RETRIED: Final = frozenset({408, 425, 429})


class WebhookDestination:
    """Posts results to a URL as JSON, each over a connection of its own.

    The header ``Idempotency-Key`` is the id of the result: a receiver that knows it already answers with success and
    does nothing more. A redirect is not followed, and no proxy is used.

    Parameters
    ----------
    config
        The destination's configuration. ``timeout_s`` limits the whole exchange.

    Raises
    ------
    ConfigError
        If the URL is none of http or https, has a user or password, or would send a token unencrypted; or if a
        certificate cannot be read.
    """

    def __init__(self, config: DestinationConfig) -> None:
        self._config = config
        url = _split_url(config)
        self._host, self._https = url.hostname or "", url.scheme == "https"
        self._port = url.port or (443 if self._https else 80)
        self._target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        if config.token_file and not self._https and not _is_loopback(self._host):
            raise ConfigError(f"destination {config.name!r}: a token needs an https URL, so that nobody can read it")
        self._tls = _tls_context(config) if self._https else None
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._closed = False

    @property
    def name(self) -> str:
        """Name from the configuration."""
        return self._config.name

    def deliver(self, delivery: Delivery) -> None:
        """Post a result.

        Raises
        ------
        DeliveryError
            If the server cannot be reached, is too slow, redirects, or answers with 408, 425, 429 or 5xx.
        DeliveryRefusedError
            If it answers with another 4xx.
        """
        body = json.dumps(delivery.result.to_delivered_dict(), ensure_ascii=False, allow_nan=False)
        headers = {
            "Content-Type": "application/json",
            "Idempotency-Key": delivery.result.id,
            "User-Agent": f"echoquad/{__version__}",
            "Connection": "close",
            **self._authorization(),
        }
        try:
            status, retry_after = self._post(body.encode("utf-8", "backslashreplace"), headers)
        except (OSError, http.client.HTTPException) as error:
            raise DeliveryError(f"{self._where}: {_explain(error)}") from error
        finally:
            with self._lock:
                self._socket = None
        self._check_status(status, _seconds(retry_after))

    def close(self) -> None:
        """Cut off an exchange in progress, and refuse further ones."""
        with self._lock:
            self._closed = True
            if self._socket is not None:
                _cut(self._socket)

    @property
    def _where(self) -> str:
        return f"{self._host}:{self._port}"

    def _post(self, body: bytes, headers: dict[str, str]) -> tuple[int, str | None]:
        """Return the status, and the header Retry-After, of the answer."""
        timeout = self._config.timeout_s
        deadline = time.monotonic() + timeout
        connection = http.client.HTTPConnection(self._host, self._port)
        try:
            peer = connect(self._host, self._port, self._tls, min(_CONNECT_S, timeout), deadline, self._keep)
            connection.sock = peer  # it has the methods that are used
            connection.default_port = 443 if self._https else 80  # which the header Host omits
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                # A server may answer, with 413 for example, and close before it has read everything.
                connection.request("POST", self._target, body, headers)
            response = connection.getresponse()
            with contextlib.suppress(OSError, http.client.HTTPException):  # the status is all that counts
                response.read(_MAX_RESPONSE_BYTES)
            return response.status, response.getheader("Retry-After")
        finally:
            connection.close()

    def _keep(self, connection: socket.socket) -> None:
        with self._lock:
            if self._closed:
                raise ConnectionAbortedError("the destination is closed")
            self._socket = connection

    def _authorization(self) -> dict[str, str]:
        if self._config.token_file is None:
            return {}
        try:
            token = self._config.token_file.read_text("ascii").strip()  # each time, since it may be renewed
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not ASCII"
            raise DeliveryError(f"the token file cannot be read ({reason}); check token_file") from error
        if not token or not token.isprintable() or " " in token:
            raise DeliveryError("the token file does not hold one line with a token; correct it")
        return {"Authorization": f"Bearer {token}"}

    def _check_status(self, status: int, retry_after: float | None) -> None:
        if 200 <= status < 300:
            return
        if 300 <= status < 400:
            raise DeliveryError(
                f"{self._where}: the server redirects ({status}), which is not followed; configure the final url"
            )
        if 400 <= status < 500 and status not in _RETRIED:
            raise DeliveryRefusedError(f"{self._where}: the server refuses the result ({status}); see its log")
        raise DeliveryError(f"{self._where}: the server answers with status {status}; see its log", retry_after)


def _split_url(config: DestinationConfig) -> SplitResult:
    problem = "expected http://HOST/PATH or https://HOST/PATH"
    try:
        url = urlsplit(config.url)
        valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        valid = False
    if not valid or not config.url.isascii() or not config.url.isprintable() or " " in config.url:
        raise ConfigError(f"destination {config.name!r}: the url is malformed; {problem}")
    if url.username is not None or url.password is not None:
        raise ConfigError(f"destination {config.name!r}: the url holds a user or password; use token_file")
    return url


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _tls_context(config: DestinationConfig) -> ssl.SSLContext:
    tls = config.tls
    try:
        context = ssl.create_default_context(cafile=tls.client_ca if tls else None)
        if tls and tls.certificate:
            context.load_cert_chain(tls.certificate, tls.key, password=lambda: "")  # asks nobody for a password
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or "malformed"
        raise ConfigError(
            f"destination {config.name!r}: a file of tls cannot be loaded ({reason}); correct it"
        ) from error
    return context


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # not connected yet, or not any more
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _seconds(retry_after: str | None) -> float | None:
    """Return the seconds of a header Retry-After, which has a number or a date; None if it is malformed."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after[:12])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _explain(error: Exception) -> str:  # noqa: PLR0911 - one for each cause
    """Return what went wrong, without any byte of what the server sent."""
    if isinstance(error, TimeoutError):
        return "the server is too slow; check it and the network"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is not accepted ({error.verify_message}); check tls.client_ca and the clocks"
    if isinstance(error, ssl.SSLError):
        return f"TLS fails ({error.reason or type(error).__name__}); check the server"
    if isinstance(error, socket.gaierror):
        return "the name of the host is not known; check the url and the DNS"
    if isinstance(error, http.client.RemoteDisconnected):
        return "the server closes the connection without an answer; see its log"
    if isinstance(error, OSError):
        return f"the connection fails ({error.strerror or type(error).__name__}); check the server and the network"
    return f"the answer is not HTTP ({type(error).__name__}); check the url"
