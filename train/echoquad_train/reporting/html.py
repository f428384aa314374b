"""Pages: self-contained HTML of plain parts. Every text is escaped here: whatever a class or a file is called is shown.

Nothing is loaded from anywhere and there is no script: a page opens without a network, on any machine, years from now.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final

__all__ = ["figure", "figures", "items", "page", "paragraph", "section", "table"]

MANY: Final = 9
"""Columns beyond which a table is printed small, so that no page cuts it off."""

_STYLE: Final = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; color: #1b1f24; background: #fff;
  max-width: 62rem; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #d0d7de; padding-bottom: .25rem; }
p, li { max-width: 48rem; overflow-wrap: anywhere; }
.strong { font-weight: 600; border-left: .35rem solid #d55e00; padding: .4rem .8rem; background: #fdf3ec; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0 1rem; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid #d8dee4; text-align: right; vertical-align: top; }
td:first-child { min-width: 9rem; max-width: 26rem; overflow-wrap: anywhere; }
table.words td { overflow-wrap: anywhere; }
th:first-child, td:first-child { text-align: left; }
table.words th, table.words td { text-align: left; }
th { border-bottom: 2px solid #57606a; font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1.4rem; }
figure { margin: 0; max-width: 36rem; break-inside: avoid; page-break-inside: avoid; }
figure img { width: 100%; height: auto; display: block; border: 1px solid #d8dee4; background: #fff; }
figcaption { font-size: .88rem; color: #3d444d; margin-top: .35rem; overflow-wrap: anywhere; }
@media (max-width: 34rem) { .figures { grid-template-columns: 1fr; } }
@page { size: A4; margin: 16mm 14mm; }
@media print {
  body { font-size: 9.5pt; line-height: 1.35; max-width: none; margin: 0; padding: 0; }
  h2 { margin-top: 1.3rem; break-after: avoid; page-break-after: avoid; }
  h2 + p { break-after: avoid; page-break-after: avoid; }
  tr { break-inside: avoid; page-break-inside: avoid; }
  thead { display: table-header-group; }
  .wide { overflow: visible; }
  table { font-size: 9pt; max-width: 100%; }
  th, td { padding: .18rem .4rem; }
  table.many { font-size: 7pt; table-layout: fixed; width: 100%; }
  table.many th, table.many td { overflow-wrap: anywhere; min-width: 0; padding: .1rem .2rem; }
  .figures { display: block; }
  .figures figure { display: inline-block; width: 48%; margin: 0 1% 5mm 0; vertical-align: top; }
  .figures img { width: auto; max-width: 100%; max-height: 104mm; margin: 0 auto; }
  .strong { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""


def page(title: str, parts: Sequence[str]) -> str:
    """Give a whole page of parts that are HTML already."""
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Whatever a part may hold, a browser loads nothing for it.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
    )
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts])
    return f"{head}<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"


def section(title: str, parts: Sequence[str]) -> str:
    """Give a section of parts that are HTML already."""
    return "\n".join(["<section>", f"<h2>{escape(title)}</h2>", *parts, "</section>"])


def paragraph(text: str, *, strong: bool = False) -> str:
    """Give a paragraph of plain text; one that nobody must miss where `strong`."""
    return f'<p class="strong">{escape(text)}</p>' if strong else f"<p>{escape(text)}</p>"


def items(lines: Sequence[str]) -> str:
    """Give a list of plain texts."""
    return "<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in lines) + "\n</ul>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False) -> str:
    """Give a table of plain texts: the first column to the left, the others to the right, or all left where `words`."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    kind = ' class="words"' if words else ' class="many"' if len(header) > MANY else ""
    body = "\n".join(lines)
    return f'<div class="wide"><table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def figure(path: Path, title: str, caption: str) -> str:
    """Give a PNG file as a figure that holds its bytes.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    words = f"<strong>{escape(title)}.</strong> {escape(caption)}" if caption else f"<strong>{escape(title)}</strong>"
    return (
        f'<figure><img alt="{escape(f"{title}. {caption}")}" src="data:image/png;base64,{data}">'
        f"<figcaption>{words}</figcaption></figure>"
    )


def figures(parts: Sequence[str]) -> str:
    """Give figures side by side, as many as there is room for."""
    return '<div class="figures">\n' + "\n".join(parts) + "\n</div>"
