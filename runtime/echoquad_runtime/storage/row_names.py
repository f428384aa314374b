"""Names of frames: as rows carry them, as a terminal shows them, and the order and the hash that follow from them.

A name is whatever bytes the disk has. A row's is text, and no formula to the spreadsheet that opens it.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

__all__ = ["digest", "display_name", "encoded", "printed", "walk_order", "without_formula"]

DIGEST_BYTES: Final = 16

_FORMULA: Final = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
"""What a spreadsheet runs, or may once it has trimmed it; the last four are the full-width forms of the first."""
_FRAME_NUMBER: Final = re.compile(r"#([1-9][0-9]{0,5})\Z")
_LONE: Final = re.compile(r"\\u(d[89a-f][0-9a-f]{2})")


def printed(name: str) -> str:
    """Give a name as rows carry it: ``./=1+1.png`` is the same path as ``=1+1.png``, and no formula."""
    return f"./{name}" if _FORMULA.match(name) else name


def without_formula(text: str) -> str:
    """Give any other text fit for a spreadsheet's cell: an apostrophe before what would be a formula."""
    return f"'{text}" if _FORMULA.match(text) else text


def encoded(text: str) -> bytes:
    r"""Encode text of rows: UTF-8, with each byte of a name that is none written as ``\udcXX``."""
    return text.encode("utf-8", "backslashreplace")


def digest(row_name: str) -> bytes:
    """Give 16 bytes that stand for a name as rows carry it, the same on every machine and in every format."""
    return hashlib.blake2b(encoded(row_name), digest_size=DIGEST_BYTES).digest()


def walk_order(row_name: str) -> str:
    """Give a key that sorts names, as rows carry them, into the order in which a folder is walked.

    The walk compares names one folder at a time, so that ``a/1.png`` comes before ``a-b/1.png``, and gives the frames
    of a file of several in their order, ``a.dcm#2`` before ``a.dcm#10``.
    """
    name = row_name.removeprefix("./")
    name = _LONE.sub(lambda found: chr(int(found[1], 16)), name)
    name = _FRAME_NUMBER.sub(lambda found: f"/{int(found[1]):06}", name)  # as if a file of several were a folder
    return name.replace("/", "\0")


def display_name(text: str) -> str:
    """Give text on one line of a terminal, with what cannot or must not be printed as an escape."""
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape", "surrogatepass").decode("ascii") for sign in text
    )
