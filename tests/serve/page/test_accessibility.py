"""Keyboard, screen reader, contrast: what the page offers to people who cannot use a mouse, or see little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .chromium import Page
from .page_service import PageService, decision

READY = "document.querySelector('#service').innerText === 'Ready'"

CONTRASTS = """(() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => numbers(colour).slice(0, 3).map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (numbers(colour)[3] !== 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const low = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility() || element.closest("noscript, .unseen")) continue;
    const [dark, light] = [getComputedStyle(element).color, ground(element)].map(luminance).sort((a, b) => a - b);
    if ((light + 0.05) / (dark + 0.05) < 4.5) low.push(element.outerHTML);
  }
  return low;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_a_contrast_of_at_least_4_5(
    page: Page, service: PageService, frames: Callable[..., list[Path]], scheme: str
) -> None:
    service.backend.add("a.png", decision("a.png"))
    service.backend.faults.destination_down = True
    page.open(service.address, prefers_color_scheme=scheme)
    page.wait(READY)
    page.choose(*frames("damaged.png", "flagged.png"))
    page.wait("document.querySelector('#subject').innerText.startsWith('flagged.png,')")
    assert page.evaluate(CONTRASTS) == []
    service.line.cut()
    page.wait("document.querySelector('#alert').innerText")
    assert page.evaluate(CONTRASTS) == []
    page.forget("422", "net::ERR_")


def test_screen_reader_finds_landmarks_and_names(page: Page, service: PageService) -> None:
    service.backend.add("a.png", decision("a.png", flags=["colour"]))
    page.open(service.address)
    page.wait("document.querySelector('#picture canvas')")
    names = page.names()
    assert {role for role, _ in names} >= {"banner", "main", "contentinfo", "status", "alert"}
    assert names >= {
        ("region", "Decision"),
        ("region", "Frame and evidence"),
        ("region", "Results"),
        ("region", "Status"),
        ("listbox", "Results"),
        ("option", "ASD, 93 % 1 flag a.png " + page.text("#list .when")),
        ("checkbox", "Activation map"),
        ("checkbox", "Show each new one"),
        ("table", "Quadrants"),
        ("columnheader", "NORM"),
        ("rowheader", "LA"),
        ("list", "Flags"),
        ("button", "Older"),
        ("image", "Frame a.png with the boxes LA, RA, LV, RV, decided ASD"),
    }
    unnamed = {(role, name) for role, name in names if role in ("button", "checkbox", "slider", "image") and not name}
    assert unnamed == set()


def test_new_result_is_spoken(page: Page, service: PageService) -> None:
    page.open(service.address)
    page.wait(READY)
    service.backend.add("a.png", decision("a.png", flags=["tie"]))
    page.wait("document.querySelector('#spoken').textContent.startsWith('Result 1: ASD. Confidence 93 %')")
    assert "same number of votes" in page.evaluate("document.querySelector('#spoken').textContent")


def test_keyboard_alone_reaches_everything_in_the_order_of_reading(page: Page, service: PageService) -> None:
    for number in range(60):
        service.backend.add(f"{number}.png", decision("x"))
    page.open(service.address)
    page.wait("document.querySelector('#list').children.length === 50")
    page.wait("document.querySelector('#picture canvas')")
    order = []
    for _ in range(6):
        page.press("Tab")
        order.append(page.focused())
        outline = (
            "getComputedStyle(document.activeElement.id === 'files' ? document.querySelector('label[for=files]') :"
        )
        assert page.evaluate(f"{outline} document.activeElement).outlineStyle") != "none"
    assert order == ["Skip to the decision", "files", "map", "follow", "list", "older"]
    page.press("Enter")
    page.wait("document.querySelector('#list-note').innerText.startsWith('Results 1 to 10')")
    page.evaluate("document.querySelector('#list').focus()")
    page.press("End")
    page.wait("document.querySelector('#subject').innerText.startsWith('0.png,')")
    page.press("ArrowUp")
    page.wait("document.querySelector('#subject').innerText.startsWith('1.png,')")
    assert page.evaluate(
        "document.getElementById(document.activeElement.getAttribute('aria-activedescendant')).innerText"
    )


def test_nothing_is_stored_in_the_browser(page: Page, service: PageService) -> None:
    service.backend.add("a.png", decision("a.png"))
    page.open(service.address)
    page.wait("document.querySelector('#picture canvas')")
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    assert page.evaluate("(async () => [await indexedDB.databases(), await caches.keys()].flat().length)()") == 0
    page.forget("DocumentCookie")  # Chromium reports the question itself
    assert "This page stores nothing in the browser" in page.text("footer")
