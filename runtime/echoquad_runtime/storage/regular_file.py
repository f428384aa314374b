"""Reading regular files: a pipe, a device or a folder is refused instead of waited for."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

__all__ = ["open_regular", "read_regular"]


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading, without blocking.

    Raises
    ------
    OSError
        If the system refuses, or `path` is a folder, a pipe or a device.
    """
    # The type is checked on the open descriptor, so that no other file can take the path's place in between.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, limit: int) -> bytes:
    """Read at most ``limit + 1`` bytes of a regular file; the extra byte shows that the file exceeds the limit.

    Raises
    ------
    OSError
        As `open_regular`.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size  # so that a limit of gigabytes allocates no more than the file needs
        return stream.read(min(size, limit) + 1)
