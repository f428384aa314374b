"""DICOM files: the byte ranges of each frame.

The file is opened for its header (see `header`) and again for each frame, so that a clip is never held in memory.
"""

from __future__ import annotations

import io
from typing import IO

from echoquad_runtime.errors import FrameDamagedError, FrameReadError, FrameTooLargeError
from echoquad_runtime.frames.decoded_frame import DecodedFrame
from echoquad_runtime.frames.dicom.elements import call_anonymized, inflate, read_transfer_syntax
from echoquad_runtime.frames.dicom.frame_ranges import Ranges, find_frame_ranges
from echoquad_runtime.frames.dicom.header import Header, read_header
from echoquad_runtime.frames.dicom.pixels import decode_pixels
from echoquad_runtime.frames.dicom.transfer_syntaxes import DEFLATED
from echoquad_runtime.frames.file_access import OpenStream
from echoquad_runtime.frames.formats import MAX_FILE_BYTES, Flip

__all__ = ["DicomFile"]


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
        ranges = self._frames[number - 1]
        if sum(length for _, length in ranges) > MAX_FILE_BYTES:
            raise FrameTooLargeError(f"a frame of the DICOM file has more than {MAX_FILE_BYTES} bytes; save it again")
        with self._open() as stream:
            parts = []
            for offset, length in ranges:
                stream.seek(offset)
                parts.append(stream.read(length))
                if len(parts[-1]) != length:
                    raise FrameReadError("the file became shorter while it was read; wait until it is written")
        return b"".join(parts)

    def _parse(self, stream: IO[bytes]) -> tuple[Header, int, list[Ranges], bool]:
        """Return the header, the stated number of frames, the ranges of those present, and whether all are complete."""
        syntax, begin = read_transfer_syntax(stream)
        if syntax == DEFLATED:
            stream.seek(begin)
            data, begin = inflate(stream), 0
            self._open, self.in_memory = (lambda: io.BytesIO(data)), True
            stream = io.BytesIO(data)
        parsed = read_header(stream, syntax, begin)
        return parsed.header, parsed.frames, *find_frame_ranges(stream, parsed)
