"""DICOM files: the byte ranges of each frame.

The file is opened for its header (see `header`) and again for each frame, so that a clip is never held in memory.
"""

from __future__ import annotations

import io
import os
import struct
from typing import IO, Final

from echoquad_runtime.errors import (
    FrameDamagedError,
    FrameFormatError,
    FrameReadError,
    FrameTooLargeError,
)
from echoquad_runtime.frames.decoded_frame import DecodedFrame
from echoquad_runtime.frames.dicom.elements import (
    MAX_VALUE_BYTES,
    UNDEFINED_LENGTH,
    call_anonymized,
    inflate,
    read_transfer_syntax,
)
from echoquad_runtime.frames.dicom.header import Header, read_header
from echoquad_runtime.frames.dicom.pixels import decode_pixels
from echoquad_runtime.frames.dicom.transfer_syntaxes import DEFLATED, UNCOMPRESSED
from echoquad_runtime.frames.file_access import OpenStream
from echoquad_runtime.frames.formats import MAX_FILE_BYTES, MAX_FRAMES, Flip

__all__ = ["DicomFile"]

_ITEM, _SEQUENCE_DELIMITER = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)
_MAX_FRAGMENTS: Final = 4 * MAX_FRAMES

_Ranges = list[tuple[int, int]]
"""Offset and length, in bytes, of each fragment of a frame."""


class DicomFile:
    """A DICOM file with pixels.

    Parameters
    ----------
    open_stream
        Opens the bytes of the file.

    Attributes
    ----------
    header
        What all frames have in common.
    frame_count
        Number of frames whose bytes are in the file.
    stated_frame_count
        Number of frames that the header states.
    multi_frame
        Whether the header states several frames.
    in_memory
        Whether the file was deflated as a whole, so that its inflated bytes are held in memory.

    Raises
    ------
    FrameError
        If the file cannot be read, is not DICOM, has no pixels or too many, or is of an unsupported kind.
    """

    def __init__(self, open_stream: OpenStream) -> None:
        self._open, self.in_memory = open_stream, False
        with self._open() as stream:
            self.header, self.stated_frame_count, self._frames, complete = call_anonymized(
                "the DICOM header cannot be read", self._parse, stream
            )
        self.frame_count = min(len(self._frames), self.stated_frame_count)
        self.multi_frame = self.stated_frame_count > 1
        if self.frame_count == 0 or (self.stated_frame_count == 1 and not complete):
            raise FrameDamagedError("the DICOM file is truncated: its pixels are incomplete; copy it again")

    def decode(self, number: int, flip: Flip) -> DecodedFrame:
        """Decode a frame, counted from 1; `flip` is for matrices and ignored.

        Raises
        ------
        FrameError
            If there is no such frame, or it cannot be read or decoded.
        """
        return decode_pixels(self.header, self._read_encoded(number))

    def _read_encoded(self, number: int) -> bytes:
        if not 1 <= number <= self.frame_count:
            raise FrameDamagedError(f"there is no frame {number}; the file holds {self.frame_count}")
        with self._open() as stream:
            parts = []
            for offset, length in self._frames[number - 1]:
                stream.seek(offset)
                parts.append(stream.read(length))
                if len(parts[-1]) != length:
                    raise FrameReadError("the file became shorter while it was read; wait until it is written")
        return b"".join(parts)

    def _parse(self, stream: IO[bytes]) -> tuple[Header, int, list[_Ranges], bool]:
        """Return the header, the stated number of frames, the ranges of those present, and whether all are complete."""
        syntax, begin = read_transfer_syntax(stream)
        if syntax == DEFLATED:
            stream.seek(begin)
            data, begin = inflate(stream), 0
            self._open, self.in_memory = (lambda: io.BytesIO(data)), True
            stream = io.BytesIO(data)
        parsed = read_header(stream, syntax, begin)
        _, length, offset = parsed.pixel_data
        size = stream.seek(0, os.SEEK_END)
        if syntax in UNCOMPRESSED:
            if length == UNDEFINED_LENGTH:
                raise FrameDamagedError("the DICOM file's uncompressed pixels have no length; save it again")
            frames, complete = _uncompressed_ranges(parsed.header, parsed.frames, offset, min(length, size - offset))
        else:
            if length != UNDEFINED_LENGTH:
                raise FrameDamagedError("the DICOM file's compressed pixels are not encapsulated; save it again")
            frames, complete = _encapsulated_ranges(stream, offset, size, parsed.frames, parsed.offsets)
        return parsed.header, parsed.frames, frames, complete


