"""Building a folder beside its target, so that a data set is there whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from echoquad_runtime.errors import OutputError

__all__ = ["atomic_folder"]


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Give a folder to write into, ``out.partial``, that takes the name `out` when the block ends well.

    When the block fails it is removed. `out` may exist if it is an empty folder.

    Raises
    ------
    OutputError
        If `out` is in the way, another writer is at work on it, or the system refuses.
    """
    out = out.resolve()
    partial = _start(out)
    try:
        yield partial
        if out.is_dir():
            out.rmdir()  # empty; Windows does not rename onto an existing folder
        partial.replace(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, OutputError):
            raise _unwritable(out, error) from error
        raise


def _start(out: Path) -> Path:
    try:
        if out.is_dir():
            if found := sum(1 for _ in out.iterdir()):
                raise OutputError(f"{out} has {found} entries, expected a new or empty folder: name another")
        elif out.exists():
            raise OutputError(f"{out} is a file, expected a new or empty folder: name another")
        partial = out.with_name(out.name + ".partial")
        partial.mkdir(parents=True)
    except FileExistsError as error:
        wanted = "no unfinished dataset: wait for its writer, or remove it"
        raise OutputError(f"{partial} exists, expected {wanted}") from error
    except OutputError:
        raise
    except OSError as error:
        raise _unwritable(out, error) from error
    return partial


def _unwritable(out: Path, error: OSError) -> OutputError:
    return OutputError(f"{out} cannot be written ({error}), expected a writable place: name another")
