"""The listener: it refuses to open beyond loopback without a token or certificates, and TLS works."""

from __future__ import annotations

import ssl
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from echoquad_runtime.errors import ConfigError
from echoquad_serve.config import HttpConfig, TlsConfig
from echoquad_serve.http.app import create_app
from echoquad_serve.http.listener import check_listener, read_token, uvicorn_config

from .conftest import ServerFactory
from .fake_backend import FakeBackend

TOKEN = "0123456789abcdef"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_nothing(host: str) -> None:
    check_listener(HttpConfig(host=host))


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "192.168.0.7", "cart-7", "localhost.example", "::ffff:10.0.0.1"])
def test_any_other_address_needs_a_token_or_certificates(host: str, token_file: Path, certificates: Path) -> None:
    config = HttpConfig(host=host)
    with pytest.raises(ConfigError, match="token_file"):
        check_listener(config)
    tls = TlsConfig(certificates / "server.pem", certificates / "server.key")
    with pytest.raises(ConfigError, match="token_file"):
        check_listener(replace(config, tls=tls))  # encrypted, and open to everybody
    check_listener(replace(config, token_file=token_file))
    check_listener(replace(config, tls=replace(tls, client_ca=certificates / "ca.pem")))


def test_service_does_not_open_what_the_check_refuses(backend: FakeBackend) -> None:
    config = HttpConfig(host="0.0.0.0")
    with pytest.raises(ConfigError):
        uvicorn_config(create_app(backend, config), config)


def test_token_in_clear_text_is_warned_of(token_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_listener(HttpConfig(host="0.0.0.0", token_file=token_file))
    assert "without TLS" in caplog.text
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o610])
def test_token_that_others_may_read_is_refused(token_file: Path, mode: int) -> None:
    token_file.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_token(HttpConfig(token_file=token_file))


@pytest.mark.parametrize(
    "text", ["", "short", " " * 20, "x" * 15, "x" * 5000, "two words of a token", "tökentökentökentöken"]
)
def test_unusable_token_is_refused_and_not_shown(token_file: Path, text: str) -> None:
    token_file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_token(HttpConfig(token_file=token_file))
    assert not text.strip() or text not in str(caught.value)


def test_token_file_is_read_without_its_line_end(token_file: Path, tmp_path: Path) -> None:
    assert read_token(HttpConfig(token_file=token_file)) == TOKEN
    assert read_token(HttpConfig()) is None
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(HttpConfig(token_file=tmp_path / "missing"))


@pytest.mark.parametrize(
    "config",
    [
        HttpConfig(port=70_000),
        HttpConfig(port=-1),
        HttpConfig(max_body_mb=0),
        HttpConfig(allowed_hosts=("*.example",)),
        HttpConfig(allowed_hosts=("http://cart",)),
        HttpConfig(allowed_hosts=("",)),
        HttpConfig(tls=TlsConfig()),
        HttpConfig(tls=TlsConfig(Path("missing.pem"), Path("missing.key"))),
    ],
)
def test_invalid_configuration_is_refused(config: HttpConfig) -> None:
    with pytest.raises(ConfigError):
        check_listener(config)


def test_uvicorn_trusts_no_header_and_names_itself_nowhere(backend: FakeBackend) -> None:
    config = uvicorn_config(create_app(backend, HttpConfig()), HttpConfig())
    assert (config.proxy_headers, config.server_header, config.access_log) == (False, False, False)
    assert config.timeout_graceful_shutdown
    assert config.limit_concurrency
    assert config.h11_max_incomplete_event_size == 32 * 1024


def test_tls_is_served_with_a_current_protocol(serve: ServerFactory, certificates: Path) -> None:
    server = serve(HttpConfig(tls=TlsConfig(certificates / "server.pem", certificates / "server.key")))
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    url = f"https://localhost:{server.port}/api/v1/live"
    headers = {"Origin": f"https://localhost:{server.port}"}
    assert httpx.get(url, verify=context, headers=headers, trust_env=False).status_code == 200
    old = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    old.set_ciphers("ECDHE+AESGCM")
    assert httpx.get(url, verify=old, trust_env=False).status_code == 200


def test_client_without_a_certificate_of_the_authority_gets_nothing(serve: ServerFactory, certificates: Path) -> None:
    tls = TlsConfig(certificates / "server.pem", certificates / "server.key", certificates / "ca.pem")
    server = serve(HttpConfig(tls=tls))
    url = f"https://localhost:{server.port}/api/v1/live"
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    with pytest.raises(httpx.TransportError):
        httpx.get(url, verify=context, trust_env=False)
    assert server.seen == []
    context.load_cert_chain(certificates / "client.pem", certificates / "client.key")
    assert httpx.get(url, verify=context, trust_env=False).status_code == 200
