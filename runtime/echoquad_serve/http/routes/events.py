"""``GET /api/v1/events``: results, status and live decisions as server-sent events.

Every client gets every result in order, once: those that do not fit into its queue, and those since `Last-Event-ID`,
are read from the store. Status and live decisions are of use only while they are new: a newer one replaces one that has
not been sent.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from echoquad_serve.http.context import Context, context_of
from echoquad_serve.http.error_responses import ApiError
from echoquad_serve.http.json_encoding import encode_json
from echoquad_serve.http.open_streams import OpenStream
from echoquad_serve.http.routes.parameters import MAX_INTEGER, check_parameters

__all__ = ["events"]

_LOGGER = logging.getLogger("echoquad_serve.http")

_RETRY_MS = 2000
"""Milliseconds after which a browser connects again."""

_PAGE = 100
"""Results that are read from the store at once."""

_MANY_ROWS = 100

_HEADERS = {"X-Accel-Buffering": "no"}  # a proxy must not collect events


async def events(request: Request) -> Response:
    """Answer a stream of events, which ends with the connection or the service.

    Raises
    ------
    ApiError
        If ``Last-Event-ID`` is no number: 400; if too many streams are open: 503.
    """
    check_parameters(request)
    last = request.headers.get("last-event-id", "")
    if last and not (re.fullmatch(r"[0-9]{1,16}", last) and int(last) <= MAX_INTEGER):
        message = "header Last-Event-ID: expected the number of a result"
        raise ApiError(HTTPStatus.BAD_REQUEST, "E_HTTP_PARAMETER", message)
    context = context_of(request)
    context.events.check_room()
    if request.method == "HEAD":
        return Response(headers=_HEADERS, media_type="text/event-stream")
    return _EventResponse(context, int(last) if last else None)


class _EventResponse(Response):
    """The response: headers, then events until the stream ends."""

    media_type = "text/event-stream"

    def __init__(self, context: Context, last: int | None) -> None:
        self.status_code = HTTPStatus.OK
        self.background = None
        self.body = b""
        self.init_headers(_HEADERS)
        del self.headers["content-length"]
        self._context = context
        self._last = last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._context.events.open(receive) as stream:
            client = _Client(self._context, stream, send, self._last)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            unsubscribe = await self._context.reads.run(self._context.backend.subscribe, client.notify)
            try:
                await client.run()
            finally:
                # Not awaited, so that it happens even if the task is being cancelled.
                self._context.reads.start(unsubscribe)
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Client:
    """A client, what waits for it, and the number of the last result that it got."""

    def __init__(self, context: Context, stream: OpenStream, send: Send, last: int | None) -> None:
        self._context = context
        self._stream = stream
        self._send = send
        self._last = last
        self._results: deque[dict[str, Any]] = deque(maxlen=context.limits.event_queue)
        self._latest: dict[str, dict[str, Any]] = {}

    def notify(self, name: str, data: dict[str, Any]) -> None:
        """Take an event, in any thread."""
        with suppress(RuntimeError):  # the loop has ended, and the client with it
            self._stream.loop.call_soon_threadsafe(self._put, name, data)

    def _put(self, name: str, data: dict[str, Any]) -> None:
        if name == "result":
            self._results.append(data)  # a full queue drops the oldest, which is read from the store again
        else:
            self._latest[name] = data
        self._stream.wake()

    async def run(self) -> None:
        """Send events until the stream ends."""
        backend, limits = self._context.backend, self._context.limits
        await self._write(f"retry: {_RETRY_MS}\n\n".encode())
        if self._last is None:
            latest = await self._context.reads.run(backend.results, limit=1)
            self._last = latest[0].number if latest else 0
        else:
            await self._replay()
        self._latest.setdefault("status", await self._context.health.run(backend.status))
        self._stream.wake()
        while not self._stream.ended:
            if not await self._stream.wait(limits.heartbeat_s):
                await self._write(b": heartbeat\n\n")
            while self._results and not self._stream.ended:
                await self._send_result(self._results.popleft())
            for name in list(self._latest):
                await self._write(_encode(name, self._latest.pop(name)))

    async def _send_result(self, data: dict[str, Any]) -> None:
        number = int(data.get("number", 0))
        assert self._last is not None
        if number > self._last + 1:
            await self._replay()
        if number > self._last:
            self._last = number
            # The rows of a long clip take seconds to encode, in which no other request would be served.
            long = len(data.get("rows", ())) > _MANY_ROWS
            await self._write(
                await self._context.reads.run(_encode, "result", data) if long else _encode("result", data)
            )

    async def _replay(self) -> None:
        """Send the results after the last one that the client got, from the store."""
        assert self._last is not None
        while not self._stream.ended:
            chunk, last = await self._context.reads.run(_replay_page, self._context.backend.results, self._last)
            if last == self._last:
                return
            self._last = last
            await self._write(chunk)

    async def _write(self, chunk: bytes) -> None:
        if chunk and not self._stream.ended:
            await self._send({"type": "http.response.body", "body": chunk, "more_body": True})


def _replay_page(results: Callable[..., Any], last: int) -> tuple[bytes, int]:
    page = [result for result in results(after=last or -1, limit=_PAGE) if result.number > last]
    chunk = b"".join(_encode("result", result.to_dict()) for result in page)
    return chunk, page[-1].number if page else last


def _encode(name: str, data: dict[str, Any]) -> bytes:
    """Return an event; nothing for one that cannot be encoded, which must not end the stream."""
    try:
        text = encode_json(data)
    except (TypeError, ValueError) as error:
        _LOGGER.error("an event %s cannot be sent: %s", name, type(error).__name__)
        return b""
    head = f"event: {name}\nid: {data['number']}\n" if name == "result" and data.get("number") else f"event: {name}\n"
    return head.encode() + b"data: " + text + b"\n\n"
