"""``echoquad inspect``."""

from __future__ import annotations

import json
import shutil
import textwrap
from typing import TYPE_CHECKING, Annotated, Final

from echoquad.cli.console import say
from echoquad.cli.declare import Option
from echoquad.cli.options import BundleFolder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from echoquad_runtime.bundle.document import Block, Document, Table

__all__ = ["inspect"]

WIDEST: Final = 120  # characters of a line: beyond, nobody finds the beginning of the next
NARROWEST: Final = 40


def inspect(
    bundle: BundleFolder,
    as_json: Annotated[
        bool, Option("--json", help="The manifest and the state of each file, as JSON to stdout.")
    ] = False,
    markdown: Annotated[bool, Option("--markdown", help="The model card alone, as Markdown to stdout.")] = False,
) -> None:
    """Show what a bundle is: intended use, contract, training, figures, parity, limits. Needs no torch.

    Every file is hashed; one that is missing or changed is named, and the exit code is 3.
    """
    from echoquad_runtime.errors import UsageError, VerificationError
    from echoquad_runtime.verify.inspection import inspect_bundle

    if as_json and markdown:
        raise UsageError("--json and --markdown: expected one of the two; leave the other out")
    found = inspect_bundle(bundle)
    if as_json:
        say(json.dumps(found.to_dict(), indent=2))
    elif markdown:
        say(found.card.markdown().rstrip("\n"))
    else:
        say("\n\n".join(_lay_out(found.document)))
    if found.faults:
        raise VerificationError(f"not whole: {'; '.join(found.faults)}")


def _lay_out(document: Document) -> Iterator[str]:
    """Give a document's parts as plain text, as wide as the terminal."""
    width = min(max(shutil.get_terminal_size((WIDEST, 24)).columns, NARROWEST), WIDEST)
    yield f"{_wrap(document.title, width)}\n{'=' * min(len(document.title), width)}"
    for section in document.sections:
        head, *rest = (_block(block, width) for block in section.blocks)
        yield f"{section.title}\n{'-' * len(section.title)}\n{head}"
        yield from rest


def _block(block: Block, width: int) -> str:
    from echoquad_runtime.bundle.document import BulletList, Paragraph

    if isinstance(block, Paragraph):
        return _wrap(block.text, width)
    if isinstance(block, BulletList):
        return "\n".join(_wrap(line, width, "- ") for line in block.lines)
    return _columns(block, width)


def _columns(table: Table, width: int) -> str:
    """Lay out a table in columns, or a line a cell where the terminal is too narrow for them."""
    widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
    if sum(widths) + 2 * (len(widths) - 1) > width:
        rows = ([f"{name}: {cell}" for name, cell in zip(table.header, row, strict=True)] for row in table.rows)
        return "\n\n".join("\n".join(_wrap(line, width, "", "    ") for line in lines) for lines in rows)
    lines = [table.header, tuple("-" * size for size in widths), *table.rows]
    return "\n".join(
        "  ".join(cell.ljust(size) for cell, size in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _wrap(text: str, width: int, begin: str = "", indent: str | None = None) -> str:
    later = " " * len(begin) if indent is None else indent
    return textwrap.fill(
        text, width, initial_indent=begin, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )
