"""Frames of a DICOM file: pixels that its header explains, pixels that it does not, fragments, and offset tables."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.errors import FrameDamagedError, FrameError, FrameFormatError
from echoquad_runtime.frames.discovery import find_frames
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.frames.reader import decode_grey, decode_grey_and_flags, load_grey

Write = Callable[..., bytes]

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
EXPLICIT, BIG_ENDIAN, JPEG, RLE = (f"1.2.840.10008.1.2{end}" for end in (".1", ".2", ".4.50", ".5"))
ROWS, COLUMNS, SAMPLES, PHOTOMETRIC, PLANAR, FRAMES = (
    0x00280010,
    0x00280011,
    0x00280002,
    0x00280004,
    0x00280006,
    0x00280008,
)
YBR_422 = {SAMPLES: ("US", 3), PHOTOMETRIC: ("CS", b"YBR_FULL_422"), PLANAR: ("US", 0)}
RGB = {SAMPLES: ("US", 3), PHOTOMETRIC: ("CS", b"RGB "), PLANAR: ("US", 0)}


def frames_stated(count: int) -> dict[int, tuple[str, bytes]]:
    text = str(count).encode()
    return {FRAMES: ("IS", text + b" " * (len(text) % 2))}


def greys(data: bytes, folder: Path) -> list[np.ndarray | FrameError]:
    path = folder / "clip.dcm"
    path.write_bytes(data)
    return [found.error if isinstance(found, Failure) else load_grey(found) for found in find_frames([path])]


def jpeg(levels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(levels).save(stream, "JPEG", quality=95)
    return stream.getvalue()


# ---------------------------------------------------------------------------------------------- uncompressed


@pytest.mark.parametrize("stated", [None, 1, 2, 5])
def test_more_pixels_than_the_header_explains_are_refused(
    stated: int | None, write_dicom: Write, tmp_path: Path
) -> None:
    values = {} if stated is None else frames_stated(stated)
    (found,) = greys(write_dicom(RAMP.tobytes() * ((stated or 1) + 1), values), tmp_path)
    assert isinstance(found, FrameFormatError) and "more pixels" in str(found)
    assert isinstance(greys(write_dicom(RAMP.tobytes() * (stated or 1), values), tmp_path)[0], np.ndarray)


@pytest.mark.parametrize("padding", [1, 2, 47])
def test_less_than_a_frame_after_the_last_is_padding(padding: int, write_dicom: Write) -> None:
    np.testing.assert_array_equal(decode_grey(write_dicom(RAMP.tobytes() + bytes(padding))), RAMP)


@pytest.mark.parametrize("order", ["RGB", "YBR"])
@pytest.mark.parametrize("frames", [1, 2])
def test_ybr_422_with_three_samples_per_pixel_is_read_as_what_makes_it_grey(
    order: str, frames: int, write_dicom: Write, tmp_path: Path
) -> None:
    chroma = [RAMP, RAMP] if order == "RGB" else [np.full_like(RAMP, 128)] * 2
    stored = np.stack([RAMP, *chroma], axis=2)
    stored[0, :3] = [200, 30, 90]  # a coloured caption
    data = write_dicom(stored.tobytes() * frames, {**YBR_422, **frames_stated(frames)})
    for found in greys(data, tmp_path):
        np.testing.assert_array_equal(found[1:], RAMP[1:])  # type: ignore[index]
    if frames == 1:
        assert decode_grey_and_flags(data)[1] == ("uncropped",)


def test_ybr_422_with_three_samples_per_pixel_of_any_colour_is_refused(write_dicom: Write) -> None:
    colours = np.random.default_rng(1).integers(0, 256, 144, np.uint8)
    for stored in (colours.tobytes(), bytes([128] * 144)):
        with pytest.raises(FrameFormatError, match="YBR_FULL_422"):
            decode_grey(write_dicom(stored, YBR_422))


def test_ybr_422_of_its_own_length_is_read(write_dicom: Write) -> None:
    pairs = np.concatenate([RAMP.reshape(6, 4, 2), np.full((6, 4, 2), 128, np.uint8)], axis=2)
    np.testing.assert_array_equal(decode_grey(write_dicom(pairs.tobytes(), YBR_422)), RAMP)
    with pytest.raises(FrameFormatError, match="more pixels"):
        decode_grey(write_dicom(pairs.tobytes() * 2, YBR_422))


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("kind", ["delimited", "one item", "an item each", "an empty table first"])
def test_uncompressed_pixels_of_undefined_length_are_read(
    kind: str, frames: int, write_dicom: Write, parts: Any, tmp_path: Path
) -> None:
    levels = [RAMP + number for number in range(frames)]
    stored = [grey.tobytes() for grey in levels]
    body = {
        "delimited": b"".join(stored),
        "one item": parts.item(b"".join(stored)),
        "an item each": b"".join(map(parts.item, stored)),
        "an empty table first": parts.item(b"") + b"".join(map(parts.item, stored)),
    }[kind]
    data = write_dicom(body + parts.SEQUENCE_END, frames_stated(frames), length=parts.UNDEFINED)
    for found, wanted in zip(greys(data, tmp_path), levels, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("size", [0, 40, 56, 96])
def test_uncompressed_pixels_of_undefined_and_other_length_are_refused(
    size: int, write_dicom: Write, parts: Any
) -> None:
    for body in (bytes(size), parts.item(bytes(size))):
        with pytest.raises(FrameError):
            decode_grey(write_dicom(body + parts.SEQUENCE_END, length=parts.UNDEFINED))


# ---------------------------------------------------------------------------------------------- fragments


def split(data: bytes, count: int) -> list[bytes]:
    """Return `data` in fragments of even length."""
    data += bytes(len(data) % 2)
    step = -(-len(data) // count) // 2 * 2 + 2
    return [data[at : at + step] for at in range(0, len(data), step)]


@pytest.mark.parametrize("counts", [(2, 2), (1, 3), (3, 1), (2, 1, 4)])
def test_fragments_without_table_are_assigned_by_markers(
    counts: tuple[int, ...], write_dicom: Write, tmp_path: Path
) -> None:
    images = [jpeg(RAMP + 3 * number) for number in range(len(counts))]
    fragments = [part for data, count in zip(images, counts, strict=True) for part in split(data, count)]
    assert len(fragments) == sum(counts)
    found = greys(write_dicom(fragments, frames_stated(len(counts)), syntax=JPEG), tmp_path)
    for grey, data in zip(found, images, strict=True):
        np.testing.assert_array_equal(grey, decode_grey(data))


def test_wrong_offset_table_gives_way_to_markers(write_dicom: Write, parts: Any, tmp_path: Path) -> None:
    images = [jpeg(RAMP), jpeg(255 - RAMP)]
    data = write_dicom([part for image in images for part in split(image, 2)], frames_stated(2), syntax=JPEG)
    table = parts.item(struct.pack("<2I", 0, 5))
    data = data.replace(parts.item(b""), table, 1)
    for grey, image in zip(greys(data, tmp_path), images, strict=True):
        np.testing.assert_array_equal(grey, decode_grey(image))


def test_frame_of_several_fragments_is_read(write_dicom: Write) -> None:
    image = jpeg(RAMP)
    np.testing.assert_array_equal(decode_grey(write_dicom(split(image, 3), syntax=JPEG)), decode_grey(image))


@pytest.mark.parametrize("stated", [None, 1, 2])
def test_more_frames_than_the_header_states_are_refused(stated: int | None, write_dicom: Write, tmp_path: Path) -> None:
    values = {} if stated is None else frames_stated(stated)
    rle = struct.pack("<16I", 1, 64, *[0] * 14) + bytes([47]) + RAMP.tobytes() + b"\x80"
    for syntax, image in ((JPEG, jpeg(RAMP)), (RLE, rle)):
        (found,) = greys(write_dicom([image] * 3, values, syntax=syntax), tmp_path)
        assert isinstance(found, FrameFormatError) and "more pixels" in str(found)


def test_fragments_that_nothing_assigns_are_refused(write_dicom: Write, tmp_path: Path) -> None:
    fragments = split(b"no marker" + jpeg(RAMP), 5)
    (found,) = greys(write_dicom(fragments, frames_stated(3), syntax=JPEG), tmp_path)
    assert isinstance(found, FrameFormatError)


def test_missing_frames_without_table_are_one_failure(write_dicom: Write, tmp_path: Path) -> None:
    fragments = [part for number in range(2) for part in split(jpeg(RAMP + number), 2)]
    *frames, last = greys(write_dicom(fragments, frames_stated(3), syntax=JPEG), tmp_path)
    assert isinstance(last, FrameDamagedError) and "last frame of 3" in str(last)
    assert len(frames) == 2 and all(isinstance(frame, np.ndarray) for frame in frames)
