"""Wholeness: whether an image file has all of its pixels, where Pillow alone would fill in what is missing.

Pillow does not look at a PNG's checksums, leaves black what a PNG's or a TIFF's pixel data do not reach, and has
libjpeg make up what a JPEG lacks. What is looked at here costs next to nothing beside decoding: headers and
markers, and of the decoded pixels only the last, since rows are stored from the top to the bottom.
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

__all__ = ["PNG_SIGNATURE", "Unwritten", "check_jpeg", "check_jpeg_pixels", "check_png", "check_tiff"]

PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"

MAX_PNG_CHUNKS: Final = 100_000  # 36 million pixels of 16-bit RGB in chunks of 4 kB come to 53 000
MAX_JPEG_SEGMENTS: Final = 2_000  # a colour profile may have 255, and so may extended XMP
MAX_JPEG_GAP: Final = 1 << 16  # bytes between two segments
MAX_JPEG_SCANS: Final = 100  # encoders write ten or so; each may cost as much time as the whole picture

TIFF_COMPRESSIONS: Final = (
    *("raw", "tiff_raw_16", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate"),
    *("packbits", "jpeg", "lzma", "zstd"),
)
"""Pillow's names of what a TIFF may be compressed with; left out are those for faxes, and rarely tested ones."""

_SCAN, _END = 0xDA, 0xD9
_NO_LENGTH: Final = frozenset({0x01, *range(0xD0, 0xD9)})
_FRAME_HEADERS: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE: Final = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_EOI: Final = b"\xff\xd9"
_ARITHMETIC: Final = frozenset(range(0xC9, 0xD0)) - {0xCC}
_MARKER: Final = re.compile(rb"\xff([^\x00\xff])")
_MARKER_IN_SCAN: Final = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
_ALL_COEFFICIENTS: Final = (1 << 64) - 1
_MADE_UP: Final = 128  # libjpeg's level for blocks that never came
_BITS: Final = bytes(range(7, 247, 3))  # any that are not all alike; no 0xFF, which would be a marker
_FILLER: Final = _BITS + b"".join(b"\xff" + bytes([0xD0 + restart]) + _BITS for restart in range(8))

_PLANAR: Final = 284  # a TIFF's tag
_UNWRITTEN: Final = 0xA5  # any level that a row seldom has from end to end


# ---------------------------------------------------------------------------------------------- PNG


