"""Names of frames in result rows: escaping for spreadsheets and terminals, sort order, and digests.

A file name is any bytes that the disk accepts. In a row it is text, and not a formula to the spreadsheet that opens it.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

__all__ = ["display_name", "encode_text", "escape_formula", "name_digest", "to_row_name", "walk_sort_key"]

DIGEST_BYTES: Final = 16

_FORMULA: Final = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
"""Beginnings that a spreadsheet runs, perhaps after trimming; the last four are full-width forms of the first."""
_FRAME_NUMBER: Final = re.compile(r"#([1-9][0-9]{0,5})\Z")
_ESCAPED_SURROGATE: Final = re.compile(r"\\u(d[89a-f][0-9a-f]{2})")


def to_row_name(name: str) -> str:
    """Return a name as rows state it: ``./=1+1.png`` is the same path as ``=1+1.png`` without being a formula."""
    return f"./{name}" if _FORMULA.match(name) else name


def escape_formula(text: str) -> str:
    """Return text other than a name for a spreadsheet's cell, with an apostrophe before a formula."""
    return f"'{text}" if _FORMULA.match(text) else text


def encode_text(text: str) -> bytes:
    r"""Encode text of rows as UTF-8; each byte of a name that is not UTF-8 becomes ``\udcXX``."""
    return text.encode("utf-8", "backslashreplace")


def name_digest(row_name: str) -> bytes:
    """Return a 16-byte name_digest of a name as rows state it, the same on every machine and in every format."""
    return hashlib.blake2b(encode_text(row_name), digest_size=DIGEST_BYTES).digest()


def walk_sort_key(row_name: str) -> str:
    """Return a sort key that puts names, as rows state them, into the order of a directory walk.

    The walk compares names folder by folder, so that ``a/1.png`` comes before ``a-b/1.png``, and yields the frames of a
    multi-frame file in their order, ``a.dcm#2`` before ``a.dcm#10``.
    """
    name = row_name.removeprefix("./")
    name = _ESCAPED_SURROGATE.sub(lambda match: chr(int(match[1], 16)), name)
    name = _FRAME_NUMBER.sub(lambda match: f"/{int(match[1]):06}", name)  # as if a multi-frame file were a folder
    return name.replace("/", "\0")


def display_name(text: str) -> str:
    """Return text as one line for a terminal, with escapes for characters that are not printable."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in text
    )
