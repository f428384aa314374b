"""Byte ranges of the frames of a DICOM file: of uncompressed pixels, and of encapsulated fragments (PS3.5, A.4)."""

from __future__ import annotations

import os
import struct
from typing import IO, Final

from echoquad_runtime.errors import FrameDamagedError, FrameFormatError, FrameTooLargeError
from echoquad_runtime.frames.dicom.codecs import uncompressed_frame_bytes
from echoquad_runtime.frames.dicom.data_set import MAX_VALUE_BYTES, UNDEFINED_LENGTH
from echoquad_runtime.frames.dicom.header import Header, ParsedHeader
from echoquad_runtime.frames.dicom.jpeg_2000 import CODESTREAM_START
from echoquad_runtime.frames.dicom.transfer_syntaxes import JPEG_2000, RLE, UNCOMPRESSED
from echoquad_runtime.frames.formats import MAX_FILE_BYTES, MAX_FRAMES

__all__ = ["Ranges", "find_frame_ranges"]

_ITEM, _SEQUENCE_DELIMITER = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)
_MAX_FRAGMENTS: Final = 4 * MAX_FRAMES
_MAX_PADDING: Final = 10  # bytes after the end marker of a frame

Ranges = list[tuple[int, int]]
"""Offset and length, in bytes, of each fragment of a frame."""


def find_frame_ranges(stream: IO[bytes], parsed: ParsedHeader) -> tuple[list[Ranges], bool]:
    """Return the ranges of the frames that are in the file, and whether all that the header states are complete.

    Raises
    ------
    FrameFormatError
        If the file holds more pixels than its header explains, or nothing assigns them to frames.
    FrameDamagedError
        If pixels or offset tables contradict the header.
    FrameTooLargeError
        If there are too many fragments, or a frame is too large.
    """
    header, frames = parsed.header, parsed.frames
    _, length, begin = parsed.pixel_data
    size = stream.seek(0, os.SEEK_END)
    if header.syntax not in UNCOMPRESSED:
        if length != UNDEFINED_LENGTH:
            raise FrameDamagedError("the DICOM file's compressed pixels are not encapsulated; save it again")
        return _encapsulated(stream, size, parsed)
    if length == UNDEFINED_LENGTH:
        return _undefined_length(stream, header, frames, begin, size)
    return _consecutive(header, frames, begin, min(length, size - begin))


# ---------------------------------------------------------------------------------------------- uncompressed


