"""Pixels of DICOM frames: from a frame's bytes to grey levels and colours, by photometric kind.

The bytes become samples in `echoquad_runtime.frames.dicom.codecs`.
"""

from __future__ import annotations

import functools
import io
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from echoquad_runtime.errors import FrameDamagedError, FrameFormatError
from echoquad_runtime.frames.decoded_frame import ColourPixels, GreyPixels, Pixels, cut
from echoquad_runtime.frames.dicom.codecs import JPEG, KNOWN, Samples, samples_of
from echoquad_runtime.frames.dicom.elements import NATIVE, reworded
from echoquad_runtime.frames.dicom.header import Header, Palette, Window
from echoquad_runtime.frames.image import decode_grey_and_flags, decode_image
from echoquad_runtime.frames.image_integrity import check_jpeg
from echoquad_runtime.quadrants import Box, Grey

__all__ = ["check_header", "pixels_of", "white_levels"]

_MONOCHROME: Final = ("MONOCHROME1", "MONOCHROME2")
_COLOURS: Final = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")

_SEGMENT_WORDS: Final = 0x10000  # entries a palette has at most


def check_header(header: Header) -> None:
    """Refuse what no rule covers, before any pixel is read. What is found is not quoted: it may be anything.

    Raises
    ------
    FrameFormatError
        If it is of such a kind.
    """
    if header.syntax not in KNOWN:
        raise FrameFormatError(
            "the DICOM file is compressed in a way that is not read (MPEG, say); expected none, JPEG, JPEG-LS, "
            "JPEG 2000 or RLE; convert it"
        )
    grey, palette = header.photometric in _MONOCHROME, header.photometric == "PALETTE COLOR"
    if not grey and not palette and header.photometric not in _COLOURS:
        raise FrameFormatError(
            "the DICOM file's pixels are of another kind than "
            f"{', '.join((*_MONOCHROME, 'PALETTE COLOR', *_COLOURS))}; convert it"
        )
    if header.samples != (1 if grey or palette else 3):
        raise FrameFormatError(
            "the DICOM header's samples a pixel do not fit the kind of its pixels; save the file again"
        )
    if header.allocated not in (8, 16) or not 1 <= header.stored <= header.allocated:
        raise FrameFormatError("the DICOM file's samples have other than 8 or 16 bits; convert it")
    if header.syntax in JPEG and header.stored != 8:
        raise FrameFormatError("the DICOM file is JPEG extended of 12 bits; expected 8; convert it")
    if not header.stored - 1 <= header.high_bit < header.allocated:
        raise FrameFormatError("the DICOM header's bits contradict each other; save the file again")
    if header.planar not in (0, 1) or (header.signed and not grey):
        raise FrameFormatError("the DICOM header's account of its samples contradicts itself; save the file again")
    if (
        header.photometric == "YBR_FULL_422"
        and header.syntax in NATIVE
        and (header.columns % 2 or header.allocated != 8)
    ):
        raise FrameFormatError("the DICOM file halves the colours of an odd width, or of 16 bits; convert it")
    if header.rows < 1 or header.columns < 1:
        raise FrameFormatError("the DICOM header announces no pixels; expected rows and columns")
    if palette and header.palette is None:
        raise FrameFormatError("the DICOM file has palette pixels and no palette; save it again")
    window = header.window
    if window is not None and not (
        np.isfinite([window.center, window.width, window.slope, window.intercept]).all()
        and window.function in ("LINEAR", "LINEAR_EXACT", "SIGMOID")
        and (window.width > 0 if window.function != "LINEAR" else window.width >= 1)
    ):
        raise FrameFormatError("the DICOM file's window cannot be; save it with another, or without")


def pixels_of(header: Header, data: bytes) -> Pixels:
    """Decode a frame.

    Raises
    ------
    FrameError
        If it is damaged, is not as the header says, or its decoder is not installed.
    """
    plain = header.photometric == "MONOCHROME2" and header.window is None
    if header.syntax in JPEG and (plain or header.photometric in _COLOURS):
        return _jpeg(header, data)
    samples, photometric = reworded("the DICOM frame cannot be decoded", samples_of, header, data)
    if samples.shape != (header.rows, header.columns, 3)[: 2 if header.samples == 1 else 3]:
        raise FrameDamagedError(
            "the DICOM frame has another size than its header says; the file is damaged: copy it again"
        )
    if photometric in _MONOCHROME:
        return GreyPixels(np.ascontiguousarray(cut(_grey(header, samples), header.box)))
    if photometric == "PALETTE COLOR":
        assert header.palette is not None
        table = reworded("the DICOM palette cannot be read", _table, header.palette, header.big_endian)
        places = np.clip(samples.astype(np.int32) - header.palette.first, 0, len(table) - 1)
        return ColourPixels(cut(table[places], header.box))
    if samples.dtype != np.uint8:
        samples = white_levels(header.stored)[samples]
    return ColourPixels(cut(samples, header.box), "YCbCr" if photometric.startswith("YBR") else "RGB")


# ---------------------------------------------------------------------------------------------- greys


