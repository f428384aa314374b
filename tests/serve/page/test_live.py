"""The live view: picture, decision, age and drops; a picture that is not current has no decision."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .chromium import Page
from .page_service import PageService, decision

READY = "document.querySelector('#service').innerText === 'Ready'"


def verdict(text: str) -> str:
    return f"document.querySelector('#verdict').innerText === '{text}'"


@contextmanager
def source(service: PageService) -> Iterator[dict[str, str]]:
    """Send 30 frames a second, in the state that the yielded dict names."""
    ended, now = threading.Event(), {"state": "ok"}

    def send() -> None:
        while not ended.wait(1 / 30):
            if now["state"]:
                service.backend.show_live(now["state"])

    thread = threading.Thread(target=send, name="echoquad-test-live", daemon=True)
    thread.start()
    yield now
    ended.set()
    thread.join()


def watch(page: Page, service: PageService) -> None:
    page.open(service.address)
    page.wait("!document.querySelector('#live').hidden")
    page.click("#live")
    page.wait(verdict("NORM"))


def test_live_view_shows_picture_decision_age_and_drops(page: Page, live_service: PageService) -> None:
    with source(live_service):
        watch(page, live_service)
        assert page.text("#subject") == "Live view, age 23 ms, 2 frames dropped"
        assert page.text("#confidence") == "Confidence 92 %"
        page.wait("document.querySelector('#picture img').naturalWidth === 640")
        assert page.evaluate("document.querySelector('#live').getAttribute('aria-pressed')") == "true"


@pytest.mark.parametrize(
    ("state", "shown"), [("frozen", "FROZEN PICTURE"), ("no signal", "NO SIGNAL"), ("stopped", "STOPPED")]
)
def test_fault_of_the_source_replaces_the_decision(
    page: Page, live_service: PageService, state: str, shown: str
) -> None:
    with source(live_service) as now:
        watch(page, live_service)
        now["state"] = state
        page.wait(verdict(shown))
        assert page.text("#confidence") == ""
        assert "Check" in page.text("#reason") or "tries" in page.text("#reason")
        assert page.evaluate("document.querySelector('#shares').hidden")
        assert page.evaluate("document.querySelector('#picture').hasAttribute('data-stale')")
        now["state"] = "ok"
        page.wait(verdict("NORM"))
        assert not page.evaluate("document.querySelector('#picture').hasAttribute('data-stale')")


def test_silent_source_replaces_the_decision_within_two_and_a_half_seconds(
    page: Page, live_service: PageService
) -> None:
    with source(live_service) as now:
        watch(page, live_service)
        now["state"] = ""
        assert page.wait(verdict("NO ANSWER")) < 2.6
        now["state"] = "ok"
        page.wait(verdict("NORM"))


def test_lost_connection_replaces_the_decision_and_the_picture_comes_back(
    page: Page, live_service: PageService
) -> None:
    with source(live_service):
        watch(page, live_service)
        page.wait("document.querySelector('#picture img').naturalWidth === 640")
        live_service.line.cut()
        assert page.wait(verdict("NO CONNECTION")) < 2.3
        live_service.line.mend()
        page.wait(verdict("NORM"))
        page.wait("document.querySelector('#picture img').naturalWidth === 640")
        page.forget("net::ERR_")


def test_source_without_a_picture_is_tried_again(page: Page, live_service: PageService) -> None:
    page.open(live_service.address)
    page.wait("!document.querySelector('#live').hidden")
    page.click("#live")
    page.wait(verdict("NO ANSWER"))
    deadline = time.monotonic() + 10
    while not any("503" in fault for fault in page.faults):
        assert time.monotonic() < deadline, "the stream was not refused"
        time.sleep(0.02)
    with source(live_service):
        page.wait(verdict("NORM"))
        page.wait("document.querySelector('#picture img').naturalWidth === 640")
    page.forget("503")


def test_leaving_ends_the_stream_and_shows_the_latest_result(page: Page, live_service: PageService) -> None:
    live_service.backend.add("a.png", decision("a.png"))
    with source(live_service):
        watch(page, live_service)
        page.wait("document.querySelector('#picture img').naturalWidth === 640")
        page.wait(READY)
        live_service.backend.add("b.png", decision("b.png"))
        page.wait("document.querySelector('#list').innerText.includes('b.png')")
        assert page.text("#verdict") == "NORM"
        page.click("#live")
        page.wait("document.querySelector('#subject').innerText.startsWith('b.png,')")
        deadline = time.monotonic() + 5
        while any(thread.name == "echoquad-http-live" for thread in threading.enumerate()):
            assert time.monotonic() < deadline, "the live stream is still open"
            time.sleep(0.05)
        page.wait("document.querySelector('#picture canvas')")


def test_sending_a_file_leaves_the_live_view(
    page: Page, live_service: PageService, frames: Callable[..., list[Path]]
) -> None:
    with source(live_service):
        watch(page, live_service)
        [path] = frames("a.png")
        page.drop(path)
        page.wait("document.querySelector('#subject').innerText.startsWith('a.png,')")
        assert page.evaluate("document.querySelector('#live').getAttribute('aria-pressed')") == "false"
