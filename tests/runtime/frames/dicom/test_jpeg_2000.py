"""JPEG 2000 in DICOM: what a codestream announces is compared with the header and bounded before it is decoded."""

from __future__ import annotations

import contextlib
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from echoquad_runtime.errors import FrameDamagedError, FrameError, FrameTooLargeError
from echoquad_runtime.frames.reader import decode_grey

Write = Callable[..., bytes]

LOSSY, HTJ2K = "1.2.840.10008.1.2.4.91", "1.2.840.10008.1.2.4.203"
SIDE = 6000
SIZE = {0x00280010: ("US", SIDE), 0x00280011: ("US", SIDE)}


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">HH", marker, len(body) + 2) + body


def coding(
    *, layers: int = 1, levels: int = 5, precinct: int | None = None, marker: int = 0xFF52, style: int = 0
) -> bytes:
    sizes = b"" if precinct is None else bytes([precinct << 4 | precinct] * (levels + 1))
    parameters = bytes([levels, 4, 4, style, 1]) + sizes
    head = bytes([precinct is not None])
    head = b"\0" + head if marker == 0xFF53 else head + struct.pack(">BHB", 0, layers, 0)
    return segment(marker, head + parameters)


def codestream(
    *,
    side: int = SIDE,
    tile: int = SIDE,
    components: int = 1,
    depth: int = 7,
    main: bytes | None = None,
    tile_header: bytes = b"",
    tile_parts: int = 1,
) -> bytes:
    """Return a codestream without packets."""
    size = struct.pack(">H8IH", 0, side, side, 0, 0, tile, tile, 0, 0, components) + bytes([depth, 1, 1]) * components
    main = coding() if main is None else main
    head = b"\xff\x4f" + segment(0xFF51, size) + main + segment(0xFF5C, b"\x40" + bytes([0x40] * 16))
    part = tile_header + b"\xff\x93" + bytes(200)
    part = segment(0xFF90, struct.pack(">HIBB", 0, len(part) + 12, 0, 1)) + part
    return head + part * tile_parts + b"\xff\xd9"


TOO_LARGE = {
    "precincts of 2 x 2": codestream(main=coding(precinct=1)),
    "65535 layers": codestream(main=coding(layers=65535, precinct=6)),
    "tiles of 1 x 1": codestream(tile=1),
    "tiles of 16 x 16": codestream(tile=16),
    "precincts of a tile-part": codestream(tile_header=coding(precinct=1)),
    "precincts of a component": codestream(main=coding() + coding(precinct=1, marker=0xFF53)),
    "precincts of a component in a tile-part": codestream(tile_header=coding(precinct=1, marker=0xFF53)),
    "layers and precincts in two places": codestream(
        main=coding(layers=65535), tile_header=coding(precinct=6, marker=0xFF53)
    ),
    "a hundred thousand tile-parts": codestream(tile_parts=20_000),
}
DAMAGED = {
    "another size": codestream(side=SIDE + 1),
    "three components": codestream(components=3),
    "more bits": codestream(depth=11),
    "no components": codestream(components=0),
    "no tile size": codestream(tile=0),
    "no coding style": codestream(main=b""),
    "40 levels": codestream(main=coding(levels=40)),
    "missing precinct sizes": codestream(main=segment(0xFF52, bytes([1, 0, 0, 1, 0, 5, 4, 4, 0, 1]) + b"\x11")),
    "an endless segment": codestream(main=coding() + b"\xff\x64\xff\xff"),
    "a header of many segments": codestream(main=segment(0xFF64, b"") * 3000 + coding()),
    "another tile-part after rubbish": codestream()[:-2]
    + b"rubbish"
    + codestream(tile_header=coding(precinct=1))[-236:],
    "no end": codestream()[:-2],
    "no codestream": b"\0\0\0\x0cjP  " + bytes(80) + b"\xff\xd9",
    "a cut header": codestream()[:60] + b"\xff\xd9",
}


@pytest.mark.parametrize("syntax", [LOSSY, HTJ2K])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("what", [*TOO_LARGE, *DAMAGED])
def test_codestream_is_refused_before_decoding(
    what: str, wrapped: bool, syntax: str, write_dicom: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openjpeg", None)  # decoding would say that it is missing
    data = {**TOO_LARGE, **DAMAGED}[what]
    if wrapped:
        data = b"\0\0\0\x0cjP  \r\n\x87\n" + struct.pack(">I4s", len(data) + 8, b"jp2c") + data
    began = time.process_time()
    with pytest.raises(FrameTooLargeError if what in TOO_LARGE else FrameDamagedError):
        decode_grey(write_dicom([data], SIZE, syntax=syntax))
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "data",
    [
        codestream(main=coding(layers=80, precinct=6)),
        codestream(main=coding(layers=20, precinct=5)),
        codestream(main=coding(layers=65535)),
        codestream(tile=256),
    ],
)
def test_what_passes_the_bounds_costs_little(data: bytes, write_dicom: Write) -> None:
    """Two of the hostile files took 20 GB and more than a minute."""
    pytest.importorskip("openjpeg")
    began = time.process_time()
    with contextlib.suppress(FrameError):
        decode_grey(write_dicom([data], SIZE, syntax=LOSSY))
    assert time.process_time() - began < 10  # half a second


@pytest.mark.usefixtures("without_isolation")
def test_usual_codestreams_pass(write_dicom: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class OpenJpeg:
        @staticmethod
        def decode(data: bytes, _: int) -> Any:
            calls.append(data)
            raise ValueError

    monkeypatch.setitem(sys.modules, "openjpeg", OpenJpeg)
    usual = [
        codestream(),
        codestream(main=coding(precinct=8)),
        codestream(main=coding(layers=20, precinct=7)),
        codestream(tile=128),
        codestream(tile=1024, tile_header=coding(layers=12, precinct=7), tile_parts=36),
    ]
    for data in usual:
        with pytest.raises(FrameDamagedError):
            decode_grey(write_dicom([data], SIZE, syntax=LOSSY))
    assert [data.rstrip(b"\0") for data in calls] == usual
