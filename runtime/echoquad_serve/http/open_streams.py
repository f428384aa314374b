"""Streams that stay open until the client or the service ends them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus

from starlette.types import Receive

from echoquad_serve.http.error_responses import busy_error

__all__ = ["OpenStream", "OpenStreams"]


class OpenStream:
    """A stream to one client, and what wakes it up.

    Attributes
    ----------
    ended
        Whether the client has gone or the service stops.
    loop
        The event loop of the stream.
    """

    def __init__(self) -> None:
        self.ended = False
        self.loop = asyncio.get_running_loop()
        self._awake = asyncio.Event()

    def wake(self) -> None:
        """Wake the stream up, from the thread of its event loop."""
        self._awake.set()

    def end(self) -> None:
        """End the stream, from the thread of its event loop."""
        self.ended = True
        self._awake.set()

    def end_from_any_thread(self) -> None:
        """End the stream, from any thread."""
        with suppress(RuntimeError):  # the loop has ended, and the stream with it
            self.loop.call_soon_threadsafe(self.end)

    async def wait(self, timeout: float) -> bool:
        """Wait until the stream is woken up; return False if it was not for `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._awake.wait()
        except TimeoutError:
            return False
        self._awake.clear()
        return True

    async def watch(self, receive: Receive) -> None:
        """End the stream once the client has gone."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.end()


class OpenStreams:
    """The open streams of one kind, and how many there may be."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._streams: set[OpenStream] = set()

    def __len__(self) -> int:
        return len(self._streams)

    def check_room(self) -> None:
        """Return if one more stream may be opened.

        Raises
        ------
        ApiError
            If as many are open as may be: 503.
        """
        if len(self._streams) >= self._limit:
            message = f"{self._limit} such streams are open already; close one, or repeat the request later"
            raise busy_error(message, status=HTTPStatus.SERVICE_UNAVAILABLE, retry_after=5.0)

    @contextmanager
    def open(self, receive: Receive) -> Iterator[OpenStream]:
        """Open a stream while the block runs; it ends when the client closes the connection.

        Raises
        ------
        ApiError
            As `check_room`.
        """
        self.check_room()
        stream = OpenStream()
        self._streams.add(stream)
        watcher = asyncio.create_task(stream.watch(receive))
        try:
            yield stream
        finally:
            watcher.cancel()
            self._streams.discard(stream)

    def end(self) -> None:
        """End all streams, from any thread."""
        for stream in list(self._streams):
            stream.end_from_any_thread()
