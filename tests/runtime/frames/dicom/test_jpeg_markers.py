"""JPEG in DICOM: marker segments are checked before GDCM sees them, and colours without markers are read."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.errors import FrameDamagedError, FrameFormatError
from echoquad_runtime.frames.decoded_frame import ColourFrame
from echoquad_runtime.frames.reader import decode_grey
from echoquad_runtime.frames.sources import decode_in_memory

Write = Callable[..., bytes]

BASELINE, EXTENDED, LOSSLESS, JPEG_LS = (f"1.2.840.10008.1.2.4.{end}" for end in ("50", "51", "70", "80"))
SIZE = {0x00280010: ("US", 16), 0x00280011: ("US", 16)}
WIDE = {**SIZE, 0x00280100: ("US", 16), 0x00280101: ("US", 16), 0x00280102: ("US", 15)}
TWELVE = {**WIDE, 0x00280101: ("US", 12), 0x00280102: ("US", 11)}
RGB = {**SIZE, 0x00280002: ("US", 3), 0x00280004: ("CS", b"RGB "), 0x00280006: ("US", 0)}
LEVELS = np.add.outer(np.arange(16), np.arange(16)).astype(np.uint8) * 8


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def frame_header(marker: int, precision: int, rows: int = 16, columns: int = 16) -> bytes:
    return segment(marker, struct.pack(">BHHB", precision, rows, columns, 1) + b"\1\x11\0")


TABLE = segment(0xC4, b"\0" + bytes([0, 1]) + bytes(14) + b"\0")  # one code, 00, for a difference of zero
SCAN = segment(0xDA, b"\1\1\0\1\0\0")
ZEROS = bytes(64)  # 256 codes of two bits
FRAME = frame_header(0xC3, 16)
# The first code of lossless JPEG stands for half of the range: every sample is 32768.
EVEN = b"\xff\xd8" + FRAME + TABLE + SCAN + ZEROS + b"\xff\xd9"


def lossless_jpeg_ls() -> bytes:
    """Return 16 x 16 samples in JPEG-LS whose run mode codes all zeros: 1 bits for complete runs."""
    return b"\xff\xd8" + frame_header(0xF7, 8) + segment(0xDA, b"\1\1\0\0\0\0") + b"\x7f" * 40 + b"\xff\xd9"


def test_even_lossless_frame_is_read(write_dicom: Write) -> None:
    pytest.importorskip("gdcm")
    assert set(decode_grey(write_dicom([EVEN], WIDE, syntax=LOSSLESS)).flat) == {128}


@pytest.mark.parametrize("junk", [segment(0xE0, b"JFIF\0\xff\xff\0\0\1\0\1\0\0"), segment(0xFE, FRAME), b"\xff\xff"])
def test_segments_that_decoding_does_not_need_are_left_out(junk: bytes, write_dicom: Write) -> None:
    """A version of JFIF that GDCM does not know ends the process if the frame is lossless."""
    pytest.importorskip("gdcm")
    data = EVEN[:2] + junk + EVEN[2:]
    assert set(decode_grey(write_dicom([data], WIDE, syntax=LOSSLESS)).flat) == {128}


WRONG = {
    "no start": EVEN[2:],
    "no frame header": EVEN.replace(FRAME, b""),
    "no table": EVEN.replace(TABLE, b""),
    "no scan": b"\xff\xd8" + FRAME + TABLE + b"\xff\xd9",
    "no end": EVEN[:-2],
    "bytes between segments": EVEN.replace(TABLE, b"\xe3" + TABLE[1:]),
    "two frame headers": EVEN.replace(FRAME, FRAME + FRAME),
    "another process": EVEN.replace(FRAME, frame_header(0xC0, 16)),
    "another height": EVEN.replace(FRAME, frame_header(0xC3, 16, rows=17)),
    "another width": EVEN.replace(FRAME, frame_header(0xC3, 16, columns=0xFFFF)),
    "another size within a comment": EVEN.replace(FRAME, segment(0xFE, FRAME) + frame_header(0xC3, 16, rows=128)),
    "more bits": EVEN.replace(FRAME, frame_header(0xC3, 17)),
    "three components": EVEN.replace(
        FRAME, segment(0xC3, struct.pack(">BHHB", 16, 16, 16, 3) + b"\1\x11\0\2\x11\0\3\x11\0")
    ),
    "subsampling": EVEN.replace(FRAME, FRAME.replace(b"\1\x11\0", b"\1\x22\0")),
    "a scan of another component": EVEN.replace(SCAN, segment(0xDA, b"\1\2\0\1\0\0")),
    "no predictor": EVEN.replace(SCAN, segment(0xDA, b"\1\1\0\0\0\0")),
    "two scans": EVEN[:-2] + SCAN + ZEROS + b"\xff\xd9",
    "too many codes": EVEN.replace(TABLE, segment(0xC4, b"\0" + bytes([3] + [0] * 15) + bytes(3))),
    "a short table": EVEN.replace(TABLE, segment(0xC4, b"\0" + bytes([0, 2] + [0] * 14) + b"\0")),
    "a long difference": EVEN.replace(TABLE, segment(0xC4, b"\0" + bytes([0, 1] + [0] * 14) + b"\x11")),
    "a segment beyond the end": EVEN[:2] + b"\xff\xfe\xff\xff" + EVEN[2:],
    "lines counted later": EVEN[:-2] + segment(0xDC, b"\0\x20") + b"\xff\xd9",
}


@pytest.mark.parametrize("what", WRONG)
def test_malformed_lossless_frame_is_refused_before_decoding(
    what: str, write_dicom: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gdcm", None)  # decoding would say that it is missing
    with pytest.raises(FrameDamagedError):
        decode_grey(write_dicom([WRONG[what]], WIDE, syntax=LOSSLESS))


LS = lossless_jpeg_ls()
WRONG_LS = {
    "another size after a comment that holds the right one": LS.replace(
        frame_header(0xF7, 8), segment(0xFE, frame_header(0xF7, 8)) + frame_header(0xF7, 8, 0xFFFF, 0xFFFF)
    ),
    "another size": LS.replace(frame_header(0xF7, 8), frame_header(0xF7, 8, 128, 128)),
    "more bits": LS.replace(frame_header(0xF7, 8), frame_header(0xF7, 9)),
    "a second frame header": LS[:-2] + frame_header(0xF7, 8) + LS[-2:],
    "interleaving of one component": LS.replace(segment(0xDA, b"\1\1\0\0\0\0"), segment(0xDA, b"\1\1\0\0\3\0")),
    "thresholds in disorder": LS.replace(b"\xff\xda", segment(0xF8, b"\1\0\xff\0\7\0\3\0\x15\0\x40") + b"\xff\xda"),
    "no end": LS[:-2],
}


@pytest.mark.parametrize("what", WRONG_LS)
def test_malformed_jpeg_ls_frame_is_refused_before_decoding(
    what: str, write_dicom: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gdcm", None)
    with pytest.raises(FrameDamagedError):
        decode_grey(write_dicom([WRONG_LS[what]], SIZE, syntax=JPEG_LS))


def test_mapping_tables_of_jpeg_ls_are_not_supported(write_dicom: Write) -> None:
    data = LS.replace(b"\xff\xda", segment(0xF8, b"\2\1\1\0\1") + b"\xff\xda")
    with pytest.raises(FrameFormatError, match="not supported"):
        decode_grey(write_dicom([data], SIZE, syntax=JPEG_LS))


PROGRAM = """
import random, sys
from echoquad_runtime.errors import FrameError
from echoquad_runtime.frames.reader import decode_grey
data = sys.stdin.buffer.read()
begin = data.rindex(b"\\xff\\xd8\\xff")
for number in range(int(sys.argv[1])):
    chance, damaged = random.Random(number), bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 4])):
        at = begin + 2 + (chance.randrange(70) if chance.random() < 0.6 else chance.randrange(len(data) - begin - 12))
        damaged[at] = chance.choice([damaged[at] ^ 1 << chance.randrange(8), 0, 255, 0xC3, 0xDA, 0xF7])
    try:
        decode_grey(bytes(damaged))
    except FrameError:
        pass
