"""What is wrong with a service that answers: bundle, self-test, readiness, lateness; and what the report shows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path

import pytest

from echoquad_runtime.bundle.bundle import Bundle

from ...serve.http.fake_backend import SHA256
from .conftest import OTHER_SHA256, Ran, ServeCart, answering, free_port, http_answer

Check = Callable[..., Ran]


def name_of(url: str) -> str:
    return url.partition("://")[2]


def test_services_that_agree_are_in_order(serve: ServeCart, check: Check) -> None:
    carts = [serve() for _ in range(3)]
    ran = check(*(cart.url for cart in carts))
    assert (ran.code, ran.err) == (0, "")
    assert list(ran.rows) == [name_of(cart.url) for cart in carts]  # in the order of the command line
    for row in ran.rows.values():
        assert f"fake {SHA256[:12]}" in row and " passed " in row and "cpu int8" in row
        assert row.endswith(" ok")


def test_service_with_another_bundle_than_the_others_is_named(serve: ServeCart, check: Check) -> None:
    carts = [serve() for _ in range(3)]
    carts[1].cart.figures["bundle"]["sha256"] = OTHER_SHA256
    ran = check(*(cart.url for cart in carts))
    assert (ran.code, ran.codes) == (3, ["E_FLEET"])
    assert "1 of 3 services" in ran.err
    states = [row.rpartition("  ")[2] for row in ran.rows.values()]
    assert states == ["ok", f"other bundle; 2 of 3 boxes run {SHA256[:12]}", "ok"]


def test_without_a_majority_every_service_is_named(serve: ServeCart, check: Check) -> None:
    carts = [serve() for _ in range(2)]
    carts[1].cart.figures["bundle"]["sha256"] = OTHER_SHA256
    ran = check(*(cart.url for cart in carts))
    assert ran.code == 3
    assert all("bundles differ: 1 of 2 boxes run this one" in row for row in ran.rows.values())


@pytest.mark.parametrize("digits", [12, 40, 64])
def test_expected_hash_decides_against_all(serve: ServeCart, check: Check, digits: int) -> None:
    cart = serve()
    assert check(cart.url, "--expect", SHA256[:digits].upper()).code == 0
    ran = check(cart.url, "--expect", OTHER_SHA256[:digits])
    assert (ran.code, ran.codes) == (3, ["E_FLEET"])
    assert f"other bundle; expected {OTHER_SHA256[:12]}" in ran.out


def test_expected_bundle_is_a_folder(serve: ServeCart, check: Check, tiny_bundle: Path) -> None:
    cart = serve()
    assert check(cart.url, "--expect", tiny_bundle).code == 3
    cart.cart.figures["bundle"]["sha256"] = Bundle(tiny_bundle).manifest["manifest_sha256"]
    assert check(cart.url, "--expect", tiny_bundle).code == 0


@pytest.mark.parametrize("text", ["abc", "no-such-folder", SHA256[:11], SHA256 + "0"])
def test_expectation_that_is_no_bundle_asks_nobody(check: Check, text: str) -> None:
    ran = check("http://127.0.0.1:1", "--expect", text)
    assert (ran.code, ran.codes, ran.out) == (2, ["E_USAGE"], "")


@pytest.mark.parametrize("answer", ["", "failed", None, True, {"passed": True}])
def test_self_test_that_has_not_passed_is_named(serve: ServeCart, check: Check, answer: object) -> None:
    cart = serve()
    cart.cart.figures["bundle"]["self_test"] = answer
    ran = check(cart.url)
    assert ran.code == 3 and "the self-test has not passed" in ran.out


def test_service_that_is_not_ready_says_why(serve: ServeCart, check: Check) -> None:
    cart, other = serve(), serve()
    cart.cart.faults.not_ready = True
    cart.cart.figures["bundle"] = None
    ran = check(cart.url, other.url)
    assert ran.code == 3
    assert "not ready: the bundle is being tested; no bundle is loaded" in ran.rows[name_of(cart.url)]
    assert ran.rows[name_of(other.url)].endswith(" ok")


def test_late_queue_and_late_destinations(serve: ServeCart, check: Check) -> None:
    queue, refusing, waiting, full = (serve() for _ in range(4))
    queue.cart.figures["queue"] |= {"waiting": 12, "oldest_waiting_s": 75.4}
    refusing.cart.figures["destinations"][0] |= {"refused": 4, "waiting": 4}
    waiting.cart.figures["destinations"][0] |= {"waiting": 3}
    waiting.cart.figures["queue"]["destinations"] = {"pacs": {"waiting": 3, "refused": 0, "oldest_s": 3600.0}}
    full.cart.figures["queue"]["full"] = True
    urls = [one.url for one in (queue, refusing, waiting, full)]
    ran = check(*urls)
    assert ran.code == 3 and "4 of 4 services" in ran.err
    states = [row.rpartition("   ")[2].strip() for row in ran.rows.values()]
    assert [state.partition("  ")[2] or state for state in states] == [
        "late: the oldest object waits for 75 s",
        "pacs refuses 4 results",
        "late: pacs has not had a result for 3600 s",
        "queue or disk full: nothing is accepted",
    ]
    relaxed = check(queue.url, waiting.url, "--late", "4000")
    assert relaxed.code == 0 and all(row.endswith(" ok") for row in relaxed.rows.values())


def test_drift_and_clock_are_noted_and_cost_nothing(serve: ServeCart, check: Check) -> None:
    cart, quiet = serve(), serve()
    cart.cart.drift, quiet.cart.drift = 1, 0
    ran = check(cart.url, quiet.url)
    assert ran.code == 0
    assert "ALERT" in ran.rows[name_of(cart.url)] and "drift: look" in ran.rows[name_of(cart.url)]
    assert " ok " in ran.rows[name_of(quiet.url)]
    found = json.loads(check(cart.url, "--json").out)["boxes"][0]
    assert (found["drift"], found["drift_frames"]) == (True, 412)
    assert abs(found["clock_s"]) < 3


def test_clock_of_a_service_is_compared(peers: Callable[..., str], check: Check) -> None:
    status = {
        "queue": {"waiting": 0, "oldest_waiting_s": 0},
        "ready": True,
        "bundle": {"sha256": SHA256, "self_test": "passed"},
        "destinations": [],
    }
    stated = f"Date: {formatdate(time.time() - 300, usegmt=True)}\r\n"
    url = peers(answering(http_answer(json.dumps(status).encode(), headers=stated)))
    ran = check(url)
    assert ran.code == 0
    assert "clock 300 s behind" in ran.out or "clock 299 s behind" in ran.out
    assert "-300" in ran.out or "-299" in ran.out


def test_json_has_all_figures_and_a_summary(serve: ServeCart, check: Check) -> None:
    cart, gone = serve(), f"http://127.0.0.1:{free_port()}"
    ran = check(cart.url, gone, "--json", "--expect", SHA256)
    content = json.loads(ran.out)
    assert ran.code == 5 and ran.codes == ["E_FLEET_NO_ANSWER"]
    assert content["expected"] == SHA256
    assert content["summary"] == {"boxes": 2, "in_order": 1, "need_attention": 0, "do_not_answer": 1}
    first, second = content["boxes"]
    assert first["url"] == cart.url and first["contract_sha256"] == SHA256[::-1]
    assert (first["ready"], first["self_test"], first["version"]) == (True, True, "0")
    assert first["destinations"] == [{"name": "pacs", "waiting": 0, "oldest_s": 0.0, "refused": 0}]
    assert second["url"] == gone and "connection refused" in second["error"]


def test_report_has_no_name_of_a_patient_a_sender_or_a_file(serve: ServeCart, check: Check) -> None:
    cart = serve()
    name = "DOE^JANE"
    cart.cart.invent_result(f"{name}.png")
    figures = cart.cart.figures
    figures["intake"]["folder"] = [{"path": f"/srv/{name}", "waiting": 1, "error": name}]
    figures["intake"]["dicom"] = {"callers": [name], "last": name}
    figures["queue"]["current"] = name
    figures["destinations"][0] |= {"last_error": name, "note": name, "refused": 1, "ok": False}
    figures["live"] = {"source": name, "state": name}
    table, content = check(cart.url), check(cart.url, "--json")
    assert table.code == content.code == 3
    assert name not in table.out + table.err + content.out + content.err


def test_text_of_a_service_cannot_control_the_terminal(serve: ServeCart, check: Check) -> None:
    cart = serve()
    cart.cart.figures["bundle"]["name"] = "\x1b]0;x\x07[red]b\u202e" + "n" * 5000
    ran = check(cart.url)
    assert ran.code == 0 and len(ran.out) < 1000
    assert not {"\x1b", "\x07", "\u202e"} & set(ran.out)
    assert "[red]b" in ran.out
