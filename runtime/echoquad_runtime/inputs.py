"""Inputs: from files, folders and patterns, as a user names them, to frame files and the names their rows carry.

A tree is walked lazily: no more is held of it than the names in the folders that lead to the frame at hand.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final

from echoquad_runtime.errors import EchoQuadError, InputNotFoundError
from echoquad_runtime.frames import EXTENSIONS
from echoquad_runtime.tree import descend, expand

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
    (``*``, ``?``, ``[...]``, ``**``) that the shell left alone is expanded, in the same order, all of it at the start.
    Names are relative to the folder where one folder is given, else to the deepest folder that holds all inputs.

    Yields
    ------
    FrameFile or Failure
        A failure, not an exception, for an input that names nothing: those beside it are still wanted.
    """
    expanded: list[tuple[str, list[str | OSError]]] = []
    root = _Root()
    for given in inputs:
        text = os.fspath(given)
        if not os.path.exists(text) and glob.has_magic(text):  # noqa: PTH110 - Path.exists raises for too long a name
            expanded.append((text, list(expand(text))))
        else:
            expanded.append((text, [text]))
        for path in expanded[-1][1]:
            if isinstance(path, str):
                root.add(path)
    for text, paths in expanded:
        if not paths:
            yield _missing(text, "no file matches the pattern; check it")
        for path in paths:
            if isinstance(path, OSError):
                yield _unreadable(path)
            elif os.path.isdir(path):  # noqa: PTH112 - as above
                yield from _in_folder(path, root, may_be_empty=len(paths) > 1)
            elif os.path.exists(path):  # noqa: PTH110 - as above
                yield FrameFile(Path(path), root.name(path))
            else:
                yield _missing(path, "no such file or folder; check the path")


def _in_folder(folder: str, root: _Root, *, may_be_empty: bool) -> Iterator[FrameFile | Failure]:
    prefix = root.name(folder)
    prefix = "" if prefix == "." else prefix if prefix.endswith("/") else f"{prefix}/"
    empty = True
    for found in _frames_in(folder):
        empty = False
        if isinstance(found, OSError):
            yield _unreadable(found)
        else:
            yield FrameFile(Path(folder, found), prefix + found)
    if empty and not may_be_empty:
        yield _missing(folder, f"the folder holds no image; expected {', '.join(sorted(EXTENSIONS))} files")


def walk(folder: Path, on_error: Callable[[OSError], object] | None = None) -> Iterator[Path]:
    """Walk a folder for image files, depth first, in sorted order, hidden names and overlays left out, link loops cut.

    Linked folders are followed, since data sets are often laid out with links; one that leads back to a folder
    above itself is not entered again. A folder that cannot be read is passed over, and `on_error` is told.
    """
    for found in _frames_in(os.fspath(folder)):
        if isinstance(found, str):
            yield folder / found
        elif on_error is not None:
            on_error(found)


def _frames_in(folder: str) -> Iterator[str | OSError]:
    return descend(folder, True, _step)


def _step(_: bool, name: str, is_folder: bool) -> tuple[bool, bool | None]:
    if name.startswith("."):  # also the "._name.png" twins that macOS leaves on foreign disks
        return False, None
    if is_folder:
        return False, True
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.endswith(OVERLAY_ENDING), None  # noqa: PTH122


def _missing(given: str, reason: str) -> Failure:
    return Failure(PurePath(given).as_posix(), InputNotFoundError(reason))


def _unreadable(error: OSError) -> Failure:
    return _missing(error.filename, f"the folder cannot be read ({error.strerror}); check its permissions")


class _Root:
    """The deepest folder that holds all inputs, which names are relative to; none where there is none (two drives)."""

    def __init__(self) -> None:
        self._path: str | None = None
        self._none = False

    def add(self, path: str) -> None:
        absolute = Path(path).absolute()
        parent = str(absolute if os.path.isdir(path) else absolute.parent)  # noqa: PTH112
        if self._none or parent == self._path:
            return
        try:
            self._path = parent if self._path is None else os.path.commonpath([self._path, parent])
        except ValueError:
            self._none = True

    def name(self, path: str) -> str:
        absolute: PurePath = Path(path).absolute()
        if self._path is not None and not self._none and absolute.is_relative_to(self._path):
            absolute = absolute.relative_to(self._path)
        return absolute.as_posix()
