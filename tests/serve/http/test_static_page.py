"""The page's files: from memory, with a tag, and nothing beside them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette

from echoquad_serve.config import HttpConfig
from echoquad_serve.http import static_page
from echoquad_serve.http.app import create_app

from .fake_backend import FakeBackend


@pytest.fixture
def app(tmp_path: Path, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> Starlette:
    folder = tmp_path / "page"
    folder.mkdir()
    folder.joinpath("index.html").write_text("<!doctype html><title>EchoQuad</title>", encoding="utf-8")
    folder.joinpath("app.js").write_text("export const one = 1;\n", encoding="utf-8")
    folder.joinpath("__init__.py").write_text("SECRET = 1\n", encoding="utf-8")
    folder.joinpath("sub").mkdir()
    tmp_path.joinpath("secret.js").write_text("no", encoding="utf-8")
    monkeypatch.setattr(static_page, "files", lambda _: tmp_path)
    app = create_app(backend, HttpConfig())
    folder.joinpath("app.js").unlink()  # it was read already
    return app


def get(app: Starlette, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get(path, headers=headers or {})

    return asyncio.run(ask())


def test_files_are_served_from_memory_with_their_type(app: Starlette) -> None:
    page, module = get(app, "/"), get(app, "/static/app.js")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "EchoQuad" in page.text
    assert module.headers["content-type"] == "text/javascript; charset=utf-8"
    assert module.headers["cache-control"] == "no-cache"
    assert "script-src 'self'" in page.headers["content-security-policy"]


def test_browser_with_a_copy_gets_none(app: Starlette) -> None:
    tag = get(app, "/static/app.js").headers["etag"]
    for known in (tag, f'"x", W/{tag}'):
        answer = get(app, "/static/app.js", {"If-None-Match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
    assert get(app, "/static/app.js", {"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/static/__init__.py",
        "/static/index.html",
        "/static/sub",
        "/static/",
        "/static/../secret.js",
        "/static/..%2fsecret.js",
    ],
)
def test_nothing_else_is_served(app: Starlette, path: str) -> None:
    assert get(app, path).status_code == 404


def test_browser_that_wants_an_icon_gets_no_error(app: Starlette) -> None:
    assert get(app, "/favicon.ico").status_code == 204
