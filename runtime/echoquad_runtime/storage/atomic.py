"""Atomic writes: a file appears under its name complete, or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import IO, Any, Final

from echoquad_runtime.errors import EchoQuadError, OutputError
from echoquad_runtime.storage.file_lock import FileLock, is_file_at, lock_descriptor
from echoquad_runtime.storage.regular_file import open_nofollow

__all__ = [
    "TEMPORARY_SUFFIX",
    "make_folder",
    "output_errors",
    "sync_folder",
    "write_atomically",
    "write_bytes",
    "write_json",
]
TEMPORARY_SUFFIX: Final = ".partial"
"""The end of the name of a temporary file, which begins with a dot."""


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
    the block fails, the temporary file is removed and `path` is unchanged. The temporary file of a process that was
    killed is removed by the next write of `path`. A symbolic link at `path` is replaced, not followed. A target that is
    not a regular file (a pipe) is written directly.

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
        temporary, file = _open_temporary(path)
        try:
            with BufferedWriter(file) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
                if os.name != "nt":  # while it is locked; Windows does not rename an open file
                    temporary.replace(path)
            if os.name == "nt":
                temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _open_temporary(path: Path) -> tuple[Path, FileIO]:
    """Create the temporary file for a write of `path`, and lock it.

    Its name is always the same, so that what a killed process left is found: a file that nobody has locked. Meanwhile a
    second writer of `path`, or a file or link that another user has planted, makes the name a random one.
    """
    start = f".{path.name[:40]}"  # cut, since the name may have the maximum length
    temporary = path.with_name(f"{start}.{zlib.crc32(os.fsencode(path.name)):08x}{TEMPORARY_SUFFIX}")
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # the attempt below raises any other error
        if os.path.lexists(temporary):
            _remove_unlocked(temporary)
        file = stack.enter_context(open_nofollow(temporary, new=True))
        lock_descriptor(file.fileno(), temporary)
        # Before it was locked, another writer may have taken it for one of a killed process.
        if is_file_at(file.fileno(), temporary):
            stack.pop_all()
            return temporary, file
    temporary = path.with_name(f"{start}.{os.urandom(6).hex()}{TEMPORARY_SUFFIX}")
    return temporary, open_nofollow(temporary, new=True)


def _remove_unlocked(temporary: Path) -> None:
    with contextlib.suppress(OSError):  # it is locked, a link, or belongs to another user
        lock = FileLock(temporary)
        lock.release(remove=lock.certain)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, if the system supports it."""
    with contextlib.suppress(OSError):  # Windows cannot open a folder, and some file systems refuse fsync
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
