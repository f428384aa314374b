"""Services that do not answer as they should: each is one row with its reason, and the others are listed."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from echoquad_serve.config import HttpConfig, TlsConfig

from .conftest import Ran, ServeCart, answering, free_port, http_answer

Check = Callable[..., Ran]
Peers = Callable[[Callable[[socket.socket], None]], str]
TOKEN = "a-token-of-the-carts-2026"


def reason(ran: Ran) -> str:
    """Return the reason of the only box."""
    (row,) = ran.rows.values()
    return row.partition("no answer: ")[2]


# ---------------------------------------------------------------------------------------------- no connection


def test_service_that_is_off_is_a_row_and_the_others_are_listed(serve: ServeCart, check: Check) -> None:
    cart, port = serve(), free_port()
    ran = check(f"http://127.0.0.1:{port}", cart.url)
    assert (ran.code, ran.codes) == (5, ["E_FLEET_NO_ANSWER"])
    off, on = ran.rows.values()
    assert "no answer: connection refused" in off and on.endswith(" ok")
    assert f"127.0.0.1:{port}: connection refused" in ran.err


def test_findings_take_precedence_over_silence(serve: ServeCart, check: Check) -> None:
    cart = serve()
    cart.cart.faults.not_ready = True
    ran = check(f"http://127.0.0.1:{free_port()}", cart.url)
    assert (ran.code, ran.codes) == (3, ["E_FLEET"])
    assert "1 of 2 services need attention, and 1 do not answer" in ran.err


def test_fleet_of_which_nobody_answers_is_exit_code_1(check: Check) -> None:
    ran = check("http://no-such-cart.invalid:8770", f"http://127.0.0.1:{free_port()}")
    assert (ran.code, ran.codes) == (1, ["E_FLEET_NO_ANSWER"] * 2)
    assert "cannot be resolved" in ran.rows["no-such-cart.invalid:8770"]


def drip(connection: socket.socket) -> None:
    """Send a byte now and then, so that no receive takes long."""
    for byte in b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + b"X: y\r\n" * 100:
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


def hang(connection: socket.socket) -> None:
    connection.recv(65536)
    time.sleep(4)


def flood(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b" " * 65536)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("behave", [drip, hang])
def test_slow_service_ends_with_the_time_limit(
    serve: ServeCart, peers: Peers, check: Check, behave: Callable[[socket.socket], None], scheme: str
) -> None:
    cart, slow = serve(), peers(behave).replace("http:", f"{scheme}:")
    began = time.monotonic()
    ran = check(slow, cart.url, "--timeout", "0.6")
    assert time.monotonic() - began < 2.5
    first, second = ran.rows.values()
    if (behave, scheme) != (drip, "https"):  # these bytes are no TLS, which is noticed at once
        assert "no answer in time" in first
    assert ran.code == 5 and second.endswith(" ok")


def test_endless_answer_is_cut_off(peers: Peers, check: Check) -> None:
    assert "more than 4 MiB" in reason(check(peers(flood), "--timeout", "20"))


# ---------------------------------------------------------------------------------------------- no EchoQuad


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (http_answer(b"<html>Router</html>", "text/html"), "200 text/html: it is no EchoQuad service"),
        (http_answer(b"<html>None</html>", "text/html", "404 Not Found"), "404 text/html: it is no EchoQuad service"),
        (http_answer(b'{"detail": "Not Found"}', status="404 Not Found"), "404: it is no EchoQuad service"),
        (http_answer(b"{}"), "lacks ready, queue or bundle"),
        (http_answer(b"[1]"), "it is no EchoQuad service"),
        (http_answer(b"[" * 200_000), "it is no EchoQuad service"),
        (http_answer(b'{"queue": 1, "ready": 2, "bundle": 3}'), "lacks ready, queue or bundle"),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "it answers no HTTP"),
        (b"", "it answers nothing"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{", "an incomplete answer"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 300, "an incomplete answer"),
        (
            http_answer(
                b'{"error": {"code": "E_HTTP_HOST", "message": "name\\nit"}}', status="421 Misdirected Request"
            ),
            "421 E_HTTP_HOST: name it",
        ),
    ],
)
def test_other_answers_are_named(peers: Peers, check: Check, answer: bytes, text: str) -> None:
    ran = check(peers(answering(answer)))
    assert ran.code == 1 and text in reason(ran)


def test_redirect_is_not_followed_and_the_token_stays(peers: Peers, check: Check, token_file: Path) -> None:
    seen: list[bytes] = []
    target = peers(answering(http_answer(b"{}"), seen))
    answer = http_answer(b"", status="302 Found", headers=f"Location: {target}/\r\n")
    ran = check(peers(answering(answer)), "--token-file", token_file)
    assert ran.code == 1 and "it answers 302" in reason(ran)
    assert seen == []


def test_proxy_of_the_environment_is_not_asked(
    serve: ServeCart, peers: Peers, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []
    monkeypatch.setenv("http_proxy", peers(answering(http_answer(b"{}"), seen)))
    assert check(serve().url).code == 0
    assert seen == []


# ---------------------------------------------------------------------------------------------- token and TLS


def test_token_is_asked_for_refused_and_accepted(
    serve: ServeCart, check: Check, token_file: Path, tmp_path: Path
) -> None:
    cart = serve(HttpConfig(token_file=token_file), client="10.1.2.3")
    assert "401 E_HTTP_TOKEN: it wants a token; name the file with --token-file" in reason(check(cart.url))
    wrong = tmp_path / "wrong"
    wrong.write_text("another-token-of-others")
    wrong.chmod(0o600)
    ran = check(cart.url, "--token-file", wrong)
    assert "it refuses the token" in reason(ran) and "another-token" not in ran.out + ran.err
    assert check(cart.url, "--token-file", token_file).code == 0


def test_service_for_its_own_machine_alone_says_so(serve: ServeCart, check: Check) -> None:
    ran = check(serve(client="10.1.2.3").url)
    assert "403 E_HTTP_TOKEN: only requests from this machine are served" in reason(ran)


@pytest.mark.parametrize(("content", "mode"), [(TOKEN, 0o644), ("", 0o600), ("two words", 0o600), ("Ä" * 20, 0o600)])
def test_token_file_that_is_unsafe_or_empty_asks_nobody(
    peers: Peers, check: Check, tmp_path: Path, content: str, mode: int
) -> None:
    seen: list[bytes] = []
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(mode)
    ran = check(peers(answering(b"", seen)), "--token-file", path)
    assert (ran.code, ran.codes, seen) == (1, ["E_CONFIG"], [])
    assert not content or content not in ran.err


def test_certificates_of_services_are_checked(serve: ServeCart, check: Check, certificates: Path) -> None:
    tls = TlsConfig(certificates / "server.pem", certificates / "server.key")
    cart = serve(HttpConfig(tls=tls))
    ca = certificates / "ca.pem"
    assert check(cart.url, "--ca", ca).code == 0
    assert "certificate is not accepted" in reason(check(cart.url))
    assert "it answers" in reason(check(cart.url.replace("https:", "http:"), "--ca", ca))
    other_name = cart.url.replace("127.0.0.1", "127.0.0.2")
    assert "connection refused" in reason(check(other_name, "--ca", ca))


def test_service_with_the_certificate_of_another_is_refused(serve: ServeCart, check: Check, certificates: Path) -> None:
    cart = serve(HttpConfig(tls=TlsConfig(certificates / "server.pem", certificates / "server.key")))
    # The loopback address has a second name in IPv6 notation, for which there is no certificate.
    ran = check(cart.url.replace("127.0.0.1", "[::ffff:127.0.0.1]"), "--ca", certificates / "ca.pem")
    assert "certificate is not accepted" in reason(ran)


def test_service_that_wants_a_certificate_gets_one(serve: ServeCart, check: Check, certificates: Path) -> None:
    ca = certificates / "ca.pem"
    cart = serve(HttpConfig(tls=TlsConfig(certificates / "server.pem", certificates / "server.key", ca)))
    assert "--certificate" in reason(check(cart.url, "--ca", ca))
    both = ("--certificate", certificates / "client.pem", "--key", certificates / "client.key")
    assert check(cart.url, "--ca", ca, *both).code == 0


def test_plain_service_at_an_encrypted_address_is_named(serve: ServeCart, check: Check) -> None:
    assert "no TLS connection" in reason(check(serve().url.replace("http:", "https:")))


@pytest.mark.parametrize("option", ["--ca", "--certificate"])
def test_pem_file_that_is_none_asks_nobody(check: Check, tmp_path: Path, option: str) -> None:
    (tmp_path / "x.pem").write_text("no PEM")
    for path in (tmp_path / "x.pem", tmp_path / "missing.pem"):
        ran = check("https://127.0.0.1:1", option, path)
        assert (ran.code, ran.codes, ran.out) == (1, ["E_CONFIG"], "")
    assert check("https://127.0.0.1:1", "--key", tmp_path / "x.pem").codes == ["E_USAGE"]


# ---------------------------------------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    "url",
    [
        "cart-7",
        "cart-7:8770",
        "ftp://cart-7",
        "http://",
        "http://cart-7:x",
        "http://cart-7:99999",
        "http://cart-7/api",
        "http://cart-7?x",
        "http://cart 7",
        "http://[::1",
        "http://.cart",
        "http://a..b",
        "http://" + "a" * 64,
        "http://cart\r\nX: y",
        "http://jane:secret-word@cart-7:8770",
    ],
)
def test_other_than_the_url_of_a_service_is_a_usage_error(check: Check, url: str) -> None:
    ran = check(url)
    assert (ran.code, ran.codes, ran.out) == (2, ["E_USAGE"], "")
    assert "secret-word" not in ran.err


def test_file_of_urls_has_comments_and_repeats_nobody(serve: ServeCart, check: Check, tmp_path: Path) -> None:
    carts = [serve(), serve()]
    listed = tmp_path / "carts.txt"
    listed.write_text(f"# ward 3\n\n  {carts[1].url}/\n{carts[0].url}\n", "utf-8")
    ran = check(carts[0].url, "--file", listed, "--json")
    assert [box["url"] for box in json.loads(ran.out)["boxes"]] == [carts[0].url, carts[1].url]
    assert check("--file", tmp_path / "missing.txt").codes == ["E_INPUT_NOT_FOUND"]
    listed.write_text("# nobody\n")
    assert check("--file", listed).codes == ["E_USAGE"]
    assert check().codes == ["E_USAGE"]


def test_token_that_can_be_read_on_the_way_is_mentioned(check: Check, token_file: Path) -> None:
    said = "the token is sent without TLS to 1 of 3 services"
    urls = ("http://no-such-cart.invalid", "https://no-such-cart.invalid", f"http://127.0.0.1:{free_port()}")
    assert said in check(*urls, "--token-file", token_file).err
    assert said not in check(*urls).err
