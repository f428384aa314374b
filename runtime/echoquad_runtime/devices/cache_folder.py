"""The user's cache folder, and access to cached files that only this user may write.

The folder is ``ECHOQUAD_CACHE_DIR``, by default ``EchoQuad`` in ``~/Library/Caches``, ``EchoQuad/Cache`` in
``%LOCALAPPDATA%``, or ``echoquad`` in ``XDG_CACHE_HOME`` or ``~/.cache``. If the variable is set to an empty string,
there is no cache.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from echoquad_runtime.storage.user_folders import user_folder

__all__ = ["cache_folder", "make_private_folder", "read_private_file"]


def cache_folder() -> Path | None:
    """Return this user's cache folder of EchoQuad; None if there is none."""
    variable = os.environ.get("ECHOQUAD_CACHE_DIR")
    if variable is not None:
        return Path(variable).absolute() if variable else None
    try:
        folder = user_folder(windows=("LOCALAPPDATA", "Local"), mac="Caches", xdg=("XDG_CACHE_HOME", ".cache"))
    except RuntimeError:  # the user has no home folder
        return None
    return folder / "Cache" if sys.platform == "win32" else folder


def make_private_folder(folder: Path) -> None:
    """Create a folder and its parent if needed, and check that nobody else may write it.

    Raises
    ------
    OSError
        If it cannot be created, or other users may write it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    _check_owner(folder.lstat(), stat.S_ISDIR)


def read_private_file(path: Path, limit: int) -> bytes:
    """Read a cached file of at most `limit` bytes.

    Raises
    ------
    OSError
        If it is missing or larger, or other users may write the file or its folder.
    """
    _check_owner(path.parent.lstat(), stat.S_ISDIR)
    # Check and read the same descriptor: nothing can replace the file in between.
    flags = (getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
    with os.fdopen(os.open(path, os.O_RDONLY | sum(flags)), "rb") as stream:
        status = os.fstat(stream.fileno())
        _check_owner(status, stat.S_ISREG)
        if status.st_size > limit:
            raise OSError("too large")
        return stream.read(status.st_size)


def _check_owner(status: os.stat_result, is_type: Callable[[int], bool]) -> None:
    """Raise an OSError unless the file belongs to this user and nobody else may write it.

    On Windows only the file type is checked: other users have no access to a user's folders.
    """
    owned = not hasattr(os, "geteuid") or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)
    if not owned or not is_type(status.st_mode):
        raise PermissionError("other users may write it")
