"""What the page shows of results: decisions, doubts, flags, errors, clips, and thousands of them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .chromium import Page
from .page_service import PageService, decision

ROOT = Path(__file__).parents[3]
PICTURE = "document.querySelector('#picture canvas')"


def shows(subject: str) -> str:
    return f"document.querySelector('#subject').innerText.startsWith('{subject},')"


def documented_flags() -> set[str]:
    table = (ROOT / "docs/reference/flags.md").read_text("utf-8").partition("\n\n| flag |")[2].partition("\n\n")[0]
    cells = (line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    return {flag for cell in cells for flag in re.findall("`([^`]+)`", cell)}


def test_every_documented_flag_has_a_sentence(page: Page, service: PageService) -> None:
    flags = documented_flags()
    assert len(flags) > 10
    service.backend.add("all.png", decision("all.png", flags=[*sorted(flags), "of-a-later-release"]))
    page.open(service.address)
    page.wait(shows("all.png"))
    sentences = page.text("#flags").splitlines()
    assert len(sentences) == len(set(sentences)) == len(flags) + 1
    assert [text for text in sentences if text.startswith("Flag ")] == [
        "Flag of-a-later-release; the documentation explains it."
    ]


def test_decision_has_confidence_picture_quadrants_and_what_ran(page: Page, service: PageService) -> None:
    service.backend.add("a.png", decision("a.png"))
    page.open(service.address)
    page.wait(PICTURE)
    assert page.text("#verdict") == "ASD"
    assert page.text("#confidence") == "Confidence 93 %"
    table = page.text("#evidence table").splitlines()
    assert table[1:3] == ["LA\t96 %\t4 %", "RA\t91 %\t9 %"]
    ran = page.text("#ran")
    for expected in ("demo", decision("")["bundle_sha256"][:12], "cpu, CPUExecutionProvider, fp32", "average", "0.82"):
        assert expected in ran
    assert decision("")["bundle_sha256"][:13] not in ran


def test_indeterminate_says_why_and_what_is_nearest(page: Page, service: PageService) -> None:
    row = decision("a.png", "INDETERMINATE", 0.44, abstained_because="the confidence is below 0.6")
    service.backend.add("a.png", row)
    page.open(service.address)
    page.wait(shows("a.png"))
    assert page.text("#verdict") == "INDETERMINATE"
    assert page.text("#confidence") == "Nearest is NORM, 56 %"
    assert page.text("#reason") == "The confidence is below 0.6."
    fits = "(() => {const e = document.querySelector('#verdict'); return e.scrollWidth <= e.clientWidth &&"
    assert page.evaluate(f"{fits} e.clientHeight < 1.5 * parseFloat(getComputedStyle(e).fontSize)}})()")


def test_confidence_that_is_not_the_mean_is_explained(page: Page, service: PageService) -> None:
    page.open(service.address)
    service.backend.add("a.png", decision("a.png", confidence=0.81, predicted_class="ASD"))
    page.wait("document.querySelector('#confidence').innerText === 'Confidence 81 %'")
    assert "calibrated; the mean above is not" in page.text("#ran")
    service.backend.add("b.png", decision("b.png", predicted_class="ASD"))
    page.wait("document.querySelector('#confidence').innerText === 'Confidence 93 %'")
    assert "calibrated" not in page.text("#ran")


def test_predicted_class_of_a_vote_is_nearest_whatever_the_means(page: Page, service: PageService) -> None:
    page.open(service.address)
    undecided = {"predicted_class": "NORM", "confidence": 0.44, "abstained_because": "low confidence"}
    service.backend.add("a.png", decision("a.png", "INDETERMINATE", 0.56, **undecided))
    page.wait("document.querySelector('#confidence').innerText === 'Nearest is NORM, 44 %'")


def test_abstention_that_a_flag_explains_is_explained_once(page: Page, service: PageService) -> None:
    page.open(service.address)
    unlike = {"abstained_because": "unlike the training frames", "flags": ["unlike-training"]}
    service.backend.add("a.png", decision("a.png", "INDETERMINATE", 0.56, **unlike))
    page.wait("document.querySelector('#verdict').innerText === 'INDETERMINATE'")
    assert page.text("#reason") == ""
    assert "The frame is unlike those that the network was trained on." in page.text("#flags")


def test_certainty_is_not_rounded_up(page: Page, service: PageService) -> None:
    service.backend.add("a.png", decision("a.png", share=0.9991))
    page.open(service.address)
    page.wait(shows("a.png"))
    assert page.text("#confidence") == "Confidence over 99 %"


def test_file_names_are_text(page: Page, service: PageService) -> None:
    name = "<img src=x onerror=alert(1)>.png"
    service.backend.add(name, decision(name, "<b>ASD</b>"))
    page.open(service.address)
    page.wait("document.querySelector('#list').children.length")
    page.wait("document.querySelector('#subject').innerText.startsWith('<img')")
    assert page.text("#verdict") == "<b>ASD</b>"
    assert page.evaluate("document.querySelectorAll('main img, main b').length") == 0


def test_frames_of_a_clip_are_chosen_one_by_one(
    page: Page, service: PageService, frames: Callable[..., list[Path]]
) -> None:
    page.open(service.address)
    page.choose(*frames("clip.mp4"))
    page.wait(shows("clip.mp4"))
    assert "frame 1 of 12 (4 NORM, 8 ASD)" in page.text("#subject")
    assert page.text("#verdict") == "NORM"
    page.evaluate("document.querySelector('#frame').focus()")
    page.press("ArrowRight")
    page.wait("document.querySelector('#verdict').innerText === 'ASD'")
    assert "frame 2 of 12" in page.text("#subject")
    page.wait(PICTURE)
    assert any("overlay?row=1&" in request for request in page.requests)


def test_activation_map_is_asked_for(page: Page, service: PageService) -> None:
    service.backend.add("a.png", decision("a.png"))
    page.open(service.address)
    page.wait(PICTURE)
    page.click("#map")
    page.wait(PICTURE)
    assert any(request.endswith("cam=1") for request in page.requests)


def test_missing_picture_is_told(page: Page, service: PageService) -> None:
    service.backend.add("a.png", decision("a.png"))
    service.backend.faults.frames_gone = True
    page.open(service.address)
    page.wait("document.querySelector('#picture-note').innerText.includes('not kept any more')")
    assert page.text("#picture-note") == "There is no picture: the frame is not kept any more (E_FRAME_UNREADABLE)"
    page.forget("404")


def test_selected_result_stays_until_the_newest_is_wanted(page: Page, service: PageService) -> None:
    for number in range(5):
        service.backend.add(f"{number}.png", decision("x"))
    page.open(service.address)
    page.wait(shows("4.png"))
    page.click("#list > :nth-child(3)")
    page.wait(shows("2.png"))
    service.backend.add("new.png", decision("x"))
    page.wait("document.querySelector('#list').innerText.includes('new.png')")
    time.sleep(0.2)
    assert page.text("#subject").startswith("2.png")
    page.click("#follow")
    page.wait(shows("new.png"))


def test_ten_thousand_results_are_paged_and_stay_fluid(page: Page, service: PageService) -> None:
    for number in range(10_000):
        service.backend.add(f"{number + 1}.png", decision("x", flags=["colour"] * (number % 2)))
    start = time.monotonic()
    page.open(service.address)
    page.wait("document.querySelector('#list').children.length === 50")
    assert time.monotonic() - start < 5
    before = page.heap()
    page.wait("document.querySelector('#list-note').innerText === 'Results 9951 to 10000 of 10000'")
    for _ in range(10):
        first = page.text("#list-note")
        page.click("#older")
        page.wait(f"document.querySelector('#list-note').innerText !== '{first}'")
    assert page.text("#list-note") == "Results 9451 to 9500 of 10000; 500 are newer"
    page.click("#newer")
    page.wait("document.querySelector('#list-note').innerText === 'Results 9501 to 9550 of 10000; 450 are newer'")
    service.backend.add("late.png", decision("x"))
    page.wait("document.querySelector('#list-note').innerText.endsWith('; 451 are newer')")
    page.click("#newest")
    page.wait("document.querySelector('#list-note').innerText === 'Results 9952 to 10001 of 10001'")
    assert page.heap() < before + 5


def test_ten_thousand_results_that_come_at_once_do_not_block_the_page(page: Page, service: PageService) -> None:
    page.open(service.address)
    page.wait("document.querySelector('#service').innerText === 'Ready'")
    page.evaluate(
        "globalThis.slowest = 0; globalThis.last = performance.now(); globalThis.tick = () => {"
        "const now = performance.now(); slowest = Math.max(slowest, now - last); last = now;"
        "requestAnimationFrame(tick)};"
        "requestAnimationFrame(tick); null"
    )
    for number in range(10_000):
        service.backend.add(f"{number + 1}.png", decision("x"))
    page.wait("document.querySelector('#list-note').innerText.endsWith('of 10000')", timeout=60)
    page.wait(shows("10000.png"))
    assert page.evaluate("document.querySelectorAll('*').length") < 600
    assert page.evaluate("slowest") < 1000  # two busy cores draw it


@pytest.mark.parametrize("size", [(1280, 800), (640, 400), (390, 844), (320, 640)])
def test_nothing_is_wider_than_the_screen(page: Page, service: PageService, size: tuple[int, int]) -> None:
    long = "a-very-long-name-without-a-space-" * 6 + ".dcm"
    row = decision(long, "INDETERMINATE", 0.55, flags=["screen", "uncropped"], abstained_because="of " + "x" * 200)
    service.backend.add(long, row)
    page.open(service.address, *size)
    page.wait(PICTURE)
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    page.evaluate("scrollTo(0, 1e6)")
    visible = "(() => {const {top, bottom} = document.querySelector('.notice').getBoundingClientRect();"
    assert page.evaluate(f"{visible} return top >= 0 && bottom <= innerHeight && bottom > top}})()")
