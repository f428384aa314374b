"""Tests of the memory ceiling: the largest frame of each format is read, and what exceeds it costs one file."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.errors import FrameDamagedError, FrameTooLargeError
from echoquad_runtime.frames.discovery import find_frames
from echoquad_runtime.frames.formats import MAX_PIXELS, ReadOptions
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.frames.isolation import reader_process
from echoquad_runtime.frames.isolation.reader_pool import reader_pool
from echoquad_runtime.frames.reader import load_grey

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits and reports the address space")

SIDE = 6000
UID = "1.2.840.10008.1.2"
assert SIDE * SIDE == MAX_PIXELS


def encode(kind: str, mode: str = "L", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (SIDE, SIDE), {"L": 90, "RGB": (90, 80, 70), "I;16": 900}[mode]).save(stream, kind, **options)
    return stream.getvalue()


def array(dtype: str, shape: tuple[int, ...] = (SIDE, SIDE)) -> bytes:
    """Return a numpy file of zeros whose pixels the test adds, since the file is sparse."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def element(group: int, number: int, vr: str, value: bytes) -> bytes:
    tag = group.to_bytes(2, "little") + number.to_bytes(2, "little") + vr.encode()
    value += b"\0" * (len(value) % 2)
    if vr in ("OB", "OW"):
        return tag + b"\0\0" + len(value).to_bytes(4, "little") + value
    return tag + len(value).to_bytes(2, "little") + value


def dicom(syntax: str, pixels: bytes, *, bits: int = 8, samples: int = 1, encapsulated: bool = True) -> bytes:
    """Return a DICOM file of one frame."""

    def uint16(number: int, value: int) -> bytes:
        return element(0x28, number, "US", value.to_bytes(2, "little"))

    body = element(8, 0x16, "UI", b"1.2.840.10008.5.1.4.1.1.6.1") + uint16(2, samples)
    body += element(0x28, 4, "CS", b"MONOCHROME2 " if samples == 1 else b"RGB ")
    body += uint16(6, 0) if samples == 3 else b""
    body += (
        uint16(0x10, SIDE) + uint16(0x11, SIDE) + uint16(0x100, bits) + uint16(0x101, bits) + uint16(0x102, bits - 1)
    )
    body += uint16(0x103, 0)
    if encapsulated:
        body += b"\xe0\x7f\x10\0OB\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\0\0\0\0"
        pixels += b"\0" * (len(pixels) % 2)
        body += b"\xfe\xff\0\xe0" + len(pixels).to_bytes(4, "little") + pixels + b"\xfe\xff\xdd\xe0\0\0\0\0"
    else:
        body += element(0x7FE0, 0x10, "OB" if bits == 8 else "OW", pixels)
    if syntax.endswith("1.99"):
        deflater = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
        body = deflater.compress(body) + deflater.flush()
    return b"\0" * 128 + b"DICM" + element(2, 0x10, "UI", syntax.encode()) + body


