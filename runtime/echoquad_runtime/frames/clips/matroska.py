"""Matroska and WebM files: whether the segment ends within the file, and a bound of its tables.

A demultiplexer keeps each entry of the cues, tags and chapters, which may take two bytes in the file, in memory.
"""

from __future__ import annotations

from typing import IO, Final

from echoquad_runtime.errors import FrameTooLargeError

__all__ = ["is_matroska_complete"]

MAX_TABLE_BYTES: Final = 8 << 20  # the cues of an hour take 2 MB
MAX_ELEMENTS: Final = 500_000  # clusters and tables
MAX_ATTACHMENT_BYTES: Final = 64 << 20  # fonts
_SEGMENT, _CLUSTER, _ATTACHMENTS, _VOID = 0x18538067, 0x1F43B675, 0x1941A469, 0xEC


def is_matroska_complete(stream: IO[bytes]) -> bool:
    """Return whether the clusters, which hold the frames, end within the file, as far as the file states.

    A file that ends within the tables behind its clusters has all frames.

    Raises
    ------
    FrameTooLargeError
        If a table is longer than a limit, or there are too many.
    """
    size = stream.seek(0, 2)
    position, segment_end, last = 0, 0, 0
    for _ in range(MAX_ELEMENTS):
        stream.seek(position)
        element, length, content = _read_element(stream.read(16))
        if element is None:
            return last != _CLUSTER or size >= segment_end
        position += content
        if element == _SEGMENT:  # go into it
            segment_end = position + (length or 0)
            continue
        if length is None:  # of a live recording; what follows are its clusters
            return True
        limit = MAX_ATTACHMENT_BYTES if element == _ATTACHMENTS else MAX_TABLE_BYTES
        if element not in (_CLUSTER, _VOID) and length > limit:
            raise FrameTooLargeError(f"a table of the clip has {length} bytes; expected at most {limit}")
        position += length
        if position > size:
            return element != _CLUSTER
        last = element
    raise FrameTooLargeError(f"the clip has more than {MAX_ELEMENTS} clusters and tables; cut it")


def _read_element(head: bytes) -> tuple[int | None, int | None, int]:
    """Return the id of an element, its length (None: unknown), and the size of both (RFC 8794, 4 and 5)."""
    id_size = 9 - head[0].bit_length() if head and head[0] else 9
    if id_size > 4 or len(head) <= id_size or not head[id_size]:
        return None, None, 0
    length_size = 9 - head[id_size].bit_length()
    content = id_size + length_size
    length = int.from_bytes(head[id_size:content], "big") & ((1 << 7 * length_size) - 1)
    unknown = length == (1 << 7 * length_size) - 1
    return int.from_bytes(head[:id_size], "big"), None if unknown else length, content
