"""Decoders of DICOM frames: from a frame's bytes to its samples, by transfer syntax.

==============================  ==================================================================================
transfer syntax                 decoded by
==============================  ==================================================================================
uncompressed, deflated          numpy
JPEG baseline, extended 8-bit   Pillow, as JPEG files are: `echoquad_runtime.frames.image` with its checks for cut files
JPEG lossless, 8-bit            the same: libjpeg-turbo knows it from 3.0 on, which Pillow's wheels have
RLE                             Pillow's PackBits, which stops at the frame's size, some hundred times pydicom's speed
JPEG 2000, HTJ2K                pylibjpeg-openjpeg: Pillow turns colours of more than 8 bits into 8
JPEG-LS, JPEG lossless 16-bit   GDCM, through pydicom: the one decoder for both that has wheels everywhere
==============================  ==================================================================================

What a compressed frame announces of itself is held against the header before it is decoded, so that a few bytes do not
ask for gigabytes.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from echoquad_runtime.errors import FrameDamagedError, FrameExtraError
from echoquad_runtime.frames.dicom.elements import NATIVE
from echoquad_runtime.frames.dicom.header import Header
from echoquad_runtime.frames.image import decode_image

__all__ = ["JPEG", "KNOWN", "Samples", "samples_of"]

Samples = npt.NDArray[Any]

JPEG: Final = frozenset({"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"})
_GDCM: Final = frozenset(f"1.2.840.10008.1.2.4.{end}" for end in (57, 70, 80, 81))
_LOSSLESS: Final = frozenset(f"1.2.840.10008.1.2.4.{end}" for end in (57, 70))
_JPEG_2000: Final = frozenset(f"1.2.840.10008.1.2.4.{end}" for end in (90, 91, 201, 202, 203))
_RLE: Final = "1.2.840.10008.1.2.5"

KNOWN: Final = NATIVE | JPEG | _GDCM | _JPEG_2000 | {_RLE}
"""Transfer syntaxes that are read."""


def samples_of(header: Header, data: bytes) -> tuple[Samples, str]:
    """Decode to samples, [H, W] or [H, W, 3], of the bits that are stored; with the kind that they are of now.

    Raises
    ------
    Exception
        Whatever a decoder raises of a damaged frame: to be called through `reworded`.
    """
    if header.syntax in NATIVE:
        return _native(header, data), "YBR_FULL" if header.photometric == "YBR_FULL_422" else header.photometric
    if header.syntax == _RLE:
        return _stored(header, _rle(header, data)), header.photometric
    if header.syntax in JPEG or (header.syntax in _LOSSLESS and header.allocated == 8):
        return np.asarray(decode_image(data)), header.photometric
    if header.syntax in _JPEG_2000:
        return _jpeg_2000(header, data), "RGB" if header.photometric in ("YBR_ICT", "YBR_RCT") else header.photometric
    return _stored(header, _gdcm(header, data)), header.photometric


def _native(header: Header, data: bytes) -> Samples:
    if header.swapped:
        data = np.frombuffer(data, "u2").byteswap().tobytes()[: header.rows * header.columns * header.samples]
    if header.photometric == "YBR_FULL_422":
        pairs = np.frombuffer(data, np.uint8).reshape(header.rows, header.columns // 2, 4)
        both = [np.repeat(pairs[..., channel], 2, axis=1) for channel in (2, 3)]
        return np.stack([pairs[..., :2].reshape(header.rows, header.columns), *both], axis=2)
    kind = np.uint8 if header.allocated == 8 else np.dtype("<>"[header.big_endian] + "u2")
    return _stored(header, _shaped(header, np.frombuffer(data, kind), header.planar))


def _shaped(header: Header, samples: Samples, planar: int) -> Samples:
    if header.samples == 1:
        return samples.reshape(header.rows, header.columns)
    if planar:
        return np.moveaxis(samples.reshape(3, header.rows, header.columns), 0, 2)
    return samples.reshape(header.rows, header.columns, 3)


def _stored(header: Header, samples: Samples) -> Samples:
    """Take the bits that hold the sample out of those around it, overlays in its place or above it, and its sign."""
    if header.stored == header.allocated and not header.signed:
        return samples.astype(samples.dtype.newbyteorder("="), copy=False)
    values = samples.astype(np.int32) >> (header.high_bit + 1 - header.stored)
    values &= (1 << header.stored) - 1
    if header.signed:
        values -= (values >> header.stored - 1) << header.stored
        return values
    return values.astype(np.uint8 if header.stored == header.allocated == 8 else np.uint16)


def _rle(header: Header, data: bytes) -> Samples:
    """Undo the run lengths (DICOM PS3.5, annex G): a segment a sample and byte, the most significant first."""
    count, *offsets = struct.unpack_from("<16I", data)
    deep, pixels = header.allocated // 8, header.rows * header.columns
    if count != header.samples * deep or len(data) < 64:
        raise FrameDamagedError(
            "the DICOM frame has another number of RLE segments than its header says; copy it again"
        )
    ends = [*offsets[1:count], len(data)]
    planes = []
    for begin, end in zip(offsets, ends, strict=False):
        # One row, since some writers' runs go on from one row to the next.
        plane = Image.frombytes("L", (pixels, 1), data[begin:end], "packbits", "L")
        planes.append(np.asarray(plane).reshape(-1))
    stacked = np.stack(planes).reshape(header.samples, deep, pixels).astype(np.uint16)
    samples = stacked[:, 0] if deep == 1 else stacked[:, 0] << 8 | stacked[:, 1]
    return _shaped(header, samples.astype(np.uint8 if deep == 1 else np.uint16).reshape(-1), planar=1)


def _jpeg_2000(header: Header, data: bytes) -> Samples:
    """Decode a JPEG 2000 codestream, which says its size in its SIZ segment (ISO/IEC 15444-1, A.5.1)."""
    begin = data.find(b"\xff\x4f\xff\x51")
    if begin < 0 or len(data) < begin + 44:
        raise FrameDamagedError("the DICOM frame is no JPEG 2000, which its header says it is; copy the file again")
    right, bottom, left, top = struct.unpack_from(">4I", data, begin + 8)
    (components,) = struct.unpack_from(">H", data, begin + 40)
    (depth,) = struct.unpack_from(">B", data, begin + 42)
    if (right - left, bottom - top, components) != (header.columns, header.rows, header.samples) or depth & 127 > 15:
        raise FrameDamagedError("the DICOM frame is not as its header says; the file is damaged: copy it again")
    if b"\xff\xd9" not in data[-4:]:
        raise FrameDamagedError("the DICOM frame's JPEG 2000 has no end: the file is truncated; copy it again")
    samples = np.asarray(_load_openjpeg()(data[begin:], 0))
    bits, signed = (depth & 127) + 1, bool(depth & 128)
    if signed != header.signed:  # the header has the last word on how bits are understood
        samples = samples.astype(np.int64) & ((1 << bits) - 1)
        if header.signed:
            samples -= (samples >> bits - 1) << bits
    low, high = (
        (-(1 << header.stored - 1), (1 << header.stored - 1) - 1) if header.signed else (0, (1 << header.stored) - 1)
    )
    samples = np.clip(samples.astype(np.int32), low, high)
    return samples.astype(np.int32 if header.signed else np.uint8 if header.allocated == 8 else np.uint16)


def _load_openjpeg() -> Any:
    try:
        return importlib.import_module("openjpeg").decode
    except ImportError:
        pass
    raise _no_decoder("pylibjpeg-openjpeg")


def _gdcm(header: Header, data: bytes) -> Samples:
    """Decode JPEG lossless and JPEG-LS by GDCM, once the frame's own header has been held against the file's."""
    for at in range(2, min(len(data), 1 << 16) - 10):
        if data[at] == 0xFF and data[at + 1] in (0xC3, 0xF7):
            precision, rows, columns, components = struct.unpack_from(">BHHB", data, at + 4)
            break
    else:
        raise FrameDamagedError("the DICOM frame has no JPEG header; the file is damaged: copy it again")
    if (rows, columns, components) != (header.rows, header.columns, header.samples) or precision > header.allocated:
        raise FrameDamagedError("the DICOM frame is not as its header says; the file is damaged: copy it again")
    if not data.startswith(b"\xff\xd8") or b"\xff\xd9" not in data[-4:]:
        raise FrameDamagedError("the DICOM frame's JPEG has no end: the file is truncated; copy it again")
    decoder, encapsulate = _load_gdcm(header.syntax)
    samples, _ = decoder.as_array(
        encapsulate([data]),
        index=0,
        raw=True,
        decoding_plugin="gdcm",
        rows=header.rows,
        columns=header.columns,
        number_of_frames=1,
        samples_per_pixel=header.samples,
        bits_allocated=header.allocated,
        bits_stored=header.stored,
        photometric_interpretation=header.photometric,
        pixel_representation=int(header.signed),
        planar_configuration=header.planar,
        pixel_keyword="PixelData",
    )
    return np.asarray(samples)


def _load_gdcm(syntax: str) -> tuple[Any, Callable[..., bytes]]:
    try:
        import gdcm
        from pydicom.encaps import encapsulate
        from pydicom.pixels import get_decoder
    except ImportError:
        gdcm = None
    if gdcm is None:
        raise _no_decoder("python-gdcm")
    for stream in ("Debug", "Warning", "Error"):
        getattr(gdcm.Trace, f"{stream}Off")()
    return get_decoder(syntax), encapsulate


def _no_decoder(package: str) -> FrameExtraError:
    return FrameExtraError(
        f'the DICOM file\'s compression needs {package}, which is not installed; do: pip install "echoquad[dicom]"'
    )
