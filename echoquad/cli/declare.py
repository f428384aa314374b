"""What a command says of its arguments and options; and plain lines read without Typer.

To import Typer and the pydantic behind it takes as long as to import numpy, Pillow and onnxruntime, and a cart that
judges one frame would wait for it. So the commands declare their parameters here, in Typer's words, and a line in
which nothing is out of the ordinary is read here as well. Any other line is Typer's, which knows all the rules and says
what is wrong; so are the help pages. A test holds the two readings of plain lines against each other.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import types
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, Union, get_args, get_origin, get_type_hints

__all__ = ["Argument", "Command", "Option", "for_typer", "load", "read_plainly"]

Command = Callable[..., object]
"""What runs a command: it gives nothing or its exit code, or raises SystemExit with that."""

_HARMLESS: Final = frozenset({"help", "max", "metavar", "min", "show_default"})  # settings that are understood here
_EXPANDED: Final = frozenset("*?[~$%" if os.name == "nt" else "")  # Typer does, where the shell does not


class Argument:
    """A positional argument, for ``Annotated``. `settings` are those of ``typer.Argument``."""

    flags: tuple[str, ...] = ()

    def __init__(self, **settings: Any) -> None:
        self.settings = settings


class Option:
    """An option, for ``Annotated``. `flags` and `settings` are those of ``typer.Option``."""

    def __init__(self, *flags: str, **settings: Any) -> None:
        self.flags, self.settings = flags, settings


class _Parameter(NamedTuple):
    """A parameter: `many` is whether its value is a list, and `kind` the type of what is in it."""

    name: str
    kind: Any
    many: bool
    required: bool
    flags: tuple[str, ...]
    settings: dict[str, Any]


class _NotPlainError(Exception):
    """The line is for Typer to read."""


def load(name: str, function: str = "") -> Any:
    """Import a command's module, and no other's; gives its function of the same name, or another."""
    return getattr(importlib.import_module(f"echoquad.cli.{name}"), function or name)


def read_plainly(command: Command, words: Sequence[str]) -> dict[str, Any] | None:
    """Read a command's words where they are plain.

    Plain is: every option by its whole name and once (a list's as often as wanted), its value in the next word or
    behind ``=`` and not empty or beginning with ``-``; numbers in digits; as many arguments as are declared.

    Returns
    -------
    dict or None
        What to call the command with; None where Typer has to read the line.
    """
    try:
        parameters = list(_parameters(command))
        given = _sort(parameters, words)
        return {
            parameter.name: _value(parameter, given[parameter.name])
            for parameter in parameters
            if parameter.name in given
        }
    except _NotPlainError:
        return None


def _parameters(command: Command) -> Iterator[_Parameter]:
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        hint = hints[name]
        declared = next(
            (item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Argument | Option)), None
        )
        if declared is None or not declared.settings.keys() <= _HARMLESS:
            raise _NotPlainError
        kind = get_args(hint)[0]
        if get_origin(kind) in (Union, types.UnionType):
            kind = next(part for part in get_args(kind) if part is not types.NoneType)
        many = get_origin(kind) is list
        required = parameter.default is parameter.empty
        yield _Parameter(name, get_args(kind)[0] if many else kind, many, required, declared.flags, declared.settings)


def _sort(parameters: Sequence[_Parameter], words: Sequence[str]) -> dict[str, list[str]]:
    """Give each parameter its words."""
    by_flag = {flag: parameter for parameter in parameters for flag in parameter.flags}
    given: dict[str, list[str]] = {}
    loose: list[str] = []
    rest = iter(words)
    if not all(words) or not _EXPANDED.isdisjoint("".join(words)):
        raise _NotPlainError
    for word in rest:
        if not word.startswith("-"):
            loose.append(word)
            continue
        flag, equals, text = word.partition("=")
        parameter = by_flag.get(flag)
        if parameter is None or (parameter.name in given and not parameter.many):
            raise _NotPlainError
        if parameter.kind is bool:
            text = "=" if equals else "yes"
        elif not equals:
            text = next(rest, "")
        given.setdefault(parameter.name, []).append(text)
    if any(not text or text[0] in "-=" for texts in given.values() for text in texts):
        raise _NotPlainError
    for parameter in parameters:
        if not parameter.flags:
            taken = loose if parameter.many else loose[:1]
            loose = loose[len(taken) :]
            if taken:
                given[parameter.name] = taken
        if parameter.required and parameter.name not in given:
            raise _NotPlainError
    if loose:
        raise _NotPlainError
    return given


def _value(parameter: _Parameter, texts: Sequence[str]) -> Any:
    values = [_convert(parameter.kind, text, parameter.settings) for text in texts]
    return values if parameter.many else values[0]


def _convert(kind: Any, text: str, settings: dict[str, Any]) -> Any:
    if kind in (str, Path):
        return kind(text)
    if kind is bool:
        return True
    if kind in (int, float):
        digits = text.replace(".", "", 1) if kind is float else text
        if digits.isascii() and digits.isdecimal() and len(digits) < 10:
            number = kind(text)
            if settings.get("min", number) <= number <= settings.get("max", number):
                return number
    elif isinstance(kind, type) and issubclass(kind, Enum):
        for choice in kind:
            if choice.value == text:
                return choice
    raise _NotPlainError


def for_typer(command: Command) -> Command:
    """Give the command as Typer wants it: its parameters declared in Typer's own objects."""
    import typer

    @functools.wraps(command)
    def call(**values: Any) -> object:
        return command(**values)

    parameters = []
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        kind, declared = get_args(hints[name])
        make = typer.Option if isinstance(declared, Option) else typer.Argument
        hints[name] = Annotated[kind, make(*declared.flags, **declared.settings)]
        parameters.append(parameter.replace(annotation=hints[name]))
    call.__annotations__ = hints
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call
