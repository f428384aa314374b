"""The webhook destination, against HTTP servers that answer, refuse, redirect, hang, drip, cut and flood."""

from __future__ import annotations

import email.utils
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echoquad_runtime.errors import ConfigError
from echoquad_serve.config import DestinationConfig, TlsConfig
from echoquad_serve.errors import DeliveryError, DeliveryRefusedError
from echoquad_serve.outbox.webhook_destination import WebhookDestination
from echoquad_serve.records import Delivery

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Serve = Callable[..., Any]


def webhook(url: str, **values: Any) -> WebhookDestination:
    return WebhookDestination(DestinationConfig("hook", "webhook", url=url, **{"timeout_s": 5.0} | values))


def answer(status: int, *headers: str, body: str = "") -> bytes:
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


def error_of(destination: WebhookDestination, delivery: Delivery) -> DeliveryError:
    with pytest.raises(DeliveryError) as caught:
        destination.deliver(delivery)
    assert "\n" not in str(caught.value) and "SECRET" not in str(caught.value)
    return caught.value


def test_posts_json_with_idempotency_key_and_token(serve: Serve, delivery: Delivery, tmp_path: Path) -> None:
    server = serve(OK)
    token = tmp_path / "token"
    token.write_text("first\n")
    destination = webhook(server.url, token_file=token)
    destination.deliver(delivery)
    token.write_text("renewed\n")
    destination.deliver(delivery)
    (headers, body), (later, _) = server.requests
    assert headers[""] == "POST /hook?a=1 HTTP/1.1" and headers["host"] == f"127.0.0.1:{server.port}"
    assert headers["content-type"] == "application/json" and headers["idempotency-key"] == delivery.result.id
    assert (headers["authorization"], later["authorization"]) == ("Bearer first", "Bearer renewed")
    assert body["id"] == delivery.result.id and body["rows"] == list(delivery.result.rows)
    assert "shadow" not in body and "sender" not in body


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_2xx_is_delivered(serve: Serve, delivery: Delivery, status: int) -> None:
    webhook(serve(answer(status)).url).deliver(delivery)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 599, 301, 302, 307, 308])
def test_these_are_tried_again(serve: Serve, delivery: Delivery, status: int) -> None:
    assert not isinstance(error_of(webhook(serve(answer(status)).url), delivery), DeliveryRefusedError)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 409, 410, 413, 415, 422, 451])
def test_other_4xx_are_refused(serve: Serve, delivery: Delivery, status: int) -> None:
    error = error_of(webhook(serve(answer(status, body="SECRET")).url), delivery)
    assert isinstance(error, DeliveryRefusedError) and str(status) in str(error)


def test_a_redirect_is_not_followed(serve: Serve, delivery: Delivery) -> None:
    target = serve(OK)
    source = serve(answer(307, f"Location: {target.url}"))
    error_of(webhook(source.url), delivery)
    assert source.connections == 1 and target.connections == 0


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("120", 120, 120),
        ("in 90 seconds", 60, 91),
        (email.utils.formatdate(0, usegmt=True), 0, 0),
        ("soon", None, None),
        ("-5", None, None),
        ("9" * 50, 9e11, 1e12),
    ],
)
def test_retry_after(serve: Serve, delivery: Delivery, value: str, low: float | None, high: float) -> None:
    if value == "in 90 seconds":  # a date, which must not be that of the collection of the tests
        value = email.utils.formatdate(time.time() + 90, usegmt=True)
    after = error_of(webhook(serve(answer(503, f"Retry-After: {value}")).url), delivery).retry_after
    assert after is None if low is None else after is not None and low <= after <= high


def hang(server: Any, connection: socket.socket, _: int) -> None:
    server.read(connection)
    server.ended.wait(20)


def silent(server: Any, _: socket.socket, __: int) -> None:
    server.ended.wait(20)  # does not even read


