"""Ahead: work on frames in threads, a bounded number before they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from echoquad_runtime.devices.cpu_info import available_cpus

__all__ = ["prefetch"]

Item = TypeVar("Item")
Made = TypeVar("Made")


def prefetch(make: Callable[[Item], Made], items: Iterable[Item], name: str) -> Iterator[tuple[Item, Made]]:
    """Give each item with what `make` makes of it, in order.

    In threads, called `name`: Pillow lets go of the GIL, and no process is spawned. What `make` raises is raised here.
    """
    workers = min(8, available_cpus())
    rest = iter(items)
    with ThreadPoolExecutor(workers, name) as pool:
        waiting: list[tuple[Item, Future[Made]]] = []
        waiting += ((item, pool.submit(make, item)) for item in islice(rest, 4 * workers))
        while waiting:
            item, future = waiting.pop(0)
            yield item, future.result()
            waiting += ((item, pool.submit(make, item)) for item in islice(rest, 1))
