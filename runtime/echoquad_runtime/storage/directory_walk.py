"""Trees of folders: walked lazily and in order, by a rule or by a pattern, whatever links and depths they have."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from glob import has_magic
from typing import Final, Generic, TypeVar

__all__ = ["Step", "descend", "expand"]

_State = TypeVar("_State")

Step = Callable[[_State, str, bool], tuple[bool, _State | None]]
"""Of a folder's state, an entry's name and whether that is a folder: whether to give it, and the state to enter it in.

None is not to enter. What is given is not entered."""

_ANY_FOLDERS: Final = "**"


@dataclass
class _Level(Generic[_State]):
    """A folder that is being gone through: what is left of it, last name first, and which of that is to be entered."""

    prefix: str
    identity: Hashable
    names: list[str] = field(default_factory=list)
    below: dict[str, _State] = field(default_factory=dict)


def descend(top: str, state: _State, step: Step[_State]) -> Iterator[str | OSError]:
    """Go through a tree, depth first, the names of a folder in sorted order, files and folders alike.

    Linked folders are entered, but none inside itself. Held are only the wanted names of the folders on the way down.

    Yields
    ------
    str or OSError
        Paths relative to `top`, with forward slashes; an error, with its file name, for a folder that cannot be read.
    """
    levels: list[_Level[_State]] = []
    entering: tuple[str, _State] | None = ("", state)
    while entering or levels:
        if entering is not None:
            prefix, inside = entering
            entering = None
            folder = os.path.join(top, prefix) if prefix else top  # noqa: PTH118 - pathlib's objects are ten times as large
            try:
                level: _Level[_State] = _Level(prefix, _identity(folder or os.curdir))
                if all(level.identity != other.identity for other in levels):
                    levels.append(level)
                    _list(folder or os.curdir, level, inside, step)
            except OSError as error:  # what was listed before it is gone through all the same
                error.filename = error.filename or folder
                yield error
            continue
        level = levels[-1]
        if not level.names:
            levels.pop()
            continue
        name = level.names.pop()
        if name in level.below:
            entering = f"{level.prefix}{name}/", level.below.pop(name)
        else:
            yield level.prefix + name


def _identity(folder: str) -> Hashable:
    """Tell a folder from others by what it is, since links and mounts give it many paths."""
    status = os.stat(folder)  # noqa: PTH116
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)


def _list(folder: str, level: _Level[_State], state: _State, step: Step[_State]) -> None:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                give, enter = step(state, entry.name, _is_folder(entry))
                if give or enter is not None:
                    level.names.append(entry.name)
                if enter is not None and not give:
                    level.below[entry.name] = enter
    finally:
        level.names.sort(reverse=True)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def expand(pattern: str) -> Iterator[str | OSError]:
    """Find what a pattern names, in the order of `descend`, each path once.

    ``*``, ``?`` and ``[...]`` stand for signs of one name, ``**`` for any number of folders; only where a part of the
    pattern begins with a dot does it stand for hidden names. A folder that is found is not searched further.

    Yields
    ------
    str or OSError
        Paths, beginning as the pattern does; an error for a folder that cannot be searched.
    """
    drive, rest = os.path.splitdrive(pattern)
    parts = re.split(f"[{re.escape(os.sep + (os.altsep or ''))}]+", rest)
    plain = next(index for index, part in enumerate(parts) if has_magic(part))
    top = drive + (os.sep if parts[0] == "" else "") + os.sep.join(part for part in parts[:plain] if part)  # noqa: PTH118
    if not os.path.isdir(top or os.curdir):  # noqa: PTH112
        return
    wanted = [part for part in parts[plain:] if part not in ("", os.curdir)]
    matchers = [None if part == _ANY_FOLDERS else _matcher(part) for part in wanted]

    def reach(state: int) -> set[int]:  # how much of the pattern may lie behind: any folders may be none
        return {state} | (reach(state + 1) if state < len(matchers) and matchers[state] is None else set())

    def step(state: frozenset[int], name: str, is_folder: bool) -> tuple[bool, frozenset[int] | None]:
        found: set[int] = set()
        for index in state:
            matches = matchers[index]
            if matches is None and not name.startswith("."):
                found |= reach(index)
            elif matches is not None and matches(name):
                found |= reach(index + 1)
        open_ended = parts[-1] == ""  # "exam*/" is for folders alone
        give = len(matchers) in found and (is_folder or not open_ended)
        enter = frozenset(found - {len(matchers)})
        return give, enter if is_folder and enter else None

    begin = reach(0)
    if len(matchers) in begin:  # nothing but "**": the folder itself
        yield top or os.curdir
        return
    for found in descend(top, frozenset(begin), step):
        yield os.path.join(top, found) if isinstance(found, str) else found  # noqa: PTH118


def _matcher(part: str) -> Callable[[str], bool]:
    pattern = re.compile(fnmatch.translate(os.path.normcase(part)))
    hidden = part.startswith(".")

    def matches(name: str) -> bool:
        return name.startswith(".") <= hidden and pattern.match(os.path.normcase(name)) is not None

    return matches
