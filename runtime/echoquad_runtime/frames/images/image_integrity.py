"""Image integrity: whether an image file contains all of its pixels, where Pillow alone would fill in missing ones.

Pillow ignores a PNG's checksums, leaves black what the data of a PNG or a TIFF do not reach, and libjpeg invents what a
JPEG lacks. These checks cost little beside decoding: they read headers and markers, and only the last of the decoded
pixels, since rows are stored from top to bottom.
"""

from __future__ import annotations

import contextlib
import functools
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from PIL import Image, ImageFile

from echoquad_runtime.errors import FrameDamagedError, FrameFormatError

if TYPE_CHECKING:
    from PIL.TiffImagePlugin import TiffImageFile

__all__ = [
    "PNG_SIGNATURE",
    "PngLastRowCheck",
    "check_jpeg_kind",
    "check_jpeg_last_block",
    "check_jpeg_markers",
    "check_png_chunks",
    "check_tiff_strips",
]

PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"

MAX_PNG_CHUNKS: Final = 100_000  # 36 million pixels of 16-bit RGB in chunks of 4 kB take 53 000
MAX_JPEG_SEGMENTS: Final = 2_000  # a colour profile may have 255, and so may extended XMP
MAX_JPEG_GAP: Final = 1 << 16  # bytes between two segments
MAX_JPEG_SCANS: Final = 100  # encoders write about ten; each may take as long as the whole picture

TIFF_COMPRESSIONS: Final = (
    *("raw", "tiff_raw_16", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate"),
    *("packbits", "jpeg", "lzma", "zstd"),
)
"""Pillow's names of the supported TIFF compressions; those for faxes and rarely tested ones are excluded."""

# JPEG markers (ITU-T T.81, table B.1).
_SOS, _EOI = 0xDA, 0xD9
_WITHOUT_LENGTH: Final = frozenset({0x01, *range(0xD0, 0xD9)})
_START_OF_FRAME: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE: Final = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_DECODED: Final = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA})  # by libjpeg: sequential, progressive, lossless
_JPEG_LS: Final = 0xF7
_ARITHMETIC: Final = frozenset(range(0xC9, 0xD0)) - {0xCC}
_EOI_BYTES: Final = b"\xff\xd9"
_MARKER: Final = re.compile(rb"\xff([^\x00\xff])")
_MARKER_IN_SCAN: Final = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
_ALL_COEFFICIENTS: Final = (1 << 64) - 1
_FILL_LEVEL: Final = 128  # libjpeg's level for missing blocks
_BITS: Final = bytes(range(7, 247, 3))  # varied bits without 0xFF, which would be a marker
_EXTRA_BITS: Final = _BITS + b"".join(b"\xff" + bytes([0xD0 + restart]) + _BITS for restart in range(8))

_PLANAR_CONFIGURATION: Final = 284  # TIFF tag
_MARK_LEVEL: Final = 0xA5  # a level that seldom fills a row

# First column and row of each Adam7 pass, and the steps between its columns and rows.
_ADAM7: Final = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


# ---------------------------------------------------------------------------------------------- PNG


