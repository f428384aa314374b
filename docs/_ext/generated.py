"""Write the command reference from the commands themselves.

A page that holds the line ``<!-- generated: commands -->`` gets the reference in its place, so that it cannot
disagree with ``echoquad --help``.
"""

from __future__ import annotations

import html
import inspect
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

MARK = "<!-- generated: commands -->"


def commands() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Yield each command: its words after ``echoquad``, its function, and an example of its use."""
    from echoquad.cli.framework.main import COMMANDS, load_command

    for name, example in COMMANDS.items():
        yield name, load_command(name), example


def commands_markdown() -> str:
    """Return the command reference as MyST Markdown, one section a command."""
    found = list(commands())
    lines = ["| command | does |", "|---|---|"]
    for name, function, _ in found:
        summary = _text(re.split(r"\n\s*\n", inspect.getdoc(function) or "")[0])
        lines.append(f"| [`echoquad {name}`](#echoquad-{name.replace(' ', '-')}) | {summary} |")
    return "\n".join([*lines, "", *(line for command in found for line in _section(*command))])


def _section(name: str, function: Callable[..., Any], example: str) -> Iterator[str]:
    parameters = _parameters(function)
    arguments = [item for item in parameters if not item.flags]
    yield from (f"## echoquad {name}", "")
    for paragraph in re.split(r"\n\s*\n", inspect.getdoc(function) or ""):
        yield from (_text(paragraph), "")
    yield from ("```text", " ".join(["echoquad", name, "[OPTIONS]", *(item.usage for item in arguments)]), "```", "")
    if arguments:
        yield from ("| argument | meaning |", "|---|---|")
        for item in arguments:
            yield f"| {_code(item.usage)} | {_text(item.help)}{item.remarks} |"
        yield ""
    yield from ("| option | meaning |", "|---|---|")
    for item in parameters:
        if item.flags:
            flags = ", ".join(f"`{flag}`" for flag in item.flags)
            value = "" if item.kind is bool else f" {_code(item.metavar)}"
            yield f"| {flags}{value} | {_text(item.help)}{item.remarks} |"
    yield from ("", "Example:", "", "```console", f"$ echoquad {example}", "```", "")


@dataclass(frozen=True)
class Parameter:
    """An argument or an option of a command; `flags` is empty for an argument."""

    name: str
    flags: tuple[str, ...]
    kind: Any
    many: bool
    default: Any
    settings: Any

    @property
    def help(self) -> str:
        """The help text."""
        return self.settings.help or ""

    @property
    def metavar(self) -> str:
        """The placeholder of the value, or its choices."""
        if get_origin(self.kind) is Literal:
            return "|".join(map(str, get_args(self.kind)))
        return str(self.settings.metavar or self.name.upper())

    @property
    def usage(self) -> str:
        """The argument as a usage line shows it."""
        text = self.metavar + "..." * self.many
        return text if self.default is inspect.Parameter.empty else f"[{text}]"

    @property
    def remarks(self) -> str:
        """Whether it is required, its bounds and its default, in italics."""
        empty = inspect.Parameter.empty
        remarks = ["required"] if self.default is empty and self.flags else []
        low, high = self.settings.min, self.settings.max
        if low is not None:
            remarks.append(f"at least {low:g}" if high is None else f"{low:g} to {high:g}")
        if self.settings.show_default is not False and not (self.default is empty or self.default in (None, False, "")):
            remarks.append(f"default: `{self.default}`")
        if self.many and self.flags and "repeated" not in self.help:
            remarks.append("may be repeated")
        return f" *({'; '.join(remarks)})*" if remarks else ""


def _parameters(function: Callable[..., Any]) -> list[Parameter]:
    found = []
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        kind, settings = get_args(parameter.annotation)[:2]
        if get_origin(kind) in (Union, types.UnionType):
            kind = next(part for part in get_args(kind) if part is not types.NoneType)
        many = get_origin(kind) in (list, tuple)
        kind = get_args(kind)[0] if many else kind
        # Within Annotated, Typer's first positional parameter, `default`, holds the first flag.
        declared = (settings.default, *(settings.param_decls or ()))
        flags = tuple(flag for flag in declared if str(flag).startswith("-"))
        found.append(Parameter(name, flags, kind, many, parameter.default, settings))
    return found


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def _text(text: str | None) -> str:
    """Return help text as Markdown: on one line, with options and `code` set as code and the rest taken literally."""
    parts = re.split(r"(`+[^`]+`+)", " ".join((text or "").split()))
    return "".join(part.replace("|", "\\|") if part.startswith("`") else _plain(part) for part in parts)


def _plain(text: str) -> str:
    text = html.escape(text, quote=False).replace("|", "\\|")
    text = re.sub(r"([*_\[\]])", r"\\\1", text)
    return re.sub(r"(?<![\w-])(--[a-z][a-z0-9-]*)", r"`\1`", text)


def _insert(_: Any, __: str, content: list[str]) -> None:
    if MARK in content[0]:
        content[0] = content[0].replace(MARK, commands_markdown())


def _escape_bars(_: Any, __: str, ___: str, ____: Any, _____: Any, lines: list[str]) -> None:
    """Escape ``|x|`` in docstrings, which reStructuredText takes for a substitution."""
    lines[:] = [line.replace("|", "\\|") for line in lines]


def setup(app: Any) -> dict[str, bool]:
    """Connect the generator to the reading of pages and docstrings."""
    app.connect("source-read", _insert)
    app.connect("autodoc-process-docstring", _escape_bars)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
