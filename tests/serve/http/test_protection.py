"""What protects the service: slow and greedy clients, other machines, other sites, and safe answers."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp

from echoquad_serve.config import HttpConfig, TlsConfig
from echoquad_serve.http.app import create_app
from echoquad_serve.monitoring.json_logging import JsonFormatter

from .conftest import FAST, RunningServer, ServerFactory, read_all
from .fake_backend import FakeBackend

HEAD = b"POST /api/v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
TOKEN = "0123456789abcdef-token"


def error_of(answer: bytes) -> tuple[int, str]:
    """Return the status code and the code of an error in bytes from a socket."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


# Bodies


@pytest.mark.parametrize("announced", [True, False])
def test_body_that_is_too_large_is_413_and_the_client_sees_it(
    server: RunningServer, backend: FakeBackend, announced: bool
) -> None:
    size = 3 * 1024 * 1024
    with server.connect() as connection:
        connection.sendall(
            HEAD + (b"Content-Length: %d\r\n\r\n" % size if announced else b"Transfer-Encoding: chunked\r\n\r\n")
        )
        for _ in range(size // 65536):
            connection.sendall(bytes(65536) if announced else b"10000\r\n" + bytes(65536) + b"\r\n")
        if not announced:
            connection.sendall(b"0\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        assert error_of(read_all(connection)) == (413, "E_HTTP_BODY_TOO_LARGE")
    assert list(backend.incoming.iterdir()) == []
    assert backend.accepted == []


def test_client_that_sends_on_after_413_is_cut_off(server: RunningServer) -> None:
    with server.connect() as connection:
        connection.sendall(HEAD + b"Content-Length: 1000000000\r\n\r\n")
        start = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - start < 5:
                connection.sendall(bytes(1000))
                time.sleep(0.005)
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("length", [b"Content-Length: 900000", b"Transfer-Encoding: chunked"])
def test_body_that_trickles_is_408_and_leaves_no_file(
    server: RunningServer, backend: FakeBackend, length: bytes
) -> None:
    chunked = b"chunked" in length
    with server.connect() as connection:
        connection.sendall(HEAD + length + b"\r\n\r\n")
        start = time.monotonic()
        connection.settimeout(0.05)
        answer = b""
        while time.monotonic() - start < 5 and (not answer or not answer.endswith(b"}}")):
            connection.sendall(b"1\r\nx\r\n" if chunked else b"x")
            with suppress(TimeoutError):
                answer += connection.recv(65536)
        assert error_of(answer) == (408, "E_HTTP_BODY_TIMEOUT")
        assert time.monotonic() - start < 2
    assert list(backend.incoming.iterdir()) == []


def test_fast_body_longer_than_the_grace_passes(serve: ServerFactory) -> None:
    server = serve(limits=replace(FAST, body_bytes_per_s=100_000))
    with server.connect() as connection:
        connection.sendall(HEAD + b"Content-Length: 100000\r\nConnection: close\r\n\r\n")
        for _ in range(10):  # 0.5 s, at twice the rate that is expected
            time.sleep(0.05)
            connection.sendall(bytes(10_000))
        assert read_all(connection).startswith(b"HTTP/1.1 200")


def test_slow_disk_is_not_the_clients_fault(
    serve: ServerFactory, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    from echoquad_serve.http.routes.uploads import Upload

    write = Upload.write

    def slowly(upload: Upload) -> None:
        time.sleep(0.2)
        write(upload)

    monkeypatch.setattr(Upload, "write", slowly)
    server = serve(HttpConfig(max_body_mb=8))
    body = bytes(5 * 1024 * 1024)
    answer = httpx.post(
        f"{server.url}/api/v1/predict", content=body, headers={"Content-Type": "image/png"}, trust_env=False
    )
    assert answer.status_code == 200


# Connections


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: local", b"GET"])
def test_connection_without_a_complete_request_is_closed(server: RunningServer, sent: bytes) -> None:
    start = time.monotonic()
    answer = server.exchange(sent, timeout=5)
    assert 0.2 < time.monotonic() - start < 2
    if sent:
        assert error_of(answer) == (408, "E_HTTP_HEADERS")
    else:
        assert answer == b""


def test_second_request_of_a_connection_has_the_same_time(server: RunningServer) -> None:
    with server.connect(5) as connection:
        connection.sendall(b"GET /api/v1/live HTTP/1.1\r\nHost: localhost\r\n\r\nGET /api")
        answers = read_all(connection)
    assert answers.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 408" in answers


def test_header_that_never_ends_is_refused(server: RunningServer) -> None:
    with server.connect(5) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
        with pytest.raises(OSError):
            for _ in range(100):
                connection.sendall(b"x" * 10_000)
                time.sleep(0.005)


@pytest.mark.parametrize(
    "headers", [[(f"x-{number}", "1") for number in range(120)], [("x", "y" * 40_000)]], ids=["many", "large"]
)
def test_many_and_large_headers_are_refused(client: httpx.Client, headers: list[tuple[str, str]]) -> None:
    answer = client.get("/api/v1/live", headers=headers)
    assert answer.status_code in (400, 431)
    assert answer.json()["error"]["code"] in ("E_HTTP_HEADERS", "E_HTTP_REQUEST")


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(600),  # TLS
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"nonsense\r\n\r\n",
    ],
)
def test_what_is_no_http_gets_the_form_of_errors(server: RunningServer, data: bytes) -> None:
    assert error_of(server.exchange(data)) == (400, "E_HTTP_REQUEST")


def test_connection_one_too_many_is_told_so(serve: ServerFactory) -> None:
    server = serve(limits=replace(FAST, connections=5, header_s=5.0))
    request = b"GET /api/v1/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(server.connect())
        time.sleep(0.1)
        assert error_of(server.exchange(request)) == (503, "E_HTTP_BUSY")
    for _ in range(100):
        if not server.uvicorn.server_state.connections:
            break
        time.sleep(0.01)
    assert server.exchange(request).startswith(b"HTTP/1.1 200")


def test_scanners_on_the_network_leave_places_for_this_machine(
    serve: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(limits=replace(FAST, remote_connections=2, header_s=5.0))
    request = b"GET /api/v1/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    module = "echoquad_serve.http.protection.h11_protocol"
    with ExitStack() as stack:
        with monkeypatch.context() as patch:
            patch.setattr(f"{module}.is_loopback", lambda address: False)
            for _ in range(3):
                stack.enter_context(server.connect())
            assert error_of(server.exchange(request)) == (503, "E_HTTP_BUSY")
        assert server.exchange(request).startswith(b"HTTP/1.1 200")


# Names of the service, and other sites


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1", "[::1]:8770", "cart-7.ward.example"])
def test_known_host_is_served(serve: ServerFactory, host: str) -> None:
    server = serve(HttpConfig(allowed_hosts=("Cart-7.ward.example",)))
    assert httpx.get(f"{server.url}/api/v1/live", headers={"Host": host}, trust_env=False).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["rebound.evil.example", "127.0.0.1.nip.io", "localhost.evil.example", "192.168.0.9", "localhost@evil", "a b", ""],
)
@pytest.mark.parametrize("path", ["/api/v1/live", "/", "/api/v1/events", "/v2", "/nothing"])
def test_name_that_was_rebound_is_refused(client: httpx.Client, host: str, path: str) -> None:
    answer = client.get(path, headers={"Host": host})
    assert answer.status_code == 421
    if path != "/v2":
        assert answer.json()["error"]["code"] == "E_HTTP_HOST"


CROSS_SITE: list[dict[str, str]] = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost"},  # another port
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},  # another port of this machine
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
    {"Sec-Fetch-Site": "nonsense"},
]


