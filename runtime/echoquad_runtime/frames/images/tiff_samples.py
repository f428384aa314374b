"""TIFF pages that Pillow misreads or refuses: separate planes of 16 bits, 9 to 15 bits, 16 bits of which 0 is white.

Pillow or its libtiff only decompresses them: a row is presented to it as a row of bytes. The samples of a row are
unpacked here, a predictor is undone, and 16 bits become 8 as in the files that Pillow reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImagePalette

from echoquad_runtime.errors import FrameDamagedError, FrameFormatError, FrameTooLargeError
from echoquad_runtime.frames.formats import MAX_PIXELS
from echoquad_runtime.frames.images import tiff_file as tiff
from echoquad_runtime.frames.images.tiff_file import TiffFile, TiffPage

__all__ = ["TiffLayout", "adjust_tiff", "check_tiff_sign", "decode_samples", "read_layout"]

LOSSLESS: Final = frozenset({1, 5, 8, 32773, 32946, 34925, 50000})
"""Compressions of bytes, whatever they stand for: none, LZW, Deflate, PackBits, LZMA, Zstandard."""

_PREDICTED: Final = LOSSLESS - {1, 32773}  # libtiff ignores the predictor of all others

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _CMYK = 0, 1, 2, 5
_COLOURS: Final = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _CMYK: 4}
_ASSOCIATED, _UNASSOCIATED = 1, 2
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_COLOUR_MAP: Final = 320
_NATIVE: Final = {"F;32BF": "F;32NF", "I;16BS": "I;16NS", "I;32BS": "I;32NS"}
"""Pillow's names of samples in the file's byte order, big endian, and in the host's."""

_BAND_SAMPLES: Final = 1 << 20

if TYPE_CHECKING:
    from PIL.TiffImagePlugin import TiffImageFile

_UInt16 = npt.NDArray[np.uint16]
_UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class TiffLayout:
    """How the samples of a page are stored; the names are those of the tags."""

    width: int
    height: int
    bits: tuple[int, ...]
    samples: int
    photometric: int
    compression: int
    separate: bool
    predictor: int
    sample_format: int
    extra: tuple[int, ...]
    fill_order: int
    orientation: int

    @property
    def description(self) -> str:
        """The numbers that tell the kind, for an error message."""
        kind = {2: "signed ", 3: "floating-point "}.get(self.sample_format, "")
        return f"{self.samples} {kind}samples of {self.bits[0]} bits, photometric interpretation {self.photometric}"

    @property
    def is_misread(self) -> bool:
        """Whether Pillow misreads the samples, and `decode_samples` does not."""
        depth = self.bits[0]
        if not (
            self.compression in LOSSLESS
            and self.sample_format == _UNSIGNED
            and self.photometric in _COLOURS
            and set(self.bits) == {depth}
            and self.predictor in (1, 2)
            and self.fill_order == 1
        ):
            return False
        if 9 <= depth <= 15:
            return True
        grey = _COLOURS[self.photometric] == 1
        if self.separate and self.samples > 1 and depth in (8, 16):
            return depth == 16 or grey or bool(self.extra)
        return depth == 16 and grey and (self.photometric == _WHITE_IS_ZERO or self.samples > 1)


