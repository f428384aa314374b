"""A writer of DICOM files that writes any header, also one that no library would."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

UNDEFINED = 0xFFFFFFFF
_LONG_VRS = ("OB", "OW", "SQ", "UN")

_DEFAULTS = {
    0x00080016: ("UI", b"1.2.840.10008.5.1.4.1.1.6.1\0"),
    0x00280002: ("US", 1),
    0x00280004: ("CS", b"MONOCHROME2 "),
    0x00280010: ("US", 6),
    0x00280011: ("US", 8),
    0x00280100: ("US", 8),
    0x00280101: ("US", 8),
    0x00280102: ("US", 7),
    0x00280103: ("US", 0),
}


def element(tag: int, vr: str, value: int | bytes, length: int | None = None) -> bytes:
    """Return an element in explicit VR, little-endian; an empty VR makes it implicit."""
    data = struct.pack("<H", value) if isinstance(value, int) else value
    length = len(data) if length is None else length
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    if not vr:
        return head + struct.pack("<I", length) + data
    if vr in _LONG_VRS:
        return head + vr.encode() + struct.pack("<HI", 0, length) + data
    return head + vr.encode() + struct.pack("<H", length) + data


def item(data: bytes, length: int | None = None) -> bytes:
    """Return a sequence item or a fragment."""
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(data) if length is None else length) + data


ITEM_END = struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
SEQUENCE_END = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


def write(
    pixels: bytes | list[bytes],
    values: dict[int, tuple[str, int | bytes] | None] | None = None,
    *,
    syntax: str = "1.2.840.10008.1.2.1",
    raw: bytes = b"",
    preamble: bool = True,
    length: int | None = None,
) -> bytes:
    """Return a DICOM file, by default of 6 x 8 8-bit grey pixels.

    Parameters
    ----------
    pixels
        Uncompressed pixels, or fragments to encapsulate after an empty offset table.
    values
        VR and value of elements to add or replace, by tag; None omits one.
    raw
        Bytes after the elements before group 28.
    preamble
        Whether to write the preamble and group 2.
    length
        Length field of the pixels, if it is not theirs.
    """
    every = {**_DEFAULTS, **(values or {})}
    implicit = syntax == "1.2.840.10008.1.2"
    parts = []
    for tag, pair in sorted(every.items()):
        if tag >> 16 == 0x28 and raw:
            parts.append(raw)
            raw = b""
        if pair is not None:
            parts.append(element(tag, "" if implicit else pair[0], pair[1]))
    if isinstance(pixels, list):
        body = b"".join(item(part) for part in [b"", *pixels]) + SEQUENCE_END
        parts.append(element(0x7FE00010, "OB", body, UNDEFINED))
    else:
        parts.append(element(0x7FE00010, "" if implicit else "OW", pixels, length))
    uid = syntax.encode() + b"\0" * (len(syntax) % 2)
    meta = bytes(128) + b"DICM" + element(0x00020010, "UI", uid)
    return (meta if preamble else b"") + b"".join(parts)


@pytest.fixture(scope="session")
def write_dicom() -> Callable[..., bytes]:
    """Return the writer of DICOM files."""
    return write


@pytest.fixture(scope="session")
def parts() -> Any:
    """Return the writers of elements and items, and the delimiters."""

    class Parts:
        ITEM_END, SEQUENCE_END, UNDEFINED = ITEM_END, SEQUENCE_END, UNDEFINED
        element, item = staticmethod(element), staticmethod(item)

    return Parts