def check_png(data: bytes) -> None:
    """Walk a PNG's chunks: Pillow skips the pixel chunks' checksums and does not miss a lost tail.

    Raises
    ------
    FrameDamagedError
        If a checksum does not match, or there is no end.
    """
    view = memoryview(data)
    position = len(PNG_SIGNATURE)
    for _ in range(MAX_PNG_CHUNKS):
        if position + 12 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(view[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            name = f"{kind.decode('ascii')} chunk" if kind.isalpha() else f"chunk at byte {position}"
            raise FrameDamagedError(f"the PNG's {name} fails its checksum: the file is damaged; copy it again")
        if kind == b"IEND":
            return
        position = end + 4
    else:
        raise FrameDamagedError(f"the PNG has more than {MAX_PNG_CHUNKS} chunks; expected a few; save it again")
    raise FrameDamagedError("the PNG ends before its last chunk: the file is truncated; copy it again")


class Unwritten:
    """Marks the last row of a PNG that is to be decoded, and sees afterwards whether a row was written there.

    Pillow takes a PNG whose pixel data end early, at the end of a row, for whole, and the rest stays black. Counting
    the rows means to inflate the data twice; that is done only where the last row is still as it was marked.
    """

    def __init__(self, image: ImageFile.ImageFile) -> None:
        self._interlaced = bool(image.info.get("interlace"))  # its rows come in seven passes: none is the last
        width, height = image.size
        bands = len(image.getbands())
        level = (_UNWRITTEN,) * bands if bands > 1 else _UNWRITTEN
        self._box = (0, height - 1, width, height)
        if not self._interlaced:
            marked = Image.new(image.mode, (width, 1))
            marked.paste(level, (0, 0, width, 1))
            self._mark = marked.tobytes()
            image.load_prepare()
            image.im.paste(level, self._box)

    def check(self, image: Image.Image, data: bytes) -> None:
        """Look at the decoded `image`, whose file held `data`.

        Raises
        ------
        FrameDamagedError
            If rows are missing.
        """
        if not self._interlaced and image.crop(self._box).tobytes() != self._mark:
            return
        expected = _png_size(data)
        found = _inflated_size(data, expected)
        if found < expected:
            raise FrameDamagedError(
                f"the PNG's pixels come to {found} of {expected} bytes: the file is damaged; save it again"
            )


def _png_size(data: bytes) -> int:
    """Compute what a PNG's pixel data come to when they are inflated: each row's pixels and a byte for its filter."""
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, len(PNG_SIGNATURE) + 8)
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    # Adam7: first column and row of each pass, and the steps between them.
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    total = 0
    for x, y, dx, dy in passes if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // dx), -(-(height - y) // dy)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


def _inflated_size(data: bytes, enough: int) -> int:
    """Inflate a PNG's pixel data, a piece at a time, and count, up to about `enough`."""
    inflater = zlib.decompressobj()
    position, total = len(PNG_SIGNATURE), 0
    while position + 12 <= len(data) and total < enough:
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IDAT":
            piece = data[position + 8 : position + 8 + length]
            while piece and not inflater.eof and total < enough:
                total += len(inflater.decompress(piece, 1 << 16))
                piece = inflater.unconsumed_tail
        position += 12 + length
    return total


# ---------------------------------------------------------------------------------------------- JPEG


def check_jpeg(data: bytes) -> None:
    """Walk a JPEG's markers: libjpeg makes do with scans that are missing, and with any number of them.

    Raises
    ------
    FrameDamagedError
        If there is no end, a scan is missing, or there are far too many segments.
    """
    missing: dict[int, int] = {}
    progressive, scans, seen = False, 0, 0
    for marker, body, end in _segments(data):
        seen = end
        if marker in _FRAME_HEADERS and len(body) >= 6 and not missing:
            progressive = marker in _PROGRESSIVE
            missing = dict.fromkeys(body[6 : 6 + 3 * body[5] : 3], _ALL_COEFFICIENTS)
        elif marker == _SCAN and body and len(body) >= 4 + 2 * body[0]:
            scans += 1
            if scans > MAX_JPEG_SCANS:
                raise FrameDamagedError(f"the JPEG has more than {MAX_JPEG_SCANS} scans; expected ten; save it again")
            first, last, bits = body[1 + 2 * body[0] :][:3]
            sent = _ALL_COEFFICIENTS
            if progressive:  # the lowest bits come last
                sent = 0 if bits & 15 else (2 << last) - (1 << first)
            for component in body[1 : 1 + 2 * body[0] : 2]:
                if component in missing:
                    missing[component] &= ~sent
            if not progressive and not any(missing.values()):
                break  # most have one scan: no need to look for where it ends
    if data.rfind(_EOI, seen) < 0:  # a scan's own 0xFF bytes are escaped
        raise FrameDamagedError("the JPEG has no end marker: the file is truncated; copy it again")
    if any(missing.values()):
        raise FrameDamagedError("the JPEG lacks some of its scans: the file is truncated; copy it again")


def check_jpeg_pixels(image: Image.Image, data: bytes, decode: Callable[[bytes], Image.Image]) -> None:
    """Look whether the last block of a decoded JPEG was made up, its file having been cut and given an end.

    libjpeg fills in mid-grey for blocks whose bits never came, the last one at least. An image that really ends in
    mid-grey is decoded again, by `decode`, with more bits before its end: they do not matter to a whole one.

    Raises
    ------
    FrameDamagedError
        If blocks are missing.
    """
    width, height = image.size
    last = image.crop(((width - 1) // 8 * 8, (height - 1) // 8 * 8, width, height))
    if last.convert("L").getextrema() != (_MADE_UP, _MADE_UP):
        return
    if any(marker in _ARITHMETIC for marker, _, _ in _segments(data)):  # whose zeros at the end are left out by rule
        return
    end = data.rfind(_EOI)
    if decode(data[:end] + _FILLER + _EOI).tobytes() != image.tobytes():
        raise FrameDamagedError("the JPEG ends before its last pixels: the file is truncated; copy it again")


def _segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Give each segment's marker, content and end, up to the end of the image; bytes between them are passed over."""
    position, marks = 2, _MARKER
    for _ in range(MAX_JPEG_SEGMENTS):
        found = marks.search(data, position)
        if found is None or found[1][0] == _END:
            return
        if marks is _MARKER and found.start() - position > MAX_JPEG_GAP:  # Pillow passes over it byte by byte
            break
        marker, position, marks = found[1][0], found.end(), _MARKER
        if marker in _NO_LENGTH:
            continue
        length = max(2, int.from_bytes(data[position : position + 2], "big"))
        yield marker, data[position + 2 : position + length], position + length
        position += length
        if marker == _SCAN:
            marks = _MARKER_IN_SCAN
    raise FrameDamagedError("the JPEG's header is beyond all bounds; expected a few segments; save it again")


# ---------------------------------------------------------------------------------------------- TIFF


def check_tiff(image: TiffImageFile) -> None:
    """Look at a TIFF that is not decoded yet.

    Raises
    ------
    FrameFormatError
        If it is compressed in a way that frames are not.
    FrameDamagedError
        If strips are missing, which Pillow leaves black.
    """
    compression = image.info.get("compression", "raw")
    if compression not in TIFF_COMPRESSIONS:
        raise FrameFormatError(
            f"the TIFF is compressed as {compression}; expected none, LZW, Deflate, PackBits or JPEG; save it as PNG"
        )
    width, height = image.size
    # Each colour may have strips of its own: but not where libtiff, which misses none, puts them together.
    apart = image.tag_v2.get(_PLANAR, 1) == 2 and all(tile[0] == "raw" for tile in image.tile)
    covered: Counter[str] = Counter()
    for _, box, _, options in image.tile:
        left, top, right, bottom = box or (0, 0, width, height)
        covered[str(options[0]) if apart and options else ""] += (right - left) * (bottom - top)
    if len(covered) < (len(image.getbands()) if apart else 1) or min(covered.values()) < width * height:
        raise FrameDamagedError("the TIFF lacks some of its strips: the file is damaged; copy it again")
    if any(tile[0] == "libtiff" for tile in image.tile):
        _silence_libtiff()


@functools.cache
def _silence_libtiff() -> None:
    """Keep libtiff from printing to stderr what it finds wrong: the error that is raised says so in one line.

    Its handler is one for the process, and belongs to the library that Pillow's wheel brings along; where it is not to
    be found (Windows, a distribution's Pillow), libtiff prints.
    """
    import ctypes

    home = Path(Image.__file__).parent
    libraries = [*home.with_name("pillow.libs").glob("libtiff*"), *(home / ".dylibs").glob("libtiff*")]
    for library in libraries:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(str(library)).TIFFSetErrorHandler(None)
