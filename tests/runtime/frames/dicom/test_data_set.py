"""DICOM data sets: encodings, character sets, nested sequences, and bounds on all that a header announces."""

from __future__ import annotations

import io
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echoquad_runtime.errors import FrameDamagedError, FrameFormatError
from echoquad_runtime.frames.dicom.data_set import DataSetWalker, detect_encoding
from echoquad_runtime.frames.discovery import find_frames
from echoquad_runtime.frames.formats import detect_format, is_dicom
from echoquad_runtime.frames.frame_file import FrameFile
from echoquad_runtime.frames.reader import decode_grey

Write = Callable[..., bytes]

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
PIXELS = RAMP.tobytes()
IMPLICIT = "1.2.840.10008.1.2"
CHARACTER_SET = 0x00080005


@pytest.mark.parametrize("syntax", [IMPLICIT, "1.2.840.10008.1.2.1"])
@pytest.mark.parametrize(
    "value", [None, ("CS", b""), ("UN", b""), ("UN", b"ISO_IR 100"), ("CS", b"no such set "), ("LO", b"x" * 4096)]
)
def test_character_set_does_not_matter(value: tuple[str, bytes] | None, syntax: str, write_dicom: Write) -> None:
    np.testing.assert_array_equal(decode_grey(write_dicom(PIXELS, {CHARACTER_SET: value}, syntax=syntax)), RAMP)


@pytest.mark.parametrize("syntax", [IMPLICIT, "1.2.840.10008.1.2.1"])
def test_without_preamble_first_element_shows_encoding(syntax: str, write_dicom: Write, tmp_path: Path) -> None:
    data = write_dicom(PIXELS, syntax=syntax, preamble=False)
    assert is_dicom(data[:132]) and detect_format(data[:132], "") == "dicom"
    np.testing.assert_array_equal(decode_grey(data), RAMP)
    (tmp_path / "IM0001").write_bytes(data)
    (found,) = find_frames([tmp_path])
    assert isinstance(found, FrameFile)


def test_without_transfer_syntax_first_element_shows_encoding(write_dicom: Write) -> None:
    for syntax in (IMPLICIT, "1.2.840.10008.1.2.1"):
        np.testing.assert_array_equal(
            decode_grey(bytes(128) + b"DICM" + write_dicom(PIXELS, syntax=syntax, preamble=False)), RAMP
        )