def check_png_chunks(data: bytes) -> None:
    """Check the checksum of every PNG chunk and that the last one is present; Pillow does neither for pixel data.

    Raises
    ------
    FrameDamagedError
        If a checksum does not match or the end is missing.
    """
    view = memoryview(data)
    position = len(PNG_SIGNATURE)
    for _ in range(MAX_PNG_CHUNKS):
        if position + 12 > len(data):
            break
        length, chunk_type = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(view[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            name = f"{chunk_type.decode('ascii')} chunk" if chunk_type.isalpha() else f"chunk at byte {position}"
            raise FrameDamagedError(f"the PNG's {name} fails its checksum: the file is damaged; copy it again")
        if chunk_type == b"IEND":
            return
        position = end + 4
    else:
        raise FrameDamagedError(f"the PNG has more than {MAX_PNG_CHUNKS} chunks; expected a few; save it again")
    raise FrameDamagedError("the PNG ends before its last chunk: the file is truncated; copy it again")


class PngLastRowCheck:
    """Check that decoding a PNG wrote its last row.

    If the pixel data end at the end of an earlier row, Pillow reports no error and leaves the rest black. The last row
    is marked before decoding. Only if the mark is still there afterwards are the data inflated again and counted.
    """

    def __init__(self, image: ImageFile.ImageFile) -> None:
        self._interlaced = bool(image.info.get("interlace"))  # seven passes: no row is written last
        width, height = image.size
        bands = len(image.getbands())
        level = (_MARK_LEVEL,) * bands if bands > 1 else _MARK_LEVEL
        self._last_row = (0, height - 1, width, height)
        if not self._interlaced:
            marked = Image.new(image.mode, (width, 1))
            marked.paste(level, (0, 0, width, 1))
            self._mark = marked.tobytes()
            image.load_prepare()
            image.im.paste(level, self._last_row)

    def check(self, image: Image.Image, data: bytes) -> None:
        """Check the decoded `image` of the file `data`.

        Raises
        ------
        FrameDamagedError
            If rows are missing.
        """
        if not self._interlaced and image.crop(self._last_row).tobytes() != self._mark:
            return
        expected = _png_data_size(data)
        found = _inflated_size(data, expected)
        if found < expected:
            raise FrameDamagedError(
                f"the PNG has {found} of {expected} bytes of pixel data: the file is damaged; save it again"
            )


def _png_data_size(data: bytes) -> int:
    """Return the size of a PNG's inflated pixel data: for each row its pixels and one byte for its filter."""
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, len(PNG_SIGNATURE) + 8)
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    total = 0
    for x, y, dx, dy in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // dx), -(-(height - y) // dy)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


def _inflated_size(data: bytes, enough: int) -> int:
    """Return the size of a PNG's inflated pixel data; counting stops soon after `enough` bytes."""
    inflater = zlib.decompressobj()
    position, total = len(PNG_SIGNATURE), 0
    while position + 12 <= len(data) and total < enough:
        length, chunk_type = struct.unpack_from(">I4s", data, position)
        if chunk_type == b"IDAT":
            piece = data[position + 8 : position + 8 + length]
            while piece and not inflater.eof and total < enough:
                total += len(inflater.decompress(piece, 1 << 16))
                piece = inflater.unconsumed_tail
        position += 12 + length
    return total


# ---------------------------------------------------------------------------------------------- JPEG


def check_jpeg_kind(data: bytes) -> None:
    """Check that libjpeg decodes this kind of JPEG: not hierarchical, of 8 bits per sample, with 1, 3 or 4 components.

    Raises
    ------
    FrameFormatError
        If it does not.
    """
    for marker, body, _ in _segments(data):
        if marker == _SOS:
            return
        if marker in _START_OF_FRAME or marker == _JPEG_LS:
            bits, components = (body[0], body[5]) if len(body) > 5 else (8, 3)
            if marker == _JPEG_LS:
                kind = "JPEG-LS"
            elif marker not in _DECODED:
                kind = "a hierarchical or arithmetic lossless JPEG"
            elif bits != 8:
                kind = f"a JPEG of {bits} bits per sample"
            elif components not in (1, 3, 4):
                kind = f"a JPEG of {components} components"
            else:
                return
            raise FrameFormatError(f"not supported: {kind}; convert it to PNG")


def check_jpeg_markers(data: bytes) -> None:
    """Check that a JPEG has all scans and an end marker; libjpeg accepts missing scans, and any number of them.

    Raises
    ------
    FrameDamagedError
        If the end or a scan is missing, or there are too many segments.
    """
    missing: dict[int, int] = {}  # for each component the coefficients that no scan has sent, as bits
    progressive, scans, position = False, 0, 0
    for marker, body, end in _segments(data):
        position = end
        if marker in _START_OF_FRAME and len(body) >= 6 and not missing:
            progressive = marker in _PROGRESSIVE
            missing = dict.fromkeys(body[6 : 6 + 3 * body[5] : 3], _ALL_COEFFICIENTS)
        elif marker == _SOS and body and len(body) >= 4 + 2 * body[0]:
            scans += 1
            if scans > MAX_JPEG_SCANS:
                raise FrameDamagedError(
                    f"the JPEG has more than {MAX_JPEG_SCANS} scans; expected about ten; save it again"
                )
            first, last, bits = body[1 + 2 * body[0] :][:3]
            sent = _ALL_COEFFICIENTS
            if progressive:  # the lowest bits are sent last
                sent = 0 if bits & 15 else (2 << last) - (1 << first)
            for component in body[1 : 1 + 2 * body[0] : 2]:
                if component in missing:
                    missing[component] &= ~sent
            if not progressive and not any(missing.values()):
                break  # most files have one scan, whose end need not be found
    if data.rfind(_EOI_BYTES, position) < 0:  # 0xFF bytes within a scan are escaped
        raise FrameDamagedError("the JPEG has no end marker: the file is truncated; copy it again")
    if any(missing.values()):
        raise FrameDamagedError("the JPEG lacks some of its scans: the file is truncated; copy it again")


def check_jpeg_last_block(image: Image.Image, data: bytes, decode: Callable[[bytes], Image.Image]) -> None:
    """Check that libjpeg did not invent the last block of a JPEG that was cut and given an end marker.

    libjpeg fills missing blocks, the last one among them, with mid-grey. If the last block is mid-grey, the file is
    decoded again with extra bits before its end: these do not change a complete image.

    Raises
    ------
    FrameDamagedError
        If blocks are missing.
    """
    width, height = image.size
    last = image.crop(((width - 1) // 8 * 8, (height - 1) // 8 * 8, width, height))
    if last.convert("L").getextrema() != (_FILL_LEVEL, _FILL_LEVEL):
        return
    if any(marker in _ARITHMETIC for marker, _, _ in _segments(data)):  # arithmetic coding omits zeros at the end
        return
    end = data.rfind(_EOI_BYTES)
    if decode(data[:end] + _EXTRA_BITS + _EOI_BYTES).tobytes() != image.tobytes():
        raise FrameDamagedError("the JPEG ends before its last pixels: the file is truncated; copy it again")


def _segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Yield each segment's marker, content and end position, up to the end of the image."""
    position, pattern = 2, _MARKER
    for _ in range(MAX_JPEG_SEGMENTS):
        match = pattern.search(data, position)
        if match is None or match[1][0] == _EOI:
            return
        if pattern is _MARKER and match.start() - position > MAX_JPEG_GAP:  # Pillow would skip it byte by byte
            break
        marker, position, pattern = match[1][0], match.end(), _MARKER
        if marker in _WITHOUT_LENGTH:
            continue
        length = max(2, int.from_bytes(data[position : position + 2], "big"))
        yield marker, data[position + 2 : position + length], position + length
        position += length
        if marker == _SOS:
            pattern = _MARKER_IN_SCAN
    raise FrameDamagedError("the JPEG has too many segments, or too large a gap between two; save it again")


# ---------------------------------------------------------------------------------------------- TIFF


def check_tiff_strips(image: TiffImageFile) -> None:
    """Check the compression and the strips of a TIFF that is not decoded yet.

    Raises
    ------
    FrameFormatError
        If its compression is not supported.
    FrameDamagedError
        If strips are missing; Pillow leaves their pixels black.
    """
    compression = image.info.get("compression", "raw")
    if compression not in TIFF_COMPRESSIONS:
        raise FrameFormatError(
            f"not supported: a TIFF compressed as {compression}; expected none, LZW, Deflate, PackBits or JPEG; "
            "save it as PNG"
        )
    width, height = image.size
    # Each colour has strips of its own, except where libtiff joins the planes: it detects missing strips itself.
    separate = image.tag_v2.get(_PLANAR_CONFIGURATION, 1) == 2 and all(tile[0] == "raw" for tile in image.tile)
    covered: Counter[str] = Counter()
    for _, box, _, options in image.tile:
        left, top, right, bottom = box or (0, 0, width, height)
        covered[str(options[0]) if separate and options else ""] += (right - left) * (bottom - top)
    if len(covered) < (len(image.getbands()) if separate else 1) or min(covered.values()) < width * height:
        raise FrameDamagedError("the TIFF lacks some of its strips: the file is damaged; copy it again")
    if any(tile[0] == "libtiff" for tile in image.tile):
        _silence_libtiff()


@functools.cache
def _silence_libtiff() -> None:
    """Keep libtiff from printing its errors to stderr: the exception reports them in one line.

    The error handler is global to the libtiff in Pillow's wheel. Where that library is not found (on Windows, or with a
    distribution's Pillow), libtiff prints.
    """
    import ctypes

    package = Path(Image.__file__).parent
    libraries = [*package.with_name("pillow.libs").glob("libtiff*"), *(package / ".dylibs").glob("libtiff*")]
    for library in libraries:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(str(library)).TIFFSetErrorHandler(None)
