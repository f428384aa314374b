"""Tests of routing: which files are decoded in the calling thread, and that no reading function bypasses it."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import FrameError, FrameTooLargeError
from echoquad_runtime.frames import reader
from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.frames.isolation import reader_pool as pools
from echoquad_runtime.frames.isolation.reader_pool import ReaderPool
from echoquad_runtime.frames.isolation.routing import route_bytes, route_file

CONTRACT = Contract(classes=("ASD", "NORM"), input_size=32)
LEVELS = np.arange(1200, dtype=np.uint8).reshape(30, 40)
UID = "1.2.840.10008.1.2"


def image(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(LEVELS).save(stream, kind)
    return stream.getvalue()


def array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, LEVELS)
    return stream.getvalue()


def meta(syntax: str) -> bytes:
    """Return the beginning of a DICOM file: its preamble and its transfer syntax."""
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    return b"\0" * 128 + b"DICM" + b"\2\0\x10\0UI" + len(value).to_bytes(2, "little") + value + b"\x08\0" + b"\0" * 6


FILES = {
    "a.png": (image("PNG"), False),
    "a.jpg": (image("JPEG"), False),
    "a.bmp": (image("BMP"), False),
    "a.tif": (image("TIFF"), True),
    "tiff named.png": (image("TIFF"), True),
    "png named.tif": (image("PNG"), False),
    "a.npy": (array(), True),
    "a.txt": (b"1 2\n3 4\n", True),
    "a.avi": (b"RIFF\0\0\0\0AVI ", True),
    "a.mp4": (b"\0\0\0\x18ftyp", True),
    "implicit.dcm": (meta(UID), False),
    "explicit.dcm": (meta(f"{UID}.1"), False),
    "big endian.dcm": (meta(f"{UID}.2"), False),
    "deflated.dcm": (meta(f"{UID}.1.99"), True),
    "jpeg.dcm": (meta(f"{UID}.4.50"), True),
    "jpeg 2000.dcm": (meta(f"{UID}.4.90"), True),
    "rle.dcm": (meta(f"{UID}.5"), True),
    "unknown.dcm": (meta("1.2.3"), True),
    "cut.dcm": (meta(UID)[:140], False),  # read as uncompressed
    "empty.dcm": (b"", True),
    "jpeg dicom.png": (meta(f"{UID}.4.50"), True),
    "empty.png": (b"", False),
}


@pytest.mark.parametrize("name", FILES)
def test_risky_formats_are_isolated(name: str, tmp_path: Path) -> None:
    data, isolated = FILES[name]
    path = tmp_path / name
    path.write_bytes(data)
    assert route_file(path).isolated is isolated
    if path.suffix != ".txt" and data:  # in memory there is no name
        assert route_bytes(data).isolated is isolated


COUNTED_HERE = ("jpeg.dcm", "jpeg 2000.dcm", "rle.dcm", "explicit.dcm", "a.png")
COUNTED_IN_A_PROCESS = ("deflated.dcm", "empty.dcm", "a.mp4", "a.npy", "a.tif")


@pytest.mark.parametrize("name", [*COUNTED_HERE, *COUNTED_IN_A_PROCESS])
def test_frames_of_compressed_dicom_are_counted_in_the_calling_thread(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name][0])
    assert route_file(path).count_isolated is (name in COUNTED_IN_A_PROCESS)


READERS: dict[str, Callable[[Path], Any]] = {
    "load_grey": lambda path: reader.load_grey(FrameFile(path, "")),
    "load_grey_and_flags": lambda path: reader.load_grey_and_flags(FrameFile(path, "")),
    "load_image": lambda path: reader.load_image(FrameFile(path, "")),
    "load_quadrants": lambda path: reader.load_quadrants(
        FrameFile(path, ""), CONTRACT, np.empty((4, 1, 32, 32), np.uint8)
    ),
    "read_grey": reader.read_grey,
    "read_grey_and_flags": reader.read_grey_and_flags,
    "decode_grey": lambda path: reader.decode_grey(path.read_bytes()),
    "decode_grey_and_flags": lambda path: reader.decode_grey_and_flags(path.read_bytes()),
    "decode_quadrants": lambda path: reader.decode_quadrants(
        path.read_bytes(), CONTRACT, np.empty((4, 1, 32, 32), np.uint8)
    ),
    "pixel_format": lambda path: reader.pixel_format(path.read_bytes()),
    "frames_in": lambda path: next(reader.frames_in(path, "", DEFAULT_READ_OPTIONS)),
}


def test_every_reading_function_is_listed() -> None:
    assert {*READERS, "clear_file_cache", "cut_frame"} == set(reader.__all__)  # the last cuts what is decoded


@pytest.mark.parametrize("function", READERS)
@pytest.mark.parametrize("name", ["a.npy", "a.png", "tiff named.png", "deflated.dcm"])
def test_functions_decode_isolated_files_in_a_process_only(
    function: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, isolated = FILES[name]
    path = tmp_path / name
    path.write_bytes(data)
    asked = []

    def ask(self: ReaderPool, request: Any, **options: Any) -> Any:
        asked.append(request.operation)
        raise FrameError("asked")

    monkeypatch.setattr(ReaderPool, "ask", ask)
    if function == "frames_in" and name in ("a.png", "tiff named.png"):  # one frame, without reading it
        isolated = False
    if isolated:
        found: Any = None
        try:
            found = READERS[function](path)
        except FrameError as error:
            found = error
        assert str(found.error if isinstance(found, Failure) else found) == "asked"
        assert len(asked) == 1
    else:
        READERS[function](path)
        assert asked == []


@pytest.mark.parametrize("name", ["a.tif", "a.npy", "a.txt"])
def test_results_are_those_of_the_calling_thread(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name][0] if name != "a.txt" else b"\n".join(b"1 2 3 200 5" for _ in range(6)))

    def read() -> list[Any]:
        quadrants = np.zeros((4, 1, 32, 32), np.uint8)
        file = FrameFile(path, "")
        flags = reader.load_quadrants(file, CONTRACT, quadrants)
        picture = reader.load_image(file)
        grey, seen = reader.load_grey_and_flags(file)
        return [flags, quadrants.tobytes(), picture.mode, picture.tobytes(), grey.tobytes(), grey.shape, seen]

    isolated = read()
    monkeypatch.setattr(reader, "can_isolate", lambda: False)
    assert isolated == read()


@pytest.mark.parametrize("function", [name for name in READERS if name not in ("frames_in", "pixel_format")])
def test_lack_of_memory_in_the_calling_thread_costs_one_file(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(image("PNG"))

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("PIL.Image.open", fail)
    monkeypatch.setattr("echoquad_runtime.frames.images.image._open", fail)
    with pytest.raises(FrameTooLargeError, match="memory"):
        READERS[function](path)


def test_program_without_interpreter_warns_once_and_reads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sys.frozen", True, raising=False)
    pools._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "echoquad_runtime"):
        for _ in range(2):
            np.testing.assert_array_equal(reader.decode_grey(image("TIFF")), LEVELS)
    assert len(caplog.records) == 1 and "reader processes" in caplog.text
    pools._warn_once.cache_clear()


def test_unusual_characters_of_a_name_do_not_count_as_a_forged_answer(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"bell\x07 \xff.npy")
    stream = io.BytesIO()
    np.save(stream, np.zeros((3, 20, 30), np.uint8))
    try:
        path.write_bytes(stream.getvalue())
    except OSError:
        pytest.skip("this file system has no such name")
    with pytest.raises(FrameError, match="3 frames") as raised:
        reader.load_grey(FrameFile(path, ""))
    assert raised.value.code == "E_FRAME_FORMAT" and str(raised.value).isprintable()
