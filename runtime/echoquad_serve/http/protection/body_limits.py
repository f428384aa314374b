"""Limits of the body of a request: its size, the time it takes, and its rate."""

from __future__ import annotations

import asyncio
import time
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from echoquad_serve.http.error_responses import ApiError, error_response
from echoquad_serve.http.limits import Limits

__all__ = ["BodyLimits"]


class BodyLimits:
    """Middleware that ends a request whose body is too large (413) or too slow (408).

    Only the time in which the service waits for the client counts, not the time in which it writes to the disk.

    Parameters
    ----------
    app
        The application.
    max_bytes
        Size of the largest body.
    limits
        Time and rate.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, limits: Limits) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request; the one who reads its body gets the error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not length.isdigit() or int(length) > self._max_bytes:
            error = self._too_large()
            answer = error_response(scope["path"], error.status_code, error.code, error.detail)
            await answer(scope, receive, send)
            return
        received, waited, complete = 0, 0.0, False

        async def receive_limited() -> Message:
            nonlocal received, waited, complete
            if complete:  # what follows is the end of the connection, which takes as long as it takes
                return await receive()
            limits = self._limits
            allowed = min(limits.body_s, limits.body_grace_s + received / limits.body_bytes_per_s)
            start = time.monotonic()
            try:
                async with asyncio.timeout(max(0.0, allowed - waited)):
                    message = await receive()
            except TimeoutError as error:
                text = (
                    f"{received} bytes came in {allowed:.0f} s; expected {limits.body_bytes_per_s:.0f} bytes per "
                    f"second and the whole body within {limits.body_s:.0f} s"
                )
                raise ApiError(HTTPStatus.REQUEST_TIMEOUT, "E_HTTP_BODY_TIMEOUT", text) from error
            waited += time.monotonic() - start
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if received > self._max_bytes:
                    raise self._too_large()
            return message

        await self._app(scope, receive_limited, send)

    def _too_large(self) -> ApiError:
        message = f"the body is too large; expected at most {self._max_bytes} bytes (http.max_body_mb)"
        return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "E_HTTP_BODY_TOO_LARGE", message)
