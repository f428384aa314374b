"""The user's cache folder, and the ownership check that a cached file must pass before it is used.

The folder is ``ECHOQUAD_CACHE_DIR``, by default ``EchoQuad`` in ``~/Library/Caches``, ``EchoQuad/Cache`` in
``%LOCALAPPDATA%``, or ``echoquad`` in ``XDG_CACHE_HOME`` or ``~/.cache``. If the variable is set to an empty string,
there is no cache.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from echoquad_runtime.storage.atomic import user_folder

__all__ = ["cache_folder", "is_owned_exclusively"]


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


def is_owned_exclusively(status: os.stat_result, *, folder: bool) -> bool:
    """Return whether a folder, or a regular file, belongs to this user and nobody else may write it.

    On Windows only the file type is checked: other users have no access to a user's folders.
    """
    owned = not hasattr(os, "geteuid") or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)
    return owned and (stat.S_ISDIR if folder else stat.S_ISREG)(status.st_mode)