@pytest.mark.parametrize("headers", CROSS_SITE, ids=str)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/v1/predict"),
        ("POST", "/api/v1/bundle"),
        ("POST", "/api/v1/bundle/rollback"),
        ("GET", "/api/v1/results"),
        ("GET", "/api/v1/events"),
        ("OPTIONS", "/api/v1/predict"),
    ],
)
def test_request_of_another_site_is_refused(
    client: httpx.Client, backend: FakeBackend, method: str, path: str, headers: dict[str, str]
) -> None:
    backend.loaded = ["one"]
    answer = client.request(method, path, content=b"x", headers={"Content-Type": "image/png", **headers})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "E_HTTP_ORIGIN")
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert (backend.accepted, backend.loaded) == ([], ["one"])


def test_own_page_may_send(client: httpx.Client, server: RunningServer) -> None:
    headers = {"Origin": server.url, "Sec-Fetch-Site": "same-origin", "Content-Type": "image/png"}
    assert client.post("/api/v1/predict", content=b"x", headers=headers).status_code == 200
    assert client.get("/api/v1/live", headers={"Sec-Fetch-Site": "none"}).status_code == 200


def test_link_on_another_site_opens_the_page_alone(client: httpx.Client) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert client.get("/", headers=headers).status_code in (200, 404)
    assert client.get("/", headers={**headers, "Sec-Fetch-Dest": "iframe"}).status_code == 403
    assert client.get("/api/v1/status", headers=headers).status_code == 403


# Other machines


def ask_from(
    address: str, backend: FakeBackend, config: HttpConfig, headers: dict[str, str] | None = None
) -> httpx.Response:
    """Return the answer to a request from an address."""
    app: ASGIApp = create_app(backend, config)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=(address, 50000))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/api/v1/live", headers=headers or {})

    return asyncio.run(ask())


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_this_machine_needs_no_token(backend: FakeBackend, token_file: Path, address: str) -> None:
    assert ask_from(address, backend, HttpConfig(token_file=token_file)).status_code == 200


