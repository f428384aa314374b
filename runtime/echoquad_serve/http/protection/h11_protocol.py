"""uvicorn's HTTP/1.1 protocol with the limits that it does not have.

uvicorn waits for ever for the first request of a connection, for the rest of headers, and for a client that reads
nothing; it answers errors of the protocol as plain text; and open streams keep it from stopping.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, ClassVar

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from echoquad_serve.http.error_responses import error_response
from echoquad_serve.http.json_encoding import encode_json
from echoquad_serve.http.limits import Limits
from echoquad_serve.http.protection.request_checks import is_loopback

__all__ = ["LimitedH11Protocol", "limited_protocol"]


class LimitedH11Protocol(H11Protocol):
    """A connection with limits; see the module.

    Attributes
    ----------
    limits
        The limits.
    on_shutdown
        Called when the server stops, for each connection: it ends open streams.
    """

    limits: ClassVar[Limits] = Limits()
    on_shutdown: ClassVar[Callable[[], None]] = staticmethod(lambda: None)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.access_log = False  # whatever handlers the process has: uvicorn's lines name paths
        self._header_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection. One too many is told so; those from this machine have the last places."""
        super().connection_made(transport)
        remote = sum(not _is_local(getattr(connection, "client", None)) for connection in self.connections)
        too_many_remote = remote > self.limits.remote_connections and not _is_local(self.client)
        if too_many_remote or len(self.connections) > self.limits.connections:
            self.app = _too_many_connections
        self._header_timer = self.loop.call_later(self.limits.header_s, self._headers_late)

    def data_received(self, data: bytes) -> None:
        """Take data of the client."""
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._linger_timer is not None and self.conn.their_state is not h11.SEND_BODY:
            self._cancel("_linger_timer")
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the timers with the connection."""
        self._cancel("_header_timer")
        self._cancel("_stall_timer")
        self._cancel("_linger_timer")
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Drop the rest of a body that was refused, so that the client reads the answer; then close."""
        super().on_response_complete()
        if self.transport.is_closing():
            return
        self._watch_headers()
        if self.conn.their_state is h11.SEND_BODY and self._linger_timer is None:
            self._linger_timer = self.loop.call_later(self.limits.linger_s, self.transport.abort)

    def pause_writing(self) -> None:
        """Limit the time in which a client may read nothing."""
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self.limits.write_stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on with a client that reads again."""
        super().resume_writing()
        self._cancel("_stall_timer")

    def shutdown(self) -> None:
        """End the connection, and the streams, since the server stops."""
        type(self).on_shutdown()
        super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        self._answer_and_close(HTTPStatus.BAD_REQUEST, "E_HTTP_REQUEST", "the request is not valid HTTP/1.1")

    def _should_upgrade(self) -> bool:
        return False  # and no warning for each request that asks for it

    def _watch_headers(self) -> None:
        """Count the time in which headers have begun and are not complete."""
        if self.conn.their_state is not h11.IDLE:
            self._cancel("_header_timer")
        elif self._header_timer is None and self.conn.trailing_data[0]:
            self._header_timer = self.loop.call_later(self.limits.header_s, self._headers_late)

    def _cancel(self, name: str) -> None:
        timer: asyncio.TimerHandle | None = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)

    def _headers_late(self) -> None:
        self._header_timer = None
        if self.transport.is_closing() or self.conn.their_state is not h11.IDLE:
            return
        if self.conn.trailing_data[0]:
            message = f"the headers are not complete after {self.limits.header_s:g} s"
            self._answer_and_close(HTTPStatus.REQUEST_TIMEOUT, "E_HTTP_HEADERS", message)
        else:
            self.transport.close()

    def _answer_and_close(self, status: HTTPStatus, code: str, message: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is being sent
            self.transport.abort()
            return
        body = encode_json({"error": {"code": code, "message": message}})
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        events = (
            h11.Response(status_code=status, headers=headers, reason=status.phrase.encode()),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()


def limited_protocol(limits: Limits, on_shutdown: Callable[[], None]) -> type[LimitedH11Protocol]:
    """Return the class of connections with some limits."""
    values = {"limits": limits, "on_shutdown": staticmethod(on_shutdown)}
    return type("LimitedH11Protocol", (LimitedH11Protocol,), values)


async def _too_many_connections(scope: Scope, receive: Receive, send: Send) -> None:
    message = "too many connections are open; close one, or repeat the request after Retry-After seconds"
    headers = {"Retry-After": "5", "Connection": "close"}
    answer = error_response(scope["path"], HTTPStatus.SERVICE_UNAVAILABLE, "E_HTTP_BUSY", message, headers)
    await answer(scope, receive, send)


def _is_local(client: tuple[str, int] | None) -> bool:
    return client is not None and is_loopback(client[0])
