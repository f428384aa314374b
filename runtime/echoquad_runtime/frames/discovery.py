"""Inputs: from files, folders and patterns, as a user names them, to frame files and the names their rows carry.

A tree is walked lazily: no more is held of it than the names in the folders that lead to the frame at hand. Of a file
with several frames the header is read to know how many they are.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Final

from echoquad_runtime.errors import FrameError, InputNotFoundError
from echoquad_runtime.frames.formats import (
    DEFAULT_READ_OPTIONS,
    FRAME_EXTENSIONS,
    IMAGE_EXTENSIONS,
    MATRIX_EXTENSIONS,
    ReadOptions,
    could_be_dicom,
    is_dicom,
)
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.frames.reader import frames_in, head_of
from echoquad_runtime.storage.directory_walk import descend, expand

__all__ = [
    "EXPECTED_FILES",
    "OVERLAY_SUFFIX",
    "find_frames",
    "find_in_folder",
    "matrices_hint",
    "walk",
]


OVERLAY_SUFFIX: Final = ".overlay.png"
"""Ending of the pictures that EchoQuad draws; in a folder they are no frames to judge."""


EXPECTED_FILES: Final = f"expected {', '.join(sorted(IMAGE_EXTENSIONS))} files, DICOM or clips"
"""What a folder is to hold."""

_KNOWN: Final = FRAME_EXTENSIONS | MATRIX_EXTENSIONS
_FRAME_NUMBER: Final = re.compile(r"(.+)#([1-9][0-9]{0,5})")


def find_frames(
    inputs: Sequence[str | Path], reading: ReadOptions = DEFAULT_READ_OPTIONS
) -> Iterator[FrameFile | Failure]:
    """Find the frames that `inputs` name, one after the other, lazily.

    A folder is walked, in sorted order, for images, DICOM files (also such as have no ending), clips, and for matrices
    if `reading` says so; a file named outright is taken whatever it is called; a pattern (``*``, ``?``, ``[...]``,
    ``**``) that the shell left alone is expanded, in the same order, all of it at the start. ``clip.dcm#12`` is the
    twelfth frame of a clip. Names are relative to the folder where one folder is given, else to the deepest folder that
    holds all inputs.

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
                yield from _in_folder(path, root, reading, may_be_empty=len(paths) > 1)
            else:
                yield from _named(path, root, reading)


def _named(path: str, root: _Root, reading: ReadOptions) -> Iterator[FrameFile | Failure]:
    if os.path.exists(path):  # noqa: PTH110 - as above
        yield from _in_file(path, root.name(path), reading)
    elif (numbered := _FRAME_NUMBER.fullmatch(path)) and os.path.isfile(numbered[1]):  # noqa: PTH113 - as above
        yield FrameFile(Path(numbered[1]), root.name(path), int(numbered[2]), reading.flip)
    else:
        yield _missing(path, "no such file or folder; check the path")


def find_in_folder(
    folder: Path, prefix: str = "", reading: ReadOptions = DEFAULT_READ_OPTIONS
) -> Iterator[FrameFile | Failure]:
    """Find the frames in a folder, as `find_frames` does; `prefix` goes before their names.

    Yields
    ------
    FrameFile or Failure
        Nothing where the folder holds none.
    """
    for found in _files_in(os.fspath(folder), matrices=reading.matrices):
        if isinstance(found, OSError):
            yield _unreadable(found)
        else:
            yield from _in_file(os.path.join(folder, found), prefix + found, reading)  # noqa: PTH118 - as in tree


def _in_folder(folder: str, root: _Root, reading: ReadOptions, *, may_be_empty: bool) -> Iterator[FrameFile | Failure]:
    prefix = root.name(folder)
    prefix = "" if prefix == "." else prefix if prefix.endswith("/") else f"{prefix}/"
    empty = True
    for found in find_in_folder(Path(folder), prefix, reading):
        empty = False
        yield found
    if empty and not may_be_empty:
        yield _missing(folder, f"the folder holds no image; {EXPECTED_FILES}{matrices_hint(folder, reading)}")


def _in_file(path: str, name: str, reading: ReadOptions) -> Iterator[FrameFile | Failure]:
    if os.path.splitext(path)[1].lower() in IMAGE_EXTENSIONS:  # noqa: PTH122 - nothing more is asked of most files
        yield FrameFile(Path(path), name)
    else:
        yield from frames_in(Path(path), name, reading)


def matrices_hint(folder: str, reading: ReadOptions) -> str:
    """Say that a folder without frames has matrices to offer, where it has: they are not taken by themselves."""
    if reading.matrices or not any(isinstance(found, str) for found in _files_in(folder, matrices=True)):
        return ""
    return "; its .txt, .csv, .tsv and .npy files are read as matrices with --matrices"


def walk(folder: Path, on_error: Callable[[OSError], object] | None = None) -> Iterator[Path]:
    """Walk a folder for files with frames, depth first, in sorted order, hidden names and overlays left out.

    Linked folders are followed, since data sets are often laid out with links; one that leads back to a folder
    above itself is not entered again. A folder that cannot be read is passed over, and `on_error` is told.
    """
    for found in _files_in(os.fspath(folder), matrices=False):
        if isinstance(found, str):
            yield folder / found
        elif on_error is not None:
            on_error(found)


def _files_in(folder: str, *, matrices: bool) -> Iterator[str | OSError]:
    for found in descend(folder, matrices, _step):
        if isinstance(found, OSError) or _ending(found) in _KNOWN or _begins_as_dicom(Path(folder, found)):
            yield found


def _step(matrices: bool, name: str, is_folder: bool) -> tuple[bool, bool | None]:
    if name.startswith("."):  # also the "._name.png" twins that macOS leaves on foreign disks
        return False, None
    if is_folder:
        return False, matrices
    ending = _ending(name)
    wanted = ending in FRAME_EXTENSIONS or (matrices and ending in MATRIX_EXTENSIONS) or could_be_dicom(name)
    return wanted and not name.endswith(OVERLAY_SUFFIX), None


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def _begins_as_dicom(path: Path) -> bool:
    try:
        return is_dicom(head_of(path))
    except FrameError:  # what it is cannot be told
        return False


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
