"""Access to frame files: only regular files are opened, and system errors become `FrameReadError`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO

from echoquad_runtime.errors import FrameError, FrameReadError, FrameTooLargeError
from echoquad_runtime.frames.formats import HEAD_BYTES, MAX_FILE_BYTES
from echoquad_runtime.storage.regular_file import open_regular

__all__ = ["OpenStream", "open_frame_file", "read_bytes", "read_errors", "read_head"]

OpenStream = Callable[[], AbstractContextManager[IO[bytes]]]
"""Opens the bytes of a file at their beginning, each time it is called."""


@contextmanager
def read_errors() -> Iterator[None]:
    """Raise system errors inside the block as `FrameReadError`."""
    try:
        yield
    except FrameError:
        raise
    except (OSError, ValueError, MemoryError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise FrameReadError(f"the file cannot be read ({reason}); check the path and its permissions") from error


def open_frame_file(path: Path) -> BufferedReader:
    """Open a regular file for reading, without waiting for a pipe.

    Raises
    ------
    FrameReadError
        If it cannot be opened or is not a regular file.
    """
    with read_errors():
        return open_regular(path)


def read_head(path: Path) -> bytes:
    """Read the first `HEAD_BYTES` bytes of a file, from which `detect_format` recognises its format.

    Raises
    ------
    FrameReadError
        If they cannot be read.
    """
    with read_errors(), open_regular(path) as stream:
        return stream.read(HEAD_BYTES)


def read_bytes(path: Path) -> bytes:
    """Read a regular file completely.

    Raises
    ------
    FrameReadError
        If it cannot be read, is not a regular file, or changes its size while it is read.
    FrameTooLargeError
        If it holds more than `MAX_FILE_BYTES`.
    """
    with read_errors(), open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise FrameTooLargeError(
                f"the file has {size} bytes; expected at most {MAX_FILE_BYTES}; convert it to 8-bit PNG"
            )
        data = stream.read(size + 1)
    if len(data) != size:
        raise FrameReadError(f"the file changed from {size} bytes while it was read; wait until it is written")
    return data
