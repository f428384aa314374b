"""Decoders of DICOM frames, by transfer syntax: from the bytes of a frame to its samples.

==============================  ==================================================================================
transfer syntax                 decoder
==============================  ==================================================================================
uncompressed, deflated          numpy
JPEG baseline, extended 8-bit   Pillow, as for JPEG files: `echoquad_runtime.frames.images.image` checks for truncation
JPEG lossless, 8-bit            the same: Pillow's wheels have libjpeg-turbo 3, which decodes it
RLE                             Pillow's PackBits: it stops at the frame's size, some hundred times pydicom's speed
JPEG 2000, HTJ2K                pylibjpeg-openjpeg: Pillow reduces colours of more than 8 bits to 8
JPEG-LS, JPEG lossless 16-bit   GDCM: the only decoder of both with wheels for every platform
JPEG extended 12-bit            the same
==============================  ==================================================================================

What a compressed frame states is compared with the header and bounded before decoding, so that a few bytes cannot ask
for gigabytes: see `jpeg_markers` and `jpeg_2000`.
"""

from __future__ import annotations

import importlib
import io
import struct
import warnings
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from echoquad_runtime.errors import FrameDamagedError, FrameExtraError, FrameFormatError
from echoquad_runtime.frames.dicom.header import Header
from echoquad_runtime.frames.dicom.jpeg_2000 import CODESTREAM_START, check_codestream
from echoquad_runtime.frames.dicom.jpeg_markers import SIZE_MISMATCH, checked_jpeg
from echoquad_runtime.frames.dicom.transfer_syntaxes import (
    JPEG_2000,
    JPEG_BASELINE,
    JPEG_LOSSLESS,
    JPEG_LS,
    RLE,
    UNCOMPRESSED,
)
from echoquad_runtime.frames.images.image import decode_image
from echoquad_runtime.frames.images.image_integrity import check_jpeg_markers

__all__ = ["Samples", "decode_samples", "open_jpeg", "uncompressed_frame_bytes"]

Samples = npt.NDArray[Any]

_GREY_TOLERANCE: Final = 8  # levels between the samples of a grey pixel


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
        return _decode_uncompressed(header, data)
    if header.syntax == RLE:
        return _extract_stored_bits(header, _decode_rle(header, data)), photometric
    pillow = JPEG_BASELINE if header.bits_stored <= 8 else frozenset()
    pillow |= JPEG_LOSSLESS if header.bits_allocated == 8 else frozenset()
    if header.syntax in pillow:
        open_jpeg(header, data)
        return np.asarray(decode_image(data)), photometric
    if header.syntax in JPEG_2000:
        return _decode_jpeg_2000(header, data), "RGB" if photometric in ("YBR_ICT", "YBR_RCT") else photometric
    return _decode_gdcm(header, data), photometric


# ---------------------------------------------------------------------------------------------- uncompressed


def uncompressed_frame_bytes(header: Header) -> int:
    """Return the number of bytes that an uncompressed frame has by its header."""
    pixels = header.rows * header.columns
    if header.photometric == "YBR_FULL_422":
        return 2 * pixels
    return pixels * header.samples_per_pixel * header.bits_allocated // 8


