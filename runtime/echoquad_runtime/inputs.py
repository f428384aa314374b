"""Inputs: from files, folders and patterns, as a user names them, to frame files and the names their rows carry."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final

from echoquad_runtime.errors import EchoQuadError, InputNotFoundError
from echoquad_runtime.frames import EXTENSIONS

__all__ = ["OVERLAY_ENDING", "Failure", "FrameFile", "find_frames", "walk"]


OVERLAY_ENDING: Final = ".overlay.png"
"""Ending of the pictures that EchoQuad draws; in a folder they are no frames to judge."""


@dataclass(frozen=True, slots=True)
class FrameFile:
    """A frame on disk.

    Attributes
    ----------
    path
        Where it lies.
    name
        How it is named in results: relative to what the user gave, with forward slashes.
    """

    path: Path
    name: str


@dataclass(frozen=True, slots=True)
class Failure:
    """A frame that could not be judged, or an input that names none, and the error that says why."""

    file: str
    error: EchoQuadError


def find_frames(inputs: Sequence[str | Path]) -> Iterator[FrameFile | Failure]:
    """Find the frames that `inputs` name, one after the other, lazily.

    A folder is walked for image files in sorted order; a file named outright is taken whatever it is called; a pattern
    (``*``, ``?``, ``[...]``, ``**``) that the shell left alone is expanded. Names are relative to the folder where one
    folder is given, else to the deepest folder that holds all inputs.

    Yields
    ------
    FrameFile or Failure
        A failure, not an exception, for an input that names nothing: those beside it are still wanted.
    """
    expanded: list[tuple[str, list[Path]]] = []
    for given in inputs:
        text = os.fspath(given)
        path = Path(text)
        if not os.path.exists(text) and glob.has_magic(text):  # noqa: PTH110 - Path.exists raises for too long a name
            matches = sorted(glob.glob(text, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
            expanded.append((text, [Path(match) for match in matches]))
        else:
            expanded.append((text, [path]))
    root = _common_root([path for _, paths in expanded for path in paths])
    for text, paths in expanded:
        if not paths:
            yield _missing(text, "no file matches the pattern; check it")
        for path in paths:
            if os.path.isdir(path):  # noqa: PTH112 - as above
                yield from _in_folder(path, root, may_be_empty=len(paths) > 1)
            elif os.path.exists(path):  # noqa: PTH110 - as above
                yield FrameFile(path, _name(path, root))
            else:
                yield _missing(path, "no such file or folder; check the path")


def _in_folder(folder: Path, root: Path | None, *, may_be_empty: bool) -> Iterator[FrameFile | Failure]:
    refused: list[OSError] = []
    empty = True
    for found in walk(folder, refused.append):
        empty = False
        yield FrameFile(found, _name(found, root))
    for error in refused:
        yield _missing(error.filename, f"the folder cannot be read ({error.strerror}); check its permissions")
    if empty and not refused and not may_be_empty:
        yield _missing(folder, f"the folder holds no image; expected {', '.join(sorted(EXTENSIONS))} files")


def walk(folder: Path, on_error: Callable[[OSError], object] | None = None) -> Iterator[Path]:
    """Walk a folder for image files, depth first, in sorted order, hidden names and overlays left out, link loops cut.

    Linked folders are followed, since data sets are often laid out with links; one that leads back to a folder
    above itself is not entered again. A folder that cannot be read is passed over, and `on_error` is told.
    """
    yield from _walk(folder, (), on_error)


def _walk(folder: Path, above: tuple[str, ...], on_error: Callable[[OSError], object] | None) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        if on_error is not None:
            on_error(error)
        return
    for entry in found:
        if entry.name.startswith("."):  # also the "._name.png" twins that macOS leaves on foreign disks
            continue
        path = folder / entry.name
        if _is_folder(entry):
            yield from _walk(path, (*above, real), on_error)
        elif path.suffix.lower() in EXTENSIONS and not entry.name.endswith(OVERLAY_ENDING):
            yield path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _missing(given: str | Path, reason: str) -> Failure:
    return Failure(PurePath(given).as_posix(), InputNotFoundError(reason))


def _common_root(paths: Sequence[Path]) -> Path | None:
    """Find the folder that names are relative to; None where there is none (two Windows drives)."""
    parents = [str(path.absolute() if os.path.isdir(path) else path.absolute().parent) for path in paths]  # noqa: PTH112
    try:
        return Path(os.path.commonpath(parents)) if parents else None
    except ValueError:
        return None


def _name(path: Path, root: Path | None) -> str:
    absolute: PurePath = path.absolute()
    if root is not None and absolute.is_relative_to(root):
        absolute = absolute.relative_to(root)
    return absolute.as_posix()