print("alive")
"""


@pytest.mark.parametrize("kind", ["lossless", "JPEG-LS"])
@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_frame_does_not_end_the_process(kind: str, count: int, write_dicom: Write) -> None:
    pytest.importorskip("gdcm")
    jfif = segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")  # damaged versions of JFIF ended it
    if kind == "lossless":
        data = write_dicom([EVEN[:2] + jfif + EVEN[2:]], WIDE, syntax=LOSSLESS)
    else:
        data = write_dicom([LS], SIZE, syntax=JPEG_LS)
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(count)], input=data, check=False, capture_output=True, timeout=280
    )
    assert (ran.returncode, ran.stdout) == (0, b"alive\n"), ran.stderr[-500:]


# ---------------------------------------------------------------------------------------------- baseline and extended


def colour_jpeg(*, names: bytes = b"\1\2\3") -> bytes:
    """Return RGB samples, stored as they are, in a JPEG without JFIF and Adobe markers."""
    stream = io.BytesIO()
    stored = Image.fromarray(np.stack([LEVELS, 255 - LEVELS, np.full_like(LEVELS, 90)], axis=2))
    # Pillow stores what it takes for YCbCr unconverted.
    Image.frombytes("YCbCr", stored.size, stored.tobytes()).save(stream, "JPEG", quality=100, subsampling=0)
    data = stream.getvalue()
    kept, at = data[:2], 2
    while data[at + 1] != 0xDA:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] not in (0xE0, 0xEE):
            kept += data[at : at + 2 + length]
        at += 2 + length
    named = bytearray(kept + data[at:])
    frame, scan = named.index(b"\xff\xc0") + 10, named.index(b"\xff\xda") + 5
    for index, name in enumerate(names):
        named[frame + 3 * index] = named[scan + 2 * index] = name
    return bytes(named)


@pytest.mark.parametrize("names", [b"\1\2\3", b"RGB"])
def test_rgb_jpeg_without_markers_is_read_unconverted(names: bytes, write_dicom: Write) -> None:
    """libjpeg takes components named RGB for RGB, and refuses to convert them."""
    frame = decode_in_memory(write_dicom([colour_jpeg(names=names)], RGB, syntax=BASELINE))
    wanted = np.stack([LEVELS, 255 - LEVELS, np.full_like(LEVELS, 90)], axis=2).astype(int)
    assert np.abs(np.asarray(frame.image().convert("RGB")).astype(int) - wanted).max() <= 4
    assert np.abs(frame.grey().astype(int) - ColourFrame(wanted.astype(np.uint8)).grey()).max() <= 4
    assert frame.is_coloured()


def test_rgb_jpeg_with_bad_table_is_damaged(write_dicom: Write) -> None:
    data = bytearray(colour_jpeg())
    data[data.index(b"\xff\xdb") + 4] = 0x0F
    with pytest.raises(FrameDamagedError):
        decode_grey(write_dicom([bytes(data)], RGB, syntax=BASELINE))


@pytest.mark.parametrize("rows", [8, 24])
def test_baseline_frame_of_another_size_is_refused_with_a_window_too(rows: int, write_dicom: Write) -> None:
    stream = io.BytesIO()
    Image.new("L", (16, rows), 90).save(stream, "JPEG")
    for window in ({}, {0x00281050: ("DS", b"60"), 0x00281051: ("DS", b"80")}):
        with pytest.raises(FrameDamagedError, match="size"):
            decode_grey(write_dicom([stream.getvalue()], {**SIZE, **window}, syntax=BASELINE))


def test_12_bit_jpeg_is_read(write_dicom: Write, capfd: pytest.CaptureFixture[str]) -> None:
    """A flat frame: all differences of the mean are zero but the first."""
    pytest.importorskip("gdcm")
    data = twelve_bit_jpeg()
    grey = decode_grey(write_dicom([data], TWELVE, syntax=EXTENDED))
    # The first coefficient is 1024, an eighth of which is added to mid-grey: 2048 + 128.
    assert set(grey.flat) == {round(2176 * 255 / 4095)}
    assert capfd.readouterr().err == ""
    for wrong in (data.replace(b"\xff\xdb", b"\xff\xfe"), data.replace(b"\xff\xc1\0\x0b\x0c", b"\xff\xc1\0\x0b\x08")):
        with pytest.raises(FrameDamagedError):
            decode_grey(write_dicom([wrong], TWELVE, syntax=EXTENDED))


def twelve_bit_jpeg() -> bytes:
    """Return a flat frame of 16 x 16 samples in 12-bit JPEG."""
    table = segment(0xDB, b"\0" + bytes([1] * 64))
    # Codes 0 and 10 stand for differences of no bits and of 11; code 0 ends a block.
    dc = segment(0xC4, b"\0" + bytes([1, 1] + [0] * 14) + bytes([0, 11]))
    ac = segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\0")
    bits = "10" + f"{1024:011b}" + "0" + "00" * 3
    bits += "1" * (-len(bits) % 8)
    coded = int(bits, 2).to_bytes(len(bits) // 8, "big")
    scan = segment(0xDA, b"\1\1\0\0\x3f\0")
    return b"\xff\xd8" + frame_header(0xC1, 12) + table + dc + ac + scan + coded + b"\xff\xd9"
