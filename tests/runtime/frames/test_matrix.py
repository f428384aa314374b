"""Numeric matrices: text layouts, numpy arrays, scales to grey, NaN, and orientation."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echoquad_runtime.errors import FrameDamagedError, FrameError, FrameFormatError, FrameTooLargeError
from echoquad_runtime.frames.discovery import find_frames
from echoquad_runtime.frames.formats import FLIPS, Flip, ReadOptions
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.frames.matrix import decode_text, parse_text
from echoquad_runtime.frames.reader import (
    decode_grey,
    decode_grey_and_flags,
    load_grey,
    load_grey_and_flags,
    load_image,
)


def npy(values: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


RAMP = np.arange(12, dtype=np.float64).reshape(3, 4)

# ---------------------------------------------------------------------------------------------- text

TEXTS = {
    "commas": "0,1,2,3\n4,5,6,7\n8,9,10,11\n",
    "semicolons and CR LF": "0;1;2;3\r\n4;5;6;7\r\n8;9;10;11",
    "tabs": "0\t1\t2\t3\n4\t5\t6\t7\n8\t9\t10\t11\n",
    "blanks of any number": "  0 1   2 3\n4  5 6 7\n 8 9 10 11  \n",
    "a mixture": "0, 1;2 \t 3\n4 ,5\t6;7\n8 9, 10 ;11\n",
    "separators at the ends of rows": "0,1,2,3,\n4,5,6,7,\n8,9,10,11,\n",
    "header lines": "Depth 16 cm\nGain: 60 dB, TGC\nx1 x2 x3 x4\n0 1 2 3\n4 5 6 7\n8 9 10 11\n",
    "comments and blank lines": "# saved by numpy\n\n0 1 2 3\n% matlab\n4 5 6 7\n\n// end\n8 9 10 11\n\n",
    "its own size": "3 4\n0 1 2 3\n4 5 6 7\n8 9 10 11\n",
    "its own size, columns first": "4,3\n0,1,2,3\n4,5,6,7\n8,9,10,11\n",
    "powers": "0e0 1.0E0 2e+0 .3e1\n+4 5. 6.00 7\n8 9 1e1 1.1e1\n",
    "quotes": '"0","1","2","3"\n"4","5","6","7"\n"8","9","10","11"\n',
    "decimal commas": "0,0 1,0 2,0 3,0\n4,0 5,0 6,0 7,0\n8,0 9,0 10,0 11,0\n",
    "decimal commas and semicolons": "0,0;1;2,00;3\n4;5,0;6;7\n8;9;10;11,0\n",
    "pandas": ",0,1,2,3\n0,0,1,2,3\n1,4,5,6,7\n2,8,9,10,11\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_every_text_layout_is_parsed_to_the_same_matrix(name: str) -> None:
    np.testing.assert_array_equal(parse_text(TEXTS[name].encode()), RAMP)


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_are_recognised(codec: str) -> None:
    np.testing.assert_array_equal(parse_text(TEXTS["commas"].encode(codec)), RAMP)


def test_missing_numbers_are_nan() -> None:
    found = parse_text(b"1,,3\nNaN,NA,6\n7,n/a,9\n")
    np.testing.assert_array_equal(found, [[1, np.nan, 3], [np.nan, np.nan, 6], [7, np.nan, 9]])


REFUSED = {
    "1 2 3\n4 5\n": "line 2 holds 2 numbers; expected 3, as in line 1",
    "head\n\n1 2 3\n4 5 6\n7 8 9 10\n": "line 5 holds 4 numbers; expected 3, as in line 3",
    "1 2 3\n4 five 6\n": "line 2 is not a row of numbers; expected 3 numbers",
    "1 2 3\n1_0 2 3\n": "line 2 is not a row of numbers",
    "file,label\na.png,ASD\n": "holds no row of numbers",
    "": "holds no row of numbers",
    "1\n2\n3\n": "holds 3 rows of 1 numbers; expected a matrix",
    "1 2 3 4\n": "holds 1 rows of 4 numbers",
    "1 2\n3 -1\n": "from -1 to 3",
    "1 2\n3 70000\n": "from 1 to 70000",
    "1 2\n3 300.5\n": "from 1 to 300.5",
    "1 2\n3 inf\n": "infinity",
    "1 2\n3 1e999\n": "infinity",
    "nan nan\nnan 1\n": "75% of the numbers are NaN",
    "note\n" * 60 + "1 2\n3 4\n": "the first 50 lines hold no row of numbers",
}


@pytest.mark.parametrize("text", REFUSED)
def test_text_without_matrix_is_refused_with_position(text: str) -> None:
    with pytest.raises(FrameFormatError) as caught:
        decode_text(text.encode(), "none")
    assert REFUSED[text] in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("rows", "grey"),
    [
        ([[0, 0.5], [0.25, 1]], [[0, 128], [64, 255]]),
        ([[0, 1], [1, 0]], [[0, 255], [255, 0]]),
        ([[0, 1.4], [200.5, 255]], [[0, 1], [201, 255]]),
        ([[0, 257], [32896, 65535]], [[0, 1], [128, 255]]),
        ([[0, 256], [0, 0]], [[0, 1], [0, 0]]),
    ],
)
def test_scale_follows_from_range_of_all_numbers(rows: list[list[float]], grey: list[list[int]]) -> None:
    text = "\n".join(" ".join(map(str, row)) for row in rows)
    assert decode_text(text.encode(), "none").grey().tolist() == grey


def test_nan_is_black_and_flagged() -> None:
    pixels = decode_text(b"0.5 nan\n1 0\n", "none")
    assert (pixels.grey().tolist(), pixels.flags) == ([[128, 0], [255, 0]], ("nan",))
    assert decode_text(b"0.5 0\n1 0\n", "none").flags == ()


numbers = st.floats(0, 255, width=32)


@given(
    st.integers(2, 6).flatmap(lambda width: st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=2)),
    st.sampled_from([",", ";", "\t", " ", ", ", " ;", ",\t", "   "]),
    st.sampled_from(["\n", "\r\n", "\r", "\n\n"]),
    st.sampled_from(["", "depth (cm), gain\n", "# note\n", "\n\n"]),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_any_layout_is_parsed_to_its_numbers(
    rows: list[list[float]], delimiter: str, end: str, head: str, decimal_comma: bool
) -> None:
    body = end.join(delimiter.join(f"{value!r}" for value in row) for row in rows)
    if decimal_comma and "," not in delimiter:
        body = body.replace(".", ",")
    np.testing.assert_array_equal(parse_text((head + body).encode()), rows)


@given(st.binary(max_size=200))
@settings(max_examples=80, deadline=None)
def test_random_bytes_yield_a_frame_or_a_one_line_error(data: bytes) -> None:
    try:
        grey = decode_text(data, "both").grey()
    except FrameError as error:
        assert str(error).isprintable()
    else:
        assert grey.dtype == np.uint8 and grey.ndim == 2


# ---------------------------------------------------------------------------------------------- npy

LEVELS = np.array([[0, 1, 2], [9, 90, 255]], np.uint8)


@pytest.mark.parametrize(
    ("values", "grey"),
    [
        (LEVELS, LEVELS),
        (LEVELS // 128, LEVELS // 128),  # uint8 holds grey levels, however dark
        (LEVELS.astype(np.int64), LEVELS),
        (LEVELS.astype(">f4"), LEVELS),
        (LEVELS.astype(np.uint16) * 257, LEVELS),
        (LEVELS.astype(np.int32) * 257, LEVELS),
        (LEVELS / 255, LEVELS),
        (np.asfortranarray(LEVELS), LEVELS),
        (LEVELS > 9, (LEVELS > 9) * 255),
        (LEVELS[..., None], LEVELS),
    ],
)
def test_array_of_every_dtype_is_converted(values: np.ndarray, grey: np.ndarray) -> None:
    np.testing.assert_array_equal(decode_grey(npy(values)), grey)


def test_rgb_array_becomes_luma_and_is_flagged() -> None:
    colours = np.zeros((4, 5, 3), np.uint8)
    colours[..., 0] = 200
    grey, flags = decode_grey_and_flags(npy(colours))
    assert (grey.shape, int(grey[0, 0]), flags) == ((4, 5), 60, ("colour",))


def read(path: Path, flip: Flip = "none", every: int = 1) -> list[np.ndarray]:
    found = []
    for item in find_frames([path], ReadOptions(flip=flip, every=every)):
        assert isinstance(item, FrameFile), item
        found.append(load_grey(item))
    return found


@pytest.mark.parametrize("order", ["C", "F"])
def test_frames_of_an_array_share_one_scale(order: Any, tmp_path: Path) -> None:
    clip = np.stack([np.zeros((4, 5)), np.full((4, 5), 1.0), np.full((4, 5), 200.0)])
    (tmp_path / "clip.npy").write_bytes(npy(np.asarray(clip, order=order)))
    assert [int(grey.max()) for grey in read(tmp_path / "clip.npy")] == [0, 1, 200]  # a dark frame stays dark
    assert [item.name for item in find_frames([tmp_path]) if isinstance(item, FrameFile)] == []
    found = list(find_frames([tmp_path], ReadOptions(matrices=True, every=2)))
    assert [item.name for item in found if isinstance(item, FrameFile)] == ["clip.npy#1", "clip.npy#3"]


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (npy(np.array([{}], object)), FrameFormatError, "plain numbers"),
        (npy(np.ones((3, 3), complex)), FrameFormatError, "plain numbers"),
        (npy(np.array([["a", "b"]])), FrameFormatError, "plain numbers"),
        (npy(np.ones(9)), FrameFormatError, "array is 9;"),
        (npy(np.ones((2, 2, 2, 4, 4))), FrameFormatError, "2 x 2 x 2 x 4 x 4"),
        (npy(np.ones((0, 4, 4))), FrameFormatError, "0 x 4 x 4"),
        (npy(np.ones((4, 4)))[:-8], FrameDamagedError, "120 bytes; expected 128"),
        (npy(np.ones((4, 4))) + b"more", FrameDamagedError, "132 bytes"),
        (npy(np.full((4, 4), np.nan)), FrameFormatError, "100% of the numbers are NaN"),
        (npy(np.full((4, 4), -1)), FrameFormatError, "from -1 to -1"),
        (b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16, FrameDamagedError, "header"),
        (
            npy(np.ones((1, 4))).replace(b"(1, 4), }   ", b"(99999, 99999"[:12]),
            FrameDamagedError,
            "header",
        ),
        (npy(np.ones((4, 4, 4))), FrameFormatError, "4 frames; expected one"),
    ],
)
def test_unsupported_array_is_refused(data: bytes, kind: type[FrameError], words: str) -> None:
    with pytest.raises(kind, match=words):
        decode_grey(data)


def test_stated_array_size_allocates_no_memory() -> None:
    header = npy(np.ones((7, 7), np.uint8))[:128].replace(b"(7, 7), }          ", b"(70000, 70000), }  ")
    assert b"70000" in header
    with pytest.raises(FrameTooLargeError, match="70000 x 70000"):
        decode_grey(header)


# ---------------------------------------------------------------------------------------------- files and --flip


@pytest.mark.parametrize("flip", FLIPS)
def test_flip_applies_to_matrices_only(flip: Flip, tmp_path: Path) -> None:
    from PIL import Image

    levels = np.array([[1, 20], [30, 90]], np.uint8)
    turned = {"none": levels, "vertical": levels[::-1], "horizontal": levels[:, ::-1], "both": levels[::-1, ::-1]}[flip]
    (tmp_path / "a.npy").write_bytes(npy(levels))
    (tmp_path / "a.txt").write_text("1 20\n30 90\n", encoding="ascii")
    Image.fromarray(levels).save(tmp_path / "a.png")
    for name in ("a.npy", "a.txt"):
        np.testing.assert_array_equal(read(tmp_path / name, flip)[0], turned)
        (item,) = find_frames([tmp_path / name], ReadOptions(flip=flip))
        assert isinstance(item, FrameFile)
        np.testing.assert_array_equal(np.asarray(load_image(item)), turned)
    np.testing.assert_array_equal(read(tmp_path / "a.png", flip)[0], levels)


def test_matrices_in_a_folder_are_frames_only_on_request(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text("1 2\n3 4\n", encoding="ascii")
    (tmp_path / "notes.csv").write_text("who,what\nme,this\n", encoding="ascii")
    (failure,) = find_frames([tmp_path])
    assert isinstance(failure, Failure) and "--matrices" in str(failure.error)
    first, second = find_frames([tmp_path], ReadOptions(matrices=True))
    assert isinstance(first, FrameFile) and isinstance(second, FrameFile)
    assert load_grey_and_flags(first)[1] == ()
    with pytest.raises(FrameFormatError, match="no row of numbers"):
        load_grey(second)
    (named,) = find_frames([str(tmp_path / "*.txt")])
    assert isinstance(named, FrameFile) and load_grey(named).tolist() == [[1, 2], [3, 4]]


# ---------------------------------------------------------------------------------------------- tolerance and bounds


@pytest.mark.parametrize(
    ("rows", "grey"),
    [
        ([[-5.5511e-17, 0.5], [1, 0.25]], [[0, 128], [255, 64]]),
        ([[0, 0.5], [1 + 2.3e-16 * 2, 0.25]], [[0, 128], [255, 64]]),  # not 0 to 255, which would be black
        ([[-1e-5, 100], [255.0001, 3]], [[0, 100], [255, 3]]),
    ],
)
def test_rounding_errors_do_not_leave_a_range(rows: list[list[float]], grey: list[list[int]]) -> None:
    text = "\n".join(" ".join(map(repr, row)) for row in rows)
    np.testing.assert_array_equal(decode_text(text.encode(), "none").grey(), grey)
    np.testing.assert_array_equal(decode_grey(npy(np.array(rows))), grey)


@pytest.mark.parametrize("rows", [[[-1e-5, 0.5], [1, 0]], [[-1e-3, 100], [255, 0]], [[-1e-17, -1], [-2, -3]]])
def test_negative_numbers_beyond_rounding_are_refused(rows: list[list[float]]) -> None:
    with pytest.raises(FrameFormatError, match="range from"):
        decode_grey(npy(np.array(rows)))


@pytest.mark.parametrize(
    "data",
    [
        b"\n" * 5_000_000,
        b"1\n" * 2_000_000,
        b"1 2\r" * 1_000_000,
        b"1 " * 3_000_000,
        b"1\x0c" * 3_000_000,
        "1 2\n".encode("utf-16") * 300_000,
    ],
    ids=["newlines", "one number a line", "carriage returns", "one line", "form feeds", "UTF-16"],
)
def test_lines_and_numbers_are_bounded_before_there_are_lists_of_them(data: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(FrameTooLargeError):
        decode_text(data, "none")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 << 20


def test_cell_of_many_digits_takes_no_time() -> None:
    with pytest.raises(FrameFormatError):
        decode_text(b"1" * 2_000_000 + b"x", "none")


def test_lack_of_memory_is_a_frame_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("echoquad_runtime.frames.matrix.value_range", fail)
    with pytest.raises(FrameTooLargeError, match="memory"):
        decode_text(b"1 2\n3 4\n", "none")


def test_stated_header_length_of_an_array_allocates_no_memory() -> None:
    data = bytearray(npy(RAMP))
    data[6:12] = b"\2\0" + (3_900_000_000).to_bytes(4, "little")
    tracemalloc.start()
    with pytest.raises(FrameDamagedError, match="header"):
        decode_grey(bytes(data))
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_frame_of_an_array_is_bounded_in_bytes() -> None:
    stream = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (6000, 6000, 3)}
    np.lib.format.write_array_header_1_0(stream, header)
    with pytest.raises(FrameTooLargeError, match="bytes per frame"):
        decode_grey(stream.getvalue())


def test_conversion_in_bands_equals_conversion_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random((50, 40))
    values[3, 4:9] = np.nan
    expected = decode_grey_and_flags(npy(values))
    monkeypatch.setattr("echoquad_runtime.frames.matrix._BAND_VALUES", 100)
    monkeypatch.setattr("echoquad_runtime.frames.decoded_frame._BAND_VALUES", 100)
    found = decode_grey_and_flags(npy(values))
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1] == expected[1] == ("nan",)
