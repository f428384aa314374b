"""MP4 and QuickTime files: bounds of their sample tables, and frames whose bytes are not in the file.

A demultiplexer builds an index with one entry per sample before it reads the first one. Some tables announce any number
of samples in a few bytes, such as ``stsz`` with a common size, or ``trun`` without fields. So the boxes (ISO/IEC
14496-12) are read here first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Final

import numpy as np
import numpy.typing as npt

from echoquad_runtime.errors import FrameDamagedError, FrameFormatError, FrameTooLargeError
from echoquad_runtime.frames.formats import MAX_FRAMES

__all__ = ["check_mp4"]

MAX_BOXES: Final = 500_000  # a clip of MAX_FRAMES fragments has four boxes each on the walk
MAX_SAMPLES: Final = 4_000_000
"""Entries of the index of all tracks: an hour of frames and an hour of sound take under 300 000."""

_CONTAINERS: Final = frozenset({b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf", b"mvex"})
_MAX_DEPTH: Final = 8
_ENTRY_BYTES: Final = {b"stts": 8, b"ctts": 8, b"stsc": 12, b"stco": 4, b"co64": 8, b"stss": 4, b"elst": 12}
"""Tables that begin with a number of entries, and the least size of an entry."""

_Int64 = npt.NDArray[np.int64]


@dataclass
class _Track:
    """What the boxes of a track announce."""

    handler: bytes = b""
    samples: int = 0
    common_size: int = 0
    edits: int = 1
    timed: int = 0  # samples in the longest table of times
    duration: int = 0  # of each sample, if the table of times has a single entry
    tables: dict[bytes, tuple[int, int]] = field(default_factory=dict)  # position and number of entries


class _Walk:
    """Read the boxes of a file in order."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.size = stream.seek(0, 2)
        self._boxes = 0
        self.tracks: list[_Track] = []
        self.fragment_samples = 0
        self.has_moov = False
        self.cut: set[bytes] = set()  # types of the boxes that go on behind the end of the file
        self._read_boxes(0, self.size, 0)

    def _read(self, position: int, size: int) -> bytes:
        self._stream.seek(position)
        return self._stream.read(size)

    def _children(self, begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
        """Yield the type of each box, and where its content begins and ends, at the latest with its parent."""
        while begin + 8 <= end:
            self._boxes += 1
            if self._boxes > MAX_BOXES:
                raise FrameTooLargeError(f"the clip has more than {MAX_BOXES} boxes; expected a few; convert it")
            head = self._read(begin, 16)
            size, content = int.from_bytes(head[:4], "big"), begin + 8
            if size == 1:
                size, content = int.from_bytes(head[8:16], "big"), begin + 16
            elif size == 0:
                size = end - begin
            if size < content - begin:
                return
            if begin + size > self.size:
                self.cut.add(head[4:8])
            yield head[4:8], content, min(begin + size, end)
            begin += size

    def _read_boxes(self, begin: int, end: int, depth: int) -> None:
        for kind, content, stop in self._children(begin, end):
            self.has_moov = self.has_moov or kind == b"moov"
            if kind == b"trak":
                self.tracks.append(_Track())
            if kind in _CONTAINERS:
                if depth < _MAX_DEPTH:
                    self._read_boxes(content, stop, depth + 1)
            elif depth:
                self._read_table(kind, content, stop)

    def _read_table(self, kind: bytes, content: int, stop: int) -> None:
        head = self._read(content, min(24, stop - content)).ljust(24, b"\0")
        if kind == b"cmov":
            raise FrameFormatError("not supported: a clip with a compressed header (cmov); convert it")
        if kind == b"trun":
            samples = int.from_bytes(head[4:8], "big")
            if samples * 4 * (head[2] & 0x0F).bit_count() > stop - content:
                raise _announces(kind, samples)
            self.fragment_samples += samples
        elif self.tracks:
            self._read_track_table(self.tracks[-1], kind, head, content, stop)

    def _read_track_table(self, track: _Track, kind: bytes, head: bytes, content: int, stop: int) -> None:
        first, second = (int.from_bytes(head[at : at + 4], "big") for at in (4, 8))
        if kind == b"hdlr":
            track.handler = track.handler or head[8:12]  # QuickTime adds one for the data, after that of the media
        elif kind == b"stsd" and head[12:16] == b"encv":
            raise FrameFormatError("not supported: an encrypted clip; decrypt it")
        elif kind in (b"stsz", b"stz2"):
            track.samples = max(track.samples, second)
            track.common_size = first if kind == b"stsz" else 0
            bits = int.from_bytes(head[7:8], "big") if kind == b"stz2" else 0 if first else 32
            if second * bits > 8 * (stop - content):
                raise _announces(kind, second)
            track.tables[kind] = content + 12, second
        elif kind in _ENTRY_BYTES:
            if first * _ENTRY_BYTES[kind] > stop - content:
                raise _announces(kind, first)
            if first > MAX_SAMPLES:
                raise FrameTooLargeError(f"a table of the clip has {first} entries; expected at most {MAX_SAMPLES}")
            track.tables[kind] = content + 8, first
            if kind == b"elst":
                track.edits = max(track.edits, first)
            elif kind in (b"stts", b"ctts"):
                track.timed = max(track.timed, int(self.table(track, kind)[:, 0].sum()))
                if kind == b"stts" and first == 1:
                    track.duration = int.from_bytes(head[12:16], "big")

    def table(self, track: _Track, kind: bytes) -> _Int64:
        """Return a table of a track, int64 [entries, columns]."""
        position, entries = track.tables.get(kind, (0, 0))
        columns, item = {b"stts": (2, 4), b"ctts": (2, 4), b"stsc": (3, 4), b"co64": (1, 8)}.get(kind, (1, 4))
        data = self._read(position, entries * columns * item)
        data = data[: len(data) // (columns * item) * columns * item]
        return np.frombuffer(data, f">u{item}").astype(np.int64).reshape(-1, columns)


def check_mp4(stream: IO[bytes]) -> int:
    """Check what the sample tables announce, before a demultiplexer allocates it.

    Returns
    -------
    int
        Number of frames whose bytes lie beyond the end of the file. The frames of cut fragments count as one.

    Raises
    ------
    FrameError
        If there is no video track, it is encrypted, or a table announces more than the file can hold or a limit allows.
    """
    walk = _Walk(stream)
    if not walk.has_moov:
        raise FrameDamagedError("the clip has no header (moov box): it is truncated or not finished; copy it again")
    videos = [track for track in walk.tracks if track.handler == b"vide"]
    if not videos and walk.cut:
        raise FrameDamagedError("the clip's header ends before its tracks: the file is truncated; copy it again")
    if not videos:
        raise FrameFormatError("not supported: the file has no video track; expected a clip")
    total = walk.fragment_samples
    for track in walk.tracks:
        samples = max(track.samples, track.timed)
        if track.handler == b"vide" and samples > MAX_FRAMES:
            raise FrameTooLargeError(f"the clip has more than {MAX_FRAMES} frames; cut it")
        if track.handler != b"vide" and track.common_size and samples > walk.size:
            raise FrameDamagedError(f"a track announces {samples} samples, more than the file has bytes; copy it again")
        # Samples of uncompressed sound, which have a common size and last one tick, are indexed by chunks.
        if not (track.handler == b"soun" and track.duration == 1):
            total += samples * track.edits
    if total > MAX_SAMPLES:
        raise FrameTooLargeError(f"the clip's tracks announce {total} samples; expected at most {MAX_SAMPLES}; cut it")
    missing = _missing_frames(walk, videos[0])
    return missing or int(walk.fragment_samples > 0 and bool(walk.cut & {b"moof", b"mdat"}))


def _announces(kind: bytes, entries: int) -> FrameDamagedError:
    return FrameDamagedError(
        f"the clip's table {kind.decode('ascii')} announces {entries} entries, more than it holds; copy the file again"
    )


def _missing_frames(walk: _Walk, track: _Track) -> int:
    """Return how many samples of a track end beyond the end of the file."""
    if b"stz2" in track.tables or not track.samples:
        return 0
    sizes = np.full(track.samples, track.common_size, np.int64)
    if not track.common_size:
        stored = walk.table(track, b"stsz")[:, 0]
        sizes = sizes[: len(stored)]
        sizes[:] = stored[: len(sizes)]
    offsets = walk.table(track, b"co64" if b"co64" in track.tables else b"stco")[:, 0]
    runs = walk.table(track, b"stsc")
    if not len(offsets) or not len(runs) or not len(sizes):
        return 0
    # A run is the first chunk for which its number of samples per chunk holds; chunks are counted from 1.
    run = np.clip(np.searchsorted(runs[:, 0], np.arange(1, len(offsets) + 1), side="right") - 1, 0, None)
    firsts = np.concatenate([[0], np.cumsum(np.minimum(runs[run, 1], len(sizes)))])
    ends = np.cumsum(sizes)
    chunk = np.searchsorted(firsts, np.arange(len(sizes)), side="right") - 1
    inside = chunk < len(offsets)
    chunk = chunk[inside]
    before = np.concatenate([[0], ends])[firsts[chunk]]
    return int(np.count_nonzero(offsets[chunk] + ends[inside] - before > walk.size)) + int(np.count_nonzero(~inside))
