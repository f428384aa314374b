"""Blocking calls of asynchronous routes, in a bounded number of threads."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any, TypeVar

from echoquad_serve.http.error_responses import busy_error

__all__ = ["ThreadPool"]

_LOGGER = logging.getLogger("echoquad_serve.http")

_T = TypeVar("_T")
_Call = Callable[[], None]


class ThreadPool:
    """Threads that run blocking calls, and a limit of requests that use them.

    Unlike those of `concurrent.futures`, the threads are daemons: a call that hangs does not keep the process alive.
    Threads start when they are needed.

    Parameters
    ----------
    name
        Name of the threads, after ``echoquad-http-``.
    threads
        Number of threads, at most.
    limit
        Number of requests that may use the pool at the same time; None for as many as there are threads.
    """

    def __init__(self, name: str, threads: int, limit: int | None = None) -> None:
        self._name = name
        self._size = threads
        self._limit = threads if limit is None else limit
        self._held = 0
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Count a request while the block runs.

        Raises
        ------
        ApiError
            If as many requests run as are allowed: 429.
        """
        if self._held >= self._limit:
            raise busy_error(f"{self._limit} such requests run already; repeat the request after Retry-After seconds")
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    async def call(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Run a blocking function as a request of its own.

        Raises
        ------
        ApiError
            As `hold`; or what `function` raises.
        """
        with self.hold():
            return await self.run(function, *args, **kwargs)

    async def run(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Run a blocking function of a request that holds the pool, and return its value or raise its exception."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()

        def deliver(value: _T | None, error: BaseException | None) -> None:
            if future.done():  # the request was cancelled
                return
            if error is None:
                future.set_result(value)  # type: ignore[arg-type]
            else:
                future.set_exception(error)

        def compute() -> None:
            value, error = None, None
            try:
                value = function(*args, **kwargs)
            except BaseException as raised:
                error = raised
            self._idle.release()  # before delivery, so that the caller's next call finds an idle thread
            with suppress(RuntimeError):  # the loop has ended, and nobody waits
                loop.call_soon_threadsafe(deliver, value, error)

        self._put(compute)
        return await future

    def start(self, function: Callable[[], object]) -> None:
        """Run a blocking function whose value nobody waits for; an exception is logged by its type."""

        def compute() -> None:
            try:
                function()
            except Exception as error:
                _LOGGER.error("a background call failed: %s", type(error).__name__)
            self._idle.release()

        self._put(compute)

    def _put(self, call: _Call) -> None:
        self._calls.put(call)
        if not self._idle.acquire(blocking=False) and len(self._threads) < self._size:
            thread = threading.Thread(target=self._work, name=f"echoquad-http-{self._name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # it refers to a request's body

    def close(self, timeout: float = 0.5) -> None:
        """End the idle threads; one whose call takes longer than `timeout` seconds ends after it."""
        threads, self._threads = self._threads, []
        for _ in threads:
            self._calls.put(None)
        for thread in threads:
            thread.join(timeout / len(threads))
        self._idle = threading.Semaphore(0)
