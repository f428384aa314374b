"""The texts that the program's own source holds: an allow list for logs and diagnostics.

A text of a log or of a diagnostic may quote anything. What is a text of the source, or matches the template of a log
call in it, was written by a programmer and holds no value of a patient.
"""

from __future__ import annotations

import ast
import builtins
import errno
import math
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib import util
from pathlib import Path
from typing import Final

__all__ = ["WITHHELD", "ProgramTexts", "finite_number", "program_texts"]

WITHHELD: Final = "[withheld]"

_PACKAGES: Final = ("echoquad", "echoquad_runtime", "echoquad_serve")
_LOG_METHODS: Final = ("debug", "info", "warning", "error", "critical", "exception", "log")
_DIRECTIVE: Final = re.compile(r"%(?:\(\w+\))?[#0\- +]*\d*(?:\.\d+)?[sdrfgeixX]")
_NUMBER: Final = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?|nan|inf|None|True|False")
_WORD: Final = re.compile(
    r"[<>=~]*\d+(\.\d+)*(\+[a-z0-9]{1,8}|[A-Za-z%]{0,3})"  # a number with its unit, or a version
    r"|lib[\w+-]+\.so[.\d]*|E_[A-Z_]+|[A-Za-z]+ExecutionProvider"
)
_PUNCTUATION: Final = "()[]{}<>.,;:'\"`!?="
_SYSTEM_TEXTS: Final = frozenset(os.strerror(number) for number in errno.errorcode)


class ProgramTexts:
    """The strings, log templates and module names of some packages, as their source files have them.

    Without source files there are none, and everything is withheld.

    Parameters
    ----------
    folders
        The packages' folders.

    Attributes
    ----------
    constants
        All strings but docstrings.
    modules
        Full names of the modules.
    exceptions
        Names of classes whose name ends as an exception's, of the packages and of Python.
    """

    def __init__(self, folders: tuple[Path, ...]) -> None:
        constants: set[str] = set()
        templates: set[str] = set()
        modules: set[str] = set()
        exceptions = {name for name in dir(builtins) if name.endswith(("Error", "Exception", "Warning", "Exit"))}
        for folder in folders:
            for path in sorted(folder.rglob("*.py")):
                parts = path.relative_to(folder.parent).with_suffix("").parts
                modules.add(".".join(part for part in parts if part != "__init__"))
                tree = ast.parse(path.read_bytes())
                constants.update(_strings(tree))
                templates.update(_log_templates(tree))
                exceptions.update(
                    node.name
                    for node in ast.walk(tree)
                    if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
                )
        self.constants = frozenset(constants)
        self.modules = frozenset(modules)
        self.exceptions = frozenset(exceptions)
        self._stems = {name.rpartition(".")[2] for name in modules} | set(sys.stdlib_module_names) | {"__init__"}
        self._words = {word.strip(_PUNCTUATION) for text in constants for word in text.split()}
        self._templates = [(text, _template_pattern(text)) for text in sorted(templates)]

    def message(self, text: object) -> str:
        """Return a log message, if it is that of a log call of the program, else `WITHHELD`.

        What was filled into it passes if it is a number, a text of the system, the code or the class of an error.
        Otherwise the message is the template.
        """
        if not isinstance(text, str):
            return WITHHELD
        for template, pattern in self._templates:
            if (found := pattern.fullmatch(text)) is not None:
                return text if all(map(self._is_safe, found.groups())) else template
        return WITHHELD

    def constant(self, text: object) -> str:
        """Return a text that stands in the source, else `WITHHELD`."""
        return text if isinstance(text, str) and text in self.constants else WITHHELD

    def location(self, text: object) -> str:
        """Return places in the source as the log writes them, ``module:line < module:line``, else `WITHHELD`."""
        if not isinstance(text, str):
            return WITHHELD
        places = [place.rpartition(":") for place in text.split(" < ")]
        known = all(stem in self._stems and re.fullmatch(r"\d{1,6}", line) for stem, _, line in places)
        return text if known else WITHHELD

    def words(self, text: str) -> str:
        """Return a text of a diagnostic: words of the source and numbers; ``[...]`` stands for all others."""
        kept: list[str] = []
        for word in text.split():
            bare = word.strip(_PUNCTUATION)
            known = bare in self._words or _WORD.fullmatch(bare) or not bare
            if known or kept[-1:] != ["[...]"]:
                kept.append(word if known else "[...]")
        return " ".join(kept)

    def _is_safe(self, value: str) -> bool:
        known = value in self.exceptions or value in _SYSTEM_TEXTS or value in (WITHHELD, "")
        return known or value in self.constants or _NUMBER.fullmatch(value) is not None


@cache
def program_texts() -> ProgramTexts:
    """Return the texts of the installed EchoQuad."""
    folders = []
    for name in _PACKAGES:
        spec = util.find_spec(name)
        folders += [Path(place) for place in (spec.submodule_search_locations or ()) if spec] if spec else []
    return ProgramTexts(tuple(folders))


def finite_number(value: object) -> object:
    """Return a number or a truth value as it is, one that JSON cannot represent as text, else `WITHHELD`."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float) else WITHHELD


def _strings(tree: ast.Module) -> Iterator[str]:
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def _log_templates(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _LOG_METHODS:
            for argument in node.args[:2]:  # the level comes first in log()
                for found in ast.walk(argument):  # a call may choose between two texts
                    if isinstance(found, ast.Constant) and isinstance(found.value, str) and " " in found.value:
                        yield found.value


def _template_pattern(template: str) -> re.Pattern[str]:
    parts = [re.escape(part.replace("%%", "%")) for part in _DIRECTIVE.split(template)]
    return re.compile("(.*?)".join(parts))
