"""A lost connection: it shows within two seconds, comes back by itself, and nothing is missed."""

from __future__ import annotations

import time

import pytest

from .chromium import Page
from .page_service import PageService, decision

READY = "document.querySelector('#service').innerText === 'Ready'"
LOST = "document.querySelector('#alert').innerText.startsWith('Connection lost, trying again')"
FOUND = "!document.querySelector('#alert').innerText"


def shows(subject: str) -> str:
    return f"document.querySelector('#subject').innerText.startsWith('{subject},')"


def listed(page: Page) -> list[str]:
    return page.evaluate("[...document.querySelectorAll('#list .name')].map((name) => name.textContent)")


def test_result_shows_as_soon_as_it_is_there(page: Page, service: PageService) -> None:
    page.open(service.address)
    page.wait(READY)
    service.backend.add("a.png", decision("a.png"))
    assert page.wait(shows("a.png")) < 1.0


@pytest.mark.parametrize("fault", ["cut", "silence"])
def test_lost_connection_shows_within_two_seconds_and_missed_results_follow(
    page: Page, service: PageService, fault: str
) -> None:
    page.open(service.address)
    page.wait(READY)
    service.backend.add("before.png", decision("x"))
    page.wait(shows("before.png"))
    getattr(service.line, fault)()
    assert page.wait(LOST) < 2.3  # with the delay of this test's questions
    assert page.text("#service") == "No connection"
    assert page.text("#status-title") == "Status, as last known"
    for number in range(60):
        service.backend.add(f"missed-{number}.png", decision("x"))
    time.sleep(1)
    service.line.mend() if fault == "cut" else service.line.restore()
    page.wait(FOUND, timeout=5)
    page.wait(shows("missed-59.png"))
    page.wait("document.querySelector('#list-note').innerText === 'Results 12 to 61 of 61'")
    assert listed(page) == [f"missed-{number}.png" for number in reversed(range(10, 60))]
    service.backend.add("after.png", decision("x"))
    page.wait(shows("after.png"))
    if fault == "cut":
        page.forget("net::ERR_")
    page.faults.clear()


def test_page_that_waits_for_a_service_finds_it(page: Page, service: PageService) -> None:
    page.open(service.address)
    page.wait(READY)
    for _ in range(3):
        service.line.cut()
        page.wait(LOST)
        service.line.mend()
        page.wait(FOUND, timeout=5)
    service.backend.add("a.png", decision("a.png"))
    page.wait(shows("a.png"))
    page.forget("net::ERR_")


def test_older_page_stays_through_a_reconnection(page: Page, service: PageService) -> None:
    for number in range(120):
        service.backend.add(f"{number}.png", decision("x"))
    page.open(service.address)
    page.wait("document.querySelector('#list').children.length === 50")
    page.click("#older")
    page.wait("document.querySelector('#list-note').innerText === 'Results 21 to 70 of 120; 50 are newer'")
    service.line.cut()
    page.wait(LOST)
    service.backend.add("missed.png", decision("x"))
    service.line.mend()
    page.wait(FOUND, timeout=5)
    page.wait("document.querySelector('#list-note').innerText === 'Results 21 to 70 of 121; 51 are newer'")
    page.forget("net::ERR_")


def test_hidden_page_holds_no_connection_and_catches_up(page: Page, service: PageService) -> None:
    page.open(service.address)
    page.wait(READY)
    hide = "Object.defineProperty(document, 'hidden', {{configurable: true, value: {}}});"
    act = hide + "document.dispatchEvent(new Event('visibilitychange')); null"
    page.evaluate(act.format("true"))
    deadline = time.monotonic() + 5
    while service.backend.listeners:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    service.backend.add("missed.png", decision("x"))
    page.evaluate(act.format("false"))
    page.wait(shows("missed.png"))


def test_status_names_what_needs_somebody(page: Page, service: PageService) -> None:
    service.backend.faults.destination_down = True
    page.open(service.address)
    page.wait("document.querySelector('#status').innerText.includes('To pacs: 3 wait, connection refused')")
    assert "self-test passed" in page.text("#status")
    service.backend.faults.destination_down = False
    service.backend.emit("status", service.backend.status())
    page.wait("document.querySelector('#status').innerText.includes('To pacs: all sent')")


def test_status_names_each_intake_that_is_closed_and_why(
    page: Page, live_service: PageService, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = live_service.backend.status()
    folders = [
        {"path": "/srv/inbox", "ok": True, "state": "ok", "error": None},
        {"path": "/mnt/share/late", "ok": False, "state": "blocked", "error": "the folder has not answered for 3 s"},
    ]
    intake = {"http": {}, "folder": folders, "dicom": {"ae_title": "CART", "listening": False}}
    live = {"source": "v4l2:/dev/video0", "state": "no signal", "last_error": "no frame comes"}
    monkeypatch.setattr(live_service.backend, "status", lambda: {**good, "intake": intake, "live": live})
    page.open(live_service.address)
    page.wait("document.querySelectorAll('#status-list li').length > 5")
    lines = page.text("#status-list").splitlines()
    assert "Watched folder inbox: open" in lines
    assert "Watched folder late: closed: the folder has not answered for 3 s" in lines
    assert "DICOM: closed: it does not listen; see the log" in lines
    assert "Live: no signal, no frame comes" in lines
