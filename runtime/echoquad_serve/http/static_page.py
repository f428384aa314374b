"""The page: the files of the package's folder ``page``, read once, so that no request reaches the file system."""

from __future__ import annotations

import hashlib
from http import HTTPStatus
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

__all__ = ["page_routes"]

_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
_INDEX = "index.html"


def page_routes() -> list[Route]:
    """Return ``/`` and a route below ``/static/`` for each other file of the page."""
    folder = files("echoquad_serve.http").joinpath("page")
    found = sorted(folder.iterdir(), key=lambda file: file.name) if folder.is_dir() else []
    routes = [Route("/favicon.ico", _no_icon)]
    for file in found:
        suffix = file.name[file.name.rfind(".") :]
        if suffix in _MEDIA_TYPES and file.is_file():
            served = _StaticFile(file.read_bytes(), _MEDIA_TYPES[suffix])
            routes.append(Route("/" if file.name == _INDEX else f"/static/{file.name}", served.answer))
    return routes


async def _no_icon(_: Request) -> Response:
    """Answer a browser that asks for an icon, without an error in its console."""
    return Response(status_code=HTTPStatus.NO_CONTENT)


class _StaticFile:
    """A file in memory."""

    def __init__(self, content: bytes, media_type: str) -> None:
        self._content = content
        # A new version is seen at the next visit: the browser asks whether its copy is still the same.
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        self._headers = {"ETag": tag, "Cache-Control": "no-cache", "Content-Type": media_type}

    async def answer(self, request: Request) -> Response:
        """Answer the file, or that the client has it."""
        known = (tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(","))
        if self._headers["ETag"] in known:
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=self._headers)
        return Response(self._content, headers=self._headers)
