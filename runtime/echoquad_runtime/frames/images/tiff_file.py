"""TIFF files: their pages, bounds of what the directories announce, and a page as a file of its own.

A directory of BigTIFF may announce any number of entries, and each entry any number of values, of which Pillow makes
Python objects. So the directories (TIFF 6.0, section 2) are read here first.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Final

from echoquad_runtime.errors import FrameDamagedError, FrameTooLargeError
from echoquad_runtime.frames.formats import MAX_FILE_BYTES, MAX_FRAMES

__all__ = ["TiffFile", "TiffPage"]

MAX_ENTRIES: Final = 1_000  # the standard and its extensions define under 200
MAX_BLOCKS: Final = 200_000  # strips and tiles: 36 million pixels in tiles of 16 x 16 take 140 000
MAX_VALUE_BYTES: Final = 16 << 20  # of one entry other than strips and tiles; colour profiles are the largest

NEW_SUBFILE_TYPE, SUBFILE_TYPE = 254, 255
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
FILL_ORDER, SAMPLES, ROWS_PER_STRIP, PLANAR, PREDICTOR = 266, 277, 278, 284, 317
TILE_WIDTH, TILE_HEIGHT, EXTRA_SAMPLES, SAMPLE_FORMAT = 322, 323, 338, 339
ORIENTATION = 274
STRIP_OFFSETS, STRIP_SIZES, TILE_OFFSETS, TILE_SIZES = 273, 279, 324, 325

_BLOCKS: Final = (STRIP_OFFSETS, STRIP_SIZES, TILE_OFFSETS, TILE_SIZES)
_POINTERS: Final = frozenset({330, 34665, 34853, 40965})  # to directories elsewhere, which a page's copy leaves out
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType
_TYPE_BYTES: Final = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
_INTEGERS: Final = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}


@dataclass(frozen=True)
class _Entry:
    """The values of a tag: their type, number, and position in the file."""

    kind: int
    count: int
    position: int

    @property
    def size(self) -> int:
        return self.count * _TYPE_BYTES[self.kind]


@dataclass(frozen=True)
class TiffPage:
    """A page of a TIFF file: its tags.

    Attributes
    ----------
    position
        Where its directory begins.
    entries
        The entry of each tag.
    """

    position: int
    entries: Mapping[int, _Entry]


class TiffFile:
    """The directories of a TIFF file.

    Parameters
    ----------
    stream
        The open file, which has one of `formats.TIFF_SIGNATURES`.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._size = stream.seek(0, io.SEEK_END)
        head = self._read(0, 16)
        self.order = "<" if head[:2] == b"II" else ">"
        self._big = 43 in head[2:4]
        self._first = self._unpack("Q", head[8:16])[0] if self._big else self._unpack("I", head[4:8])[0]

    def _read(self, position: int, size: int) -> bytes:
        self._stream.seek(position)
        data = self._stream.read(size)
        if len(data) != size:
            raise FrameDamagedError("the TIFF ends before its directories or pixels: it is truncated; copy it again")
        return data

    def _unpack(self, letters: str, data: bytes) -> tuple[int, ...]:
        return struct.unpack(self.order + letters, data)

    def pages(self) -> Iterator[TiffPage]:
        """Yield the pages that are frames: all but reduced-resolution copies and transparency masks.

        Raises
        ------
        FrameError
            If a directory is damaged or announces more than a limit, or there are too many.
        """
        position, seen = self._first, set[int]()
        while position and position not in seen:  # libtiff too ends at a page that it has read
            if len(seen) >= MAX_FRAMES:
                raise FrameTooLargeError(f"the TIFF has more than {MAX_FRAMES} pages; split it")
            seen.add(position)
            page, position = self._read_page(position)
            kind = self.value(page, NEW_SUBFILE_TYPE, 0)
            if not kind & (_REDUCED | _MASK) and self.value(page, SUBFILE_TYPE, 1) != 2:
                yield page

    def has_next_page(self) -> bool:
        """Return whether the first page refers to another one; reads a few bytes.

        Raises
        ------
        FrameError
            If the first directory is damaged or announces more than a limit.
        """
        return self._read_page(self._first)[1] != 0

    def extract_at(self, position: int) -> bytes:
        """Return the page whose directory begins at a position as a TIFF file of its own; see `extract`.

        Raises
        ------
        FrameError
            As `extract`.
        """
        return self.extract(self._read_page(position)[0])

    def is_first(self, page: TiffPage) -> bool:
        """Return whether a page is the one that the header refers to."""
        return page.position == self._first

    def _read_page(self, position: int) -> tuple[TiffPage, int]:
        """Return a page and the position of the next one, 0 if it is the last."""
        head, letter = (8, "Q") if self._big else (2, "I")
        word = struct.calcsize(letter)
        row = 4 + 2 * word  # tag, type, number of values, and the values or their position
        (count,) = self._unpack("Q" if self._big else "H", self._read(position, head))
        if count > MAX_ENTRIES:
            raise FrameDamagedError(f"a page of the TIFF announces {count} tags; expected at most {MAX_ENTRIES}")
        data = self._read(position + head, count * row)
        entries: dict[int, _Entry] = {}
        for at in range(0, len(data), row):
            tag, kind = self._unpack("HH", data[at : at + 4])
            values, pointer = self._unpack(2 * letter, data[at + 4 : at + row])
            size = values * _TYPE_BYTES.get(kind, 1)
            if size > (8 * MAX_BLOCKS if tag in _BLOCKS else MAX_VALUE_BYTES):
                raise FrameTooLargeError(f"a tag of the TIFF announces {size} bytes; expected fewer; save it as PNG")
            if kind in _TYPE_BYTES:
                entries[tag] = _Entry(kind, values, pointer if size > word else position + head + at + 4 + word)
        link = position + head + count * row
        # Some writers leave out the link to the next page behind the last one.
        following = self._unpack(letter, self._read(link, word))[0] if link + word <= self._size else 0
        return TiffPage(position, entries), following

    def values(self, page: TiffPage, tag: int) -> tuple[int, ...]:
        """Return the integers of a tag; none if it is missing or holds other values."""
        entry = page.entries.get(tag)
        if entry is None or entry.kind not in _INTEGERS:
            return ()
        return self._unpack(f"{entry.count}{_INTEGERS[entry.kind]}", self._read(entry.position, entry.size))

    def value(self, page: TiffPage, tag: int, default: int) -> int:
        """Return the first integer of a tag, or `default`."""
        return next(iter(self.values(page, tag)), default)

    def extract(
        self,
        page: TiffPage,
        changes: Mapping[int, int] | None = None,
        *,
        without: Collection[int] = (),
        plane: int = 0,
        planes: int = 1,
    ) -> bytes:
        """Return a page as a TIFF file of its own.

        Parameters
        ----------
        page
            One of `pages`.
        changes
            New values of tags that hold one integer.
        without
            Tags to leave out.
        plane, planes
            Number of the plane, from 0, whose strips or tiles the file has, and the number of all planes.

        Raises
        ------
        FrameError
            If the pixels are not in the file, or exceed the limit of a file.
        """
        tiled = TILE_OFFSETS in page.entries
        offsets = self.values(page, TILE_OFFSETS if tiled else STRIP_OFFSETS)
        sizes = self.values(page, TILE_SIZES if tiled else STRIP_SIZES)
        each = len(offsets) // planes
        offsets, sizes = (blocks[plane * each : (plane + 1) * each] for blocks in (offsets, sizes))
        if not offsets or len(offsets) != len(sizes):
            raise FrameDamagedError("the TIFF lacks some of its strips: the file is damaged; copy it again")
        if sum(sizes) > MAX_FILE_BYTES:
            raise FrameTooLargeError(f"the page's pixels have {sum(sizes)} bytes; expected at most {MAX_FILE_BYTES}")
        blocks = [self._read(*block) for block in zip(offsets, sizes, strict=True)]
        begins = [8]
        for block in blocks:
            begins.append(begins[-1] + len(block))
        rows: dict[int, tuple[int, int, bytes]] = {}
        for tag, entry in page.entries.items():
            if tag in _POINTERS or tag in _BLOCKS or tag in without or entry.kind in (17, 18):
                continue
            if entry.kind == 16:  # only BigTIFF has 64-bit integers
                numbers = self.values(page, tag)
                rows[tag] = 4, len(numbers), struct.pack(f"{self.order}{len(numbers)}I", *numbers)
            else:
                rows[tag] = entry.kind, entry.count, self._read(entry.position, entry.size)
        for tag, number in (changes or {}).items():
            rows[tag] = 4, 1, struct.pack(self.order + "I", number)
        stored = f"{self.order}{len(blocks)}I"
        rows[TILE_OFFSETS if tiled else STRIP_OFFSETS] = 4, len(blocks), struct.pack(stored, *begins[:-1])
        rows[TILE_SIZES if tiled else STRIP_SIZES] = 4, len(blocks), struct.pack(stored, *sizes)
        return _write_tiff(self.order, blocks, rows)


def _write_tiff(order: str, blocks: list[bytes], rows: Mapping[int, tuple[int, int, bytes]]) -> bytes:
    """Return a file of blocks of pixels, and a directory of the type, number and bytes of each tag."""
    pixels = b"".join(blocks)
    begin = 8 + len(pixels) + len(pixels) % 2
    behind = begin + 2 + 12 * len(rows) + 4
    directory, values = [struct.pack(order + "H", len(rows))], bytearray()
    for tag, (kind, count, data) in sorted(rows.items()):
        field = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack(order + "I", behind + len(values))
        if len(data) > 4:
            values += data + b"\0" * (len(data) % 2)
        directory.append(struct.pack(order + "HHI", tag, kind, count) + field)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, begin)
    return b"".join([head, pixels, b"\0" * (len(pixels) % 2), *directory, bytes(4), values])
