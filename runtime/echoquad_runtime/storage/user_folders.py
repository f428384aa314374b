"""Folders of the user that hold EchoQuad's settings and caches, by platform convention."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["user_folder"]


def user_folder(*, windows: tuple[str, str], mac: str, xdg: tuple[str, str]) -> Path:
    """Return EchoQuad's folder of one kind (settings, cache) for the current user.

    Parameters
    ----------
    windows, xdg
        The environment variable that names the parent folder, and the default below ``AppData`` or the home folder.
    mac
        The parent folder below ``~/Library``.

    Raises
    ------
    RuntimeError
        If the user has no home folder.
    """
    if sys.platform == "win32":
        parent = os.environ.get(windows[0])
        return (Path(parent) if parent else Path.home() / "AppData" / windows[1]) / "EchoQuad"
    if sys.platform == "darwin":
        return Path.home() / "Library" / mac / "EchoQuad"
    named = Path(os.environ.get(xdg[0], ""))
    # The XDG base directory specification ignores relative paths.
    return (named if named.is_absolute() else Path.home() / xdg[1]) / "echoquad"
