"""Pixels of DICOM frames, by photometric interpretation: from the bytes of a frame to grey levels and colours.

`echoquad_runtime.frames.dicom.codecs` decodes the bytes to samples.
"""

from __future__ import annotations

import functools
import io
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from echoquad_runtime.errors import FrameDamagedError, FrameFormatError
from echoquad_runtime.frames.decoded_frame import ColourFrame, DecodedFrame, GreyFrame, crop
from echoquad_runtime.frames.dicom.codecs import SIZE_MISMATCH, Samples, decode_samples
from echoquad_runtime.frames.dicom.elements import call_anonymized
from echoquad_runtime.frames.dicom.header import COLOUR, MONOCHROME, PALETTE_COLOR, Header, Palette, Window
from echoquad_runtime.frames.dicom.transfer_syntaxes import JPEG_BASELINE
from echoquad_runtime.frames.image import decode_grey_and_flags, decode_image
from echoquad_runtime.frames.image_integrity import check_jpeg_markers
from echoquad_runtime.quadrants import Box, Grey

__all__ = ["decode_pixels", "full_scale_levels"]

_MAX_ENTRIES: Final = 0x10000  # of a palette


def decode_pixels(header: Header, data: bytes) -> DecodedFrame:
    """Decode a frame.

    Raises
    ------
    FrameError
        If it is damaged, contradicts the header, or its decoder is not installed.
    """
    plain = header.photometric == "MONOCHROME2" and header.window is None
    if header.syntax in JPEG_BASELINE and (plain or header.photometric in COLOUR):
        return _decode_jpeg(header, data)
    samples, photometric = call_anonymized("the DICOM frame cannot be decoded", decode_samples, header, data)
    if samples.shape != (header.rows, header.columns, 3)[: 2 if header.samples_per_pixel == 1 else 3]:
        raise FrameDamagedError(SIZE_MISMATCH)
    if photometric in MONOCHROME:
        return GreyFrame(np.ascontiguousarray(crop(_to_grey(header, samples), header.region)))
    if photometric == PALETTE_COLOR:
        assert header.palette is not None
        table = call_anonymized("the DICOM palette cannot be read", _palette_rgb, header.palette, header.big_endian)
        indices = np.clip(samples.astype(np.int32) - header.palette.first, 0, len(table) - 1)
        return ColourFrame(crop(table[indices], header.region))
    if samples.dtype != np.uint8:
        samples = full_scale_levels(header.bits_stored)[samples]
    return ColourFrame(crop(samples, header.region), "YCbCr" if photometric.startswith("YBR") else "RGB")


# ---------------------------------------------------------------------------------------------- monochrome


def full_scale_levels(bits: int) -> Grey:
    """Return the grey level of every `bits`-bit value, uint8 [2 ** bits]: the largest value is white."""
    white = (1 << bits) - 1
    return np.asarray((np.arange(white + 1, dtype=np.int64) * 510 + white) // (2 * white), np.uint8)


def _to_grey(header: Header, samples: Samples) -> Grey:
    low = -(1 << header.bits_stored - 1) if header.signed else 0
    table = _window_levels(header.bits_stored, low, header.window)
    if header.photometric == "MONOCHROME1":
        table = 255 - table
    return np.asarray(table[samples.astype(np.int32) - low])


@functools.lru_cache(maxsize=8)
def _window_levels(bits: int, low: int, window: Window | None) -> Grey:
    """Return the grey level of every `bits`-bit value from `low` on (DICOM PS3.3, C.11.2.1)."""
    if window is None:
        return full_scale_levels(bits)
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
def _palette_rgb(palette: Palette, big_endian: bool) -> Grey:
    """Return the colours of a palette, uint8 [entries, 3]."""
    byte_order = "<>"[big_endian]
    columns = []
    for data in palette.tables:
        if palette.segmented:
            values = _expand_segments(data, palette, byte_order)
        elif len(data) in (palette.entries, palette.entries + 1):
            values = np.frombuffer(data, np.uint8)
        else:
            values = np.frombuffer(data[: 2 * palette.entries], f"{byte_order}u2")
        if len(values) < palette.entries:
            raise FrameDamagedError(
                "the DICOM palette is shorter than its descriptor states; the file is damaged: copy it again"
            )
        columns.append(values[: palette.entries].astype(np.int64))
    table = np.stack(columns, axis=1)
    # Some writers store 8-bit entries and state 16 bits; DCMTK reads them in the same way.
    bits = 8 if palette.bits == 8 or table.max() <= 255 else 16
    if palette.bits not in (8, 16) or table.max() >= 1 << bits:
        raise FrameFormatError("the DICOM palette has entries of other than 8 or 16 bits; convert it")
    return full_scale_levels(bits)[table]


def _expand_segments(data: bytes, palette: Palette, byte_order: str) -> npt.NDArray[np.int64]:
    """Expand a segmented table (DICOM PS3.3, C.7.9.2): discrete, linear and indirect segments."""
    word = 1 if palette.bits == 8 else 2
    words = np.frombuffer(data[: len(data) // word * word], np.uint8 if word == 1 else f"{byte_order}u2").tolist()
    values: list[int] = []

    def expand(at: int, *, indirect: bool = False) -> int:
        opcode, length = words[at : at + 2]
        if opcode == 0:
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
        if len(values) > 2 * _MAX_ENTRIES:
            raise ValueError
        return at

    at = 0
    while at + 2 <= len(words) and len(values) < palette.entries:
        at = expand(at)
    return np.array(values, np.int64)


# ---------------------------------------------------------------------------------------------- JPEG


def _decode_jpeg(header: Header, data: bytes) -> DecodedFrame:
    """Decode as a JPEG file, which needs only the luma for grey."""
    if not data.startswith(b"\xff\xd8\xff"):
        raise FrameDamagedError("the DICOM frame is not JPEG, as its header states; copy the file again")
    check_jpeg_markers(data)
    image = _open_jpeg(data)
    if image.size != (header.columns, header.rows) or image.layers != header.samples_per_pixel:
        raise FrameDamagedError(SIZE_MISMATCH)
    if header.photometric == "RGB" and not {"jfif", "adobe_transform"} & image.info.keys():
        # Nothing in the JPEG states its colour space, and libjpeg would assume YCbCr and convert it.
        image.draft("YCbCr", image.size)
        image.load()
        return ColourFrame(crop(np.asarray(image), header.region))
    return _JpegFrame(data, header.region)


def _open_jpeg(data: bytes) -> Any:
    from PIL.JpegImagePlugin import JpegImageFile

    return call_anonymized("the DICOM frame's JPEG header cannot be read", JpegImageFile, io.BytesIO(data))


class _JpegFrame:
    """A baseline JPEG frame, decoded on request: its luma, or its colours."""

    flags: tuple[str, ...] = ()

    def __init__(self, data: bytes, region: Box | None) -> None:
        self._data, self._region = data, region
        self._coloured: bool | None = None

    def grey(self) -> Grey:
        """Return the luma."""
        levels, flags = decode_grey_and_flags(self._data)
        self._coloured = bool(flags)
        return np.ascontiguousarray(crop(levels, self._region))

    def is_coloured(self) -> bool:
        """Return whether a substantial part is coloured, at an eighth of the resolution."""
        if self._coloured is None:
            self._coloured = bool(decode_grey_and_flags(self._data)[1])
        return self._coloured

    def image(self) -> Image.Image:
        """Return the picture in its colours."""
        image = decode_image(self._data)
        return image if self._region is None else image.crop(self._region)
