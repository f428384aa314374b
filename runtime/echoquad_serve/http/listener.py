"""The listener: what must be so before it opens, and how uvicorn runs it."""

from __future__ import annotations

import logging
import os
import socket
import ssl
import stat
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from echoquad_runtime.errors import ConfigError
from echoquad_serve.config import HttpConfig
from echoquad_serve.http.context import Context
from echoquad_serve.http.protection.h11_protocol import limited_protocol
from echoquad_serve.http.protection.request_checks import is_loopback

__all__ = ["check_listener", "open_listener", "read_token", "uvicorn_config"]

_LOGGER = logging.getLogger("echoquad_serve.http")
_MIN_TOKEN = 16
_MAX_TOKEN = 4096


def check_listener(config: HttpConfig) -> None:
    """Return if the listener may be opened: beyond loopback, only for peers that show who they are.

    Raises
    ------
    ConfigError
        If the address is not that of this machine alone and there is neither a token nor an authority of client
        certificates, or if a token or a certificate is not usable.
    """
    if not 0 <= config.port <= 65535:
        raise ConfigError(f"http.port: the value is {config.port}; expected 0 to 65535")
    if config.max_body_mb < 1:
        raise ConfigError(f"http.max_body_mb: the value is {config.max_body_mb}; expected at least 1")
    invalid = [name for name in config.allowed_hosts if not name or set(name) & set("/:*@ ")]
    if invalid:
        raise ConfigError(f"http.allowed_hosts: {invalid[0]!r} found; expected names without scheme, port and wildcard")
    tls = config.tls
    if tls is not None:
        if tls.certificate is None or tls.key is None:
            raise ConfigError("http.tls: the listener needs certificate and key; give both")
        for name, path in (("certificate", tls.certificate), ("key", tls.key), ("client_ca", tls.client_ca)):
            if path is not None and not path.is_file():
                raise ConfigError(f"http.tls.{name}: {path} is no file; expected a PEM file")
    token = read_token(config)
    if is_loopback(config.host):
        return
    if token is None and (tls is None or tls.client_ca is None):
        raise ConfigError(
            f"http.host {config.host!r} can be reached from other machines; expected http.token_file or "
            "http.tls.client_ca, or the address 127.0.0.1"
        )
    if tls is None:
        _LOGGER.warning("the listener is open to other machines without TLS: the token and all frames can be read")


def read_token(config: HttpConfig) -> str | None:
    """Return the token of requests from other machines; None if none is configured.

    Raises
    ------
    ConfigError
        If the file cannot be read, others may read it, or the token is too short or not printable ASCII.
    """
    path = config.token_file
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(_MAX_TOKEN + 1)
    except OSError as error:
        raise ConfigError(f"http.token_file: {path} cannot be read ({error.strerror}); correct the path") from error
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"http.token_file: others may access {path}; run chmod 600 on it")
    token = text.decode("latin-1").strip()
    if not _MIN_TOKEN <= len(token) <= _MAX_TOKEN or not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError(
            f"http.token_file: {path} has no usable token; expected one line of {_MIN_TOKEN} printable ASCII "
            "characters or more, without spaces"
        )
    return token


def open_listener(config: HttpConfig) -> socket.socket:
    """Return a socket that is bound to the configured address, for `uvicorn.Server.run`.

    Raises
    ------
    ConfigError
        If this machine does not have the address, or another program uses it.
    """
    listener: socket.socket | None = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        # With the protocol's number, by which asyncio knows that it may send small answers at once (TCP_NODELAY).
        listener = socket.socket(family, kind, socket.IPPROTO_TCP)
        if os.name == "posix":  # on Windows the option would let a second program listen too
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        reason = error.strerror or type(error).__name__
        raise ConfigError(
            f"http: cannot listen on {config.host}:{config.port} ({reason}); choose a free port of this machine"
        ) from error
    return listener


def uvicorn_config(app: Starlette, config: HttpConfig) -> uvicorn.Config:
    """Return how uvicorn runs an application of `create_app`: with its limits, TLS, and no log of its own.

    Raises
    ------
    ConfigError
        As `check_listener`.
    """
    check_listener(config)
    context = app.state.context
    assert isinstance(context, Context)
    limits, tls = context.limits, config.tls
    client_ca: Path | None = tls.client_ca if tls else None
    return uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        loop="asyncio",
        http=limited_protocol(limits, context.end_streams),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,  # it names paths; `protection.request_guard` logs requests
        proxy_headers=False,  # a header must not make a peer one of this machine
        server_header=False,
        # The protocol answers in the form of errors before uvicorn's own limit answers plain text.
        limit_concurrency=2 * limits.connections,
        timeout_keep_alive=limits.keep_alive_s,
        timeout_graceful_shutdown=limits.shutdown_s,
        h11_max_incomplete_event_size=limits.header_bytes,
        ssl_certfile=tls.certificate if tls else None,
        ssl_keyfile=tls.key if tls else None,
        ssl_ca_certs=str(client_ca) if client_ca else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if client_ca else ssl.CERT_NONE,
    )