def _consecutive(header: Header, frames: int, begin: int, length: int) -> tuple[list[Ranges], bool]:
    """Return the ranges of frames that follow one another."""
    size = _frame_bytes(header, frames, length)
    if length >= (frames + 1) * size:
        raise _excess()
    present = min(frames, max(0, length) // size)
    return [[(begin + index * size, size)] for index in range(present)], present == frames


def _frame_bytes(header: Header, frames: int, length: int) -> int:
    size = uncompressed_frame_bytes(header)
    pixels = header.rows * header.columns
    if header.photometric == "YBR_FULL_422" and length in (3 * pixels * frames, 3 * pixels * frames + 1):
        size = 3 * pixels  # the chroma is not halved, whatever the header says
    if header.byte_swapped and size % 2:
        if frames > 1:
            raise FrameFormatError("the DICOM file's frames begin in the middle of big-endian words; convert it")
        size += 1
    if size > MAX_FILE_BYTES:
        raise FrameTooLargeError(f"a frame of the DICOM file has {size} bytes; expected at most {MAX_FILE_BYTES}")
    return size


def _undefined_length(
    stream: IO[bytes], header: Header, frames: int, begin: int, size: int
) -> tuple[list[Ranges], bool]:
    """Return the ranges of uncompressed pixels of undefined length: in items, or before a delimiter.

    The header says how long they are; they are read only if they are exactly so long.
    """
    fragments, ended = _walk_fragments(stream, begin, size, "<>"[header.big_endian])
    if fragments:
        fragments = [fragment for fragment in fragments if fragment[1]]  # without an empty offset table
        length = sum(length for _, length in fragments)
        frame_bytes = _frame_bytes(header, frames, length)
        if ended and length in (frames * frame_bytes, frames * frame_bytes + 1):
            if len(fragments) == 1:
                return _consecutive(header, frames, *fragments[0])
            if len(fragments) == frames:
                return [[(offset, frame_bytes)] for offset, _ in fragments], True
            if frames == 1:
                return [fragments], True
    else:
        length = frames * _frame_bytes(header, frames, -1)
        length += length % 2
        stream.seek(begin + length)
        if stream.read(8) == struct.pack(f"{'<>'[header.big_endian]}HHI", *_SEQUENCE_DELIMITER, 0):
            return _consecutive(header, frames, begin, length)
    raise FrameDamagedError("the DICOM file's uncompressed pixels have no length; save it again")


def _excess() -> FrameFormatError:
    return FrameFormatError(
        "the DICOM file holds more pixels than its header explains (a wrong number of frames, or of bits?); save it "
        "again"
    )


# ---------------------------------------------------------------------------------------------- encapsulated


def _walk_fragments(stream: IO[bytes], begin: int, size: int, byte_order: str) -> tuple[Ranges, bool]:
    """Return the items that begin at `begin`, the offset table among them, and whether they are complete."""
    fragments: Ranges = []
    position, item_header = begin, struct.Struct(f"{byte_order}HHI")
    while position + 8 <= size and len(fragments) <= _MAX_FRAGMENTS + 1:
        stream.seek(position)
        group, element, length = item_header.unpack(stream.read(8))
        if (group, element) == _SEQUENCE_DELIMITER:
            return fragments, True
        if (group, element) != _ITEM or position + 8 + length > size:
            break
        fragments.append((position + 8, length))
        position += 8 + length
    # Some writers omit the delimiter; the fragments have end markers of their own.
    return fragments, position == size


def _encapsulated(stream: IO[bytes], size: int, parsed: ParsedHeader) -> tuple[list[Ranges], bool]:
    """Assign the fragments to frames: by an offset table, or by the markers at their beginning and end."""
    frames = parsed.frames
    fragments, ended = _walk_fragments(stream, parsed.pixel_data.offset, size, "<")
    offset_table = b""
    if fragments:
        offset, length = fragments.pop(0)
        stream.seek(offset)
        offset_table = stream.read(length // 4 * 4) if length <= MAX_VALUE_BYTES else b""
    if len(fragments) > _MAX_FRAGMENTS:
        raise FrameTooLargeError(f"the DICOM file's pixels have more than {_MAX_FRAGMENTS} fragments; save it again")
    if frames == 1 or len(fragments) == frames:
        if frames == 1 and len(_group_by_markers(stream, parsed.header, fragments)) > 1:
            raise _excess()
        if frames == 1 and fragments:
            return [fragments], ended
        return [[fragment] for fragment in fragments], ended
    offsets = parsed.offsets or struct.unpack(f"<{len(offset_table) // 4}I", offset_table)
    by_offsets = _group_by_offsets(fragments, offsets, ended) if len(offsets) == frames else None
    if by_offsets is not None:
        return by_offsets, ended
    groups = _group_by_markers(stream, parsed.header, fragments)
    if len(groups) > frames:
        raise _excess()
    if not groups and frames < len(fragments):
        raise FrameFormatError("nothing assigns the DICOM file's fragments to frames; save it again")
    if len(groups) < frames and len(offsets) == frames and ended:
        raise FrameDamagedError("the DICOM file's offset table contradicts its fragments; save it again")
    return groups or [[fragment] for fragment in fragments], ended


def _group_by_offsets(fragments: Ranges, offsets: tuple[int, ...], ended: bool) -> list[Ranges] | None:
    """Group fragments by a table of the offsets of frames; None if they contradict it."""
    if not fragments:
        return []
    first = fragments[0][0]  # offsets count from the first fragment's item header to each other one's
    index = {start - first: number for number, (start, _) in enumerate(fragments)}
    starts = []
    for offset in offsets:
        if offset not in index:
            break
        starts.append(index[offset])
    if starts != sorted(set(starts)) or starts[:1] != [0] or (ended and len(starts) < len(offsets)):
        return None
    ends = [*starts[1:], len(fragments)]
    frames = [fragments[start:end] for start, end in zip(starts, ends, strict=True)]
    return frames if ended else frames[:-1]  # the last one may lack fragments


def _group_by_markers(stream: IO[bytes], header: Header, fragments: Ranges) -> list[Ranges]:
    """Group fragments by the markers of their codec, as DCMTK and pydicom do without an offset table.

    Compressed data contain no such markers. A fragment begins a frame if it looks so and the one before it ends one.
    The result is empty if the first fragment has no such marker.
    """
    if len(fragments) <= 1:
        return [[fragment] for fragment in fragments]
    groups: list[Ranges] = []
    previous_ends = True
    for offset, length in fragments:
        stream.seek(offset)
        if previous_ends and _begins_frame(header, stream.read(min(length, 8))):
            groups.append([])
        if not groups:
            return []
        groups[-1].append((offset, length))
        tail = min(length, _MAX_PADDING)
        stream.seek(offset + length - tail)
        previous_ends = header.syntax == RLE or b"\xff\xd9" in stream.read(tail)
    return groups


def _begins_frame(header: Header, head: bytes) -> bool:
    if header.syntax == RLE:  # number of segments, and offset of the first one
        return head == struct.pack("<2I", header.samples_per_pixel * header.bits_allocated // 8, 64)
    if header.syntax in JPEG_2000:
        return head.startswith((CODESTREAM_START, b"\0\0\0\x0cjP  "))
    return head.startswith(b"\xff\xd8\xff")
