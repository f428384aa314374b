"""Discovery of frames: from files, folders and glob patterns to frame files and the names of their rows.

A folder is walked lazily: memory holds only the names in the folders that lead to the current frame. The header of a
multi-frame file is read to count its frames.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Final

from echoquad_runtime.errors import FrameError, InputNotFoundError
from echoquad_runtime.frames.file_access import read_head
from echoquad_runtime.frames.formats import (
    DEFAULT_READ_OPTIONS,
    FRAME_EXTENSIONS,
    IMAGE_EXTENSIONS,
    MATRIX_EXTENSIONS,
    STACK_EXTENSIONS,
    ReadOptions,
    could_be_dicom,
    is_dicom,
)
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.frames.images.several_images import file_may_be_stack
from echoquad_runtime.frames.reader import frames_in
from echoquad_runtime.storage.directory_walk import WalkRule, expand_pattern, walk_directory
from echoquad_runtime.storage.system_files import SkippedEntries, is_system_name

__all__ = [
    "EXPECTED_FILES",
    "OVERLAY_SUFFIX",
    "find_frames",
    "find_in_folder",
    "matrices_hint",
    "walk",
]


OVERLAY_SUFFIX: Final = ".overlay.png"
"""Suffix of the pictures that EchoQuad draws; such files in a folder are not frames."""


EXPECTED_FILES: Final = f"expected {', '.join(sorted(IMAGE_EXTENSIONS))} files, DICOM or clips"
"""What a folder of frames holds, for error messages."""

_KNOWN_EXTENSIONS: Final = FRAME_EXTENSIONS | MATRIX_EXTENSIONS
_FRAME_NUMBER: Final = re.compile(r"(.+)#([1-9][0-9]{0,5})")


def find_frames(
    inputs: Sequence[str | Path],
    options: ReadOptions = DEFAULT_READ_OPTIONS,
    skipped: SkippedEntries | None = None,
) -> Iterator[FrameFile | Failure]:
    """Find the frames that `inputs` name, one after the other, lazily.

    A folder is walked in sorted order for images, DICOM files (with or without an extension), clips, and, if `options`
    includes them, matrices. A file is taken whatever its name. A pattern (``*``, ``?``, ``[...]``, ``**``) that the
    shell did not expand is expanded in the same order, completely, at the beginning. ``clip.dcm#12`` is the twelfth
    frame of a clip.

    Names are relative to the folder if one folder is given, else to the deepest folder that contains all inputs, with
    forward slashes. ``..`` is resolved first; links are not, so two links to one file are two frames. Inputs on two
    drives have absolute names.

    Hidden files, and files and folders of the system (`echoquad_runtime.storage.system_files`), are skipped and counted
    in `skipped`. One that is the only input is taken; beside other inputs a system file is skipped, since the shell
    expands ``folder/*`` to it.

    Yields
    ------
    FrameFile or Failure
        A failure for an input that names nothing, instead of an exception: the other inputs are still processed.
    """
    root = _CommonRoot()
    expanded = list(_expand_inputs(inputs, skipped))
    for _, paths in expanded:
        for path in paths:
            if isinstance(path, str):
                root.add(path)
    for text, paths in expanded:
        if not paths:
            yield _not_found(text, "no file matches the pattern; check it")
        for path in paths:
            if isinstance(path, OSError):
                yield _unreadable_folder(path)
            elif os.path.isdir(path):  # noqa: PTH112 - as above
                yield from _find_in_input_folder(path, root, options, skipped, may_be_empty=len(paths) > 1)
            else:
                yield from _find_in_input_file(path, root, options)


def _expand_inputs(
    inputs: Sequence[str | Path], skipped: SkippedEntries | None
) -> Iterator[tuple[str, list[str | OSError]]]:
    """Yield each input with its paths: itself, or those that match if it is a pattern."""
    for given in inputs:
        text = os.fspath(given)
        name = os.path.basename(text)  # noqa: PTH119 - os.path here for names that pathlib rejects
        if not os.path.exists(text) and glob.has_magic(text):  # noqa: PTH110 - Path.exists raises for too long a name
            yield text, list(expand_pattern(text, skipped))
        elif len(inputs) > 1 and is_system_name(name) and not name.startswith("."):
            if skipped is not None:
                skipped.add(name)
        else:
            yield text, [text]


def _find_in_input_file(path: str, root: _CommonRoot, options: ReadOptions) -> Iterator[FrameFile | Failure]:
    if os.path.exists(path):  # noqa: PTH110 - as above
        yield from _find_in_file(path, root.relative_name(path), options)
    elif (numbered := _FRAME_NUMBER.fullmatch(path)) and os.path.isfile(numbered[1]):  # noqa: PTH113 - as above
        yield FrameFile(Path(numbered[1]), root.relative_name(path), int(numbered[2]), options.flip)
    else:
        yield _not_found(path, "no such file or folder; check the path")


def _find_in_input_folder(
    folder: str, root: _CommonRoot, options: ReadOptions, skipped: SkippedEntries | None, *, may_be_empty: bool
) -> Iterator[FrameFile | Failure]:
    prefix = root.relative_name(folder)
    prefix = "" if prefix == "." else prefix if prefix.endswith("/") else f"{prefix}/"
    empty = True
    for found in find_in_folder(Path(folder), prefix, options, skipped):
        empty = False
        yield found
    if empty and not may_be_empty:
        yield _not_found(folder, f"the folder holds no image; {EXPECTED_FILES}{matrices_hint(folder, options)}")


def find_in_folder(
    folder: Path,
    prefix: str = "",
    options: ReadOptions = DEFAULT_READ_OPTIONS,
    skipped: SkippedEntries | None = None,
) -> Iterator[FrameFile | Failure]:
    """Find the frames in a folder, as `find_frames` does; `prefix` is put before their names.

    Yields
    ------
    FrameFile or Failure
        Nothing if the folder holds none.
    """
    for found in _frame_paths(os.fspath(folder), matrices=options.matrices, skipped=skipped):
        if isinstance(found, OSError):
            yield _unreadable_folder(found)
        else:
            # os.path, here and below: pathlib would dominate the time of a walk.
            yield from _find_in_file(os.path.join(folder, found), prefix + found, options)  # noqa: PTH118


def _find_in_file(path: str, name: str, options: ReadOptions) -> Iterator[FrameFile | Failure]:
    if _is_single_image(path):
        yield FrameFile(Path(path), name)
    else:
        yield from frames_in(Path(path), name, options)


def _is_single_image(path: str) -> bool:
    """Return whether a file is named as an image and announces one image; most files."""
    extension = _extension(path)
    if extension not in STACK_EXTENSIONS:
        return extension in IMAGE_EXTENSIONS
    try:
        return not file_may_be_stack(Path(path))
    except FrameError:  # reported when the frame is read
        return True


def matrices_hint(folder: str, options: ReadOptions) -> str:
    """Return a hint at --matrices, for an error message, if a folder without frames holds matrices; else ""."""
    if options.matrices or not any(isinstance(found, str) for found in _frame_paths(folder, matrices=True)):
        return ""
    return "; its .txt, .csv, .tsv and .npy files are read as matrices with --matrices"


def walk(folder: Path, on_error: Callable[[OSError], object] | None = None) -> Iterator[Path]:
    """Walk a folder for files with frames, depth first, in sorted order, without hidden or system files and overlays.

    Symbolic links to folders are followed, since data sets are often laid out with links, but not to a folder above
    the link. An unreadable folder is skipped and passed to `on_error`.
    """
    for found in _frame_paths(os.fspath(folder), matrices=False):
        if isinstance(found, str):
            yield folder / found
        elif on_error is not None:
            on_error(found)


def _frame_paths(folder: str, *, matrices: bool, skipped: SkippedEntries | None = None) -> Iterator[str | OSError]:
    for found in walk_directory(folder, matrices, _walk_rule(skipped)):
        if isinstance(found, OSError) or _extension(found) in _KNOWN_EXTENSIONS or _is_dicom_file(Path(folder, found)):
            yield found


def _walk_rule(skipped: SkippedEntries | None) -> WalkRule[bool]:
    def rule(matrices: bool, name: str, is_folder: bool) -> tuple[bool, bool | None]:
        if is_system_name(name):
            if skipped is not None:
                skipped.add(name)
            return False, None
        if is_folder:
            return False, matrices
        extension = _extension(name)
        wanted = extension in FRAME_EXTENSIONS or (matrices and extension in MATRIX_EXTENSIONS) or could_be_dicom(name)
        return wanted and not name.endswith(OVERLAY_SUFFIX), None

    return rule


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def _is_dicom_file(path: Path) -> bool:
    try:
        return is_dicom(read_head(path))
    except FrameError:  # an unreadable file without an extension is not known to be a frame
        return False


def _not_found(given: str, reason: str) -> Failure:
    return Failure(PurePath(given).as_posix(), InputNotFoundError(reason))


def _unreadable_folder(error: OSError) -> Failure:
    return _not_found(error.filename, f"the folder cannot be read ({error.strerror}); check its permissions")


class _CommonRoot:
    """The deepest folder that contains all inputs; names are relative to it. There is none for inputs on two drives."""

    def __init__(self) -> None:
        self._path: str | None = None
        self._none = False

    def add(self, path: str) -> None:
        absolute = Path(_without_parents(path))
        parent = str(absolute if os.path.isdir(path) else absolute.parent)  # noqa: PTH112
        if self._none or parent == self._path:
            return
        try:
            self._path = parent if self._path is None else os.path.commonpath([self._path, parent])
        except ValueError:
            self._none = True

    def relative_name(self, path: str) -> str:
        absolute: PurePath = Path(_without_parents(path))
        if self._path is not None and not self._none and absolute.is_relative_to(self._path):
            absolute = absolute.relative_to(self._path)
        return absolute.as_posix()


def _without_parents(path: str) -> str:
    """Return an absolute path without ``..``. A link is resolved only where ``..`` follows it."""
    absolute = Path(path).absolute()
    if os.pardir not in absolute.parts:
        return str(absolute)
    try:
        resolved = Path(absolute.anchor)
        for part in absolute.parts[1:]:
            # "link/.." is the folder above the link's target, as the system opens it.
            resolved = Path(os.path.realpath(resolved)).parent if part == os.pardir else resolved / part
        return str(resolved)
    except ValueError:  # a null character: the input names nothing
        return os.path.normpath(absolute)
