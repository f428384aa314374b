"""Atomic writes: a file appears under its name complete, or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import IO, Any, Final

from echoquad_runtime.errors import EchoQuadError, OutputError
from echoquad_runtime.storage.regular_file import open_nofollow

__all__ = [
    "TEMPORARY_SUFFIX",
    "make_folder",
    "output_errors",
    "sync_folder",
    "write_all",
    "write_atomically",
    "write_bytes",
    "write_json",
]
TEMPORARY_SUFFIX: Final = ".partial"
"""The end of the name of a temporary file, which begins with a dot; a killed process leaves it behind."""


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Raise system errors inside the block as one-line errors about writing `path`.

    Raises
    ------
    OutputError
        For any OSError: disk full, read-only, no such folder.
    """
    try:
        yield
    except EchoQuadError:  # some are OSErrors too, with a more specific message
        raise
    except BrokenPipeError:  # the reader of a pipe has closed it; the caller handles that
        raise
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise OutputError(f"{path.as_posix()}: cannot be written ({reason}); check space and permissions") from error


@contextmanager
def write_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for an atomic write: it takes its name only if the block succeeds.

    The bytes go to a hidden temporary file in the same folder, are flushed to the disk, then renamed over `path`. If
    the block fails, the temporary file is removed and `path` is unchanged. A symbolic link at `path` is replaced, not
    followed. A target that is not a regular file (a pipe) is written directly.

    Raises
    ------
    OutputError
        If the system refuses.
    """
    with output_errors(path):
        if path.exists() and not path.is_file():
            if path.is_dir():
                raise OutputError(f"{path.as_posix()}: is a folder; expected a file name")
            with path.open("wb") as stream:
                yield stream
            return
        # No other writer has the same name, and nobody can guess it. It is cut since it may have the maximum length.
        temporary = path.with_name(f".{path.name[:40]}.{os.urandom(6).hex()}{TEMPORARY_SUFFIX}")
        try:
            with BufferedWriter(open_nofollow(temporary, new=True)) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, if the system supports it."""
    with contextlib.suppress(OSError):  # Windows cannot open a folder, and some file systems refuse fsync
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_all(stream: FileIO, data: bytes) -> None:
    """Write all of `data` to an unbuffered stream, which may accept only part of it per call.

    Raises
    ------
    OSError
        If the system refuses.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically.

    Raises
    ------
    OutputError
        If the system refuses.
    """
    with write_atomically(path) as stream:
        stream.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically.

    Raises
    ------
    OutputError
        If the system refuses.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # A file name that is not UTF-8 has lone surrogates, which become JSON escapes such as \udcff.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def make_folder(path: Path) -> Path:
    """Create a folder and its parents, if they do not exist, and return it.

    Raises
    ------
    OutputError
        If the system refuses.
    """
    with output_errors(path):
        missing: list[Path] = []
        for folder in (path, *path.parents):  # not mkdir(parents=True), which recurses once per level
            try:
                folder.mkdir(exist_ok=True)
                break
            except FileNotFoundError:
                missing.append(folder)
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
    return path