def white_levels(bits: int) -> Grey:
    """Give the grey level of every value of so many bits, uint8 [2 ** bits]: the greatest is white."""
    white = (1 << bits) - 1
    return np.asarray((np.arange(white + 1, dtype=np.int64) * 510 + white) // (2 * white), np.uint8)


def _grey(header: Header, samples: Samples) -> Grey:
    low = -(1 << header.stored - 1) if header.signed else 0
    table = _grey_table(header.stored, low, header.window)
    if header.photometric == "MONOCHROME1":
        table = 255 - table
    return np.asarray(table[samples.astype(np.int32) - low])


@functools.lru_cache(maxsize=8)
def _grey_table(bits: int, low: int, window: Window | None) -> Grey:
    """Give the grey level of every value that can be stored, the least first."""
    if window is None:
        return white_levels(bits)
    values = np.arange(low, low + (1 << bits)) * window.slope + window.intercept
    if window.function == "LINEAR":
        shares = (values - (window.center - 0.5)) / max(window.width - 1, 1e-9) + 0.5  # a width of 1 is a step
    elif window.function == "LINEAR_EXACT":
        shares = (values - window.center) / window.width + 0.5
    else:
        shares = 1 / (1 + np.exp(np.clip(-4 * (values - window.center) / window.width, -700, 700)))
    return np.asarray(np.floor(np.clip(shares, 0, 1) * 255 + 0.5), np.uint8)


# ---------------------------------------------------------------------------------------------- palettes


@functools.lru_cache(maxsize=8)
def _table(palette: Palette, big_endian: bool) -> Grey:
    """Give a palette's colours, uint8 [entries, 3]."""
    columns = []
    for data in palette.tables:
        if palette.segmented:
            values = _expanded(data, palette, "<>"[big_endian])
        elif len(data) in (palette.entries, palette.entries + 1):
            values = np.frombuffer(data, np.uint8)
        else:
            values = np.frombuffer(data[: 2 * palette.entries], "<>"[big_endian] + "u2")
        if len(values) < palette.entries:
            raise FrameDamagedError(
                "the DICOM palette is shorter than its header says; the file is damaged: copy it again"
            )
        columns.append(values[: palette.entries].astype(np.int64))
    table = np.stack(columns, axis=1)
    # As DCMTK does: some write tables of 8 bits, and say 16.
    bits = 8 if palette.bits == 8 or table.max() <= 255 else 16
    if palette.bits not in (8, 16) or table.max() >= 1 << bits:
        raise FrameFormatError("the DICOM palette has entries of other than 8 or 16 bits; convert it")
    return white_levels(bits)[table]


def _expanded(data: bytes, palette: Palette, order: str) -> npt.NDArray[np.int64]:
    """Expand a segmented table (DICOM PS3.3, C.7.9.2): runs of values, straight lines, and repetitions of these."""
    word = 1 if palette.bits == 8 else 2
    words = np.frombuffer(data[: len(data) // word * word], np.uint8 if word == 1 else f"{order}u2").tolist()
    values: list[int] = []

    def segment(at: int, *, repeated: bool = False) -> int:
        kind, length = words[at : at + 2]
        if kind == 0:
            values.extend(words[at + 2 : at + 2 + length])
            at += 2 + length
        elif kind == 1:
            begin, end = values[-1], words[at + 2]
            values.extend(int(value) for value in np.floor(np.linspace(begin, end, length + 1)[1:] + 0.5))
            at += 3
        elif kind == 2 and not repeated:
            low, high = words[at + 2 : at + 4] if word == 2 else (words[at + 2], words[at + 4])
            place = low | high << 16 if word == 2 else low | words[at + 3] << 8 | high << 16 | words[at + 5] << 24
            place //= word
            for _ in range(length):
                place = segment(place, repeated=True)
            at += 4 if word == 2 else 6
        else:
            raise ValueError
        if len(values) > 2 * _SEGMENT_WORDS:
            raise ValueError
        return at

    at = 0
    while at + 2 <= len(words) and len(values) < palette.entries:
        at = segment(at)
    return np.array(values, np.int64)


# ---------------------------------------------------------------------------------------------- JPEG


def _jpeg(header: Header, data: bytes) -> Pixels:
    """Decode as a JPEG file, of which the luma alone is wanted for grey."""
    if not data.startswith(b"\xff\xd8\xff"):
        raise FrameDamagedError("the DICOM frame is no JPEG, which its header says it is; copy the file again")
    check_jpeg(data)
    image = _jpeg_header(data)
    if image.size != (header.columns, header.rows) or image.layers != header.samples:
        raise FrameDamagedError("the DICOM frame is not as its header says; the file is damaged: copy it again")
    if header.photometric == "RGB" and not {"jfif", "adobe_transform"} & image.info.keys():
        # Nothing in the JPEG says YCbCr, for which libjpeg would take it.
        image.draft("YCbCr", image.size)
        image.load()
        return ColourPixels(cut(np.asarray(image), header.box))
    return _JpegPixels(data, header.box)


def _jpeg_header(data: bytes) -> Any:
    from PIL.JpegImagePlugin import JpegImageFile

    return reworded("the DICOM frame's JPEG header cannot be read", JpegImageFile, io.BytesIO(data))


class _JpegPixels:
    """A baseline JPEG's pixels, decoded when asked for: its luma, or its colours."""

    flags: tuple[str, ...] = ()

    def __init__(self, data: bytes, box: Box | None) -> None:
        self._data, self._box = data, box
        self._coloured: bool | None = None

    def grey(self) -> Grey:
        """Give the luma."""
        levels, flags = decode_grey_and_flags(self._data)
        self._coloured = bool(flags)
        return np.ascontiguousarray(cut(levels, self._box))

    def is_coloured(self) -> bool:
        """Look at an eighth of the resolution."""
        if self._coloured is None:
            self._coloured = bool(decode_grey_and_flags(self._data)[1])
        return self._coloured

    def image(self) -> Image.Image:
        """Give the picture."""
        image = decode_image(self._data)
        return image if self._box is None else image.crop(self._box)
