"""UIDs of the DICOM transfer syntaxes that EchoQuad reads (DICOM PS3.6, annex A)."""

from __future__ import annotations

from typing import Final

__all__ = [
    "BIG_ENDIAN",
    "DEFLATED",
    "EXPLICIT",
    "EXTENDED",
    "IMPLICIT",
    "JPEG_2000",
    "JPEG_BASELINE",
    "JPEG_LOSSLESS",
    "JPEG_LS",
    "NATIVE",
    "RLE",
    "SUPPORTED",
    "UNCOMPRESSED",
]

IMPLICIT: Final = "1.2.840.10008.1.2"
EXPLICIT: Final = "1.2.840.10008.1.2.1"
DEFLATED: Final = "1.2.840.10008.1.2.1.99"
BIG_ENDIAN: Final = "1.2.840.10008.1.2.2"
NATIVE: Final = frozenset({IMPLICIT, EXPLICIT, BIG_ENDIAN})
"""Transfer syntaxes of pixels that are neither compressed nor deflated."""

UNCOMPRESSED: Final = NATIVE | {DEFLATED}

_JPEG: Final = "1.2.840.10008.1.2.4"
EXTENDED: Final = f"{_JPEG}.51"
JPEG_BASELINE: Final = frozenset({f"{_JPEG}.50", EXTENDED})
JPEG_LOSSLESS: Final = frozenset(f"{_JPEG}.{end}" for end in (57, 70))
JPEG_LS: Final = frozenset(f"{_JPEG}.{end}" for end in (80, 81))
JPEG_2000: Final = frozenset(f"{_JPEG}.{end}" for end in (90, 91, 201, 202, 203))
RLE: Final = "1.2.840.10008.1.2.5"

SUPPORTED: Final = UNCOMPRESSED | JPEG_BASELINE | JPEG_LOSSLESS | JPEG_LS | JPEG_2000 | {RLE}
"""Every transfer syntax that `echoquad_runtime.frames.dicom.codecs` decodes."""
