"""Decoders of DICOM frames, by transfer syntax: from the bytes of a frame to its samples.

==============================  ==================================================================================
transfer syntax                 decoder
==============================  ==================================================================================
uncompressed, deflated          numpy
JPEG baseline, extended 8-bit   Pillow, as for JPEG files: `echoquad_runtime.frames.image` checks for truncation
JPEG lossless, 8-bit            the same: Pillow's wheels have libjpeg-turbo 3, which decodes it
RLE                             Pillow's PackBits: it stops at the frame's size, some hundred times pydicom's speed
JPEG 2000, HTJ2K                pylibjpeg-openjpeg: Pillow reduces colours of more than 8 bits to 8
JPEG-LS, JPEG lossless 16-bit   GDCM, through pydicom: the only decoder of both with wheels for every platform
==============================  ==================================================================================

The size that a compressed frame states is compared with the header before decoding, so that a few bytes cannot ask for
gigabytes.
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
from echoquad_runtime.frames.dicom.header import Header
from echoquad_runtime.frames.dicom.transfer_syntaxes import JPEG_2000, JPEG_BASELINE, JPEG_LOSSLESS, RLE, UNCOMPRESSED
from echoquad_runtime.frames.image import decode_image

__all__ = ["SIZE_MISMATCH", "Samples", "decode_samples"]

Samples = npt.NDArray[Any]

SIZE_MISMATCH: Final = "the DICOM frame's size differs from its header's; the file is damaged: copy it again"


def decode_samples(header: Header, data: bytes) -> tuple[Samples, str]:
    """Decode the bytes of a frame.

    Returns
    -------
    samples, photometric
        Integers [H, W] or [H, W, 3] of `header.bits_stored` bits, and the photometric interpretation that they have
        now: some decoders convert to RGB.

    Raises
    ------
    Exception
        Whatever a decoder raises for a damaged frame: call this through `call_anonymized`.
    """
    photometric = header.photometric
    if header.syntax in UNCOMPRESSED:
        return _decode_uncompressed(header, data), "YBR_FULL" if photometric == "YBR_FULL_422" else photometric
    if header.syntax == RLE:
        return _extract_stored_bits(header, _decode_rle(header, data)), photometric
    if header.syntax in JPEG_BASELINE or (header.syntax in JPEG_LOSSLESS and header.bits_allocated == 8):
        return np.asarray(decode_image(data)), photometric
    if header.syntax in JPEG_2000:
        return _decode_jpeg_2000(header, data), "RGB" if photometric in ("YBR_ICT", "YBR_RCT") else photometric
    return _extract_stored_bits(header, _decode_gdcm(header, data)), photometric


def _decode_uncompressed(header: Header, data: bytes) -> Samples:
    if header.byte_swapped:
        size = header.rows * header.columns * header.samples_per_pixel
        data = np.frombuffer(data, "u2").byteswap().tobytes()[:size]
    if header.photometric == "YBR_FULL_422":
        pairs = np.frombuffer(data, np.uint8).reshape(header.rows, header.columns // 2, 4)
        chroma = [np.repeat(pairs[..., channel], 2, axis=1) for channel in (2, 3)]
        return np.stack([pairs[..., :2].reshape(header.rows, header.columns), *chroma], axis=2)
    dtype = np.uint8 if header.bits_allocated == 8 else np.dtype("<>"[header.big_endian] + "u2")
    samples = _reshape(header, np.frombuffer(data, dtype), planar=header.planar_configuration == 1)
    return _extract_stored_bits(header, samples)


def _reshape(header: Header, samples: Samples, *, planar: bool) -> Samples:
    if header.samples_per_pixel == 1:
        return samples.reshape(header.rows, header.columns)
    if planar:
        return np.moveaxis(samples.reshape(3, header.rows, header.columns), 0, 2)
    return samples.reshape(header.rows, header.columns, 3)


def _extract_stored_bits(header: Header, samples: Samples) -> Samples:
    """Remove the bits around the stored ones, which may hold overlays, and restore the sign."""
    if header.bits_stored == header.bits_allocated and not header.signed:
        return samples.astype(samples.dtype.newbyteorder("="), copy=False)
    values = samples.astype(np.int32) >> (header.high_bit + 1 - header.bits_stored)
    values &= (1 << header.bits_stored) - 1
    if header.signed:
        values -= (values >> header.bits_stored - 1) << header.bits_stored
        return values
    return values.astype(np.uint8 if header.bits_stored == header.bits_allocated == 8 else np.uint16)


def _decode_rle(header: Header, data: bytes) -> Samples:
    """Decode run lengths (DICOM PS3.5, annex G): one segment per sample and byte, the most significant byte first."""
    count, *offsets = struct.unpack_from("<16I", data)
    sample_bytes, pixels = header.bits_allocated // 8, header.rows * header.columns
    if count != header.samples_per_pixel * sample_bytes or len(data) < 64:
        raise FrameDamagedError("the DICOM frame's number of RLE segments contradicts its header; copy it again")
    ends = [*offsets[1:count], len(data)]
    planes = []
    for begin, end in zip(offsets, ends, strict=False):
        # Decoded as one row, since some writers let runs cross rows.
        plane = Image.frombytes("L", (pixels, 1), data[begin:end], "packbits", "L")
        planes.append(np.asarray(plane).reshape(-1))
    stacked = np.stack(planes).reshape(header.samples_per_pixel, sample_bytes, pixels).astype(np.uint16)
    samples = stacked[:, 0] if sample_bytes == 1 else stacked[:, 0] << 8 | stacked[:, 1]
    return _reshape(header, samples.astype(np.uint8 if sample_bytes == 1 else np.uint16).reshape(-1), planar=True)


def _decode_jpeg_2000(header: Header, data: bytes) -> Samples:
    """Decode a JPEG 2000 codestream, whose SIZ segment states its size (ISO/IEC 15444-1, A.5.1)."""
    begin = data.find(b"\xff\x4f\xff\x51")
    if begin < 0 or len(data) < begin + 44:
        raise FrameDamagedError("the DICOM frame is not JPEG 2000, as its header states; copy the file again")
    right, bottom, left, top = struct.unpack_from(">4I", data, begin + 8)
    (components,) = struct.unpack_from(">H", data, begin + 40)
    (depth,) = struct.unpack_from(">B", data, begin + 42)
    size = (right - left, bottom - top, components)
    if size != (header.columns, header.rows, header.samples_per_pixel) or depth & 127 > 15:
        raise FrameDamagedError(SIZE_MISMATCH)
    if b"\xff\xd9" not in data[-4:]:
        raise FrameDamagedError("the DICOM frame's JPEG 2000 has no end marker: the file is truncated; copy it again")
    samples = np.asarray(_load_openjpeg()(data[begin:], 0))
    bits, signed = (depth & 127) + 1, bool(depth & 128)
    if signed != header.signed:  # the DICOM header overrules the codestream
        samples = samples.astype(np.int64) & ((1 << bits) - 1)
        if header.signed:
            samples -= (samples >> bits - 1) << bits
    low = -(1 << header.bits_stored - 1) if header.signed else 0
    samples = np.clip(samples.astype(np.int32), low, low + (1 << header.bits_stored) - 1)
    return samples.astype(np.int32 if header.signed else np.uint8 if header.bits_allocated == 8 else np.uint16)


def _load_openjpeg() -> Any:
    try:
        return importlib.import_module("openjpeg").decode
    except ImportError:
        pass
    raise _missing_decoder("pylibjpeg-openjpeg")


def _decode_gdcm(header: Header, data: bytes) -> Samples:
    """Decode JPEG lossless and JPEG-LS with GDCM, after comparing the size in the frame with the header."""
    for offset in range(2, min(len(data), 1 << 16) - 10):
        if data[offset] == 0xFF and data[offset + 1] in (0xC3, 0xF7):
            precision, rows, columns, components = struct.unpack_from(">BHHB", data, offset + 4)
            break
    else:
        raise FrameDamagedError("the DICOM frame has no JPEG header; the file is damaged: copy it again")
    size = (rows, columns, components)
    if size != (header.rows, header.columns, header.samples_per_pixel) or precision > header.bits_allocated:
        raise FrameDamagedError(SIZE_MISMATCH)
    if not data.startswith(b"\xff\xd8") or b"\xff\xd9" not in data[-4:]:
        raise FrameDamagedError("the DICOM frame's JPEG has no end marker: the file is truncated; copy it again")
    decoder, encapsulate = _load_gdcm(header.syntax)
    samples, _ = decoder.as_array(
        encapsulate([data]),
        index=0,
        raw=True,
        decoding_plugin="gdcm",
        rows=header.rows,
        columns=header.columns,
        number_of_frames=1,
        samples_per_pixel=header.samples_per_pixel,
        bits_allocated=header.bits_allocated,
        bits_stored=header.bits_stored,
        photometric_interpretation=header.photometric,
        pixel_representation=int(header.signed),
        planar_configuration=header.planar_configuration,
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
        raise _missing_decoder("python-gdcm")
    for stream in ("Debug", "Warning", "Error"):
        getattr(gdcm.Trace, f"{stream}Off")()
    return get_decoder(syntax), encapsulate


def _missing_decoder(package: str) -> FrameExtraError:
    return FrameExtraError(
        f"the DICOM file's compression needs {package}, which is not installed; "
        'install it: pip install "echoquad[dicom]"'
    )
