"""A browser for all tests of the page, and for each test a page and a service of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from .chromium import PROGRAM, Page, running
from .page_service import PageService


@pytest.fixture(scope="session")
def new_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Page]]:
    """Return a function that opens an empty page in the browser."""
    if shutil.which(PROGRAM) is None:
        pytest.skip("needs Debian's chromium")
    with running(tmp_path_factory.mktemp("chromium")) as new:
        yield new


@pytest.fixture
def page(new_page: Callable[[], Page]) -> Iterator[Page]:
    """Return an empty page; at the end of the test, nothing may have gone wrong in it that it did not expect."""
    page = new_page()
    yield page
    page.close()
    assert page.faults == []  # errors of the console, exceptions, violations of the Content-Security-Policy
    assert {urlsplit(request).hostname for request in page.requests} <= {"127.0.0.1", None}


@pytest.fixture
def service(tmp_path: Path, page: Page) -> Iterator[PageService]:
    """Return a service without results."""
    service = PageService(tmp_path / "service")
    yield service
    page.close()  # or it would report that the connection is lost
    service.close()


@pytest.fixture
def live_service(tmp_path: Path, page: Page) -> Iterator[PageService]:
    """Return a service with a live source."""
    service = PageService(tmp_path / "service", live=True)
    yield service
    page.close()  # or it would report that the connection is lost
    service.close()


@pytest.fixture
def frames(tmp_path: Path) -> Callable[..., list[Path]]:
    """Return a function that writes files with these names; the service looks at the names alone."""

    def write(*names: str, size: int = 2000) -> list[Path]:
        folder = tmp_path / "frames"
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).write_bytes(b"x" * size)
        return [folder / name for name in names]

    return write