def _decode_uncompressed(header: Header, data: bytes) -> tuple[Samples, str]:
    photometric = header.photometric
    if header.byte_swapped:
        data = np.frombuffer(data, "u2").byteswap().tobytes()[: len(data) - uncompressed_frame_bytes(header) % 2]
    if photometric == "YBR_FULL_422":
        if len(data) > uncompressed_frame_bytes(header):
            samples = np.frombuffer(data, np.uint8).reshape(header.rows, header.columns, 3)
            return samples, _full_resolution_photometric(samples)
        pairs = np.frombuffer(data, np.uint8).reshape(header.rows, header.columns // 2, 4)
        chroma = [np.repeat(pairs[..., channel], 2, axis=1) for channel in (2, 3)]
        return np.stack([pairs[..., :2].reshape(header.rows, header.columns), *chroma], axis=2), "YBR_FULL"
    dtype = np.uint8 if header.bits_allocated == 8 else np.dtype("<>"[header.big_endian] + "u2")
    samples = _reshape(header, np.frombuffer(data, dtype), planar=header.planar_configuration == 1)
    return _extract_stored_bits(header, samples), photometric


def _full_resolution_photometric(samples: Samples) -> str:
    """Return whether pixels that the header calls YBR_FULL_422, but that have three samples each, are YBR or RGB.

    Most of an ultrasound frame is grey: its three samples are equal in RGB, and its chroma is 128 in YBR.

    Raises
    ------
    FrameFormatError
        If both or neither are likely.
    """
    luma, chroma = samples[..., :1].astype(np.int16), samples[..., 1:].astype(np.int16)
    grey_rgb = np.count_nonzero((np.abs(chroma - luma) <= _GREY_TOLERANCE).all(axis=2))
    grey_ybr = np.count_nonzero((np.abs(chroma - 128) <= _GREY_TOLERANCE).all(axis=2))
    if max(grey_rgb, grey_ybr) < luma.size / 2 or grey_rgb == grey_ybr:
        raise FrameFormatError(
            "the DICOM file states YBR_FULL_422 and holds three samples per pixel, of which nothing says whether they "
            "are RGB; convert it"
        )
    return "RGB" if grey_rgb > grey_ybr else "YBR_FULL"


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


def open_jpeg(header: Header, data: bytes) -> Any:
    """Read the header of a JPEG without decoding it, as Pillow's image.

    Raises
    ------
    FrameDamagedError
        If it is not JPEG, or truncated, or its size or number of components is not that of the DICOM header.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        raise FrameDamagedError("the DICOM frame is not JPEG, as its header states; copy the file again")
    check_jpeg_markers(data)
    from PIL.JpegImagePlugin import JpegImageFile

    image = JpegImageFile(io.BytesIO(data))
    if image.size != (header.columns, header.rows) or image.layers != header.samples_per_pixel:
        raise FrameDamagedError(SIZE_MISMATCH)
    return image


def _decode_jpeg_2000(header: Header, data: bytes) -> Samples:
    """Decode a JPEG 2000 codestream, on its own or within the boxes of a JP2 file."""
    data = data[max(0, data.find(CODESTREAM_START)) :]
    bits, signed = check_codestream(header, data)
    samples = np.asarray(_load_openjpeg()(data, 0))
    if signed != header.signed:  # the DICOM header overrules the codestream
        samples = samples.astype(np.int64) & ((1 << bits) - 1)
        if header.signed:
            samples -= (samples >> bits - 1) << bits
    low = -(1 << header.bits_stored - 1) if header.signed else 0
    samples = np.clip(samples.astype(np.int32), low, low + (1 << header.bits_stored) - 1)
    return samples.astype(np.int32 if header.signed else np.uint8 if header.bits_allocated == 8 else np.uint16)


def _load_openjpeg() -> Any:
    warnings.filterwarnings("ignore", module=r"(openjpeg|echoquad_runtime\.frames\.dicom)")  # they quote values
    try:
        return importlib.import_module("openjpeg").decode
    except ImportError:
        pass
    raise _missing_decoder("pylibjpeg-openjpeg")


def _decode_gdcm(header: Header, data: bytes) -> Samples:
    """Decode a JPEG or JPEG-LS frame, after checking its segments."""
    precision, data = checked_jpeg(header, data)
    bits_allocated, bits_stored, planar = header.bits_allocated, header.bits_stored, header.planar_configuration == 1
    if header.syntax in JPEG_LS:  # GDCM returns as many bits as the frame has, and colours by pixel
        bits_allocated, bits_stored, planar = 8 if precision <= 8 else 16, precision, False
        if precision in (6, 7) or (precision < 8 and header.signed):
            raise FrameFormatError("not supported: the DICOM frame's JPEG-LS has fewer than 8 bits; convert the file")
    gdcm = _load_gdcm()
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(data)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((header.columns, header.rows, 1))
    image.SetDataElement(element)
    photometric = gdcm.PhotometricInterpretation.GetPIType(header.photometric)
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(photometric))
    if header.samples_per_pixel > 1:
        image.SetPlanarConfiguration(header.planar_configuration)
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(header.syntax)))
    # With 16 bits allocated, GDCM would try a decoder of 8 bits first, which complains on stderr.
    container = bits_allocated if header.syntax not in JPEG_BASELINE else precision
    bits = container, bits_stored, bits_stored - 1
    image.SetPixelFormat(gdcm.PixelFormat(header.samples_per_pixel, *bits, int(header.signed)))
    # GDCM returns bytes as text.
    decoded = image.GetBuffer().encode("utf-8", "surrogateescape")
    samples = np.frombuffer(decoded, np.uint8 if bits_allocated == 8 else "<u2")
    header = replace(header, bits_allocated=bits_allocated)
    if bits_stored < header.bits_stored:  # the sign is that of the frame's bits
        header = replace(header, bits_stored=bits_stored, high_bit=bits_stored - 1)
    return _extract_stored_bits(header, _reshape(header, samples, planar=planar))


def _load_gdcm() -> Any:
    try:
        gdcm = importlib.import_module("gdcm")
    except ImportError:
        gdcm = None
    if gdcm is None:
        raise _missing_decoder("python-gdcm")
    for stream in ("Debug", "Warning", "Error"):
        getattr(gdcm.Trace, f"{stream}Off")()
    return gdcm


def _missing_decoder(package: str) -> FrameExtraError:
    return FrameExtraError(
        f"the DICOM file's compression needs {package}, which is not installed; "
        'install it: pip install "echoquad[dicom]"'
    )