def read_layout(file: TiffFile, page: TiffPage) -> TiffLayout:
    """Read how the samples of a page are stored.

    Raises
    ------
    FrameError
        If the page states no size, too large a one, or a compression that is not supported.
    """
    width, height = file.value(page, tiff.WIDTH, 0), file.value(page, tiff.HEIGHT, 0)
    if not width or not height:
        raise FrameDamagedError("the TIFF states no size: it is damaged; save it again")
    if width * height > MAX_PIXELS:
        raise FrameTooLargeError(
            f"the header states {width}x{height} pixels; expected at most {MAX_PIXELS // 1_000_000} million"
        )
    samples = file.value(page, tiff.SAMPLES, 1)
    compression = file.value(page, tiff.COMPRESSION, 1)
    return TiffLayout(
        width=width,
        height=height,
        bits=(file.values(page, tiff.BITS) or (1,))[: max(1, samples)],
        samples=samples,
        photometric=file.value(page, tiff.PHOTOMETRIC, _WHITE_IS_ZERO),
        compression=compression,
        separate=file.value(page, tiff.PLANAR, 1) == 2,
        predictor=file.value(page, tiff.PREDICTOR, 1) if compression in _PREDICTED else 1,
        sample_format=file.value(page, tiff.SAMPLE_FORMAT, _UNSIGNED),
        extra=file.values(page, tiff.EXTRA_SAMPLES),
        fill_order=file.value(page, tiff.FILL_ORDER, 1),
        orientation=file.value(page, tiff.ORIENTATION, 1),
    )


def adjust_tiff(image: TiffImageFile, layout: TiffLayout) -> None:
    """Adjust how Pillow will decode a page where it does not follow libtiff.

    libtiff decompresses samples of several bytes to the host's byte order; Pillow 13 assumes the file's for signed and
    floating-point ones. A palette whose entries are all below 256 has 8 bits, as libtiff reads it, instead of 16.

    Raises
    ------
    FrameFormatError
        If the page has floating-point samples of which 0 is white.
    """
    if layout.photometric == _WHITE_IS_ZERO and layout.sample_format == _FLOAT:
        raise FrameFormatError(f"not supported: a TIFF of {layout.description}; save it as PNG")
    if any(tile[0] == "libtiff" for tile in image.tile):
        # The arguments of such a tile begin with the name of its samples.
        arguments = [cast("tuple[Any, ...]", tile.args) for tile in image.tile]
        image.tile = [
            tile._replace(args=(_NATIVE.get(first, first), *others))
            for tile, (first, *others) in zip(image.tile, arguments, strict=True)
        ]
    if image.mode in ("P", "PA"):
        entries = image.tag_v2.get(_COLOUR_MAP, ())
        if entries and max(entries) < 256:
            image.palette = ImagePalette.raw("RGB;L", bytes(entries))


def check_tiff_sign(image: Image.Image, layout: TiffLayout) -> None:
    """Check a decoded page of signed 8-bit samples, which Pillow reads as unsigned.

    Raises
    ------
    FrameFormatError
        If a sample is negative.
    """
    if layout.sample_format == _SIGNED and layout.bits[0] == 8 and np.asarray(image).max() > 127:
        raise FrameFormatError("the pixels are signed and some are negative; expected integers in 0..65535")


def decode_samples(
    file: TiffFile, page: TiffPage, layout: TiffLayout, decode: Callable[[bytes], Image.Image]
) -> Image.Image:
    """Decode a page of which `TiffLayout.is_misread`, to 8 bits per sample: grey, RGB or CMYK, with its alpha.

    Grey of n bits is ``round(255 * value / (2^n - 1))``. Colours, and grey with alpha, are the upper 8 bits, as Pillow
    reads them from other files.

    Parameters
    ----------
    file, page, layout
        The page and how it is stored.
    decode
        Decodes a TIFF file of 8-bit grey.

    Raises
    ------
    FrameError
        If the strips are damaged, or the samples are not those of a picture.
    """
    colours = _COLOURS[layout.photometric]
    if not colours <= layout.samples <= colours + 4:
        raise FrameFormatError(f"not supported: a TIFF of {layout.samples} samples per pixel; save it as PNG")
    planes = layout.samples if layout.separate else 1
    channels: list[Image.Image] = []
    wanted = colours + bool(_alpha(layout))
    for plane in range(planes):
        if len(channels) < wanted:
            channels += _decode_plane(file, page, layout, plane, decode)[:wanted]
    if colours == 4:
        return Image.merge("CMYK", channels[:4])
    if _alpha(layout) == _ASSOCIATED:  # the colours are over black already
        channels = channels[:colours]
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[len(channels)]
    return channels[0] if mode == "L" else Image.merge(mode, channels)


