"""Opening regular files: a pipe, a device or a folder is refused instead of waited for.

Helper files, such as temporary files and locks, are opened with `open_nofollow`: in a shared folder, another user could
have planted a symbolic link under their name, through which they would overwrite any file of this user.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader, FileIO
from pathlib import Path

__all__ = ["open_nofollow", "open_regular", "read_regular", "refuse_link", "write_all"]


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


def refuse_link(path: Path) -> None:
    """Refuse a symbolic link.

    Raises
    ------
    OSError
        If `path` is a symbolic link.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, f"{path.name} is a symbolic link, which is not followed; remove it", str(path))


def open_nofollow(path: Path, *, new: bool = False) -> FileIO:
    """Open a regular file for reading and writing, unbuffered; create it if it does not exist.

    Parameters
    ----------
    path
        The file. A symbolic link is refused, as is a pipe, a device or a folder.
    new
        Whether the file must not exist yet.

    Raises
    ------
    OSError
        If the system refuses, or something other than a regular file has the name.
    """
    refuse_link(path)
    flags = os.O_RDWR | os.O_CREAT | (os.O_EXCL if new else 0)
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):  # O_NOFOLLOW, since a link may appear just now
        flags |= getattr(os, name, 0)
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{path.name} is no regular file; remove it", str(path))
    return FileIO(descriptor, "r+")


def write_all(stream: FileIO, data: bytes) -> None:
    """Write all of `data` to an unbuffered stream, which may accept only part of it per call.

    Raises
    ------
    OSError
        If the system refuses.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]
