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
# The docstring's tree: its bars, a name, the builtin in brackets, the exit code where it is another than above.
LINE = re.compile(
    r"^ {4}(?P<bars>[│├└─ ]*)(?P<name>\w+Error)(?: \((?P<builtin>\w+)\))?(?: +(?P<code>\d))?$", re.MULTILINE
)
TREE = list(LINE.finditer(errors.__doc__ or ""))


def depth(line: re.Match[str]) -> int:
    return len(line["bars"]) // 4


def ancestors(line: re.Match[str]) -> list[re.Match[str]]:
    """Give the lines above that this one hangs from, nearest first."""
    found: list[re.Match[str]] = []
    for other in reversed(TREE[: TREE.index(line)]):
        if depth(other) < depth(found[-1] if found else line):
            found.append(other)
    return found


def test_all_is_every_class_and_nothing_else() -> None:
    assert sorted(errors.__all__) == sorted(CLASSES)
    assert errors.__all__ == sorted(errors.__all__)


def test_the_tree_names_every_class_once() -> None:
    assert sorted(line["name"] for line in TREE) == sorted(CLASSES)


@pytest.mark.parametrize("line", TREE, ids=lambda line: line["name"])
def test_the_tree_is_true(line: re.Match[str]) -> None:
    found, above = CLASSES[line["name"]], ancestors(line)
    parents = {parent.__name__ for parent in found.__mro__[1:] if parent.__module__ == errors.__name__}
    assert parents == {other["name"] for other in above}
    assert found.exit_code == next(int(other["code"]) for other in [line, *above] if other["code"])
    if line["builtin"]:
        assert issubclass(found, getattr(builtins, line["builtin"]))
    else:
        assert found.__bases__ == (CLASSES[above[0]["name"]] if above else Exception,)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_each_is_caught_as_an_echoquad_error_and_is_documented(name: str) -> None:
    found = CLASSES[name]
    assert issubclass(found, EchoQuadError)
    assert found.__doc__
    assert str(found("one line")) == "one line"  # an OSError's odd constructor is not in the way


@pytest.mark.parametrize("name", sorted(set(CLASSES) - {"EchoQuadError"}))
def test_each_is_also_a_builtin_that_a_caller_would_catch(name: str) -> None:
    builtin = (ValueError, OSError, RuntimeError, ImportError)
    assert issubclass(CLASSES[name], builtin)


def test_every_class_has_a_code_of_its_own() -> None:
    codes = [found.code for found in CLASSES.values()]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"E_[A-Z]+(_[A-Z]+)*", code) for code in codes)
    assert all("code" in vars(found) for found in CLASSES.values())
