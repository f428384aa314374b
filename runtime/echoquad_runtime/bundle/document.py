"""Blocks: a document as headings, running text, tables and lists, so that Markdown and a terminal show the same."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Final

__all__ = ["Block", "Document", "Items", "Paragraph", "Section", "Table"]

WIDTH: Final = 100  # characters of a line of Markdown
BAR: Final = "\\|"  # within a cell of a Markdown table


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Running text; `strong` where it must not be overlooked."""

    text: str
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table; every row is as long as the header."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Items:
    """A list of sentences or facts."""

    lines: tuple[str, ...]


Block = Paragraph | Table | Items


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """A title and sections."""

    title: str
    sections: tuple[Section, ...]

    def markdown(self) -> str:
        """Write the document as Markdown."""
        parts = [f"# {self.title}"]
        for section in self.sections:
            parts += [f"## {section.title}", *map(_markdown, section.blocks)]
        return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Paragraph):
        return f"**{block.text}**" if block.strong else _wrap(block.text)  # a search finds it in one line
    if isinstance(block, Items):
        return "\n".join(_wrap(line, "- ") for line in block.lines)
    head, *rows = (
        f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |" for cells in (block.header, *block.rows)
    )
    return "\n".join([head, f"|{'---|' * len(block.header)}", *rows])


def _wrap(text: str, begin: str = "") -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=begin,
        subsequent_indent=" " * len(begin),
        break_long_words=False,
        break_on_hyphens=False,
    )
