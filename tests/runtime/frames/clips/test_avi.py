"""Chunks of AVI files: completeness, repeated frames, and bounds of the indexes."""

from __future__ import annotations

import io
import struct

import pytest

from echoquad_runtime.errors import FrameDamagedError, FrameTooLargeError
from echoquad_runtime.frames.clips.avi import AviChunks, read_avi_chunks


def chunk(name: bytes, content: bytes = b"") -> bytes:
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def avi(*frames: bytes, index: bytes = b"", kinds: tuple[bytes, ...] = (b"vids",)) -> bytes:
    streams = b"".join(
        chunk(b"LIST", b"strl" + chunk(b"strh", kind + bytes(52)) + chunk(b"strf", bytes(40)) + index) for kind in kinds
    )
    header = chunk(b"LIST", b"hdrl" + chunk(b"avih", bytes(56)) + streams)
    return chunk(b"RIFF", b"AVI " + header + chunk(b"LIST", b"movi" + b"".join(frames)))


FRAME, EMPTY = chunk(b"00dc", bytes(9)), chunk(b"00dc")


def read(data: bytes) -> AviChunks:
    return read_avi_chunks(io.BytesIO(data))


def test_empty_chunks_are_repeated_frames() -> None:
    assert read(avi(FRAME, EMPTY, FRAME, EMPTY, EMPTY)) == AviChunks(complete=True, repeated=3)
    assert read(avi(FRAME, chunk(b"LIST", b"rec " + EMPTY))) == AviChunks(complete=True, repeated=1)
    sound_first = avi(FRAME, EMPTY, chunk(b"01dc"), kinds=(b"auds", b"vids"))
    assert read(sound_first) == AviChunks(complete=True, repeated=1)


def test_file_that_ends_within_a_chunk_or_list_is_incomplete() -> None:
    whole = avi(FRAME, EMPTY, FRAME, EMPTY)
    assert read(whole[:-1]) == AviChunks(complete=False, repeated=1)
    assert read(whole[:-20]) == AviChunks(complete=False, repeated=1)
    assert not read(whole.replace(FRAME, b"\0" * len(FRAME), 1)).complete


def test_index_that_repeats_another_is_bounded() -> None:
    stored = chunk(b"ix00", struct.pack("<HBBI", 2, 0, 1, 8000) + bytes(16 + 8 * 8000))
    entries = 2000
    index = chunk(b"indx", struct.pack("<HBBI16x", 4, 0, 0, entries) + struct.pack("<QII", 0, 1, 1) * entries)
    data = avi(stored, index=index)
    position = data.index(b"ix00")
    with pytest.raises(FrameTooLargeError, match="index"):
        read(data.replace(struct.pack("<QII", 0, 1, 1), struct.pack("<QII", position, 1, 1)))


def test_index_of_indexes_of_indexes_is_refused() -> None:
    inner = chunk(b"ix00", struct.pack("<HBBI", 4, 0, 0, 1) + bytes(40))
    index = chunk(b"indx", struct.pack("<HBBI16x", 4, 0, 0, 1) + struct.pack("<QII", 0, 1, 1))
    data = avi(inner, index=index)
    with pytest.raises(FrameDamagedError, match="index"):
        read(data.replace(struct.pack("<QII", 0, 1, 1), struct.pack("<QII", data.index(b"ix00"), 1, 1)))


def test_stream_header_longer_than_the_file_is_refused() -> None:
    data = bytearray(avi(FRAME))
    struct.pack_into("<I", data, data.index(b"strf") + 4, 1 << 30)
    with pytest.raises(FrameDamagedError):
        read(bytes(data))
