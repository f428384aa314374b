"""The section of the model card that shows the code table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from echoquad_runtime.bundle.code_table import CodeTable
from echoquad_runtime.bundle.document import Block, Paragraph, Section, Table
from echoquad_runtime.bundle.manifest import CODES
from echoquad_runtime.errors import ConfigError

__all__ = ["code_section"]

_TITLE: Final = "Codes of structured reports"


def code_section(manifest: Mapping[str, Any]) -> tuple[Section, ...]:
    """Return the section of the code table; empty if the bundle has none.

    Parameters
    ----------
    manifest
        The content of ``bundle.json``; any value may be missing or have an unexpected type.
    """
    content, contract = manifest.get(CODES), manifest.get("contract")
    if content is None:
        return ()
    names = contract.get("classes") if isinstance(contract, Mapping) else None
    classes = [str(name) for name in names] if isinstance(names, list | tuple) else []
    try:
        table = CodeTable.from_dict(content, classes, CODES)
    except ConfigError:
        return (Section(_TITLE, (Paragraph("The code table is malformed; no structured report is made.", True),)),)
    rows = [(name, str(codes.finding), str(codes.site or "none")) for name, codes in table.classes.items()]
    if table.absent:
        rows.append((table.absent, "none of these findings is present", "none"))
    rows += [(name, "no codes: it makes no structured report", "none") for name in table.uncoded(classes)]
    blocks: list[Block] = [
        Table(("class", "finding", "site"), tuple((_printable(name), *cells) for name, *cells in rows)),
        Paragraph(f"The procedure is {table.procedure}, the language {table.language}."),
    ]
    return (Section(_TITLE, tuple(blocks)),)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)