def clip() -> bytes:
    av = pytest.importorskip("av")
    stream = io.BytesIO()
    with av.open(stream, "w", format="avi") as out:
        track = out.add_stream("mjpeg", rate=25)
        track.width, track.height, track.pix_fmt = SIDE, SIDE, "yuvj420p"
        out.mux(track.encode(av.VideoFrame.from_ndarray(np.full((SIDE * 3 // 2, SIDE), 90, np.uint8), "yuv420p")))
        out.mux(track.encode())
    return stream.getvalue()


def text(rows: int = SIDE, columns: int = SIDE) -> bytes:
    return (b"0.5 " * columns + b"\n") * rows


def rle() -> bytes:
    packed = b"\x81\x5a" * (SIDE * SIDE // 128)
    return (1).to_bytes(4, "little") + (64).to_bytes(4, "little") + b"\0" * 56 + packed


slow = pytest.mark.slow

# The largest frames: name, their bytes, and the size of the file if it goes on with zeros.
LARGEST: dict[str, tuple[Callable[[], bytes], int]] = {
    "a.png": (lambda: encode("PNG", "RGB", compress_level=1), 0),
    "a.jpg": (lambda: encode("JPEG", "RGB"), 0),
    "lzw.tif": (lambda: encode("TIFF", "RGB", compression="tiff_lzw"), 0),
    "16 bits.tif": (lambda: encode("TIFF", "I;16"), 0),
    "grey.npy": (lambda: array("|u1"), SIDE * SIDE),
    "float.npy": (lambda: array("<f8"), 8 * SIDE * SIDE),
    "colour.npy": (lambda: array("|u1", (SIDE, SIDE, 3)), 3 * SIDE * SIDE),
    "native.dcm": (lambda: dicom(f"{UID}.1", b"\5" * (3 * SIDE * SIDE), samples=3, encapsulated=False), 0),
    "deflated.dcm": (lambda: dicom(f"{UID}.1.99", b"\5" * (2 * SIDE * SIDE), bits=16, encapsulated=False), 0),
    "jpeg.dcm": (lambda: dicom(f"{UID}.4.50", encode("JPEG")), 0),
    "rle.dcm": (lambda: dicom(f"{UID}.5", rle()), 0),
    "jpeg 2000.dcm": (lambda: dicom(f"{UID}.4.90", encode("JPEG2000", no_jp2=True)), 0),
    "clip.avi": (clip, 0),
    "matrix.txt": (text, 0),
}

# Reads a file as a command does, with a limit for this process alone, and prints its shape and its peak memory.
PROGRAM = """
import json, resource, sys
from pathlib import Path
from echoquad_runtime.frames.discovery import find_frames
from echoquad_runtime.frames.reader import load_grey
_, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (1500 << 20, hard))
(item,) = find_frames([Path(sys.argv[1])])
shape = load_grey(item).shape
peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
print(json.dumps([shape, int(peak) >> 10]))
"""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=slow if name in ("jpeg 2000.dcm", "matrix.txt", "clip.avi", "native.dcm") else ())
        for name in LARGEST
    ],
)
def test_largest_frame_of_each_format_is_read(name: str, tmp_path: Path) -> None:
    if name.endswith(".dcm"):
        pytest.importorskip("pydicom")
    write, size = LARGEST[name]
    path = tmp_path / name
    data = write()
    with path.open("wb") as stream:
        stream.write(data)
        stream.truncate(len(data) + size)
    done = subprocess.run([sys.executable, "-c", PROGRAM, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shape, peak = json.loads(done.stdout)
    assert shape == [SIDE, SIDE]
    assert peak < (900 if name in ("a.png", "a.jpg", "native.dcm") else 250), f"{peak} MiB in the main process"


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Limit reader processes to 128 MiB."""
    monkeypatch.setattr(reader_process, "MEMORY_LIMIT", 128 << 20)
    reader_pool().trim()
    yield
    reader_pool().trim()


HUNGRY: dict[str, tuple[Callable[[], bytes], int]] = {
    **{name: LARGEST[name] for name in ("float.npy", "colour.npy", "deflated.dcm", "rle.dcm", "16 bits.tif")},
    "newlines.txt": (lambda: b"\n" * 5_000_000, 0),
    "ones.txt": (lambda: b"1\n" * 2_000_000, 0),
    "pixels.tif": (lambda: encode("TIFF", "RGB", compression="tiff_lzw"), 0),
    "header.npy": (lambda: b"\x93NUMPY\2\0" + (0xF0000000).to_bytes(4, "little") + b"{", 0),
}


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", HUNGRY)
def test_file_that_takes_more_memory_is_one_failure(name: str, tmp_path: Path) -> None:
    if name.endswith(".dcm"):
        pytest.importorskip("pydicom")
    write, size = HUNGRY[name]
    data = write()
    with (tmp_path / name).open("wb") as stream:
        stream.write(data)
        stream.truncate(len(data) + size)
    Image.new("L", (20, 20)).save(tmp_path / "other.tif")
    for item in find_frames([tmp_path / name, tmp_path / "other.tif"], ReadOptions(matrices=True)):
        if isinstance(item, FrameFile) and item.name == "other.tif":
            assert load_grey(item).shape == (20, 20)
            continue
        with pytest.raises((FrameTooLargeError, FrameDamagedError)) as raised:
            if isinstance(item, Failure):
                raise item.error
            load_grey(item)
        assert "memory" in str(raised.value).lower() or name in ("header.npy", "newlines.txt", "ones.txt")
