"""The lock that keeps runs on CUDA apart where they must not overlap.

cuDNN chooses its kernels in the first run of a shape, and onnxruntime captures a CUDA graph in the first run of a
binding. Both record a stream, and CUDA refuses most calls of every other thread of the process meanwhile
(``cudaErrorStreamCaptureUnsupported``): runs, copies, allocations. So the first run of a shape holds the lock alone,
and runs of known shapes share it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["CUDA_LOCK", "DeviceLock"]


class DeviceLock:
    """A readers-writer lock: any number of threads share it, or one thread holds it alone.

    A thread that waits to hold it alone goes before threads that come later to share it. The lock is not reentrant.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing = 0
        self._waiting = 0
        self._alone = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the lock beside other threads that share it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._waiting)
            self._sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock while no other thread does."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._alone and not self._sharing)
            finally:
                self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


CUDA_LOCK: Final = DeviceLock()
"""One for the process: the restriction is CUDA's, not a session's."""
