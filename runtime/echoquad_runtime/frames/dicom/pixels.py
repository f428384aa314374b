"""Pixels of DICOM frames, by photometric interpretation: from the bytes of a frame to grey levels and colours.

`echoquad_runtime.frames.dicom.codecs` decodes the bytes to samples.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from PIL import Image

from echoquad_runtime.errors import FrameDamagedError
from echoquad_runtime.frames.decoded_frame import ColourFrame, DecodedFrame, GreyFrame, crop
from echoquad_runtime.frames.dicom.codecs import Samples, decode_samples, open_jpeg
from echoquad_runtime.frames.dicom.elements import call_anonymized
from echoquad_runtime.frames.dicom.header import COLOUR, MONOCHROME, PALETTE_COLOR, Header
from echoquad_runtime.frames.dicom.jpeg_markers import SIZE_MISMATCH
from echoquad_runtime.frames.dicom.lookup_tables import full_scale_levels, grey_levels, palette_rgb
from echoquad_runtime.frames.dicom.transfer_syntaxes import JPEG_BASELINE
from echoquad_runtime.frames.images.image import decode_grey_and_flags, decode_image
from echoquad_runtime.quadrants import Box, Grey

__all__ = ["decode_pixels"]


def decode_pixels(header: Header, data: bytes) -> DecodedFrame:
    """Decode a frame.

    Raises
    ------
    FrameError
        If it is damaged, contradicts the header, or its decoder is not installed.
    """
    luma_suffices = header.stored_is_shown or header.photometric in COLOUR
    if header.syntax in JPEG_BASELINE and header.bits_stored <= 8 and luma_suffices:
        return _decode_jpeg(header, data)
    samples, photometric = call_anonymized("the DICOM frame cannot be decoded", decode_samples, header, data)
    if samples.shape != (header.rows, header.columns, 3)[: 2 if header.samples_per_pixel == 1 else 3]:
        raise FrameDamagedError(SIZE_MISMATCH)
    if photometric in MONOCHROME:
        return GreyFrame(np.ascontiguousarray(crop(_to_grey(header, samples), header.region)), header.flags)
    if photometric == PALETTE_COLOR:
        assert header.palette is not None
        table = call_anonymized("the DICOM palette cannot be read", palette_rgb, header.palette, header.big_endian)
        indices = np.clip(samples.astype(np.int32) - header.palette.first, 0, len(table) - 1)
        return ColourFrame(crop(table[indices], header.region), flags=header.flags)
    if samples.dtype != np.uint8:
        samples = full_scale_levels(header.bits_stored)[samples]
    mode: Literal["RGB", "YCbCr"] = "YCbCr" if photometric.startswith("YBR") else "RGB"
    return ColourFrame(crop(samples, header.region), mode, header.flags)


def _to_grey(header: Header, samples: Samples) -> Grey:
    levels = call_anonymized("the DICOM file's LUT cannot be read", grey_levels, header)
    low = -(1 << header.bits_stored - 1) if header.signed else 0
    return np.asarray(levels[samples.astype(np.int32) - low])


# ---------------------------------------------------------------------------------------------- JPEG


def _decode_jpeg(header: Header, data: bytes) -> DecodedFrame:
    """Decode as a JPEG file, which needs only the luma for grey."""
    image = call_anonymized("the DICOM frame's JPEG header cannot be read", open_jpeg, header, data)
    named = bytes(layer[0] for layer in image.layer) == b"RGB"  # which libjpeg takes for RGB
    if header.photometric == "RGB" and not named and not {"jfif", "adobe_transform"} & image.info.keys():
        # Nothing in the JPEG states its colour space, and libjpeg would assume YCbCr and convert it.
        levels = call_anonymized("the DICOM frame cannot be decoded", _load_unconverted, image)
        return ColourFrame(crop(levels, header.region), flags=header.flags)
    return _JpegFrame(data, header.region, header.flags)


def _load_unconverted(image: Any) -> Grey:
    """Return the stored samples, uint8 [H, W, 3], of a JPEG that is not decoded yet."""
    image.draft("YCbCr", image.size)
    image.load()
    return np.asarray(image)


class _JpegFrame:
    """A baseline JPEG frame, decoded on request: its luma, or its colours."""

    def __init__(self, data: bytes, region: Box | None, flags: tuple[str, ...]) -> None:
        self._data, self._region, self.flags = data, region, flags
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
