"""DICOM files: where each frame's bytes lie.

The file is opened for its header (see `header`), and again for each frame, so that a clip is never
in memory.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import IO, Final

from echoquad_runtime.errors import (
    FrameDamagedError,
    FrameFormatError,
    FrameReadError,
    FrameTooLargeError,
)
from echoquad_runtime.frames.dicom.elements import (
    DEFLATED,
    MAX_VALUE,
    NATIVE,
    UNDEFINED,
    inflated,
    reworded,
    transfer_syntax,
)
from echoquad_runtime.frames.dicom.header import Header, read_header
from echoquad_runtime.frames.formats import MAX_FILE_BYTES, MAX_FRAMES

__all__ = ["DicomFile"]

_ITEM, _END_OF_SEQUENCE = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)
_MAX_FRAGMENTS: Final = 4 * MAX_FRAMES

Open = Callable[[], AbstractContextManager[IO[bytes]]]
"""Opens the file's bytes, each time at their beginning."""


class DicomFile:
    """A DICOM file with pixels.

    Parameters
    ----------
    open_stream
        Opens its bytes.

    Attributes
    ----------
    header
        What its frames have in common.
    count
        Frames whose bytes are there.
    announced
        Frames that the header announces.
    inflated
        Whether it was deflated as a whole, and is in memory now.

    Raises
    ------
    FrameError
        If it cannot be read, is no DICOM, has no pixels or too many, or is of a kind that no rule covers.
    """

    def __init__(self, open_stream: Open) -> None:
        self._open, self.inflated = open_stream, False
        with self._open() as stream:
            self.header, self.announced, self._places = reworded("the DICOM header cannot be read", self._read, stream)
        self.count = min(len(self._places), self.announced)
        if self.count == 0 or (self.announced == 1 and not self._whole):
            raise FrameDamagedError("the DICOM file ends before its pixels do: it is truncated; copy it again")

    def encoded(self, number: int) -> bytes:
        """Read the bytes of a frame, counted from 1.

        Raises
        ------
        FrameError
            If there is no such frame, or it cannot be read.
        """
        if not 1 <= number <= self.count:
            raise FrameDamagedError(f"there is no frame {number}; the file holds {self.count}")
        with self._open() as stream:
            parts = []
            for offset, length in self._places[number - 1]:
                stream.seek(offset)
                parts.append(stream.read(length))
                if len(parts[-1]) != length:
                    raise FrameReadError("the file became shorter while it was read; wait until it is written")
        return b"".join(parts)

    def _read(self, stream: IO[bytes]) -> tuple[Header, int, list[list[tuple[int, int]]]]:
        syntax, begin = transfer_syntax(stream)
        if syntax == DEFLATED:
            stream.seek(begin)
            data, begin = inflated(stream), 0
            self._open, self.inflated = (lambda: io.BytesIO(data)), True
            stream = io.BytesIO(data)
        found = read_header(stream, syntax, begin)
        size = stream.seek(0, os.SEEK_END)
        if syntax in NATIVE:
            if found.length == UNDEFINED:
                raise FrameDamagedError("the DICOM file's pixels have no length; save it again")
            length = min(found.length, size - found.begin)
            places, self._whole = _native(found.header, found.frames, found.begin, length)
        else:
            if found.length != UNDEFINED:
                raise FrameDamagedError("the DICOM file's compressed pixels are in no sequence; save it again")
            places, self._whole = _encapsulated(stream, found.begin, size, found.frames, found.offsets)
        return found.header, found.frames, places


# ---------------------------------------------------------------------------------------------- frames' places


def _native(header: Header, frames: int, begin: int, length: int) -> tuple[list[list[tuple[int, int]]], bool]:
    """Place frames that lie one behind the other."""
    pixels = header.rows * header.columns
    size = 2 * pixels if header.photometric == "YBR_FULL_422" else pixels * header.samples * header.allocated // 8
    if header.swapped and size % 2:
        if frames > 1:
            raise FrameFormatError("the DICOM file's frames begin in the middle of big-endian words; convert it")
        size += 1
    if size > MAX_FILE_BYTES:
        raise FrameTooLargeError(f"a frame of the DICOM file holds {size} bytes; expected at most {MAX_FILE_BYTES}")
    there = min(frames, max(0, length) // size)
    return [[(begin + index * size, size)] for index in range(there)], there == frames


def _encapsulated(
    stream: IO[bytes], begin: int, size: int, frames: int, extended: tuple[int, ...]
) -> tuple[list[list[tuple[int, int]]], bool]:
    """Walk the fragments of compressed pixels, by their headers alone, and put them to frames (DICOM PS3.5, A.4)."""
    pieces: list[tuple[int, int]] = []
    at, ended, table = begin, False, b""
    while at + 8 <= size and len(pieces) <= _MAX_FRAGMENTS:
        stream.seek(at)
        group, element, length = struct.unpack("<HHI", stream.read(8))
        if (group, element) == _END_OF_SEQUENCE:
            ended = True
            break
        if (group, element) != _ITEM or at + 8 + length > size:
            break
        if at == begin:
            table = stream.read(length) if length <= MAX_VALUE else b""
        else:
            pieces.append((at + 8, length))
        at += 8 + length
    ended = ended or at == size  # some writers leave the end away; what is in the pieces has ends of its own
    if len(pieces) > _MAX_FRAGMENTS:
        raise FrameTooLargeError(f"the DICOM file's pixels are in more than {_MAX_FRAGMENTS} pieces; save it again")
    if frames == 1:
        if sum(length for _, length in pieces) > MAX_FILE_BYTES:
            raise FrameTooLargeError(f"the DICOM file's frame holds more than {MAX_FILE_BYTES} bytes; save it again")
        return [pieces] if pieces else [], ended
    offsets = extended or struct.unpack(f"<{len(table) // 4}I", table[: len(table) // 4 * 4])
    if len(pieces) == frames or (len(pieces) < frames and len(offsets) != frames):
        return [[piece] for piece in pieces], ended
    if len(offsets) != frames:
        raise FrameFormatError("the DICOM file does not say which piece of its pixels is of which frame; save it again")
    return _by_offsets(pieces, offsets, ended), ended


def _by_offsets(pieces: list[tuple[int, int]], offsets: tuple[int, ...], ended: bool) -> list[list[tuple[int, int]]]:
    if not pieces:
        return []
    first = pieces[0][0]  # offsets are of items, whose headers have eight bytes, from the first item on
    index = {start - first: place for place, (start, _) in enumerate(pieces)}
    starts = []
    for offset in offsets:
        if offset not in index:
            break
        starts.append(index[offset])
    if starts != sorted(set(starts)) or starts[:1] != [0] or (ended and len(starts) < len(offsets)):
        raise FrameDamagedError("the DICOM file's table of frames does not fit its pixels; save it again")
    ends = [*starts[1:], len(pieces)]
    places = [pieces[start:end] for start, end in zip(starts, ends, strict=True)]
    return places if ended else places[:-1]  # the last may have lost some
