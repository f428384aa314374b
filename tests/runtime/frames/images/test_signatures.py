"""Formats that are not read are named, and files of boxes that hold no video are never taken for clips."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from echoquad_runtime.errors import FrameFormatError
from echoquad_runtime.frames.discovery import find_frames
from echoquad_runtime.frames.formats import detect_format
from echoquad_runtime.frames.frame_file import FrameFile
from echoquad_runtime.frames.images.signatures import unsupported_format
from echoquad_runtime.frames.reader import load_grey


def ftyp(*brands: bytes) -> bytes:
    return (
        struct.pack(">I", 16 + 4 * (len(brands) - 1))
        + b"ftyp"
        + brands[0]
        + bytes(4)
        + b"".join(brands[1:])
        + bytes(200)
    )


@pytest.mark.parametrize(
    ("brands", "name"),
    [
        ((b"heic", b"mif1", b"heic"), "HEIC"),
        ((b"mif1", b"heic", b"miaf"), "HEIC"),
        ((b"heix", b"mif1"), "HEIC"),
        ((b"isom", b"heic"), "HEIC"),
        ((b"avif", b"mif1", b"miaf"), "AVIF"),
        ((b"mif1", b"avif"), "AVIF"),
        ((b"avis", b"msf1"), "AVIF"),
        ((b"mif1",), "HEIF"),
        ((b"crx ", b"isom"), "a camera's raw file"),
        ((b"M4A ", b"mp42", b"isom"), "a sound file"),
        ((b"M4B ",), "a sound file"),
    ],
)
@pytest.mark.parametrize("extension", [".heic", ".mp4", ".png", ""])
def test_pictures_and_sound_in_boxes_are_refused(
    brands: tuple[bytes, ...], name: str, extension: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a{extension}"
    path.write_bytes(ftyp(*brands))
    assert detect_format(ftyp(*brands), extension) == "image"
    (frame,) = find_frames([path])
    assert isinstance(frame, FrameFile)
    with pytest.raises(FrameFormatError, match=f"not supported: {name};"):
        load_grey(frame)


@pytest.mark.parametrize(
    "brands", [(b"isom", b"iso2", b"avc1", b"mp41"), (b"qt  ",), (b"M4V ", b"M4A ", b"mp42"), (b"3gp4",)]
)
def test_brands_of_clips_are_clips(brands: tuple[bytes, ...]) -> None:
    assert detect_format(ftyp(*brands), ".mp4") == "video"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"GIF89a", "GIF"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "WebP"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "a sound file"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\xff\x0a\xfa", "JPEG XL"),
        (b"8BPS\0\1", "Photoshop"),
        (bytes(344) + b"n+1\0", "NIfTI"),
        (b"\x47" + bytes(187) + b"\x47", "MPEG-1 or MPEG-2 video"),
        (b"PK\3\4", "an archive"),
        (b"\0\1\2\3", None),
        (b"", None),
    ],
)
def test_formats_are_named(data: bytes, name: str | None) -> None:
    assert unsupported_format(data) == name
