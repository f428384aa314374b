"""Blocking calls in threads: limits, exceptions, cancelled requests and the end."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from echoquad_serve.http.error_responses import ApiError
from echoquad_serve.http.thread_pool import ThreadPool


def names(prefix: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == f"echoquad-http-{prefix}"]


def test_values_and_exceptions_arrive() -> None:
    async def main() -> None:
        pool = ThreadPool("values", 2)
        assert await pool.call(lambda one, two: one + two, 1, two=2) == 3
        with pytest.raises(KeyError, match="x"):
            await pool.call({}.__getitem__, "x")
        pool.close()

    asyncio.run(main())


def test_threads_are_few_and_daemons_and_end() -> None:
    async def main() -> None:
        pool = ThreadPool("few", 3, 20)
        await asyncio.gather(*(pool.call(time.sleep, 0.01) for _ in range(20)))
        assert 1 <= len(names("few")) <= 3
        assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("echoquad-http-few"))
        pool.close()
        assert names("few") == []
        assert await pool.call(lambda: 1) == 1  # it starts again where an application is served again
        pool.close()

    asyncio.run(main())


def test_one_thread_serves_calls_one_after_another() -> None:
    async def main() -> None:
        pool = ThreadPool("one", 8)
        for _ in range(50):
            await pool.call(lambda: None)
        assert len(names("one")) == 1
        pool.close()

    asyncio.run(main())


def test_request_beyond_the_limit_is_refused_at_once() -> None:
    async def main() -> None:
        pool = ThreadPool("limit", 1, 2)
        release = threading.Event()
        running = [asyncio.create_task(pool.call(release.wait, 5)) for _ in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(ApiError) as caught:
            await pool.call(lambda: None)
        assert (caught.value.status_code, caught.value.code) == (429, "E_HTTP_BUSY")
        release.set()
        await asyncio.gather(*running)
        await pool.call(lambda: None)
        pool.close()

    asyncio.run(main())


def test_cancelled_request_does_not_disturb_its_thread() -> None:
    async def main() -> None:
        pool = ThreadPool("cancelled", 1)
        task = asyncio.create_task(pool.call(time.sleep, 0.1))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await pool.call(lambda: 2) == 2
        pool.close()

    asyncio.run(main())


def test_end_does_not_wait_for_a_call_that_hangs() -> None:
    release = threading.Event()

    async def main() -> None:
        pool = ThreadPool("hangs", 1)
        task = asyncio.create_task(pool.call(release.wait, 5))
        await asyncio.sleep(0.01)
        start = time.monotonic()
        pool.close(timeout=0.1)
        assert time.monotonic() - start < 1
        task.cancel()

    asyncio.run(main())
    release.set()


def test_background_call_that_fails_is_logged_by_its_type(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("Doe^Jane")

    async def main() -> None:
        pool = ThreadPool("background", 1)
        pool.start(fail)
        assert await pool.call(lambda: 3) == 3
        pool.close()

    asyncio.run(main())
    assert "RuntimeError" in caplog.text
    assert "Doe" not in caplog.text