# ---------------------------------------------------------------------------------------------- byte ranges


def _uncompressed_ranges(header: Header, frames: int, begin: int, length: int) -> tuple[list[_Ranges], bool]:
    """Return the ranges of frames that follow one another."""
    pixels = header.rows * header.columns
    size = pixels * header.samples_per_pixel * header.bits_allocated // 8
    if header.photometric == "YBR_FULL_422":
        size = 2 * pixels
    if header.byte_swapped and size % 2:
        if frames > 1:
            raise FrameFormatError("the DICOM file's frames begin in the middle of big-endian words; convert it")
        size += 1
    if size > MAX_FILE_BYTES:
        raise FrameTooLargeError(f"a frame of the DICOM file has {size} bytes; expected at most {MAX_FILE_BYTES}")
    present = min(frames, max(0, length) // size)
    return [[(begin + index * size, size)] for index in range(present)], present == frames


def _encapsulated_ranges(
    stream: IO[bytes], begin: int, size: int, frames: int, extended_offsets: tuple[int, ...]
) -> tuple[list[_Ranges], bool]:
    """Walk the item headers of encapsulated pixels and assign the fragments to frames (DICOM PS3.5, A.4)."""
    fragments: _Ranges = []
    position, ended, offset_table = begin, False, b""
    while position + 8 <= size and len(fragments) <= _MAX_FRAGMENTS:
        stream.seek(position)
        group, element, length = struct.unpack("<HHI", stream.read(8))
        if (group, element) == _SEQUENCE_DELIMITER:
            ended = True
            break
        if (group, element) != _ITEM or position + 8 + length > size:
            break
        if position == begin:
            offset_table = stream.read(length) if length <= MAX_VALUE_BYTES else b""
        else:
            fragments.append((position + 8, length))
        position += 8 + length
    ended = ended or position == size  # some writers omit the delimiter; the fragments have end markers of their own
    if len(fragments) > _MAX_FRAGMENTS:
        raise FrameTooLargeError(f"the DICOM file's pixels have more than {_MAX_FRAGMENTS} fragments; save it again")
    if frames == 1:
        if sum(length for _, length in fragments) > MAX_FILE_BYTES:
            raise FrameTooLargeError(f"the DICOM file's frame has more than {MAX_FILE_BYTES} bytes; save it again")
        return [fragments] if fragments else [], ended
    offsets = extended_offsets or struct.unpack(
        f"<{len(offset_table) // 4}I", offset_table[: len(offset_table) // 4 * 4]
    )
    if len(fragments) == frames or (len(fragments) < frames and len(offsets) != frames):
        return [[fragment] for fragment in fragments], ended
    if len(offsets) != frames:
        raise FrameFormatError("the DICOM file has several fragments per frame but no offset table; save it again")
    return _group_by_offsets(fragments, offsets, ended), ended


def _group_by_offsets(fragments: _Ranges, offsets: tuple[int, ...], ended: bool) -> list[_Ranges]:
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
        raise FrameDamagedError("the DICOM file's offset table contradicts its fragments; save it again")
    ends = [*starts[1:], len(fragments)]
    frames = [fragments[start:end] for start, end in zip(starts, ends, strict=True)]
    return frames if ended else frames[:-1]  # the last one may lack fragments
