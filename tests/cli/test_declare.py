"""Plain lines, which are read without Typer: read as Typer reads them, or left to it."""

from __future__ import annotations

import functools
import inspect
import shlex
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from echoquad.cli import declare
from echoquad.cli.app import COMMANDS
from echoquad.cli.declare import Argument, Option, for_typer, load, read_plainly
from echoquad.cli.options import DeviceName

VALUES = [
    *["a.png", "exam/*.png", "x=y", "=", "a b", "ü", "-", "--", "-1", "--help", "-h", "--nothing", ""],
    *["0", "1", "7", "08", "+7", "7.", ".5", "0.25", "1e3", "1_0", " 8", "\u0663", "999999999", "9" * 20, "nan", "inf"],
    *["cpu", "cuda", "CPU", "auto", "tpu", "majority", "oracle", "latency", "int8"],
]


class Colour(StrEnum):
    red = "red"


class Told:
    """A command that only keeps what it is called with."""

    def __init__(self, command: Callable[..., object]) -> None:
        self.called: dict[str, Any] = {}

        @functools.wraps(command)
        def keep(**values: Any) -> None:
            self.called = values

        self.command = keep
        self.defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(command).parameters.items()
            if parameter.default is not parameter.empty
        }
        app = typer.Typer(add_completion=False)
        app.callback()(lambda: None)
        app.command("told")(for_typer(keep))
        self._typer = typer.main.get_command(app)

    def by_typer(self, words: list[str]) -> dict[str, Any] | None:
        """Give what Typer makes of the words; None where it refuses them, or does something else."""
        self.called = {}
        try:
            self._typer(["told", *words], standalone_mode=False)
        except Exception as error:
            assert isinstance(error, typer.BadParameter.__mro__[1]), error
            return None
        return self.called or None


@functools.cache
def told(name: str) -> Told:
    return Told(load(name))


@functools.cache
def flags(name: str) -> list[str]:
    return sorted(flag for parameter in declare._parameters(load(name)) for flag in parameter.flags)


@st.composite
def lines(draw: st.DrawFn) -> tuple[str, list[str]]:
    """Draw a command and words for it: well-formed as a rule, with something else among them now and then."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    words = draw(st.lists(st.sampled_from(["bundle", "a.png", "exam/"]), max_size=3))
    value = st.one_of(st.sampled_from(["8", "1", "cpu", "0.5", "out.csv", "average"]), st.sampled_from(VALUES))
    for flag in draw(st.lists(st.sampled_from(flags(name)), max_size=4)):
        at = draw(st.integers(0, len(words)))
        kind = draw(st.sampled_from(["alone", "next", "next", "next", "equals"]))
        if kind == "equals":
            words.insert(at, f"{flag}={draw(value)}")
        else:
            words[at:at] = [flag, draw(value)][: 1 if kind == "alone" else 2]
    if draw(st.integers(0, 5)) == 0:
        words.insert(draw(st.integers(0, len(words))), draw(st.sampled_from(VALUES)))
    return name, words


@settings(max_examples=1000)
@given(lines())
def test_what_is_read_plainly_is_what_typer_reads(line: tuple[str, list[str]]) -> None:
    name, words = line
    command = told(name)
    plain = read_plainly(command.command, words)
    if plain is not None:
        assert command.by_typer(words) == {**command.defaults, **plain}


@pytest.mark.parametrize("name", COMMANDS)
def test_lines_as_users_write_them_are_plain(name: str) -> None:
    command = told(name)
    first, *words = shlex.split(COMMANDS[name])
    assert first == name
    plain = read_plainly(command.command, words)
    assert plain is not None
    assert command.by_typer(words) == {**command.defaults, **plain}


def test_the_command_line_that_a_cart_runs_is_plain() -> None:
    words = ["bundle", "one.png", "a/two.png", "--precision", "int8", "--device=cpu", "--threads", "2", "--untuned"]
    assert read_plainly(load("predict"), words) == {
        "bundle": Path("bundle"),
        "inputs": ["one.png", "a/two.png"],
        "precision": "int8",
        "device": DeviceName.cpu,
        "threads": 2,
        "untuned": True,
    }


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["bundle"],
        ["bundle", "--help"],
        ["bundle", "x.png", "--help"],
        ["bundle", "x.png", "-h"],
        ["bundle", "x.png", ""],
        ["bundle", "--", "x.png"],
        ["bundle", "x.png", "--precision"],
        ["bundle", "x.png", "--precision", ""],
        ["bundle", "x.png", "--precision="],
        ["bundle", "x.png", "--precision", "-1"],
        ["bundle", "x.png", "--precision", "--untuned"],
        ["bundle", "x.png", "--precision", "a", "--precision", "b"],
        ["bundle", "x.png", "--prec", "a"],
        ["bundle", "x.png", "--untuned=yes"],
        ["bundle", "x.png", "--threads", "0"],
        ["bundle", "x.png", "--threads", "two"],
        ["bundle", "x.png", "--device", "tpu"],
    ],
)
def test_all_else_is_left_to_typer(words: list[str]) -> None:
    assert read_plainly(load("predict"), words) is None


def test_a_declaration_that_is_not_understood_is_left_to_typer() -> None:
    def command(colour: Annotated[Colour, Option("--colour", case_sensitive=False)] = Colour.red) -> None: ...
    def untold(name: str) -> None: ...
    def timed(when: Annotated[complex, Argument()]) -> None: ...

    assert read_plainly(command, ["--colour", "red"]) is None
    assert read_plainly(untold, ["x"]) is None
    assert read_plainly(timed, ["1"]) is None


def test_patterns_and_variables_are_typers_to_expand_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(declare, "_EXPANDED", frozenset("*?[~$%"))
    for text, plain in (("x.png", True), ("*.png", False), ("~/x.png", False), ("%TEMP%/x.png", False)):
        assert (read_plainly(load("predict"), ["bundle", text]) is not None) is plain
        assert (read_plainly(load("predict"), ["bundle", "x.png", "--out", f"{text}.csv"]) is not None) is plain
