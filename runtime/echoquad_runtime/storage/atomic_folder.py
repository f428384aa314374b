"""Atomic folders: a data set, an ensemble or a bundle appears under its name complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from echoquad_runtime.errors import OutputError
from echoquad_runtime.storage.atomic import make_folder, output_errors
from echoquad_runtime.storage.file_lock import FileLock, LockedError
from echoquad_runtime.storage.regular_file import refuse_link

__all__ = ["atomic_folder"]


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Create a folder for an atomic write: it is renamed to `target` only if the block succeeds.

    The yielded folder is ``NAME.partial/NAME`` beside the target: it has the target's name, since the signature of a
    bundle records that name. If the block fails, it is removed and `target` is unchanged. A file lock excludes other
    writers; what a killed process left behind is removed.

    Where the system can exchange two folders (Linux, macOS), there is no moment without a folder at `target`: it is the
    old one or the new one, also if the process is killed. Elsewhere two renames follow each other. If the process is
    killed between them, the next writer restores the old folder first.

    Parameters
    ----------
    target
        The folder to create. A symbolic link to a folder stays a link. A link at the name ``NAME.partial`` is refused.
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
        lock = _claim(partial, target)
        try:
            folder.mkdir()
            yield folder
            if not replace and target.is_dir():
                target.rmdir()  # it is empty, or this fails; Windows does not rename onto an existing folder
            _move(folder, target, partial)
        finally:
            _empty(partial, target)
            lock.release(remove=True)
            with contextlib.suppress(OSError):  # another writer has claimed it
                partial.rmdir()


def _claim(partial: Path, target: Path) -> FileLock:
    """Create `partial` and lock it; remove what a killed process left in it."""
    refuse_link(partial)
    existed = partial.is_dir()
    partial.mkdir(exist_ok=True)
    try:
        lock = FileLock(partial / "lock")
    except LockedError as error:
        raise OutputError(f"another process is writing {partial}: wait for it to end") from error
    if existed and not lock.certain:
        lock.release()
        raise OutputError(f"{partial} exists, and its file system has no locks: remove it if its writer has ended")
    replaced = _replaced(partial, target)
    if replaced.is_dir() and not target.exists():  # killed between two renames
        replaced.rename(target)
    _empty(partial, target)
    return lock


def _replaced(partial: Path, target: Path) -> Path:
    """Return the name of the older folder between two renames."""
    return partial / f"{target.name}.replaced"


def _empty(partial: Path, target: Path) -> None:
    for folder in (partial / target.name, _replaced(partial, target)):
        shutil.rmtree(folder, ignore_errors=True)


def _check_empty(target: Path) -> None:
    if target.is_dir():
        if entries := sum(1 for _ in target.iterdir()):
            raise OutputError(f"{target} has {entries} entries, expected a new or empty folder: name another")
    elif target.exists():
        raise OutputError(f"{target} is a file, expected a new or empty folder: name another")


def _move(folder: Path, target: Path, partial: Path) -> None:
    """Put a folder in the place of `target`; an older one goes to `partial`."""
    if not target.exists():
        folder.rename(target)
    elif not _exchange(folder, target):
        replaced = _replaced(partial, target)
        target.rename(replaced)
        try:
            folder.rename(target)
        except BaseException:
            if not target.exists():
                replaced.rename(target)
            raise


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one step; return False, with no effect, if the system or the file system cannot."""
    if sys.platform not in ("linux", "darwin"):
        return False
    import ctypes

    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "linux":
            at, exchange = ctypes.c_int(-100), ctypes.c_uint(2)  # AT_FDCWD, RENAME_EXCHANGE
            status = library.renameat2(at, os.fsencode(a), at, os.fsencode(b), exchange)
        else:
            status = library.renamex_np(os.fsencode(a), os.fsencode(b), ctypes.c_uint(2))  # RENAME_SWAP
    except (OSError, AttributeError):  # an older C library
        return False
    return bool(status == 0)
