"""Prefetching: process items in threads, a bounded number ahead of the consumer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from echoquad_runtime.devices.cpu_info import available_cpus

__all__ = ["prefetch"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(function: Callable[[Item], Result], items: Iterable[Item], name: str) -> Iterator[tuple[Item, Result]]:
    """Yield each item with the result of `function`, in order.

    The work runs in threads called `name`: Pillow releases the GIL while it decodes. An exception of `function` is
    raised here.
    """
    workers = min(8, available_cpus())
    remaining = iter(items)
    with ThreadPoolExecutor(workers, name) as pool:
        pending: deque[tuple[Item, Future[Result]]] = deque()
        pending.extend((item, pool.submit(function, item)) for item in islice(remaining, 4 * workers))
        while pending:
            item, future = pending.popleft()
            yield item, future.result()
            pending.extend((item, pool.submit(function, item)) for item in islice(remaining, 1))
