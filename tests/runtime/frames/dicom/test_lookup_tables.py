"""Lookup tables of DICOM: Modality LUT, VOI LUT, windows, and palettes, also hostile ones."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from echoquad_runtime.errors import FrameDamagedError, FrameFormatError
from echoquad_runtime.frames.reader import decode_grey
from echoquad_runtime.frames.sources import decode_in_memory

Write = Callable[..., bytes]

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
PIXELS = RAMP.tobytes()
MODALITY, VOI = 0x00283000, 0x00283010
CENTER, WIDTH, FUNCTION, SLOPE, INTERCEPT = 0x00281050, 0x00281051, 0x00281056, 0x00281053, 0x00281052


def lut(parts: Any, tag: int, values: list[int], *, first: int = 0, bits: int = 16, packed: bool = False) -> bytes:
    """Return a sequence with one table."""
    descriptor = struct.pack("<3H", len(values) & 0xFFFF, first & 0xFFFF, bits)
    data = bytes(values) if packed else struct.pack(f"<{len(values)}H", *values)
    body = parts.element(0x00283002, "US", descriptor) + parts.element(0x00283006, "OW", data)
    return parts.element(tag, "SQ", parts.item(body))


def grey(write_dicom: Write, after: bytes, **values: tuple[str, bytes]) -> np.ndarray:
    """Decode the ramp with elements of group 28 after the usual ones."""
    data = write_dicom(PIXELS, {int(tag, 16): pair for tag, pair in values.items()})
    at = data.rindex(b"\xe0\x7f\x10\0")
    return decode_grey(data[:at] + after + data[at:])


INVERSE = [65535 - 257 * value for value in range(256)]


@pytest.mark.parametrize("tag", [MODALITY, VOI])
@pytest.mark.parametrize(("bits", "packed"), [(16, False), (8, False), (8, True), (12, False)])
def test_table_maps_stored_values(tag: int, bits: int, packed: bool, write_dicom: Write, parts: Any) -> None:
    white = (1 << bits) - 1
    values = [white - round(value * white / 255) for value in range(256)]
    np.testing.assert_array_equal(grey(write_dicom, lut(parts, tag, values, bits=bits, packed=packed)), 255 - RAMP)


@pytest.mark.parametrize("tag", [MODALITY, VOI])
def test_values_outside_table_take_its_first_or_last_entry(tag: int, write_dicom: Write, parts: Any) -> None:
    found = grey(write_dicom, lut(parts, tag, [10, 20, 30], first=100, bits=8))
    assert found[RAMP <= 100].max() == 10 and found[RAMP >= 105].min() == 30


def test_voi_lut_takes_rescaled_values_and_is_preferred_to_window(write_dicom: Write, parts: Any) -> None:
    window = parts.element(CENTER, "DS", b"10") + parts.element(WIDTH, "DS", b"2 ")
    rescale = parts.element(INTERCEPT, "DS", b"-100") + parts.element(SLOPE, "DS", b"1 ")
    table = lut(parts, VOI, list(range(256)), first=-100, bits=8)
    np.testing.assert_array_equal(grey(write_dicom, window + rescale + table), RAMP)


def test_window_follows_modality_lut(write_dicom: Write, parts: Any) -> None:
    table = lut(parts, MODALITY, [4 * value for value in range(256)], bits=16)
    window = parts.element(CENTER, "DS", b"512 ") + parts.element(WIDTH, "DS", b"1021")
    found = grey(write_dicom, window + table)
    np.testing.assert_allclose(found, RAMP, atol=1)


def test_table_of_signed_values(write_dicom: Write, parts: Any) -> None:
    table = lut(parts, VOI, list(range(256)), first=-128, bits=8)
    found = grey(write_dicom, table, **{"00280103": ("US", 1)})  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, RAMP.view(np.int8).astype(int) + 128)


@pytest.mark.parametrize("tag", [MODALITY, VOI])
def test_empty_tables_count_as_absent(tag: int, write_dicom: Write, parts: Any) -> None:
    for body in (b"", parts.item(b""), parts.item(parts.element(0x00283003, "LO", b"no table"))):
        np.testing.assert_array_equal(grey(write_dicom, parts.element(tag, "SQ", body)), RAMP)
    undefined = parts.element(tag, "SQ", parts.item(b"") + parts.SEQUENCE_END, parts.UNDEFINED)
    np.testing.assert_array_equal(grey(write_dicom, undefined), RAMP)


@pytest.mark.parametrize("tag", [MODALITY, VOI])
def test_short_and_wide_tables_are_refused(tag: int, write_dicom: Write, parts: Any) -> None:
    short = lut(parts, tag, [1, 2, 3]).replace(struct.pack("<3H", 3, 0, 16), struct.pack("<3H", 9, 0, 16))
    with pytest.raises(FrameDamagedError, match="shorter"):
        grey(write_dicom, short)
    with pytest.raises(FrameFormatError, match="not supported"):
        grey(write_dicom, lut(parts, tag, [1, 2, 3], bits=32))


@pytest.mark.parametrize(
    ("center", "width", "function"),
    [(b"0 ", b"0 ", b""), (b"1 ", b"0 ", b""), (b"1 ", b"-5", b""), (b"1 ", b"0 ", b"SIGMOID "), (b"1 ", b"", b"")],
)
def test_window_of_no_width_counts_as_absent(
    center: bytes, width: bytes, function: bytes, write_dicom: Write, parts: Any
) -> None:
    window = parts.element(CENTER, "DS", center) + parts.element(WIDTH, "DS", width)
    window += parts.element(FUNCTION, "CS", function) if function else b""
    np.testing.assert_array_equal(grey(write_dicom, window), RAMP)


@pytest.mark.parametrize("values", [(b"nan ", b"10"), (b"1 ", b"inf ")])
def test_window_that_is_no_number_is_refused(values: tuple[bytes, bytes], write_dicom: Write, parts: Any) -> None:
    center, width = values
    with pytest.raises(FrameFormatError, match="window"):
        grey(write_dicom, parts.element(CENTER, "DS", center) + parts.element(WIDTH, "DS", width))


# ---------------------------------------------------------------------------------------------- palettes


def segmented(write_dicom: Write, words: list[int], entries: int = 256) -> bytes:
    values: dict[int, tuple[str, bytes]] = {0x00280004: ("CS", b"PALETTE COLOR ")}
    for colour in range(3):
        values[0x00281101 + colour] = ("US", struct.pack("<3H", entries, 0, 16))
        values[0x00281221 + colour] = ("OW", struct.pack(f"<{len(words)}H", *words))
    return write_dicom(PIXELS, values)


def test_segmented_palette_is_read(write_dicom: Write) -> None:
    data = segmented(write_dicom, [0, 1, 0, 1, 255, 65535])
    np.testing.assert_array_equal(decode_grey(data), RAMP)
    assert decode_in_memory(data).flags == ("uncropped",)


@pytest.mark.parametrize(
    "words",
    [
        [0, 0] * 100_000,
        [0, 1, 5] + [1, 0, 7] * 100_000,
        [0, 1, 5] + [2, 65535, 0, 0] * 100_000,
        [0, 0] + [2, 65535, 0, 0] * 100_000,
        [0, 1, 5] + [2, 65535, 6, 0] * 100_000,
        [0, 1, 5, 2, 65535, 0xFFFF, 0xFFFF] * 50_000,
        [0, 65535],
    ],
)
def test_segmented_palette_that_never_ends_is_refused_soon(words: list[int], write_dicom: Write) -> None:
    data = segmented(write_dicom, words, entries=65535)
    began = time.process_time()
    with pytest.raises(FrameDamagedError):
        decode_grey(data)
    assert time.process_time() - began < 5
