"""The elements of a DICOM data set (PS3.5, chapter 7), walked one header at a time with bounds on everything.

Only the values of wanted elements are read; all others are skipped unread. Undefined lengths are followed without
recursion, so that neither depth nor number of nested items costs more than a header of 8 bytes each.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator
from typing import IO, Final, NamedTuple

from echoquad_runtime.errors import FrameDamagedError

__all__ = [
    "LONG_VRS",
    "MAX_VALUE_BYTES",
    "UNDEFINED_LENGTH",
    "DataSetWalker",
    "ElementHeader",
    "detect_encoding",
]

LONG_VRS: Final = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
"""Value representations whose length field has 32 bits."""

UNDEFINED_LENGTH: Final = 0xFFFFFFFF

MAX_VALUE_BYTES: Final = 4 << 20  # of a value that is read: an offset table of half a million frames
_MAX_ELEMENTS: Final = 100_000  # a header has some hundreds
_MAX_NESTED: Final = 500_000  # headers within sequences: functional groups of 10 000 frames take some 400 000
_MAX_DEPTH: Final = 64
_MAX_ITEMS: Final = 1_000  # of a sequence that is read; ultrasound has a few regions

_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD


class ElementHeader(NamedTuple):
    """The header of an element: tag, value representation, length field, and offset of its value, in bytes.

    The value representation is empty if the element is encoded as implicit VR.
    """

    tag: int
    vr: str
    length: int
    offset: int


def detect_encoding(stream: IO[bytes], begin: int) -> tuple[bool, bool]:
    """Return whether the data set at `begin` is implicit VR, and whether it is big-endian, from its first element.

    A group in the first element is small, so its larger byte is zero. The VR is two capital letters.
    """
    stream.seek(begin)
    head = stream.read(8)
    return not _is_vr(head[4:6]), head[:1] == b"\0" and head[1:2] != b"\0"


def _is_vr(letters: bytes) -> bool:
    return len(letters) == 2 and letters.isalpha() and letters.isupper()


class DataSetWalker:
    """Walks the elements of a data set.

    Parameters
    ----------
    stream
        The file, opened for reading.
    implicit, big_endian
        How the data set is encoded, by its transfer syntax.

    Attributes
    ----------
    truncated
        Whether the file ended within an element, known after `elements` is exhausted.
    """

    def __init__(self, stream: IO[bytes], *, implicit: bool, big_endian: bool) -> None:
        self._stream, self._implicit = stream, implicit
        byte_order = ">" if big_endian else "<"
        self._tag = struct.Struct(f"{byte_order}HH")
        self._short, self._long = struct.Struct(f"{byte_order}H"), struct.Struct(f"{byte_order}I")
        self._size = stream.seek(0, os.SEEK_END)
        self._nested = 0
        self.truncated = False

    def elements(self, begin: int, nested: Collection[int]) -> Iterator[ElementHeader]:
        """Yield the header of each element of the data set that begins at `begin`, until the end of the file.

        Parameters
        ----------
        begin
            Offset of the data set, in bytes.
        nested
            Tags of undefined length that the caller reads itself, with `items`, or where it stops.

        Raises
        ------
        FrameDamagedError
            If there are too many elements, or they are malformed.
        """
        position = begin
        for _ in range(_MAX_ELEMENTS):
            if position >= self._size:
                self.truncated = position > self._size
                return
            header = self._header(position, self._implicit)
            if header is None:
                self.truncated = True
                return
            yield header
            if header.length != UNDEFINED_LENGTH:
                position = header.offset + header.length
            elif header.tag in nested:
                position = self._sequence_end
            else:
                position = self._skip_sequence(header)
        raise FrameDamagedError(f"the DICOM header has more than {_MAX_ELEMENTS} elements; save it again")

    def value(self, header: ElementHeader) -> bytes:
        """Read the value of an element.

        Raises
        ------
        FrameDamagedError
            If it is too long, or the file ends before.
        """
        if header.length > MAX_VALUE_BYTES:
            raise FrameDamagedError("a value of the DICOM header is too long; the file is damaged: copy it again")
        self._stream.seek(header.offset)
        value = self._stream.read(header.length)
        if len(value) != header.length:
            raise _truncated()
        return value

    def items(self, sequence: ElementHeader, wanted: Collection[int]) -> list[dict[int, bytes]]:
        """Read the wanted elements of each item of a sequence.

        Raises
        ------
        FrameDamagedError
            If there are too many items, or they are malformed.
        """
        implicit = self._implicit or sequence.vr == "UN"  # PS3.5, 6.2.2
        items: list[dict[int, bytes]] = []
        position = sequence.offset
        end = self._size if sequence.length == UNDEFINED_LENGTH else sequence.offset + sequence.length
        while position < end:
            tag, length = self._item_header(position)
            position += 8
            if tag == _SEQUENCE_END:
                break
            if tag != _ITEM:
                raise _malformed()
            if len(items) == _MAX_ITEMS:
                raise FrameDamagedError(
                    f"a sequence of the DICOM header has more than {_MAX_ITEMS} items; save it again"
                )
            item: dict[int, bytes] = {}
            items.append(item)
            item_end = self._size if length == UNDEFINED_LENGTH else position + length
            while position < item_end:
                header = self._nested_header(position, implicit)
                position = header.offset
                if header.tag == _ITEM_END:
                    break
                if header.length == UNDEFINED_LENGTH:
                    position = self._skip_sequence(header, implicit=implicit)
                    continue
                if header.tag in wanted:
                    item[header.tag] = self.value(header)
                position += header.length
        self._sequence_end = position
        return items

    def _skip_sequence(self, sequence: ElementHeader, *, implicit: bool | None = None) -> int:
        """Return the offset after a sequence of undefined length."""
        implicit = self._implicit if implicit is None else implicit
        # For each open sequence, whether its items are implicit; and whether the walk is within an item of the last.
        open_sequences = [implicit or sequence.vr == "UN"]
        within_item, position = False, sequence.offset
        while open_sequences:
            if not within_item:
                tag, length = self._item_header(position)
                position += 8
                if tag == _SEQUENCE_END:
                    open_sequences.pop()
                    within_item = True  # of the sequence around it
                elif tag != _ITEM:
                    raise _malformed()
                elif length == UNDEFINED_LENGTH:
                    within_item = True
                else:
                    position += length
                continue
            header = self._nested_header(position, open_sequences[-1])
            position = header.offset
            if header.tag == _ITEM_END:
                within_item = False
            elif header.length == UNDEFINED_LENGTH:
                if len(open_sequences) == _MAX_DEPTH:
                    raise FrameDamagedError(
                        f"the DICOM header has sequences nested more than {_MAX_DEPTH} deep; save it again"
                    )
                open_sequences.append(open_sequences[-1] or header.vr == "UN")
                within_item = False
            else:
                position += header.length
        return position

    def _nested_header(self, position: int, implicit: bool) -> ElementHeader:
        self._count_nested()
        header = self._header(position, implicit)
        if header is None:
            raise _truncated()
        return header

    def _item_header(self, position: int) -> tuple[int, int]:
        self._count_nested()
        self._stream.seek(position)
        head = self._stream.read(8)
        if len(head) < 8:
            raise _truncated()
        group, element = self._tag.unpack_from(head)
        return group << 16 | element, self._long.unpack_from(head, 4)[0]

    def _count_nested(self) -> None:
        self._nested += 1
        if self._nested > _MAX_NESTED:
            raise FrameDamagedError(
                f"the sequences of the DICOM header have more than {_MAX_NESTED} elements; save it again"
            )

    def _header(self, position: int, implicit: bool) -> ElementHeader | None:
        """Read the header of an element; None if the file ends within it."""
        self._stream.seek(position)
        head = self._stream.read(8)
        if len(head) < 8:
            return None
        group, element = self._tag.unpack_from(head)
        tag, vr = group << 16 | element, head[4:6]
        # Some writers change to implicit VR within a file; and items have no VR.
        if implicit or not _is_vr(vr):
            return ElementHeader(tag, "", self._long.unpack_from(head, 4)[0], position + 8)
        if vr not in LONG_VRS:
            return ElementHeader(tag, vr.decode(), self._short.unpack_from(head, 6)[0], position + 8)
        extension = self._stream.read(4)
        if len(extension) < 4:
            return None
        return ElementHeader(tag, vr.decode(), self._long.unpack(extension)[0], position + 12)


def _malformed() -> FrameDamagedError:
    return FrameDamagedError("a sequence of the DICOM header is malformed; the file is damaged: copy it again")


def _truncated() -> FrameDamagedError:
    return FrameDamagedError("the DICOM file is truncated: it ends within its header; copy it again")
