"""``echoquad inspect``."""

from __future__ import annotations

import json
import shutil
import textwrap
from typing import TYPE_CHECKING, Annotated, Final

import typer

from echoquad.cli.framework.console import print_result
from echoquad.cli.framework.options import BundleFolder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from echoquad_runtime.bundle.document import Block, Document, Table

__all__ = ["inspect"]

MAX_WIDTH: Final = 120  # characters; longer lines are hard to read
MIN_WIDTH: Final = 40


def inspect(
    bundle: BundleFolder,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the manifest and the state of each file as JSON.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print only the model card, as Markdown.")] = False,
) -> None:
    """Show a bundle: intended use, contract, training, figures, parity, limits. Needs no torch.

    Every file is hashed. A missing or altered file is named, and the exit code is 3.
    """
    from echoquad_runtime.errors import UsageError, VerificationError
    from echoquad_runtime.verify.inspection import inspect_bundle

    if as_json and markdown:
        raise UsageError("--json with --markdown: they exclude each other; leave one out")
    found = inspect_bundle(bundle)
    if as_json:
        print_result(json.dumps(found.to_dict(), indent=2))
    elif markdown:
        print_result(found.card.markdown().rstrip("\n"))
    else:
        print_result("\n\n".join(_lay_out(found.document)))
    if found.faults:
        raise VerificationError(f"the bundle is damaged: {'; '.join(found.faults)}")


def _lay_out(document: Document) -> Iterator[str]:
    """Yield the parts of a document as plain text, wrapped to the width of the terminal."""
    width = min(max(shutil.get_terminal_size((MAX_WIDTH, 24)).columns, MIN_WIDTH), MAX_WIDTH)
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
        return "\n".join(_wrap(line, width, "- ", "  ") for line in block.lines)
    return _columns(block, width)


def _columns(table: Table, width: int) -> str:
    """Lay out a table in columns, or with one line for each cell if the terminal is too narrow."""
    widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
    if sum(widths) + 2 * (len(widths) - 1) > width:
        rows = ([f"{name}: {cell}" for name, cell in zip(table.header, row, strict=True)] for row in table.rows)
        return "\n\n".join("\n".join(_wrap(line, width, "", "    ") for line in lines) for lines in rows)
    lines = [table.header, tuple("-" * size for size in widths), *table.rows]
    return "\n".join(
        "  ".join(cell.ljust(size) for cell, size in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _wrap(text: str, width: int, first: str = "", later: str = "") -> str:
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )
