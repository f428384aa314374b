"""Documents of headings, paragraphs, tables and lists, to show the same content as Markdown and on a terminal."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Final

__all__ = ["Block", "BulletList", "Document", "Paragraph", "Section", "Table"]

_WIDTH: Final = 100  # characters of a line of Markdown
_ESCAPED_BAR: Final = "\\|"  # in a cell of a Markdown table


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph; `strong` for text that nobody may overlook."""

    text: str
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table; every row is as long as the header."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class BulletList:
    """A bullet list."""

    lines: tuple[str, ...]


Block = Paragraph | Table | BulletList


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """A title and sections."""

    title: str
    sections: tuple[Section, ...]

    def markdown(self) -> str:
        """Return the document as Markdown."""
        parts = [f"# {self.title}"]
        for section in self.sections:
            parts += [f"## {section.title}", *map(_markdown, section.blocks)]
        return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Paragraph):
        return f"**{block.text}**" if block.strong else _wrap(block.text)  # strong text stays searchable in one line
    if isinstance(block, BulletList):
        return "\n".join(_wrap(line, "- ") for line in block.lines)
    head, *rows = (
        f"| {' | '.join(cell.replace('|', _ESCAPED_BAR) for cell in cells)} |" for cells in (block.header, *block.rows)
    )
    return "\n".join([head, f"|{'---|' * len(block.header)}", *rows])


def _wrap(text: str, bullet: str = "") -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=bullet,
        subsequent_indent=" " * len(bullet),
        break_long_words=False,
        break_on_hyphens=False,
    )
