"""Writing files so that a reader never sees half of one; reading nothing but files."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, FileIO
from pathlib import Path
from typing import IO, Any

from echoquad_runtime.errors import EchoQuadError, OutputError

__all__ = [
    "make_folder",
    "open_regular",
    "output_errors",
    "read_regular",
    "sync_folder",
    "user_folder",
    "write_all",
    "write_atomically",
    "write_bytes",
    "write_json",
]

_MADE = itertools.count()


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusals while `path` is written into one clear line.

    Raises
    ------
    OutputError
        For any OSError inside the block: disk full, read-only, no such folder.
    """
    try:
        yield
    except EchoQuadError:  # some are OSErrors too, and know better what went wrong
        raise
    except BrokenPipeError:  # the reader went away, which is the caller's affair and no fault of the disk
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{path.as_posix()}: cannot be written ({reason}); check space and permissions") from error


@contextmanager
def write_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes its name only when the block ends well.

    The bytes go to a hidden neighbour, are flushed to the disk, then renamed over `path`. When the block fails the
    neighbour is removed and `path` is as it was. A target that is no regular file (a pipe) is written directly.

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
        # Threads may write the same file, and the longest name has no room for more.
        partial = path.with_name(f".{path.name[:40]}.{os.getpid()}-{next(_MADE)}.partial")
        try:
            with partial.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def sync_folder(folder: Path) -> None:
    """Have the disk keep a folder's names as they are now, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folder, some disks refuse
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_all(stream: FileIO, data: bytes) -> None:
    """Write all of `data`, without a buffer: a disk takes what it has room for, and refuses only the next byte.

    Raises
    ------
    OSError
        If the system refuses.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically.

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
    # A file name that is no UTF-8 has lone surrogates in it; as \udcff they are JSON again.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def make_folder(path: Path) -> Path:
    """Make a folder and those above it, if they are not there.

    Raises
    ------
    OutputError
        If the system refuses.
    """
    with output_errors(path):
        missing: list[Path] = []
        for folder in (path, *path.parents):  # a loop, since pathlib's own way goes no deeper than Python's stack
            try:
                folder.mkdir(exist_ok=True)
                break
            except FileNotFoundError:
                missing.append(folder)
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
    return path


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a file to read it, if it is one: a pipe would wait for its writer, a device may never end.

    Raises
    ------
    OSError
        If the system refuses, or `path` is a folder, a pipe, a device.
    """
    # What was opened is what is asked, so that nothing else can take its place in between.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    with os.fdopen(descriptor, "rb") as stream:
        yield stream


def read_regular(path: Path, limit: int) -> bytes:
    """Read a file whole, up to `limit` bytes and one more, which tells that there are too many.

    Raises
    ------
    OSError
        As `open_regular`.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size  # so that a limit of gigabytes does not ask for them
        return stream.read(min(size, limit) + 1)


def user_folder(*, windows: tuple[str, str], mac: str, xdg: tuple[str, str]) -> Path:
    """Name EchoQuad's folder of one kind, settings say or caches, among the user's own.

    Parameters
    ----------
    windows, xdg
        The variable that names the parent, and where that is in ``AppData`` or the home if it does not.
    mac
        The parent in ``~/Library``.

    Raises
    ------
    RuntimeError
        If the user has no home.
    """
    if sys.platform == "win32":
        given = os.environ.get(windows[0])
        return (Path(given) if given else Path.home() / "AppData" / windows[1]) / "EchoQuad"
    if sys.platform == "darwin":
        return Path.home() / "Library" / mac / "EchoQuad"
    named = Path(os.environ.get(xdg[0], ""))
    # The XDG specification has a relative path ignored.
    return (named if named.is_absolute() else Path.home() / xdg[1]) / "echoquad"
