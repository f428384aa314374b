"""TLS of the node and of the client: TLS 1.2 or later, certificates from PEM files."""

from __future__ import annotations

import ssl

from echoquad_runtime.errors import ConfigError
from echoquad_serve.config import TlsConfig

__all__ = ["client_context", "server_context"]


def server_context(config: TlsConfig) -> ssl.SSLContext:
    """Return the context of a listener; with `client_ca`, the caller must have a certificate of these authorities.

    Raises
    ------
    ConfigError
        If a file is missing or cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if config.certificate is None:
        raise ConfigError("dicom.tls: the node has no certificate; set certificate and key to PEM files")
    _load(context, config)
    if config.client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(config: TlsConfig) -> ssl.SSLContext:
    """Return the context of a connection, which checks the certificate and the name of the other side.

    The authorities are those of `client_ca`, else those of the system.

    Raises
    ------
    ConfigError
        If a file is missing or cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and host name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, config)
    if config.client_ca is None:
        context.load_default_certs()
    return context


def _load(context: ssl.SSLContext, config: TlsConfig) -> None:
    try:
        if config.certificate is not None:
            context.load_cert_chain(config.certificate, config.key, password=_no_password)
        if config.client_ca is not None:
            context.load_verify_locations(config.client_ca)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        files = ", ".join(str(path) for path in (config.certificate, config.key, config.client_ca) if path)
        raise ConfigError(
            f"TLS files {files}: cannot be used ({error}); expected PEM files that belong together"
        ) from error


def _no_password() -> str:
    """Refuse a key with a password, which OpenSSL would else ask for on the terminal."""
    raise ValueError("the key has a password")
