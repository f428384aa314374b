"""Directory walks: lazy and in sorted order, filtered by a rule or a glob pattern, safe against links and depth."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from glob import has_magic
from typing import Final, Generic, TypeVar

from echoquad_runtime.storage.system_files import SkippedEntries, is_system_name

__all__ = ["WalkRule", "expand_pattern", "walk_directory"]

_State = TypeVar("_State")

WalkRule = Callable[[_State, str, bool], tuple[bool, _State | None]]
"""Decides on an entry from the state of its folder, its name, and whether it is a folder.

Returns whether to yield it, and the state in which to enter it; None is not to enter. A yielded entry is not entered.
"""

_RECURSIVE: Final = "**"


@dataclass
class _OpenFolder(Generic[_State]):
    """A folder that is being walked: its remaining names, last one first, and the states of those to enter."""

    prefix: str
    identity: Hashable
    names: list[str] = field(default_factory=list)
    subfolders: dict[str, _State] = field(default_factory=dict)


def walk_directory(top: str, state: _State, rule: WalkRule[_State]) -> Iterator[str | OSError]:
    """Walk a directory tree depth first; within a folder, files and folders come in one sorted order.

    Symbolic links to folders are followed, but no folder is entered inside itself. Memory holds only the wanted names
    of the folders on the path to the current one.

    Yields
    ------
    str or OSError
        Paths relative to `top`, with forward slashes; for a folder that cannot be read, the error with its file name.
    """
    path: list[_OpenFolder[_State]] = []
    entering: tuple[str, _State] | None = ("", state)
    while entering or path:
        if entering is not None:
            prefix, inner_state = entering
            entering = None
            folder = os.path.join(top, prefix) if prefix else top  # noqa: PTH118 - a Path takes ten times the memory
            try:
                opened: _OpenFolder[_State] = _OpenFolder(prefix, _identity(folder or os.curdir))
                if all(opened.identity != other.identity for other in path):
                    path.append(opened)
                    _list_folder(folder or os.curdir, opened, inner_state, rule)
            except OSError as error:  # the names listed before the error are walked all the same
                error.filename = error.filename or folder
                yield error
            continue
        current = path[-1]
        if not current.names:
            path.pop()
            continue
        name = current.names.pop()
        if name in current.subfolders:
            entering = f"{current.prefix}{name}/", current.subfolders.pop(name)
        else:
            yield current.prefix + name


def _identity(folder: str) -> Hashable:
    """Return what identifies a folder, since links and mounts give it many paths."""
    status = os.stat(folder)  # noqa: PTH116
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)


def _list_folder(folder: str, opened: _OpenFolder[_State], state: _State, rule: WalkRule[_State]) -> None:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                wanted, inner_state = rule(state, entry.name, _is_folder(entry))
                if wanted or inner_state is not None:
                    opened.names.append(entry.name)
                if inner_state is not None and not wanted:
                    opened.subfolders[entry.name] = inner_state
    finally:
        opened.names.sort(reverse=True)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def expand_pattern(pattern: str, skipped: SkippedEntries | None = None) -> Iterator[str | OSError]:
    """Find the paths that match a glob pattern, each once, in the order of `walk_directory`.

    ``*``, ``?`` and ``[...]`` match characters of one name, ``**`` any number of folders. Hidden names match only a
    part of the pattern that begins with a dot, and other system names (`echoquad_runtime.storage.system_files`) only a
    part that is exactly that name; the others are counted in `skipped`. A folder that matches is not searched.

    Yields
    ------
    str or OSError
        Paths that begin as the pattern does; an error for a folder that cannot be searched.
    """
    drive, rest = os.path.splitdrive(pattern)
    parts = re.split(f"[{re.escape(os.sep + (os.altsep or ''))}]+", rest)
    plain = next(index for index, part in enumerate(parts) if has_magic(part))
    top = drive + (os.sep if parts[0] == "" else "") + os.sep.join(part for part in parts[:plain] if part)  # noqa: PTH118
    if not os.path.isdir(top or os.curdir):  # noqa: PTH112
        return
    wanted = [part for part in parts[plain:] if part not in ("", os.curdir)]
    matchers = [None if part == _RECURSIVE else _matcher(part) for part in wanted]
    literal = {part for part in wanted if not has_magic(part)}
    folders_only = parts[-1] == ""  # "exam*/"

    def closure(position: int) -> set[int]:
        """Return the positions of the pattern reachable from one without a name: ``**`` may match no folder."""
        skips = position < len(matchers) and matchers[position] is None
        return {position} | (closure(position + 1) if skips else set())

    def rule(state: frozenset[int], name: str, is_folder: bool) -> tuple[bool, frozenset[int] | None]:
        reached: set[int] = set()
        if not name.startswith(".") and is_system_name(name) and name not in literal:
            if skipped is not None:
                skipped.add(name)
            return False, None
        for position in state:
            matches = matchers[position]
            if matches is None and not name.startswith("."):
                reached |= closure(position)
            elif matches is not None and matches(name):
                reached |= closure(position + 1)
        matched = len(matchers) in reached and (is_folder or not folders_only)
        inner_state = frozenset(reached - {len(matchers)})
        return matched, inner_state if is_folder and inner_state else None

    begin = closure(0)
    if len(matchers) in begin:  # nothing but "**": the folder itself
        yield top or os.curdir
        return
    for found in walk_directory(top, frozenset(begin), rule):
        yield os.path.join(top, found) if isinstance(found, str) else found  # noqa: PTH118


def _matcher(part: str) -> Callable[[str], bool]:
    pattern = re.compile(fnmatch.translate(os.path.normcase(part)))
    hidden = part.startswith(".")

    def matches(name: str) -> bool:
        return name.startswith(".") <= hidden and pattern.match(os.path.normcase(name)) is not None

    return matches
