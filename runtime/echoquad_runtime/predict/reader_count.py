"""How many reader processes read all files of a run.

Threads that decode PNG and JPEG share the interpreter lock. Up to a few, this costs nothing; with many, a reader
process for each of them is faster. Files that are not safe to decode in a thread go to a reader process in any case;
see `echoquad_runtime.frames.isolation`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Final

from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.frames.isolation.reader_pool import can_isolate

__all__ = ["FILES_PER_READER", "MAX_WORKERS", "choose_readers"]

MAX_WORKERS: Final = 512

FILES_PER_READER: Final = 8
"""Files per reader process from which on the default uses them: a start takes about as long as reading so many."""

_MAX_THREADS_WITHOUT: Final = 4
"""Number of threads up to which decoding in threads is as fast."""


def choose_readers(
    items: Iterator[FrameFile | Failure], workers: int | None, threads: int
) -> tuple[int, Iterator[FrameFile | Failure]]:
    """Return the number of reader processes for all files, 0 if threads read most of them, and the items again.

    Parameters
    ----------
    items
        The files. Only as many are taken as the choice needs.
    workers
        The number that the user asks for; None is 0 for up to four threads, else one per thread if there are enough
        files.
    threads
        Number of threads that may compute. So few files are read by one thread.
    """
    first = list(islice(items, threads + 1))
    enough = len(first) > threads and any(isinstance(item, FrameFile) for item in first)
    if workers is not None or not enough:
        return (workers or 0) if enough else 0, chain(first, items)
    if threads <= _MAX_THREADS_WITHOUT or not can_isolate():
        return 0, chain(first, items)
    first += islice(items, FILES_PER_READER * threads - len(first))
    return threads if len(first) == FILES_PER_READER * threads else 0, chain(first, items)
