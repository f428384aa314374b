"""File locks: one process at a time holds a file, and the system releases the lock when the process ends."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Final

from echoquad_runtime.storage.regular_file import open_nofollow, write_all

__all__ = ["FileLock", "LockedError", "is_file_at", "lock_descriptor"]

_HELD_ERRNOS: Final = frozenset(
    {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, getattr(errno, "EDEADLK", errno.EACCES)}
)
_WINDOWS_OFFSET: Final = 1 << 40  # beyond the content: a locked byte on Windows cannot be read by others


class LockedError(OSError):
    """Another process holds the file lock."""


class FileLock:
    """An exclusive file lock on a small file, which is created if it does not exist.

    Parameters
    ----------
    path
        The file; a symbolic link is refused. Removing it while the lock is held gives the lock up.

    Attributes
    ----------
    certain
        False if the file system has no locks, as some network file systems: then nothing excludes a second process.

    Raises
    ------
    LockedError
        If another process holds the lock.
    OSError
        If the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        while True:
            with contextlib.ExitStack() as stack:
                stream = stack.enter_context(open_nofollow(path))
                self.certain = lock_descriptor(stream.fileno(), path)
                # The previous holder may have removed the file after it was opened here: then the lock is on no file.
                if is_file_at(stream.fileno(), path):
                    stack.pop_all()
                    self._stream = stream
                    return

    def read(self) -> bytes:
        """Return the content of the file."""
        self._stream.seek(0)
        return self._stream.readall()

    def write(self, data: bytes) -> None:
        """Replace the content of the file."""
        self._stream.seek(0)
        self._stream.truncate()
        write_all(self._stream, data)

    def sync(self) -> None:
        """Flush the content to the disk."""
        os.fsync(self._stream.fileno())

    def release(self, *, remove: bool = False) -> None:
        """Release the lock; with `remove`, remove the file as well."""
        if os.name == "nt":  # where an open file cannot be removed
            self._stream.close()
        with contextlib.suppress(OSError):
            if remove:
                self.path.unlink()
        self._stream.close()


def lock_descriptor(descriptor: int, path: Path) -> bool:
    """Lock an open file until it is closed. Return False, with no effect, if the file system has no locks.

    Raises
    ------
    LockedError
        If another process holds the lock, or this one through another descriptor; the error names `path`.
    """
    try:
        _lock(descriptor)
    except OSError as error:
        if error.errno in _HELD_ERRNOS:
            raise LockedError(error.errno, "another process holds it", str(path)) from error
        return False
    return True


def is_file_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is the one at `path`, and no symbolic link to it; False if there is none any more."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:
        import msvcrt

        os.lseek(descriptor, _WINDOWS_OFFSET, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
