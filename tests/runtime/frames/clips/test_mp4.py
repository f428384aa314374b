"""Sample tables of MP4 files: what they may announce, and frames beyond the end of the file."""

from __future__ import annotations

import io
import struct
import tracemalloc

import pytest

from echoquad_runtime.errors import FrameDamagedError, FrameError, FrameFormatError, FrameTooLargeError
from echoquad_runtime.frames.clips.mp4 import check_mp4

MANY = 4_000_000_000


def box(kind: bytes, *contents: bytes) -> bytes:
    content = b"".join(contents)
    return struct.pack(">I", 8 + len(content)) + kind + content


def table(kind: bytes, *numbers: int) -> bytes:
    return box(kind, struct.pack(f">{1 + len(numbers)}I", 0, *numbers))


def track(*tables: bytes, handler: bytes = b"vide", edits: bytes = b"", entry: bytes = b"mp4v") -> bytes:
    description = box(b"stsd", struct.pack(">3I", 0, 1, 16) + entry + bytes(8))
    header = box(b"hdlr", bytes(8) + handler + bytes(13))
    return box(b"trak", edits, box(b"mdia", header, box(b"minf", box(b"stbl", description, *tables))))


def mp4(*boxes: bytes) -> bytes:
    return box(b"ftyp", b"isom\0\0\2\0isom") + b"".join(boxes)


def check(data: bytes) -> int:
    return check_mp4(io.BytesIO(data))


FEW = (table(b"stts", 1, 3, 40), table(b"stsc", 1, 1, 3, 1), table(b"stsz", 10, 3), table(b"stco", 1, 36))
SOUND = (table(b"stts", 1, MANY, 1), table(b"stsc", 1, 1, MANY, 1), table(b"stsz", 4, MANY), table(b"stco", 1, 36))


def test_clip_of_a_few_frames_is_accepted() -> None:
    assert check(mp4(box(b"mdat", bytes(30)), box(b"moov", track(*FEW)))) == 0


@pytest.mark.parametrize(
    ("boxes", "error"),
    [
        ([box(b"moov", track(table(b"stsz", 1, MANY)))], FrameTooLargeError),
        ([box(b"moov", track(table(b"stsz", 0, MANY)))], FrameDamagedError),
        ([box(b"moov", track(table(b"stts", 1, MANY, 1), *FEW[1:]))], FrameTooLargeError),
        ([box(b"moov", track(table(b"stts", MANY, 1, 1), *FEW[1:]))], FrameDamagedError),
        ([box(b"moov", track(table(b"ctts", 1, MANY, 1), *FEW))], FrameTooLargeError),
        ([box(b"moov", track(*FEW), track(table(b"stsz", 1, MANY), handler=b"soun"))], FrameDamagedError),
        ([box(b"moov", track(*FEW), track(*SOUND, handler=b"soun"))], FrameDamagedError),
        ([box(b"moov", *[track(table(b"stsz", 1, 99_000))] * 50)], FrameTooLargeError),
        (
            [box(b"moov", track(table(b"stsz", 1, 90_000), edits=box(b"edts", table(b"elst", 99, *[1] * 297))))],
            FrameTooLargeError,
        ),
        ([box(b"moov", track(*FEW)), box(b"moof", box(b"traf", table(b"trun", MANY)))], FrameTooLargeError),
        (
            [box(b"moov", track(*FEW)), box(b"moof", box(b"traf", box(b"trun", b"\0\0\2\0" + b"\xff" * 4)))],
            FrameDamagedError,
        ),
        ([box(b"moov", box(b"cmov", bytes(40)))], FrameFormatError),
        ([box(b"moov", track(*FEW, entry=b"encv"))], FrameFormatError),
        ([box(b"moov", track(*FEW, handler=b"soun"))], FrameFormatError),
        ([box(b"meta", bytes(60)), box(b"mdat", bytes(60))], FrameDamagedError),
    ],
)
def test_tables_that_announce_too_much_are_refused_at_once(boxes: list[bytes], error: type[FrameError]) -> None:
    tracemalloc.start()
    with pytest.raises(error):
        check(mp4(*boxes))
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_uncompressed_sound_may_have_more_samples_than_frames() -> None:
    sound = (table(b"stts", 1, 200_000, 1), table(b"stsz", 2, 200_000))
    data = mp4(box(b"mdat", bytes(400_000)), box(b"moov", track(*FEW), track(*sound, handler=b"soun")))
    assert check(data) == 0


def test_frames_beyond_the_end_of_the_file_are_counted() -> None:
    header = box(b"moov", track(*FEW[:3], table(b"stco", 1, 0)))
    begin = len(mp4()) + len(header) + 8
    whole = mp4(box(b"moov", track(*FEW[:3], table(b"stco", 1, begin))), box(b"mdat", bytes(30)))
    assert [check(whole[: len(whole) - cut]) for cut in (0, 1, 10, 11, 30)] == [0, 1, 1, 2, 3]


def test_box_that_goes_on_behind_its_parent_ends_with_it() -> None:
    data = bytearray(mp4(box(b"mdat", bytes(30)), box(b"moov", track(*FEW))))
    at = data.index(b"stbl") - 4
    struct.pack_into(">I", data, at, 0xFFFFFFF0)
    assert check(bytes(data)) == 0
