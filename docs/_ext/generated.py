"""Write the command reference from the commands themselves.

A page that holds the line ``<!-- generated: commands -->`` gets the reference in its place, so that it cannot
disagree with ``echoquad --help``.
"""

from __future__ import annotations

import html
import inspect
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Union, get_args, get_origin

MARK = "<!-- generated: commands -->"


def command_line() -> Any:
    """Return the click group of ``echoquad`` with all commands loaded."""
    from echoquad.cli import full
    from echoquad.cli.app import COMMANDS

    return full._built(frozenset({*COMMANDS, *full.GROUPS}), tuple(COMMANDS.items()))


def walk(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each command that runs something, with its words after ``echoquad``."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from walk(command, (*path, name))
        else:
            yield (*path, name), command


def commands_markdown() -> str:
    """Return the command reference as MyST Markdown, one section a command."""
    return "\n".join(line for path, command in walk(command_line()) for line in _section(path, command))


def _section(path: tuple[str, ...], command: Any) -> Iterator[str]:
    name = " ".join(("echoquad", *path))
    parameters = _parameters(command)
    arguments = [item for item in parameters if not item.flags]
    yield from (f"## {name}", "")
    for paragraph in re.split(r"\n\s*\n", command.help or ""):
        yield from (_text(paragraph), "")
    yield from ("```text", " ".join([name, "[OPTIONS]", *(item.usage for item in arguments)]), "```", "")
    if arguments:
        yield from ("| argument | meaning |", "|---|---|")
        for item in arguments:
            yield f"| `{item.usage}` | {_text(item.help)}{item.remarks} |"
        yield ""
    yield from ("| option | meaning |", "|---|---|")
    for item in parameters:
        if item.flags:
            flags = ", ".join(f"`{flag}`" for flag in item.flags)
            value = "" if item.kind is bool else f" `{item.metavar}`"
            yield f"| {flags}{value} | {_text(item.help)}{item.remarks} |"
    yield ""
    if example := re.match(r"Example: (.*)", command.epilog or ""):
        yield from ("Example:", "", "```console", f"$ {example[1]}", "```", "")


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
        """What stands for the value."""
        if isinstance(self.kind, type) and issubclass(self.kind, Enum):
            return "|".join(str(choice.value) for choice in self.kind)
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
        default = getattr(self.default, "value", self.default)
        if self.settings.show_default is not False and default not in (empty, None, False, "", []):
            remarks.append(f"default: `{default}`")
        if self.many and self.flags:
            remarks.append("may be repeated")
        return f" *({'; '.join(remarks)})*" if remarks else ""


def _parameters(command: Any) -> list[Parameter]:
    found = []
    for name, parameter in inspect.signature(command.callback, eval_str=True).parameters.items():
        if len(annotated := get_args(parameter.annotation)) != 2:
            continue  # typer.Context
        kind, settings = annotated
        if hasattr(settings, "settings"):  # TEMP
            d = dict.fromkeys(("help", "metavar", "min", "max", "show_default")) | settings.settings
            settings = types.SimpleNamespace(default=None, param_decls=settings.flags, **d)
        if get_origin(kind) in (Union, types.UnionType):
            kind = next(part for part in get_args(kind) if part is not types.NoneType)
        many = get_origin(kind) in (list, tuple)
        kind = get_args(kind)[0] if many else kind
        # Within Annotated, Typer's first positional parameter, `default`, holds the first flag.
        flags = tuple(
            flag for flag in (settings.default, *(settings.param_decls or ())) if str(flag).startswith("-")
        )
        found.append(Parameter(name, flags, kind, many, parameter.default, settings))
    return found


def _text(text: str | None) -> str:
    """Return help text as Markdown: on one line, with options and `code` set as code and the rest taken literally."""
    parts = re.split(r"(`[^`]+`)", " ".join((text or "").split()))
    return "".join(part if part.startswith("`") else _plain(part) for part in parts)


def _plain(text: str) -> str:
    text = html.escape(text, quote=False).replace("|", "\\|")
    text = re.sub(r"([*_\[\]])", r"\\\1", text)
    return re.sub(r"(?<![\w-])(--[a-z][a-z0-9-]*)", r"`\1`", text)


def setup(app: Any) -> dict[str, bool]:
    """Connect the generator to the reading of each page."""

    def insert(_: Any, __: str, content: list[str]) -> None:
        if MARK in content[0]:
            content[0] = content[0].replace(MARK, commands_markdown())

    app.connect("source-read", insert)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
