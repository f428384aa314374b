"""Marker segments of JPEG and JPEG-LS frames, checked before GDCM decodes them.

GDCM trusts what it reads: a frame without Huffman tables, or with an odd version of JFIF, ends the process. So every
segment of a frame is walked, from its start to its end, whatever contradicts the standards or the DICOM header is
refused (ITU-T T.81, annex B; ISO/IEC 14495-1, annex C), and what decoding does not need is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from echoquad_runtime.errors import FrameDamagedError, FrameError, FrameFormatError
from echoquad_runtime.frames.dicom.header import Header
from echoquad_runtime.frames.dicom.transfer_syntaxes import JPEG_LOSSLESS, JPEG_LS

__all__ = ["SIZE_MISMATCH", "checked_jpeg"]

SIZE_MISMATCH: Final = "the DICOM frame's size differs from its header's; the file is damaged: copy it again"

_MAX_SEGMENTS: Final = 2_000  # a colour profile may have 255
_DHT, _SOI, _EOI, _SOS, _DQT, _DNL, _DRI, _LSE = 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, 0xF8
_QUANTIZATION: Final = 0x20  # marks the number of a quantization table among those of Huffman tables
_SOF_EXTENDED, _SOF_LOSSLESS, _SOF_LS = (0xC0, 0xC1), (0xC3,), (0xF7,)
_START_OF_FRAME: Final = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH: Final = frozenset({0x01, *range(0xD0, 0xD9)})
# In a scan, 0xFF is followed by a zero byte or a restart marker, in JPEG-LS by a zero bit.
_MARKER_IN_SCAN: Final = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")
_MARKER_IN_LS_SCAN: Final = re.compile(rb"\xff+([\x80-\xfe])")


def checked_jpeg(header: Header, data: bytes) -> tuple[int, bytes]:
    """Check all marker segments of a JPEG or JPEG-LS frame.

    Returns
    -------
    precision, data
        Its bits per sample, and the frame without comments and application data, such as thumbnails.

    Raises
    ------
    FrameDamagedError
        If a segment is malformed or contradicts another one or the header, or the end is missing.
    FrameFormatError
        If it uses an extension of JPEG-LS that is not supported.
    """
    frame: _Frame | None = None
    tables: set[int] = set()
    sent: list[int] = []
    kept = [b"\xff\xd8"]
    for marker, body, segment in _segments(data, ls=header.syntax in JPEG_LS):
        if marker in _START_OF_FRAME:
            if frame is not None:
                raise _malformed()
            frame = _Frame(header, marker, body)
        elif marker == _DHT:
            tables.update(_huffman_tables(body, lossless=header.syntax in JPEG_LOSSLESS))
        elif marker == _DQT:
            tables.update(_quantization_tables(body))
        elif marker == _LSE:
            _check_ls_parameters(header, frame, body)
        elif marker == _SOS:
            if frame is None:
                raise _malformed()
            sent += frame.scan_components(body, tables)
        elif marker == _DNL or (marker == _DRI and len(body) != 2):
            raise _malformed()
        elif marker != _DRI and not _is_colour_transformation(marker, body):
            continue
        kept.append(segment)
    if frame is None or sorted(sent) != sorted(frame.components):
        raise _malformed()
    return frame.precision, b"".join([*kept, b"\xff\xd9"])


def _is_colour_transformation(marker: int, body: bytes) -> bool:
    """Return whether application data are those of Adobe, or of HP for JPEG-LS, which name a colour space."""
    adobe = marker == 0xEE and len(body) == 12 and body[:5] == b"Adobe" and body[-1] <= 2
    return adobe or (marker == 0xE8 and len(body) == 5 and body[:4] == b"mrfx" and body[-1] <= 3)


class _Frame:
    """A frame header, whose size, number of components and precision are those of the DICOM header."""

    def __init__(self, header: Header, marker: int, body: bytes) -> None:
        lossless, ls = header.syntax in JPEG_LOSSLESS, header.syntax in JPEG_LS
        if marker not in (_SOF_LS if ls else _SOF_LOSSLESS if lossless else _SOF_EXTENDED) or len(body) < 6:
            raise _malformed()
        self.syntax, self.precision = header.syntax, body[0]
        size = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big"), body[5]
        if size != (header.rows, header.columns, header.samples_per_pixel):
            raise FrameDamagedError(SIZE_MISMATCH)
        if lossless or ls:
            valid = 2 <= self.precision <= header.bits_allocated
        else:
            valid = self.precision == (8 if header.bits_stored <= 8 else 12)
        if not valid:
            raise FrameDamagedError(
                "the DICOM frame's bits per sample differ from its header's; the file is damaged: copy it again"
            )
        self.components = list(body[6::3])
        self.quantization = set(body[8::3])
        sampling = body[7::3]
        if len(body) != 6 + 3 * body[5] or len(set(self.components)) != len(self.components):
            raise _malformed()
        # Without loss, components are not subsampled. Factors go to 4 (T.81, B.2.2).
        factors = (1,) if lossless or ls else (1, 2, 3, 4)
        if not all(factor >> 4 in factors and factor & 0x0F in factors for factor in sampling):
            raise _malformed()

    def scan_components(self, body: bytes, tables: set[int]) -> list[int]:
        """Check a scan header and return the scan's components."""
        count = body[0] if body else 0
        if not 1 <= count <= len(self.components) or len(body) != 4 + 2 * count:
            raise _malformed()
        components, selectors = list(body[1 : 1 + 2 * count : 2]), body[2 : 2 + 2 * count : 2]
        first, last, approximation = body[-3:]
        if not set(components) <= set(self.components):
            raise _malformed()
        if self.syntax in JPEG_LS:
            near, interleave = first, last
            # Several components of a scan are interleaved.
            valid = near <= (1 << self.precision) // 2 and interleave <= 2 and (count == 1 or interleave > 0)
            valid = valid and not any(selectors) and approximation == 0
        elif self.syntax in JPEG_LOSSLESS:
            valid = 1 <= first <= 7 and last == 0 and approximation >> 4 == 0 and approximation < self.precision
            valid = valid and all(selector >> 4 in tables for selector in selectors)
        else:
            # Some writers leave the spectral selection of a sequential scan zero; libjpeg ignores it.
            valid = all(selector >> 4 in tables and 0x10 | selector & 0x0F in tables for selector in selectors)
            valid = valid and {_QUANTIZATION | number for number in self.quantization} <= tables
        if not valid:
            raise _malformed()
        return components


