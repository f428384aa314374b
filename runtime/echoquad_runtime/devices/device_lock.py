"""A readers-writer lock that serialises the CUDA runs that must not overlap.

cuDNN selects its kernels in the first run of an input shape, and onnxruntime captures a CUDA graph in the first run of
an IO binding. Both capture a stream, and meanwhile CUDA refuses most calls of the process's other threads
(``cudaErrorStreamCaptureUnsupported``): runs, copies and allocations. Therefore the first run of a shape holds the
lock exclusively, and later runs of that shape share it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["CUDA_LOCK", "DeviceLock"]


class DeviceLock:
    """A readers-writer lock: either any number of threads share it, or one thread holds it exclusively.

    A thread that waits for exclusive access precedes threads that ask for shared access later. The lock is not
    reentrant.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._waiting_writers = 0
        self._writing = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the lock together with other threads that share it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._writing and not self._waiting_writers)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock while no other thread holds it."""
        with self._changed:
            self._waiting_writers += 1
            try:
                self._changed.wait_for(lambda: not self._writing and not self._readers)
            finally:
                self._waiting_writers -= 1
            self._writing = True
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._changed.notify_all()


CUDA_LOCK: Final = DeviceLock()
"""One lock per process: the restriction is CUDA's, not a session's."""