@pytest.mark.parametrize("address", ["192.168.1.20", "10.0.0.1", "fe80::1", "::ffff:10.0.0.1", "localhost.evil", ""])
@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}"]
)
def test_other_machine_needs_the_token(
    backend: FakeBackend, token_file: Path, address: str, authorization: str | None
) -> None:
    config = HttpConfig(token_file=token_file)
    headers = {} if authorization is None else {"Authorization": authorization}
    answer = ask_from(address, backend, config, headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "E_HTTP_TOKEN")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "set-cookie" not in answer.headers
    assert ask_from(address, backend, config, {"Authorization": f"bearer {TOKEN}"}).status_code == 200


def test_other_machine_is_refused_without_a_token_unless_its_certificate_was_checked(backend: FakeBackend) -> None:
    assert ask_from("10.0.0.1", backend, HttpConfig()).status_code == 403
    config = HttpConfig(tls=TlsConfig(client_ca=Path("ca.pem")))
    assert ask_from("10.0.0.1", backend, config).status_code == 200


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "Via"])
def test_header_of_a_proxy_never_makes_a_request_trusted(backend: FakeBackend, token_file: Path, header: str) -> None:
    config = HttpConfig(token_file=token_file)
    for address in ("10.0.0.1", "127.0.0.1"):  # a proxy on this machine passes on what comes from anywhere
        answer = ask_from(address, backend, config, {header: "127.0.0.1"})
        assert answer.status_code == 401


def test_server_itself_believes_no_forwarded_address(server: RunningServer) -> None:
    answer = httpx.get(f"{server.url}/api/v1/live", headers={"X-Forwarded-For": "127.0.0.1"}, trust_env=False)
    assert answer.status_code == 403


# Answers

SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}


@pytest.mark.parametrize("path", ["/api/v1/live", "/nothing", "/metrics", "/api/v1/results?limit=x", "/v2/nothing"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
def test_every_answer_has_safe_headers(client: httpx.Client, path: str, method: str) -> None:
    answer = client.request(method, path)
    assert SAFE_HEADERS.items() <= dict(answer.headers).items()
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert "server" not in answer.headers
    assert "set-cookie" not in answer.headers
    if method == "HEAD":
        assert answer.content == b""


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "E_HTTP_NOT_FOUND"),
        ("GET", "/api/v1/live/", 404, "E_HTTP_NOT_FOUND"),
        ("GET", "/static/../app.py", 404, "E_HTTP_NOT_FOUND"),
        ("GET", "/static/%2e%2e%2fapp.py", 404, "E_HTTP_NOT_FOUND"),
        ("GET", "/static//etc/passwd", 404, "E_HTTP_NOT_FOUND"),
        ("DELETE", "/api/v1/results", 405, "E_HTTP_METHOD"),
        ("GET", "/api/v1/predict", 405, "E_HTTP_METHOD"),
        ("TRACE", "/api/v1/live", 405, "E_HTTP_METHOD"),
    ],
)
def test_every_error_has_one_form(client: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}
    assert set(answer.json()["error"]) == {"code", "message"}
    assert answer.json()["error"]["code"] == code
    if status == 405:
        assert answer.headers["allow"]


def test_kserve_errors_are_plain(client: httpx.Client) -> None:
    assert isinstance(client.get("/v2/nothing").json()["error"], str)


def test_logs_name_neither_patient_nor_path(
    client: httpx.Client, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    name, uid = "Doe^Jane", "1.2.840.113619.2.5"
    client.post(f"/api/v1/predict?name={name}.png", content=b"x", headers={"Idempotency-Key": uid})
    client.get(f"/api/v1/results/{uid}")
    client.get(f"/{name}")
    backend.faults.crash = True
    client.get("/api/v1/ready")
    records = [record for record in caplog.records if not record.name.startswith("http")]
    access = [record for record in records if record.name.endswith(".access")]
    assert [(record.method, record.route, record.http_status) for record in access][:3] == [
        ("POST", "/api/v1/predict", 200),
        ("GET", "/api/v1/results/{id}", 404),
        ("GET", "-", 404),
    ]
    line = json.loads(JsonFormatter().format(access[1]))
    assert (line["method"], line["route"], line["http_status"]) == ("GET", "/api/v1/results/{id}", 404)
    text = "\n".join(logging.Formatter().format(record) for record in records)
    assert "RuntimeError" in text
    assert "fake_backend.py" in text  # the place
    for value in ("Doe", uid, "1970"):
        assert value not in text


def test_upgrade_to_another_protocol_is_ignored(client: httpx.Client) -> None:
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x", "Sec-WebSocket-Version": "13"}
    assert client.get("/api/v1/live", headers=headers).status_code == 200


def test_fault_after_the_answer_has_begun_closes_the_connection(
    server: RunningServer, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def status() -> dict[str, Any]:
        raise RuntimeError("Doe^Jane")

    monkeypatch.setattr(backend, "status", status)
    answer = server.exchange(b"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert not answer.endswith(b"0\r\n\r\n")
    assert b"Doe" not in answer