def _huffman_tables(body: bytes, *, lossless: bool) -> Iterator[int]:
    """Yield the class and number of each Huffman table, as ``class << 4 | number``."""
    at = 0
    while at < len(body):
        counts = body[at + 1 : at + 17]
        used, codes = sum(counts), 0
        for count in counts:
            codes = 2 * codes + count
        complete = len(counts) == 16 and at + 17 + used <= len(body)
        # The codes of each length have to fit beside the shorter ones (T.81, annex C).
        space = sum(count << 16 - length for length, count in enumerate(counts, 1))
        symbols = body[at + 17 : at + 17 + used]
        if not complete or not 1 <= used <= 256 or space > 1 << 16 or body[at] >> 4 > 1 or body[at] & 0x0F > 3:
            raise _malformed()
        if lossless and body[at] >> 4 == 0 and max(symbols) > 16:
            raise _malformed()
        yield body[at]
        at += 17 + used


def _quantization_tables(body: bytes) -> Iterator[int]:
    """Yield the number of each quantization table, marked as `_QUANTIZATION`."""
    at = 0
    while at < len(body):
        if body[at] >> 4 > 1 or body[at] & 0x0F > 3:
            raise _malformed()
        yield _QUANTIZATION | body[at] & 0x0F
        at += 1 + 64 * (1 + (body[at] >> 4))
    if at != len(body):
        raise _malformed()


def _check_ls_parameters(header: Header, frame: _Frame | None, body: bytes) -> None:
    """Check the coding parameters of JPEG-LS; zero stands for a default."""
    if header.syntax not in JPEG_LS or not body:
        raise _malformed()
    if body[0] != 1:
        raise FrameFormatError("not supported: the DICOM frame's JPEG-LS has mapping tables; convert the file")
    if frame is None or len(body) != 11:
        raise _malformed()
    largest, *thresholds, reset = (int.from_bytes(body[at : at + 2], "big") for at in range(1, 11, 2))
    white = (1 << frame.precision) - 1
    largest = largest or white
    given = [threshold for threshold in thresholds if threshold]
    if largest > white or given != sorted(given) or any(value > largest for value in given):
        raise _malformed()
    if reset and not 3 <= reset <= max(255, largest):
        raise _malformed()


def _segments(data: bytes, *, ls: bool) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield each segment's marker, its content, and all of it, with the scan that follows; to the end of the image."""
    if data[:2] != b"\xff\xd8":
        raise _malformed()
    in_scan = _MARKER_IN_LS_SCAN if ls else _MARKER_IN_SCAN
    position = 2
    for _ in range(_MAX_SEGMENTS):
        start = position
        while data[position : position + 1] == b"\xff":  # any number of fill bytes
            position += 1
        if position == start or position >= len(data):
            break
        marker = data[position]
        position += 1
        if marker == _EOI:
            return
        if marker in _WITHOUT_LENGTH or marker == _SOI or position + 2 > len(data):
            break
        end = position + int.from_bytes(data[position : position + 2], "big")
        if not position + 2 <= end <= len(data):
            break
        body = data[position + 2 : end]
        if marker == _SOS:
            match = in_scan.search(data, end)
            if match is None:
                raise FrameDamagedError(
                    "the DICOM frame's JPEG has no end marker: the file is truncated; copy it again"
                )
            end = match.start()
        yield marker, body, data[position - 2 : end]
        position = end
    raise _malformed()


def _malformed() -> FrameError:
    return FrameDamagedError("the DICOM frame's JPEG segments are malformed; the file is damaged: copy it again")
