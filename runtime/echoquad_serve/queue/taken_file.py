"""The file that names the jobs that are being decided, so that a crash is counted against them at the next start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from echoquad_runtime.storage.regular_file import open_nofollow

__all__ = ["TakenFile"]

_LARGEST: Final = 1 << 20


class TakenFile:
    """Identifiers of jobs, one a line.

    The file is not flushed to the disk: it outlasts a crash of the process, for which a job may be the cause, and not a
    power failure, for which none is. It is of help and not needed, so that errors of the disk are ignored.

    Parameters
    ----------
    path
        The file, which is created if it does not exist.

    Attributes
    ----------
    from_before
        The jobs that were being decided when the last process ended without `close`.

    Raises
    ------
    OSError
        If the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._stream = open_nofollow(path)
        self.from_before = frozenset(self._stream.read(_LARGEST).decode("ascii", "replace").split())

    def write(self, identifiers: Iterable[str]) -> None:
        """Replace the identifiers."""
        data = "".join(f"{identifier}\n" for identifier in identifiers).encode()
        with contextlib.suppress(OSError):
            self._stream.seek(0)
            self._stream.write(data)
            self._stream.truncate()

    def close(self) -> None:
        """Empty the file, since the process ends in order, and close it."""
        self.write(())
        self.release()

    def release(self) -> None:
        """Close the file as it is."""
        self._stream.close()