def drip_headers(server: Any, connection: socket.socket, _: int) -> None:
    server.read(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while not server.ended.wait(0.05):
        connection.sendall(b"a")


def drip_continues(server: Any, connection: socket.socket, _: int) -> None:
    server.read(connection)
    while not server.ended.wait(0.05):
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")


@pytest.mark.parametrize("behave", [hang, silent, drip_headers, drip_continues])
def test_a_server_that_takes_too_long_is_cut_off(serve: Serve, delivery: Delivery, behave: Any) -> None:
    began = time.monotonic()
    assert "too slow" in str(error_of(webhook(serve(behave).url, timeout_s=0.5), delivery))
    assert time.monotonic() - began < 1.5


def test_a_server_that_does_not_read_a_large_body_is_cut_off(serve: Serve, make_result: Any, make_row: Any) -> None:
    large = Delivery(make_result(rows=tuple(make_row(f"{number}.png") for number in range(30_000))), None)
    began = time.monotonic()
    error_of(webhook(serve(silent).url, timeout_s=0.5), large)
    assert time.monotonic() - began < 3


def test_a_success_counts_whatever_the_body_does(serve: Serve, delivery: Delivery) -> None:
    def drip_body(server: Any, connection: socket.socket, _: int) -> None:
        server.read(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not server.ended.wait(0.05):
            connection.sendall(b"a")

    def flood(server: Any, connection: socket.socket, _: int) -> None:
        server.read(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(b"a" * 65536)

    def cut(server: Any, connection: socket.socket, _: int) -> None:
        server.read(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\na")

    for behave in (drip_body, flood, cut):
        began = time.monotonic()
        webhook(serve(behave).url, timeout_s=0.5).deliver(delivery)
        assert time.monotonic() - began < 1.5


def test_connections_that_break_are_tried_again(serve: Serve, delivery: Delivery) -> None:
    def close_at_once(_: Any, connection: socket.socket, __: int) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset

    def close_without_an_answer(server: Any, connection: socket.socket, _: int) -> None:
        server.read(connection)

    def cut_in_the_headers(server: Any, connection: socket.socket, _: int) -> None:
        server.read(connection)
        connection.sendall(b"HTTP/1.1 200 O")

    def no_http(server: Any, connection: socket.socket, _: int) -> None:
        server.read(connection)
        connection.sendall(b"SECRET SSH-2.0\r\n\r\n")

    def endless_headers(server: Any, connection: socket.socket, _: int) -> None:
        server.read(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + b"X: SECRET\r\n" * 200 + b"\r\n")

    for behave in (close_at_once, close_without_an_answer, no_http, endless_headers):
        error = error_of(webhook(serve(behave).url), delivery)
        assert not isinstance(error, DeliveryRefusedError)


def test_nobody_listens(delivery: Delivery) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert "refused" in str(error_of(webhook(f"http://127.0.0.1:{port}/"), delivery))


def test_an_answer_before_the_body_is_read_counts(serve: Serve, make_result: Any, make_row: Any) -> None:
    """413 from a server that does not read the body: it is refused, not tried again for ever."""

    def early(_: Any, connection: socket.socket, __: int) -> None:
        connection.recv(1000)
        connection.sendall(answer(413))
        connection.shutdown(socket.SHUT_WR)
        time.sleep(0.2)

    large = Delivery(make_result(rows=tuple(make_row(f"{number}.png") for number in range(10_000))), None)
    destination = webhook(serve(early).url)
    assert isinstance(error_of(destination, large), DeliveryError)


def test_close_cuts_off_an_exchange_and_refuses_further_ones(serve: Serve, delivery: Delivery) -> None:
    server = serve(hang)
    destination = webhook(server.url, timeout_s=20.0)
    errors: list[DeliveryError] = []
    thread = threading.Thread(target=lambda: errors.append(error_of(destination, delivery)))
    thread.start()
    while not server.requests:
        time.sleep(0.01)
    destination.close()
    thread.join(1)
    assert not thread.is_alive() and errors
    error_of(destination, delivery)


@pytest.mark.parametrize("text", ["", "two words", "two\nlines", "Ω"])
def test_a_token_that_is_none(serve: Serve, delivery: Delivery, tmp_path: Path, text: str) -> None:
    (tmp_path / "token").write_text(text, "utf-8")
    server = serve(OK)
    error = error_of(webhook(server.url, token_file=tmp_path / "token"), delivery)
    assert "token" in str(error) and not isinstance(error, DeliveryRefusedError) and not server.connections


@pytest.mark.parametrize(
    ("url", "values"),
    [
        ("", {}),
        ("ftp://a/", {}),
        ("http:///x", {}),
        ("http://a:99999/", {}),
        ("http://a/b c", {}),
        ("http://a/b\r\nX: y", {}),
        ("http://ä/", {}),
        ("https://user:password@a/", {}),
        ("http://a.example/", {"token_file": Path("token")}),
        ("https://a/", {"tls": TlsConfig(client_ca=Path("missing"))}),
    ],
)
def test_configurations_that_are_refused(url: str, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        webhook(url, **values)
    assert "password@" not in str(caught.value) and "\n" not in str(caught.value)


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    for name, subject in (("good", "IP:127.0.0.1"), ("other", "DNS:elsewhere.example"), ("client", "DNS:cart")):
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        command += ["-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName={subject}"]
        try:
            subprocess.run(
                [*command, "-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.pem")],
                check=True,
                capture_output=True,
            )
        except FileNotFoundError:
            pytest.skip("needs Debian's openssl")
    return folder


def tls_server(certificates: Path, name: str, *, client: bool = False) -> Callable[[Any, socket.socket, int], None]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
    if client:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(certificates / "client.pem")

    def behave(server: Any, connection: socket.socket, _: int) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            server.read(secure)
            secure.sendall(OK)

    return behave


def test_tls_with_the_right_certificate(serve: Serve, delivery: Delivery, certificates: Path) -> None:
    server = serve(tls_server(certificates, "good"))
    tls = TlsConfig(client_ca=certificates / "good.pem")
    webhook(f"https://127.0.0.1:{server.port}/", tls=tls).deliver(delivery)
    assert server.requests[0][1]["id"] == delivery.result.id


@pytest.mark.parametrize(("name", "trusted"), [("good", "other"), ("good", ""), ("other", "other")])
def test_tls_with_a_wrong_certificate_sends_nothing(
    serve: Serve, delivery: Delivery, certificates: Path, name: str, trusted: str
) -> None:
    server = serve(tls_server(certificates, name))
    tls = TlsConfig(client_ca=certificates / f"{trusted}.pem") if trusted else None
    assert "certificate" in str(error_of(webhook(f"https://127.0.0.1:{server.port}/", tls=tls), delivery))
    assert not server.requests


def test_tls_with_a_certificate_of_this_side(serve: Serve, delivery: Delivery, certificates: Path) -> None:
    server = serve(tls_server(certificates, "good", client=True))
    url, authority = f"https://127.0.0.1:{server.port}/", certificates / "good.pem"
    error_of(webhook(url, tls=TlsConfig(client_ca=authority)), delivery)
    tls = TlsConfig(certificates / "client.pem", certificates / "client.key", authority)
    webhook(url, tls=tls).deliver(delivery)
    assert len(server.requests) == 1


def test_a_silent_server_in_the_handshake_is_cut_off_by_time_and_by_close(
    serve: Serve, delivery: Delivery, certificates: Path
) -> None:
    url = f"https://127.0.0.1:{serve(silent).port}/"
    began = time.monotonic()
    error_of(webhook(url, timeout_s=0.5), delivery)
    destination = webhook(url, timeout_s=20.0)
    thread = threading.Thread(target=lambda: error_of(destination, delivery))
    thread.start()
    time.sleep(0.2)
    destination.close()
    thread.join(1)
    assert not thread.is_alive() and time.monotonic() - began < 3
