"""Lookup tables of DICOM files: from stored values to grey levels, and from palette entries to colours."""

from __future__ import annotations

import functools
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from echoquad_runtime.errors import FrameDamagedError, FrameFormatError
from echoquad_runtime.frames.dicom.header import Header, LookupTable, Palette, Window
from echoquad_runtime.quadrants import Grey

__all__ = ["full_scale_levels", "grey_levels", "palette_rgb"]

_MAX_ENTRIES: Final = 0x10000  # of a table
_MAX_SEGMENT_WORDS: Final = 4 * _MAX_ENTRIES  # a segment that adds a single value takes three

_Values = npt.NDArray[Any]


def full_scale_levels(bits: int) -> Grey:
    """Return the grey level of every `bits`-bit value, uint8 [2 ** bits]: the largest value is white."""
    white = (1 << bits) - 1
    return np.asarray((np.arange(white + 1, dtype=np.int64) * 510 + white) // (2 * white), np.uint8)


# ---------------------------------------------------------------------------------------------- monochrome


def grey_levels(header: Header) -> Grey:
    """Return the grey level of every stored value, uint8 [2 ** bits], from the lowest on (DICOM PS3.3, C.11).

    Raises
    ------
    FrameError
        If a table is short or has entries of an unsupported kind.
    """
    low = -(1 << header.bits_stored - 1) if header.signed else 0
    levels = _grey_levels(
        header.bits_stored,
        low,
        header.rescale,
        header.modality_lut,
        header.window,
        header.voi_lut,
        header.big_endian,
    )
    return 255 - levels if header.photometric == "MONOCHROME1" else levels


@functools.lru_cache(maxsize=8)
def _grey_levels(
    bits: int,
    low: int,
    rescale: tuple[float, float],
    modality_lut: LookupTable | None,
    window: Window | None,
    voi_lut: LookupTable | None,
    big_endian: bool,
) -> Grey:
    values: _Values = np.arange(low, low + (1 << bits), dtype=np.float64) * rescale[0] + rescale[1]
    if modality_lut is not None:
        table, bits = _table(modality_lut, big_endian)
        values = _look_up(table, modality_lut.first, values)
    if voi_lut is not None:
        table, bits = _table(voi_lut, big_endian)
        return full_scale_levels(bits)[_look_up(table, voi_lut.first, np.floor(values + 0.5)).astype(np.int64)]
    if window is not None:
        return _window_levels(values, window)
    # Without both, slope and intercept do not matter: the largest storable value is white.
    return full_scale_levels(bits) if modality_lut is None else full_scale_levels(bits)[values.astype(np.int64)]


def _look_up(table: _Values, first: int, values: _Values) -> _Values:
    return np.asarray(table[np.clip(values - first, 0, len(table) - 1).astype(np.int64)])


def _table(lut: LookupTable, big_endian: bool) -> tuple[_Values, int]:
    """Return the entries of a table, and their number of bits."""
    entries = _entries(lut.data, lut.entries, big_endian)
    # Some writers store more bits than they state; DCMTK reads them in the same way.
    bits = max(lut.bits, int(entries.max()).bit_length())
    if not 1 <= lut.bits <= 16:
        raise FrameFormatError("not supported: the DICOM file's LUT has entries of more than 16 bits; convert it")
    return entries.astype(np.float64), bits


def _entries(data: bytes, count: int, big_endian: bool) -> npt.NDArray[Any]:
    if len(data) in (count, count + 1):
        values = np.frombuffer(data, np.uint8)
    else:
        values = np.frombuffer(data[: 2 * count], f"{'<>'[big_endian]}u2")
    if len(values) < count:
        raise _too_short()
    return values[:count]


def _too_short() -> FrameDamagedError:
    return FrameDamagedError("a palette or LUT of the DICOM file is shorter than it states; copy the file again")


def _window_levels(values: _Values, window: Window) -> Grey:
    """Return the grey levels of values in a window (DICOM PS3.3, C.11.2.1)."""
    if window.function == "LINEAR":
        shares = (values - (window.center - 0.5)) / max(window.width - 1, 1e-9) + 0.5  # a width of 1 is a step
    elif window.function == "LINEAR_EXACT":
        shares = (values - window.center) / window.width + 0.5
    else:
        shares = 1 / (1 + np.exp(np.clip(-4 * (values - window.center) / window.width, -700, 700)))
    return np.asarray(np.floor(np.clip(shares, 0, 1) * 255 + 0.5), np.uint8)


# ---------------------------------------------------------------------------------------------- palettes


@functools.lru_cache(maxsize=8)
def palette_rgb(palette: Palette, big_endian: bool) -> Grey:
    """Return the colours of a palette, uint8 [entries, 3].

    Raises
    ------
    FrameError
        If it is short, or has entries of an unsupported kind.
    Exception
        Whatever a malformed segment raises: call this through `call_anonymized`.
    """
    columns = []
    for data in palette.tables:
        if palette.segmented:
            values = _expand_segments(data, palette, big_endian)
            if len(values) < palette.entries:
                raise _too_short()
        else:
            values = _entries(data, palette.entries, big_endian)
        columns.append(values[: palette.entries].astype(np.int64))
    table = np.stack(columns, axis=1)
    # Some writers store 8-bit entries and state 16 bits; DCMTK reads them in the same way.
    bits = 8 if palette.bits == 8 or table.max() <= 255 else 16
    if palette.bits not in (8, 16) or table.max() >= 1 << bits:
        raise FrameFormatError("not supported: the DICOM palette has entries of other than 8 or 16 bits; convert it")
    return full_scale_levels(bits)[table]


def _expand_segments(data: bytes, palette: Palette, big_endian: bool) -> npt.NDArray[np.int64]:
    """Expand a segmented table (DICOM PS3.3, C.7.9.2): discrete, linear and indirect segments."""
    word = 1 if palette.bits == 8 else 2
    data = data[: len(data) // word * word][: _MAX_SEGMENT_WORDS * word]
    words = np.frombuffer(data, np.uint8 if word == 1 else f"{'<>'[big_endian]}u2").tolist()
    values: list[int] = []

    def expand(at: int, *, indirect: bool = False) -> int:
        opcode, length = words[at : at + 2]
        if length == 0 or len(values) > 2 * _MAX_ENTRIES:  # as each segment adds values, there are few
            raise ValueError
        if opcode == 0:
            if at + 2 + length > len(words):
                raise ValueError
            values.extend(words[at + 2 : at + 2 + length])
            at += 2 + length
        elif opcode == 1:
            begin, end = values[-1], words[at + 2]
            values.extend(int(value) for value in np.floor(np.linspace(begin, end, length + 1)[1:] + 0.5))
            at += 3
        elif opcode == 2 and not indirect:
            low, high = words[at + 2 : at + 4] if word == 2 else (words[at + 2], words[at + 4])
            target = low | high << 16 if word == 2 else low | words[at + 3] << 8 | high << 16 | words[at + 5] << 24
            target //= word
            for _ in range(length):
                target = expand(target, indirect=True)
            at += 4 if word == 2 else 6
        else:
            raise ValueError
        return at

    at = 0
    while at + 2 <= len(words) and len(values) < palette.entries:
        at = expand(at)
    return np.array(values, np.int64)
