"""The tree of exceptions: documented, with stable codes, exit codes and builtin bases."""

from __future__ import annotations

import builtins
import inspect
import re

import pytest

from echoquad_runtime import errors
from echoquad_runtime.errors import EchoQuadError

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and value.__module__ == errors.__name__
}
# A line of the docstring's tree: bars, name, builtin in brackets, exit code if it differs from the parent's.
LINE = re.compile(
    r"^ {4}(?P<bars>[│├└─ ]*)(?P<name>\w+Error)(?: \((?P<builtin>\w+)\))?(?: +(?P<code>\d))?$", re.MULTILINE
)
TREE = list(LINE.finditer(errors.__doc__ or ""))


def depth(line: re.Match[str]) -> int:
    return len(line["bars"]) // 4


def ancestors(line: re.Match[str]) -> list[re.Match[str]]:
    """Return the lines of the parent classes, nearest first."""
    found: list[re.Match[str]] = []
    for other in reversed(TREE[: TREE.index(line)]):
        if depth(other) < depth(found[-1] if found else line):
            found.append(other)
    return found


def test_all_lists_every_class() -> None:
    assert sorted(errors.__all__) == sorted(CLASSES)
    assert errors.__all__ == sorted(errors.__all__)


def test_docstring_tree_names_every_class_once() -> None:
    assert sorted(line["name"] for line in TREE) == sorted(CLASSES)


@pytest.mark.parametrize("line", TREE, ids=lambda line: line["name"])
def test_docstring_tree_matches_the_classes(line: re.Match[str]) -> None:
    found, above = CLASSES[line["name"]], ancestors(line)
    parents = {parent.__name__ for parent in found.__mro__[1:] if parent.__module__ == errors.__name__}
    assert parents == {other["name"] for other in above}
    assert found.exit_code == next(int(other["code"]) for other in [line, *above] if other["code"])
    if line["builtin"]:
        assert issubclass(found, getattr(builtins, line["builtin"]))
    else:
        assert found.__bases__ == (CLASSES[above[0]["name"]] if above else Exception,)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_class_is_an_echoquad_error_with_a_docstring(name: str) -> None:
    found = CLASSES[name]
    assert issubclass(found, EchoQuadError)
    assert found.__doc__
    assert str(found("one line")) == "one line"  # OSError has a constructor of its own


@pytest.mark.parametrize("name", sorted(set(CLASSES) - {"EchoQuadError"}))
def test_every_class_inherits_a_builtin_exception(name: str) -> None:
    builtin = (ValueError, OSError, RuntimeError, ImportError)
    assert issubclass(CLASSES[name], builtin)


def test_codes_are_unique() -> None:
    codes = [found.code for found in CLASSES.values()]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"E_[A-Z]+(_[A-Z]+)*", code) for code in codes)
    assert all("code" in vars(found) for found in CLASSES.values())
