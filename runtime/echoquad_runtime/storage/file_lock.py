"""A file that one process at a time may hold; what it held is let go when it ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import os
from io import FileIO
from pathlib import Path
from typing import Final

from echoquad_runtime.storage.atomic import write_all

__all__ = ["FileLock", "LockedError"]

_HELD: Final = frozenset({errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, getattr(errno, "EDEADLK", errno.EACCES)})
_FAR: Final = 1 << 40  # where Windows, whose locks keep readers out, has nothing to read


class LockedError(OSError):
    """Another process holds the file."""


class FileLock:
    """An exclusive lock on a small file, which is made if it is not there.

    Parameters
    ----------
    path
        The file. Who unlinks it while it is held gives it up.

    Attributes
    ----------
    certain
        False where the disk knows no locks, as some network disks: then nothing keeps a second process out.

    Raises
    ------
    LockedError
        If another process holds it.
    OSError
        If the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.certain = path, True
        while True:
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
            self._stream = FileIO(os.open(path, flags, 0o666), "r+")
            try:
                _lock(self._stream.fileno())
            except OSError as error:
                if error.errno in _HELD:
                    self._stream.close()
                    raise LockedError(error.errno, "another process holds it", str(path)) from error
                self.certain = False
            # Who held it may have removed it after it was opened here: then this is a lock on nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._stream.fileno()), path.stat()):
                    return
            self._stream.close()

    def read(self) -> bytes:
        """Read what the file holds."""
        self._stream.seek(0)
        return self._stream.readall()

    def write(self, data: bytes) -> None:
        """Put `data` in place of what the file holds."""
        self._stream.seek(0)
        self._stream.truncate()
        write_all(self._stream, data)

    def sync(self) -> None:
        """Wait until the disk has what was written."""
        os.fsync(self._stream.fileno())

    def release(self, *, remove: bool = False) -> None:
        """Let it go; `remove` is whether the file goes, too."""
        if os.name == "nt":  # where an open file cannot be removed
            self._stream.close()
        with contextlib.suppress(OSError):
            if remove:
                self.path.unlink()
        self._stream.close()


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:
        import msvcrt

        os.lseek(descriptor, _FAR, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
