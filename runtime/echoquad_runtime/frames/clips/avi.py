"""AVI files: whether all of the file is there, frames that are repeated by an empty chunk, and bounds of its indexes.

The header of an AVI file counts all chunks of a stream. A chunk of zero length shows the previous frame once more; a
demultiplexer skips it. So only the chunks tell whether frames are missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Final

from echoquad_runtime.errors import FrameDamagedError, FrameTooLargeError
from echoquad_runtime.frames.formats import MAX_FRAMES

__all__ = ["AviChunks", "read_avi_chunks"]

MAX_CHUNKS: Final = 1_000_000  # MAX_FRAMES frames, and nine chunks of sound for each
_LISTS: Final = (b"RIFF", b"LIST")
_INDEX_ENTRY_BYTES: Final = 8  # of OpenDML; those of idx1 have 16
_MAX_DEPTH: Final = 5


@dataclass
class AviChunks:
    """What the chunks of an AVI file show.

    Attributes
    ----------
    complete
        Whether every list ends within the file.
    repeated
        Number of empty chunks of the first video stream.
    """

    complete: bool = True
    repeated: int = 0


class _Walk:
    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.size = stream.seek(0, 2)
        self.chunks = AviChunks()
        self._count = 0
        self._streams = 0
        self._video: int | None = None
        self._index_entries = 0
        self._read_list(0, self.size, 0)

    def _read(self, position: int, size: int) -> bytes:
        self._stream.seek(position)
        return self._stream.read(size)

    def _children(self, begin: int, end: int) -> Iterator[tuple[bytes, int, int, bytes]]:
        """Yield the name of each chunk, where its content begins and ends, and the first bytes of its content."""
        while begin + 8 <= end:
            self._count += 1
            if self._count > MAX_CHUNKS:
                raise FrameTooLargeError(f"the clip has more than {MAX_CHUNKS} chunks; cut it")
            head = self._read(begin, 20)
            length = int.from_bytes(head[4:8], "little")
            if not head[:4].isascii() or not head[:4].strip(b"\0"):
                self.chunks.complete = False
                return
            if begin + 8 + length > self.size:
                self.chunks.complete = False
            yield head[:4], begin + 8, begin + 8 + length, head[8:]
            begin += 8 + length + length % 2

    def _read_list(self, begin: int, end: int, depth: int) -> None:
        for name, content, stop, head in self._children(begin, end):
            if name in _LISTS:
                if depth < _MAX_DEPTH:
                    self._read_list(content + 4, min(stop, self.size), depth + 1)
            elif name == b"strh":
                if stop > self.size:
                    raise FrameDamagedError("the clip's header is damaged or truncated: copy the file again")
                if head[:4] == b"vids" and self._video is None:
                    self._video = self._streams
                self._streams += 1
            elif name in (b"strf", b"strd") and stop > self.size:
                raise FrameDamagedError("the clip's header is damaged or truncated: copy the file again")
            elif name == b"idx1":
                self._add_index_entries((min(stop, self.size) - content) // 16)
            elif name == b"indx":
                self._read_super_index(content, min(stop, self.size))
            elif name[2:] in (b"dc", b"db") and stop == content and name[:2] == b"%02d" % (self._video or 0):
                self.chunks.repeated += 1

    def _read_super_index(self, content: int, stop: int) -> None:
        """Count the entries of the indexes that a stream's index refers to; several may refer to the same one."""
        data = self._read(content, min(stop - content, 24 + 16 * MAX_FRAMES))
        entries = min(int.from_bytes(data[4:8], "little"), max(0, len(data) - 24) // 16)
        if data[3:4] == b"\1":  # an index of chunks itself
            self._add_index_entries(min(int.from_bytes(data[4:8], "little"), len(data) // _INDEX_ENTRY_BYTES))
            return
        for number in range(entries):
            position = int.from_bytes(data[24 + 16 * number : 32 + 16 * number], "little")
            self._add_index_entries(1)
            if position + 16 <= self.size:
                head = self._read(position, 16)
                if head[11:12] == b"\0":
                    raise FrameDamagedError("the clip's index refers to another index of indexes; convert the clip")
                stored = (self.size - position) // _INDEX_ENTRY_BYTES
                self._add_index_entries(min(int.from_bytes(head[12:16], "little"), stored))

    def _add_index_entries(self, entries: int) -> None:
        self._index_entries += entries
        if self._index_entries > 4 * MAX_CHUNKS:
            raise FrameTooLargeError(f"the clip's indexes have more than {4 * MAX_CHUNKS} entries; convert the clip")


def read_avi_chunks(stream: IO[bytes]) -> AviChunks:
    """Read the headers of the chunks of an AVI file.

    Raises
    ------
    FrameError
        If its header is truncated, or it has more chunks or index entries than a limit.
    """
    return _Walk(stream).chunks