def _alpha(layout: TiffLayout) -> int:
    """Return the kind of the alpha channel behind the colours; 0 if there is none."""
    colours = _COLOURS[layout.photometric]
    if colours in (4, layout.samples):
        return 0
    if not layout.extra:  # Pillow takes a fourth sample for alpha
        return _UNASSOCIATED if layout.samples == colours + 1 else 0
    return layout.extra[0] if layout.extra[0] in (_ASSOCIATED, _UNASSOCIATED) else 0


def _decode_plane(
    file: TiffFile, page: TiffPage, layout: TiffLayout, plane: int, decode: Callable[[bytes], Image.Image]
) -> list[Image.Image]:
    """Return the channels of a plane, 8-bit grey each."""
    depth = layout.bits[0]
    samples = 1 if layout.separate else layout.samples
    row_bytes = (layout.width * samples * depth + 7) // 8
    changes = {
        tiff.WIDTH: row_bytes,
        tiff.BITS: 8,
        tiff.SAMPLES: 1,
        tiff.PHOTOMETRIC: _BLACK_IS_ZERO,
        tiff.PLANAR: 1,
        tiff.PREDICTOR: 1,
    }
    tile = file.value(page, tiff.TILE_WIDTH, 0)
    if tile:
        if tile * samples * depth % 8:
            raise FrameFormatError(f"not supported: a TIFF of {depth} bits in tiles; save it as PNG")
        changes[tiff.TILE_WIDTH] = tile * samples * depth // 8
    planes = layout.samples if layout.separate else 1
    data = file.extract(page, changes, without=(tiff.EXTRA_SAMPLES, tiff.ORIENTATION), plane=plane, planes=planes)
    packed = np.asarray(decode(data))
    if packed.shape != (layout.height, row_bytes):
        raise FrameDamagedError("the TIFF's strips have another size than it states; save it again")
    found = np.empty((samples, layout.height, layout.width), np.uint8)
    for top, values in _unpack_bands(packed, layout, samples, file.order, tile):
        if layout.photometric == _WHITE_IS_ZERO:
            values[..., 0] = (1 << depth) - 1 - values[..., 0]
        grey = _COLOURS[layout.photometric] == 1 and not _alpha(layout)
        for channel in range(samples):
            band = values[..., channel]
            found[channel, top : top + len(band)] = _to_8_bits(band, depth) if grey else band >> (depth - 8)
    return [Image.fromarray(channel) for channel in found]


def _to_8_bits(values: _UInt16, depth: int) -> _UInt8:
    white = (1 << depth) - 1
    return np.asarray((values.astype(np.uint32) * 510 + white) // (2 * white), np.uint8)


def _unpack_bands(
    packed: _UInt8, layout: TiffLayout, samples: int, order: str, tile: int
) -> Iterator[tuple[int, _UInt16]]:
    """Yield bands of rows: the first row, and the samples, uint16 [rows, W, samples]."""
    depth, count = layout.bits[0], layout.width * samples
    rows = max(1, _BAND_SAMPLES // count)
    for top in range(0, layout.height, rows):
        band = packed[top : top + rows]
        values: _UInt16
        if depth == 8:
            values = band.astype(np.uint16)
        elif depth == 16:
            values = np.ascontiguousarray(band).view(order + "u2").astype(np.uint16)
        else:
            bits = np.unpackbits(band, axis=1, count=count * depth).reshape(len(band), count, depth)
            values = np.zeros((len(band), count), np.uint16)
            for bit in range(depth):
                values = (values << 1 | bits[..., bit]).astype(np.uint16)
        values = values.reshape(len(band), layout.width, samples)
        if layout.predictor == 2:  # a sample is stored as its difference from the left one, within a tile
            for left in range(0, layout.width, tile or layout.width):
                part = values[:, left : left + (tile or layout.width)]
                part[...] = np.cumsum(part, axis=1, dtype=np.uint16)
            values &= (1 << depth) - 1
        yield top, values
