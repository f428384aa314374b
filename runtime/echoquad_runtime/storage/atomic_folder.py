"""Atomic folders: a data set, an ensemble or a bundle appears under its name complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from echoquad_runtime.errors import OutputError
from echoquad_runtime.storage.atomic import make_folder, output_errors
from echoquad_runtime.storage.file_lock import FileLock, LockedError

__all__ = ["atomic_folder"]


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Create a folder for an atomic write: it is renamed to `target` only if the block succeeds.

    The yielded folder is ``NAME.partial/NAME`` beside the target: it has the target's name, since the signature of a
    bundle records that name. If the block fails, it is removed and `target` is unchanged. A file lock excludes other
    writers; what a killed process left behind is replaced.

    Parameters
    ----------
    target
        The folder to create. A symbolic link to a folder stays a link.
    replace
        Whether a target that is not empty is replaced. It stays in place until the new folder is complete.

    Raises
    ------
    OutputError
        If `target` must not be replaced, another writer is creating it, or the system refuses.
    """
    target = target.resolve()
    with output_errors(target):
        if not replace:
            _check_empty(target)
        make_folder(target.parent)
        partial = target.with_name(f"{target.name}.partial")
        folder = partial / target.name
        lock = _claim(partial, folder)
        try:
            folder.mkdir()
            yield folder
            if not replace and target.is_dir():
                target.rmdir()  # it is empty, or this fails; Windows does not rename onto an existing folder
            _move(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.release(remove=True)
            with contextlib.suppress(OSError):  # another writer has claimed it
                partial.rmdir()


def _claim(partial: Path, folder: Path) -> FileLock:
    """Create `partial` and lock it; empty one that a killed process left behind."""
    existed = partial.is_dir()
    partial.mkdir(exist_ok=True)
    try:
        lock = FileLock(partial / "lock")
    except LockedError as error:
        raise OutputError(f"another process is writing {partial}: wait for it to end") from error
    if existed and not lock.certain:
        lock.release()
        raise OutputError(f"{partial} exists, and its file system has no locks: remove it if its writer has ended")
    shutil.rmtree(folder, ignore_errors=True)
    return lock


def _check_empty(target: Path) -> None:
    if target.is_dir():
        if entries := sum(1 for _ in target.iterdir()):
            raise OutputError(f"{target} has {entries} entries, expected a new or empty folder: name another")
    elif target.exists():
        raise OutputError(f"{target} is a file, expected a new or empty folder: name another")


def _move(folder: Path, target: Path) -> None:
    """Rename a folder to `target`; an older one is moved away first, since no system renames over a full folder."""
    if not target.exists():
        folder.rename(target)
        return
    older = target.with_name(f".{target.name}.{os.getpid()}.replaced")
    target.rename(older)
    try:
        folder.rename(target)
    except BaseException:
        if not target.exists():
            older.rename(target)
        raise
    shutil.rmtree(older, ignore_errors=True)
