"""The outermost layer: security headers, an access log without names, and an answer to unexpected errors."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from echoquad_serve.http.error_responses import error_response

__all__ = ["CONTENT_SECURITY_POLICY", "Observer", "RequestGuard"]

_LOGGER = logging.getLogger("echoquad_serve.http")
_ACCESS = logging.getLogger("echoquad_serve.http.access")

Observer = Callable[[str, str, int, float], None]
"""What is told of each request: method, route, status code and seconds."""

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_HEADERS = {
    b"content-security-policy": CONTENT_SECURITY_POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"permissions-policy": b"camera=(), geolocation=(), microphone=()",
    b"cache-control": b"no-store",
}


class RequestGuard:
    """Middleware that adds headers to every answer, logs it, and hides unexpected errors.

    Parameters
    ----------
    app
        The application.
    observe
        What is told of each request; None for nothing.
    """

    def __init__(self, app: ASGIApp, observe: Observer | None = None) -> None:
        self._app = app
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request; a WebSocket, which the service does not have, is closed."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 0

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message.get("headers", ()))
                present = {name.lower() for name, _ in headers}
                headers += [(name, value) for name, value in _HEADERS.items() if name not in present]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, send_guarded)
        except Exception as error:
            _LOGGER.error("a request failed: %s at %s", type(error).__name__, _places(error), extra=_request(scope))
            if not status:
                message = "the service has a fault; its log has the place"
                answer = error_response(scope["path"], HTTPStatus.INTERNAL_SERVER_ERROR, "E_UNEXPECTED", message)
                await answer(scope, receive, send_guarded)
            # Otherwise the answer stays incomplete, and the server closes the connection.
        finally:
            seconds = time.perf_counter() - start
            # Pages and monitors ask every second, and their questions would bury the rest of the log.
            level = logging.DEBUG if scope["method"] in ("GET", "HEAD") and 200 <= status < 400 else logging.INFO
            fields = {**_request(scope), "http_status": status, "ms": round(seconds * 1000, 1)}
            _ACCESS.log(level, "a request has ended", extra=fields)
            try:
                if self._observe is not None:
                    self._observe(scope["method"], _route(scope), status, seconds)
            except Exception as error:
                _LOGGER.error("a request was not counted: %s", _places(error))


def _route(scope: Scope) -> str:
    """Return the pattern of the path: the path itself may hold a name or a UID."""
    return str(getattr(scope.get("route"), "path", "-"))


def _request(scope: Scope) -> dict[str, str]:
    return {"method": str(scope["method"]), "route": _route(scope)}


def _places(error: BaseException) -> str:
    """Return the type of an exception and where it was raised, without its message and without values."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    return " < ".join([type(error).__name__, *(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames))])
