"""Looks at a folder, again and again: which files are there, and which of them nobody writes to any more."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from echoquad_runtime.frames.discovery import OVERLAY_SUFFIX
from echoquad_runtime.frames.formats import FRAME_EXTENSIONS, could_be_dicom
from echoquad_runtime.storage.system_files import is_system_name

__all__ = ["CallMonitor", "FolderScan", "SeenFile"]

_UNFINISHED: Final = (".part", ".partial", ".tmp")
_CHECKS_PER_LOOK: Final = 500
"""Finished files whose size and time are read at one look: ten thousand are all checked within twenty looks."""


@dataclass(slots=True)
class SeenFile:
    """A file of the folder.

    Attributes
    ----------
    size, mtime_ns
        Bytes, and time of the last change, at the latest look.
    turn
        Spreads the checks of finished files over the looks.
    look
        Number of the latest look that saw it.
    kind
        ``frame`` by its extension, ``unknown`` if only its content can tell, ``other`` for what is not read.
    stable
        Whether size and time were the same at the last two looks.
    done
        Whether nothing is left to do unless it changes.
    attempts
        Failed attempts to take it.
    retry_at
        Time of the scan's user before which it is not tried again.
    """

    size: int
    mtime_ns: int
    turn: int
    look: int
    kind: Literal["frame", "unknown", "other"]
    stable: bool = False
    done: bool = False
    attempts: int = 0
    retry_at: float = 0.0

    def is_version(self, status: os.stat_result) -> bool:
        """Return whether a regular file has this size and time."""
        return stat.S_ISREG(status.st_mode) and (status.st_size, status.st_mtime_ns) == (self.size, self.mtime_ns)


class CallMonitor:
    """Measures for how long a call to the file system has not returned: a network share may block it for ever."""

    def __init__(self) -> None:
        self._began: float | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Measure the calls inside the block."""
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._began = None

    def beat(self) -> None:
        """Note that a call has returned, and the next begins."""
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the current call began; 0 if there is none."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began


class FolderScan:
    """The files of a folder and its subfolders, without hidden and unfinished ones, and without symbolic links.

    Parameters
    ----------
    folder
        The folder. It may be missing for a while.
    skip
        Name of a subfolder that is not entered; empty for none.
    monitor
        Watches the calls to the file system.

    Attributes
    ----------
    files
        By path relative to the folder, with forward slashes.
    unreadable
        Number of subfolders that could not be read at the latest look.
    """

    def __init__(self, folder: Path, skip: str, monitor: CallMonitor) -> None:
        self.files: dict[str, SeenFile] = {}
        self.unreadable = 0
        self._folder, self._skip, self._monitor = folder, skip, monitor
        self._look = self._turns = 0

    def look(self) -> None:
        """Update `files`: new ones, changed ones, and those that are gone.

        Raises
        ------
        OSError
            If the folder cannot be read. What was known is kept.
        """
        self._look += 1
        self.unreadable = 0
        period = len(self.files) // _CHECKS_PER_LOOK + 1
        pending = [""]
        with self._monitor.watch():
            while pending:
                prefix = pending.pop()
                try:
                    self._list(prefix, period, pending)
                except OSError:
                    if not prefix:
                        raise
                    self.unreadable += 1
        if not self.unreadable:  # else files would be forgotten that are there
            for path in [path for path, seen in self.files.items() if seen.look != self._look]:
                del self.files[path]

    def _list(self, prefix: str, period: int, pending: list[str]) -> None:
        files, look = self.files, self._look
        self._monitor.beat()
        with os.scandir(self._folder / prefix) as entries:
            for entry in entries:
                path = prefix + entry.name
                seen = files.get(path)
                if seen is not None and seen.done and (seen.turn + look) % period:
                    seen.look = look
                    continue
                self._monitor.beat()
                if is_system_name(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if path != self._skip:
                        pending.append(f"{path}/")
                elif entry.is_file(follow_symlinks=False) and (kind := _kind(entry.name)):
                    try:
                        self._note(path, kind, entry.stat(follow_symlinks=False))
                    except FileNotFoundError:  # removed since it was listed
                        continue

    def _note(self, path: str, kind: Literal["frame", "unknown", "other"], status: os.stat_result) -> None:
        seen = self.files.get(path)
        if seen is not None and seen.is_version(status):
            seen.look = self._look
            seen.stable = True
            return
        if seen is None:
            self._turns += 1
        turn = self._turns if seen is None else seen.turn
        self.files[path] = SeenFile(status.st_size, status.st_mtime_ns, turn, self._look, kind)


def _kind(name: str) -> Literal["frame", "unknown", "other"] | None:
    """Return what a file is by its name; None for one that is not reported either."""
    lower = name.lower()
    if lower.endswith((*_UNFINISHED, OVERLAY_SUFFIX)) or name == "DICOMDIR":
        return None
    if os.path.splitext(lower)[1] in FRAME_EXTENSIONS:  # noqa: PTH122 - for each file of each look
        return "frame"
    return "unknown" if could_be_dicom(name) else "other"
