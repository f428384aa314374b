"""The keys of files that were accepted and left where they are, so that a restart copies none of them again.

The store knows the keys of its jobs too, until it prunes them; a file may lie in a folder for years.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from echoquad_runtime.storage.atomic import write_bytes
from echoquad_runtime.storage.regular_file import open_nofollow, write_all

__all__ = ["AcceptedKeys"]

_DIGEST_BYTES: Final = 16
_SPARE_KEYS: Final = 1000


class AcceptedKeys:
    """A set of keys in a file. Losing it, or its end, loses nothing: the store then finds the repeats.

    Parameters
    ----------
    path
        The file; created by the first key.

    Raises
    ------
    OSError
        If the file exists and cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with contextlib.suppress(FileNotFoundError):
            data = path.read_bytes()
            self._digests = {data[at : at + _DIGEST_BYTES] for at in range(0, len(data), _DIGEST_BYTES)}
            return
        self._digests = set()

    def __contains__(self, key: str) -> bool:
        return _digest(key) in self._digests

    def add(self, key: str) -> None:
        """Add a key.

        Raises
        ------
        OSError
            If the file cannot be written; the key is in the set all the same.
        """
        self._digests.add(_digest(key))
        with open_nofollow(self._path) as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(size - size % _DIGEST_BYTES)  # a torn end is overwritten
            write_all(stream, _digest(key))

    def forget_others(self, keys: Callable[[], Iterable[str]], count: int) -> None:
        """Forget all keys but those of the `count` files that are there, if that makes the set much smaller.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        if len(self._digests) > 2 * count + _SPARE_KEYS:
            self._digests &= set(map(_digest, keys()))
            write_bytes(self._path, b"".join(sorted(self._digests)))


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=_DIGEST_BYTES).digest()