@pytest.mark.parametrize(
    "head",
    [
        *(b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\0\x10JFIF", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"BM"),
        *(b"\0\0\0\x18ftypisom", b"\0\x08\0\x10moov", b"RIFF\0\0\0\0AVI ", b"\x93NUMPY", b"\x1aE\xdf\xa3", b"8 0 1"),
        *(b"", b"\x08\0", bytes(132), b"\x08\0\0\0\0\0\0\0", b"\x02\0\0\0xx\0\0"),
    ],
)
def test_other_formats_are_not_taken_for_dicom_without_preamble(head: bytes) -> None:
    assert not is_dicom(head.ljust(132, b"\0") if head else head)


@pytest.mark.parametrize("wrong", [True, False])
def test_explicit_data_set_in_implicit_transfer_syntax_is_read(wrong: bool, write_dicom: Write) -> None:
    data = write_dicom(PIXELS, syntax=IMPLICIT if wrong else "1.2.840.10008.1.2.1", preamble=False)
    other = write_dicom(PIXELS, syntax="1.2.840.10008.1.2.1" if wrong else IMPLICIT)
    head = other[: other.index(b"\x08\0\x16\0")]
    np.testing.assert_array_equal(decode_grey(head + data), RAMP)


def nested(parts: Any, depth: int) -> bytes:
    inner = parts.element(0x00091001, "LO", b"x ")
    for _ in range(depth):
        inner = parts.element(0x00091000, "SQ", parts.item(inner, parts.UNDEFINED) + parts.ITEM_END, parts.UNDEFINED)
        inner += parts.SEQUENCE_END
    return inner


@pytest.mark.parametrize("kind", ["empty", "sized items", "nested", "UN", "fragments"])
def test_sequences_of_undefined_length_are_skipped(kind: str, write_dicom: Write, parts: Any) -> None:
    implicit = parts.element(0x00280010, "", b"\xff\xff")
    raw = {
        "empty": parts.element(0x00091000, "SQ", parts.SEQUENCE_END, parts.UNDEFINED),
        "sized items": parts.element(
            0x00091000, "SQ", parts.item(b"\xfe\xff\xdd\xe0 anything") * 3 + parts.SEQUENCE_END, parts.UNDEFINED
        ),
        "nested": nested(parts, 40),
        "UN": parts.element(
            0x00091000,
            "UN",
            parts.item(implicit, parts.UNDEFINED) + parts.ITEM_END + parts.SEQUENCE_END,
            parts.UNDEFINED,
        ),
        "fragments": parts.element(0x00091000, "OB", parts.item(PIXELS) + parts.SEQUENCE_END, parts.UNDEFINED),
    }[kind]
    np.testing.assert_array_equal(decode_grey(write_dicom(PIXELS, raw=raw)), RAMP)


def regions(parts: Any, kind: str) -> bytes:
    vr = "" if kind == "UN" else "US"
    long = "" if kind == "UN" else "UL"
    box = zip((0x00186018, 0x0018601A, 0x0018601C, 0x0018601E), (1, 2, 6, 5), strict=True)
    body = parts.element(0x00186012, vr, 1) + parts.element(0x00186014, vr, 1)
    body += b"".join(parts.element(tag, long, struct.pack("<I", value)) for tag, value in box)
    if kind == "sized":
        return parts.element(0x00186011, "SQ", parts.item(body))
    body = parts.item(body + nested(parts, 2) * (kind != "UN"), parts.UNDEFINED) + parts.ITEM_END
    return parts.element(0x00186011, "UN" if kind == "UN" else "SQ", body + parts.SEQUENCE_END, parts.UNDEFINED)


@pytest.mark.parametrize("kind", ["sized", "undefined", "UN"])
def test_regions_are_read_from_sequences_of_every_form(kind: str, write_dicom: Write, parts: Any) -> None:
    np.testing.assert_array_equal(decode_grey(write_dicom(PIXELS, raw=regions(parts, kind))), RAMP[2:6, 1:7])


def hostile(parts: Any, kind: str) -> bytes:
    def sequence(tag: int, body: bytes) -> bytes:
        return parts.element(tag, "SQ", body + parts.SEQUENCE_END, parts.UNDEFINED)

    opened = parts.item(parts.element(0x00091000, "SQ", b"", parts.UNDEFINED), parts.UNDEFINED)
    return {
        "items": lambda: sequence(0x00091000, parts.item(b"") * 4_000_000),
        "items of a sequence that is read": lambda: sequence(0x00186011, parts.item(b"") * 4_000_000),
        "elements": lambda: parts.element(0x00091000, "LO", b"") * 2_000_000,
        "elements of an item": lambda: sequence(
            0x00091000, parts.item(parts.element(0x00091000, "LO", b"") * 2_000_000, parts.UNDEFINED)
        ),
        "depth": lambda: sequence(0x00091000, opened * 200_000),
        "a long value": lambda: parts.element(0x00281101, "UN", b"", 1 << 30),
        "no item": lambda: sequence(0x00091000, b"anything else"),
        "an endless sequence": lambda: parts.element(0x00091000, "SQ", parts.item(b""), parts.UNDEFINED),
    }[kind]()


@pytest.mark.parametrize(
    "kind",
    [
        *("items", "items of a sequence that is read", "elements", "elements of an item", "depth", "a long value"),
        *("no item", "an endless sequence"),
    ],
)
def test_hostile_header_is_refused_soon(kind: str, write_dicom: Write, parts: Any) -> None:
    data = write_dicom(PIXELS, raw=hostile(parts, kind))
    began = time.process_time()
    with pytest.raises(FrameDamagedError):
        decode_grey(data)
    assert time.process_time() - began < 10  # half a second; 4 million items took 98 s


@pytest.mark.parametrize("removed", [1, 13, 27, 55])
def test_header_that_ends_within_an_element_is_truncated(removed: int, write_dicom: Write) -> None:
    data = write_dicom(b"")
    with pytest.raises(FrameDamagedError, match="truncated"):
        decode_grey(data[: len(data) - 12 - removed])


@pytest.mark.parametrize(
    "sop_class",
    [
        *(b"1.2.840.10008.5.1.4.1.1.88.11\0", b"1.2.840.10008.5.1.4.1.1.104.1\0", b"1.2.840.10008.5.1.4.1.1.9.1.1\0"),
        b"1.2.840.10008.1.3.10",
    ],
)
def test_sound_file_without_pixels_is_not_called_damaged(sop_class: bytes, write_dicom: Write) -> None:
    data = write_dicom(b"", {0x00080016: ("UI", sop_class)})
    with pytest.raises(FrameFormatError, match="not supported"):
        decode_grey(data[:-12])


def test_float_pixels_are_not_supported(write_dicom: Write, parts: Any) -> None:
    data = write_dicom(b"")[:-12] + parts.element(0x7FE00008, "OB", bytes(192))
    with pytest.raises(FrameFormatError, match="not supported"):
        decode_grey(data)


def test_walker_yields_headers_without_reading_values(write_dicom: Write) -> None:
    data = write_dicom(PIXELS, preamble=False)
    stream = io.BytesIO(data)
    assert detect_encoding(stream, 0) == (False, False)
    headers = list(DataSetWalker(stream, implicit=False, big_endian=False).elements(0, ()))
    assert [header.tag for header in headers][-1] == 0x7FE00010
    assert headers[-1].offset == len(data) - 48 and headers[-1].length == 48
