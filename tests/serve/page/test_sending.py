"""Files that are dropped or chosen: one after another, with progress, refusals and repeated attempts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .chromium import Page
from .page_service import PageService

Frames = Callable[..., list[Path]]
READY = "document.querySelector('#service').innerText === 'Ready'"
DONE = "document.querySelector('#sending').hidden"


def names(service: PageService) -> list[str]:
    return [name for name, _, _ in service.backend.accepted]


def shows(subject: str) -> str:
    return f"document.querySelector('#subject').innerText.startsWith('{subject},')"


def test_dropped_file_is_decided(page: Page, service: PageService, frames: Frames) -> None:
    page.open(service.address)
    page.wait(READY)
    page.drop(*frames("Übung 1 & 2.png"))
    page.wait(shows("Übung 1 & 2.png"))
    assert page.text("#verdict") == "ASD"
    [(name, key, content)] = service.backend.accepted
    assert name == "Übung 1 & 2.png"
    assert len(key) == 32
    assert content == b"x" * 2000


def test_several_files_are_sent_in_order_and_the_last_is_shown(
    page: Page, service: PageService, frames: Frames
) -> None:
    several = [f"{number}.png" for number in range(12)]
    page.open(service.address)
    page.wait(READY)
    page.choose(*frames(*several))
    page.wait(shows("11.png"))
    page.wait(DONE)
    assert names(service) == several
    assert len({key for _, key, _ in service.backend.accepted}) == 12
    assert page.evaluate("document.querySelector('#list').children.length") == 12


def test_progress_is_told(page: Page, service: PageService, frames: Frames) -> None:
    service.backend.delay = 0.3
    page.open(service.address)
    page.wait(READY)
    page.choose(*frames("a.png", "b.png"))
    page.wait("document.querySelector('#sending-text').innerText === 'Deciding 2 of 2: b.png'")
    page.wait(DONE)


def test_long_name_of_a_file_that_is_sent_moves_nothing(page: Page, live_service: PageService, frames: Frames) -> None:
    top = "document.querySelector('#decision').getBoundingClientRect().top"
    page.open(live_service.address)
    page.wait(READY)
    page.wait("!document.querySelector('#live').hidden")
    before = page.evaluate(top)
    live_service.backend.delay = 0.5
    page.drop(*frames(f"{'long ' * 30}.png"))
    page.wait("document.querySelector('#sending-text').innerText.startsWith('Deciding')")
    assert page.evaluate(top) == before
    page.wait(DONE)


def test_failed_file_is_told_with_its_code_and_the_next_is_sent(
    page: Page, service: PageService, frames: Frames
) -> None:
    page.open(service.address)
    page.wait(READY)
    page.choose(*frames("damaged.dcm", "good.dcm"))
    page.wait(shows("good.dcm"))
    told = "the image is truncated; copy the file again (E_FRAME_DAMAGED)"
    assert page.text("#problem-list") == f"damaged.dcm: {told}"
    page.click("#list > :nth-child(2)")
    page.wait(shows("damaged.dcm"))
    assert page.text("#verdict") == "NOT DECIDED"
    assert page.text("#reason") == told[0].upper() + told[1:]
    page.click("#clear")
    page.wait("document.querySelector('#problems').hidden")
    page.forget("422")


def test_refused_file_is_told_with_its_code(page: Page, service: PageService, frames: Frames) -> None:
    page.open(service.address)
    page.wait(READY)
    page.choose(*frames("empty.png", size=0))
    page.wait("document.querySelector('#problem-list').innerText")
    assert page.text("#problem-list").startswith("empty.png: the body is empty")
    assert "(E_HTTP_BODY_EMPTY)" in page.text("#problem-list")
    page.forget("400")


def test_too_large_file_is_told(page: Page, service: PageService, frames: Frames) -> None:
    page.open(service.address)
    page.wait(READY)
    page.choose(*frames("large.dcm", size=17 << 20))
    page.wait("document.querySelector('#problem-list').innerText", timeout=30)
    assert "large.dcm: " in page.text("#problem-list")
    page.forget("413", "net::ERR_CONNECTION", "net::ERR_")


def test_full_queue_is_waited_for(page: Page, service: PageService, frames: Frames) -> None:
    service.backend.faults.queue_full = True
    page.open(service.address)
    page.wait(READY)
    page.choose(*frames("a.png"))
    page.wait("document.querySelector('#sending-text').innerText.includes('Trying again in')")
    assert page.text("#sending-text").startswith("1000 objects wait")
    service.backend.faults.queue_full = False
    page.wait(shows("a.png"))
    assert names(service) == ["a.png"]
    page.forget("429")


def test_sending_can_be_stopped(page: Page, service: PageService, frames: Frames) -> None:
    service.backend.faults.queue_full = True
    page.open(service.address)
    page.wait(READY)
    page.choose(*frames("a.png", "b.png"))
    page.wait("document.querySelector('#sending-text').innerText.includes('Trying again in')")
    page.click("#stop")
    page.wait(DONE)
    service.backend.faults.queue_full = False
    assert names(service) == []
    page.choose(*frames("c.png"))
    page.wait(shows("c.png"))
    assert names(service) == ["c.png"]
    page.forget("429")


def test_file_is_sent_once_when_the_connection_breaks_before_the_answer(
    page: Page, service: PageService, frames: Frames
) -> None:
    service.backend.delay = 1.0
    page.open(service.address)
    page.wait(READY)
    page.choose(*frames("a.png"))
    page.wait("document.querySelector('#sending-text').innerText.startsWith('Deciding')")
    service.line.cut()
    page.wait("document.querySelector('#sending-text').innerText.startsWith('The connection is lost')")
    service.line.mend()
    page.wait(shows("a.png"))
    page.wait(DONE)
    assert names(service) == ["a.png"]
    assert len(service.backend.results()) == 1
    page.forget("net::ERR_")


def test_folder_is_refused_in_words(page: Page, service: PageService, tmp_path: Path) -> None:
    folder = tmp_path / "exam"
    folder.mkdir()
    page.open(service.address)
    page.wait(READY)
    page.drop(folder)
    page.wait("document.querySelector('#problem-list').innerText")
    assert page.text("#problem-list").startswith("exam: It cannot be read; choose files, not folders")
    page.faults.clear()


@pytest.mark.parametrize("fault", ["not_ready", "disk_full"])
def test_service_that_does_not_accept_says_why(page: Page, service: PageService, fault: str) -> None:
    setattr(service.backend.faults, fault, True)
    page.open(service.address)
    if fault == "not_ready":
        page.wait("document.querySelector('#service').innerText === 'Not ready: the bundle is being tested'")
    else:
        page.wait("document.querySelector('#status').innerText.includes('Queue: full, nothing more is accepted')")
