"""The files of the queue: objects that are being received, and objects that are accepted."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Final

__all__ = ["Spool"]

logger = logging.getLogger(__name__)

_SUFFIX: Final = re.compile(r"\.[A-Za-z0-9]{1,8}")
_UNSYNCABLE: Final = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EROFS})


class Spool:
    """Three folders on one file system.

    Only the owner may read them: they hold objects of patients.

    Parameters
    ----------
    folder
        Where they are.

    Attributes
    ----------
    incoming
        Files that are being received. `reconcile` empties it.
    accepted
        A file for each job, which stays until the job's result is pruned.
    unclaimed
        Files that `reconcile` has found without a job. They are kept.

    Raises
    ------
    OSError
        If a folder cannot be created.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.incoming = folder / "incoming"
        self.accepted = folder / "spool"
        self.unclaimed = folder / "unclaimed"
        for path in (self.incoming, self.accepted):
            path.mkdir(mode=0o700, exist_ok=True)
        _sync(folder)

    def free_bytes(self) -> int:
        """Return the free space of the file system, as far as this user may fill it."""
        return shutil.disk_usage(self.folder).free

    @staticmethod
    def name(identifier: str, received_as: Path) -> str:
        """Return the file name of a job: its identifier, and the suffix, by which readers know the format."""
        suffix = received_as.suffix.lower()
        return identifier + (suffix if _SUFFIX.fullmatch(suffix) else "")

    def path(self, name: str) -> Path:
        """Return the path of an accepted file."""
        return self.accepted / name

    def move_in(self, path: Path, name: str) -> None:
        """Move a complete file from `incoming` to `accepted`. It outlasts a power failure after `sync`.

        Raises
        ------
        OSError
            If the system refuses.
        """
        path.replace(self.path(name))

    def sync(self, name: str) -> None:
        """Flush an accepted file to the disk, content and name.

        Raises
        ------
        OSError
            If the disk fails.
        """
        _sync(self.path(name))
        _sync(self.accepted)

    def remove(self, name: str) -> None:
        """Remove an accepted file, if it exists; a failure is logged."""
        try:
            self.path(name).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("a file of the spool cannot be removed (%s)", error.strerror)

    def reconcile(self, names: set[str]) -> set[str]:
        """Bring the files in line with the database, and return the names that have no file.

        What is left in `incoming` was never acknowledged, and is removed. A file without a job goes to `unclaimed`, and
        comes back when a database with its job comes back.

        Parameters
        ----------
        names
            The files of all jobs.

        Raises
        ------
        OSError
            If the system refuses.
        """
        for path in list(self.incoming.iterdir()):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        found = {path.name for path in self.accepted.iterdir()}
        if unknown := found - names:
            self.unclaimed.mkdir(mode=0o700, exist_ok=True)
            for name in unknown:
                self.path(name).replace(self.unclaimed / name)
            logger.warning("%d files have no job, and were moved to 'unclaimed'", len(unknown))
        missing = names - found
        back = {name for name in missing if (self.unclaimed / name).exists()} if self.unclaimed.exists() else set()
        for name in back:
            (self.unclaimed / name).replace(self.path(name))
        if unknown or back:
            _sync(self.accepted)
            _sync(self.unclaimed)
        return missing - back

    def holds_files(self) -> bool:
        """Return whether there is an accepted file."""
        with os.scandir(self.accepted) as entries:
            return any(True for _ in entries)


def _sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk.

    Unlike `echoquad_runtime.storage.atomic.sync_folder` it raises if the disk fails, since an acknowledgement follows.

    Raises
    ------
    OSError
        If the disk fails. A file system that cannot flush folders is no failure.
    """
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno not in _UNSYNCABLE:
            raise
    finally:
        os.close(descriptor)
