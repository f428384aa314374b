"""Suppression of what third-party code prints, at the level of Python and of file descriptors."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Iterator

__all__ = ["suppress_native_stderr", "suppress_python_output"]

# stdout, stderr and the warning filters belong to the process: only one thread may redirect them at a time.
_LOCK = threading.RLock()


@contextlib.contextmanager
def suppress_python_output() -> Iterator[None]:
    """Discard what Python code prints and warns inside the block."""
    with _LOCK, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def suppress_native_stderr() -> Iterator[None]:
    """Discard what compiled code of this process writes to file descriptor 2 inside the block."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # the process may have no standard error
            saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
            stack.callback(os.close, saved)
            stack.callback(os.dup2, saved, 2)
            os.dup2(sink, 2)
            os.close(sink)
        yield
