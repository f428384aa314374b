"""The DICOM header: how the pixels of a file are stored, and the checks on it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import IO, Final

from echoquad_runtime.errors import FrameFormatError, FrameTooLargeError
from echoquad_runtime.frames.dicom.elements import Elements, PixelDataElement, read_elements
from echoquad_runtime.frames.dicom.transfer_syntaxes import (
    BIG_ENDIAN,
    EXTENDED,
    JPEG_BASELINE,
    SUPPORTED,
    UNCOMPRESSED,
)
from echoquad_runtime.frames.formats import MAX_FRAMES, MAX_PIXELS
from echoquad_runtime.frames.quality_flags import REGION_CLAMPED, UNCROPPED
from echoquad_runtime.quadrants import Box

__all__ = [
    "COLOUR",
    "MONOCHROME",
    "PALETTE_COLOR",
    "Header",
    "LookupTable",
    "Palette",
    "ParsedHeader",
    "Window",
    "read_header",
]

MONOCHROME: Final = ("MONOCHROME1", "MONOCHROME2")
PALETTE_COLOR: Final = "PALETTE COLOR"
COLOUR: Final = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")

_WINDOW_FUNCTIONS: Final = ("LINEAR", "LINEAR_EXACT", "SIGMOID")

_MAX_EXCESS: Final = 0.01
"""Share of the frame's width or height by which a region may leave it; one pixel is always allowed."""

_NOT_IMAGES: Final = tuple(
    f"1.2.840.10008.5.1.4.1.1.{end}"
    for end in ("66", "481.2", "11.", "88.", "104.", "9.", "30", "68.")  # some of them have pixels
)
"""SOP classes without images: raw data, segmentations, dose, presentation states, reports, documents, waveforms."""


@dataclass(frozen=True, slots=True)
class Window:
    """The values, after the modality transformation, that are shown from black to white (DICOM PS3.3, C.11.2)."""

    center: float
    width: float
    function: str


@dataclass(frozen=True, slots=True)
class LookupTable:
    """A Modality LUT or a VOI LUT as stored: number of entries, first value mapped, bits of an entry, and entries."""

    entries: int
    first: int
    bits: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Palette:
    """A colour lookup table as stored.

    Attributes
    ----------
    entries, first, bits
        The descriptor: number of entries, first pixel value mapped, bits of an entry.
    tables
        Bytes of the red, green and blue tables.
    segmented
        Whether the tables are stored as segments (DICOM PS3.3, C.7.9.2).
    """

    entries: int
    first: int
    bits: int
    tables: tuple[bytes, bytes, bytes]
    segmented: bool


@dataclass(frozen=True, slots=True)
class Header:
    """What decoding a frame needs from the header; the names are those of the DICOM attributes.

    Attributes
    ----------
    syntax
        The transfer syntax UID, one of `SUPPORTED`.
    byte_swapped
        Whether bytes are swapped in pairs: 8-bit samples stored as big-endian words.
    rescale
        Slope and intercept from stored values to those that a window or a VOI LUT takes.
    modality_lut
        A table to use instead of slope and intercept.
    window, voi_lut
        What is shown from black to white: one of them, or neither.
    region
        The ultrasound region to crop to; None for the whole frame.
    region_clamped
        Whether the region was cut at the frame's edge.
    """

    syntax: str
    byte_swapped: bool
    rows: int
    columns: int
    samples_per_pixel: int
    photometric: str
    planar_configuration: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    rescale: tuple[float, float]
    modality_lut: LookupTable | None
    window: Window | None
    voi_lut: LookupTable | None
    palette: Palette | None
    region: Box | None = None
    region_clamped: bool = False

    @property
    def big_endian(self) -> bool:
        """Whether the first byte of a word is the most significant."""
        return self.syntax == BIG_ENDIAN

    @property
    def stored_is_shown(self) -> bool:
        """Whether the grey level of a monochrome value is the value itself, scaled to 8 bits."""
        return (
            self.photometric == "MONOCHROME2"
            and self.window is None
            and self.voi_lut is None
            and self.modality_lut is None
        )

    @property
    def flags(self) -> tuple[str, ...]:
        """Quality flags that the header shows."""
        return (UNCROPPED,) if self.region is None else (REGION_CLAMPED,) if self.region_clamped else ()


@dataclass(frozen=True, slots=True)
class ParsedHeader:
    """A header, the number of frames it states, the Pixel Data element, and the extended offset table, maybe empty."""

    header: Header
    frames: int
    pixel_data: PixelDataElement
    offsets: tuple[int, ...]


def read_header(stream: IO[bytes], syntax: str, begin: int) -> ParsedHeader:
    """Read and check the header of the data set that begins at `begin`.

    Raises
    ------
    FrameError
        If it is damaged, or describes pixels of an unsupported kind.
    Exception
        Whatever the conversion of a malformed value raises: call this through `call_anonymized`.
    """
    elements, pixel_data = read_elements(stream, syntax, begin)
    header, frames = _parse(elements, syntax, word_vr=pixel_data.vr == "OW")
    return ParsedHeader(header, frames, pixel_data, elements.uint64s("offsets"))


def _parse(elements: Elements, syntax: str, *, word_vr: bool) -> tuple[Header, int]:
    if elements.text("sop_class").startswith(_NOT_IMAGES):
        raise FrameFormatError(
            "not supported: the DICOM file is not an image (a report, a segmentation, a dose?); leave it out"
        )
    frames = int(elements.decimal("frames", 1.0))
    bits_allocated = elements.uint16("bits_allocated")
    bits_stored = elements.uint16("bits_stored", bits_allocated)
    header = Header(
        syntax=syntax,
        byte_swapped=word_vr and syntax == BIG_ENDIAN and bits_allocated == 8,
        rows=elements.uint16("rows"),
        columns=elements.uint16("columns"),
        samples_per_pixel=elements.uint16("samples_per_pixel", 1),
        photometric=elements.text("photometric"),
        planar_configuration=elements.uint16("planar_configuration", 0),
        bits_allocated=bits_allocated,
        bits_stored=bits_stored,
        high_bit=elements.uint16("high_bit", bits_stored - 1),
        signed=elements.uint16("pixel_representation", 0) == 1,
        rescale=(1.0, 0.0),
        modality_lut=None,
        window=None,
        voi_lut=None,
        palette=_palette(elements),
    )
    _check(header)
    if not 1 <= frames <= MAX_FRAMES:
        raise FrameTooLargeError(f"the DICOM header states no frames or too many; expected 1 to {MAX_FRAMES}")
    if header.rows * header.columns > MAX_PIXELS:
        raise FrameTooLargeError(
            f"the DICOM header states {header.columns}x{header.rows} pixels; expected at most "
            f"{MAX_PIXELS // 1_000_000} million"
        )
    if header.photometric in MONOCHROME:
        header = _with_grey_transformation(header, elements)
    return _with_region(header, elements), frames


def _check(header: Header) -> None:
    """Refuse a header that no rule covers, without quoting what was found.

    Raises
    ------
    FrameFormatError
        If a value is unsupported or contradicts another.
    """
    if header.syntax not in SUPPORTED:
        raise FrameFormatError(
            "not supported: the DICOM file's transfer syntax (video, JPEG XL?); expected uncompressed, JPEG, JPEG-LS, "
            "JPEG 2000 or RLE; convert it"
        )
    monochrome, palette = header.photometric in MONOCHROME, header.photometric == PALETTE_COLOR
    if not monochrome and not palette and header.photometric not in COLOUR:
        raise FrameFormatError(
            "not supported: the DICOM file's photometric interpretation; expected "
            f"{', '.join((*MONOCHROME, PALETTE_COLOR, *COLOUR))}; convert it"
        )
    if header.samples_per_pixel != (1 if monochrome or palette else 3):
        raise FrameFormatError(
            "the DICOM header's samples per pixel do not match its photometric interpretation; save the file again"
        )
    if header.bits_allocated not in (8, 16):
        raise FrameFormatError(
            "not supported: the DICOM file's samples have neither 8 nor 16 bits; convert it to 8 or 16 bits"
        )
    if not 1 <= header.bits_stored <= header.high_bit + 1 <= header.bits_allocated:
        raise FrameFormatError(
            "the DICOM header's bits allocated, bits stored and high bit contradict each other; save the file again"
        )
    if header.syntax in JPEG_BASELINE and header.bits_stored > (12 if header.syntax == EXTENDED else 8):
        raise FrameFormatError("the DICOM header states more bits than its JPEG compression can have; save it again")
    if header.planar_configuration not in (0, 1) or (header.signed and not monochrome):
        raise FrameFormatError(
            "the DICOM header's planar configuration or pixel representation is invalid; save the file again"
        )
    if (
        header.photometric == "YBR_FULL_422"
        and header.syntax in UNCOMPRESSED
        and (header.columns % 2 or header.bits_allocated != 8)
    ):
        raise FrameFormatError(
            "not supported: the DICOM file's YBR_FULL_422 pixels have an odd width or 16 bits; convert it"
        )
    if header.rows < 1 or header.columns < 1:
        raise FrameFormatError("the DICOM header states an image without pixels; expected rows and columns")
    if palette and header.palette is None:
        raise FrameFormatError("the DICOM file has palette pixels but no palette; save it again")


# ---------------------------------------------------------------------------------------------- grey levels, palette


def _with_grey_transformation(header: Header, elements: Elements) -> Header:
    """Add what leads from stored values to grey levels: slope and intercept or a Modality LUT, a window or a VOI LUT.

    A VOI LUT is preferred to a window, as in pydicom. Empty tables, and windows of no width, count as absent.

    Raises
    ------
    FrameFormatError
        If a number is infinite or NaN, or the function of a window is unknown.
    """
    rescale = elements.decimal("rescale_slope", 1), elements.decimal("rescale_intercept", 0)
    window = _window(elements)
    numbers = (*rescale, *((window.center, window.width) if window is not None else ()))
    if not all(map(math.isfinite, numbers)) or (window is not None and window.function not in _WINDOW_FUNCTIONS):
        raise FrameFormatError("the DICOM file's window is invalid; save it with another window, or without one")
    if window is not None and (window.width < 1 if window.function == "LINEAR" else window.width <= 0):
        window = None
    modality_lut = _lookup_table(elements, "modality_lut", signed=header.signed)
    if modality_lut is not None:
        rescale = 1.0, 0.0
    low = rescale[1] - (rescale[0] * (1 << header.bits_stored - 1) if header.signed else 0)
    voi_lut = _lookup_table(elements, "voi_lut", signed=modality_lut is None and low < 0)
    return replace(header, rescale=rescale, modality_lut=modality_lut, window=window, voi_lut=voi_lut)


def _window(elements: Elements) -> Window | None:
    if not elements.text("window_center") or not elements.text("window_width"):
        return None
    return Window(
        center=elements.decimal("window_center", 0),
        width=elements.decimal("window_width", 0),
        function=elements.text("window_function") or "LINEAR",
    )


def _lookup_table(elements: Elements, name: str, *, signed: bool) -> LookupTable | None:
    """Return the first table of a sequence (DICOM PS3.3, C.11.1 and C.11.2); None if there is none."""
    for item in elements.sequence(name):
        descriptor, data = item.uint16s("lut_descriptor"), item.raw("lut_data")
        if len(descriptor) == 3 and data:
            entries, first, bits = descriptor
            return LookupTable(entries or 0x10000, first - 0x10000 * (signed and first >= 0x8000), bits, data)
    return None


def _palette(elements: Elements) -> Palette | None:
    descriptor = elements.uint16s("palette_descriptor")
    if len(descriptor) != 3:
        return None
    entries, first, bits = descriptor
    segmented = not elements.raw("red")
    red, green, blue = (elements.raw(f"{name}{'_segments' * segmented}") for name in ("red", "green", "blue"))
    if first >= 0x8000 and elements.uint16("pixel_representation", 0):
        first -= 0x10000
    return Palette(entries or 0x10000, first, bits, (red, green, blue), segmented)


# ---------------------------------------------------------------------------------------------- region


def _with_region(header: Header, elements: Elements) -> Header:
    """Add the only 2D tissue region if it lies inside the frame (DICOM PS3.3, C.8.5.5).

    DICOM's right and bottom are the last pixels inside the region. Some writers state the first outside, or round to
    whole blocks: a region that leaves the frame by little is clamped. One that leaves it by more was written for
    another size.
    """
    boxes = [
        [item.integer(f"region_{side}") for side in ("left", "top", "right", "bottom")]
        for item in elements.sequence("regions")
        if (item.integer("spatial_format"), item.integer("data_type")) == (1, 1)
    ]
    if len(boxes) != 1:
        return header
    left, top, right, bottom = boxes[0]
    columns, rows = header.columns, header.rows
    excess_right, excess_bottom = right - (columns - 1), bottom - (rows - 1)
    if (
        not (0 <= left < min(right, columns - 1) and 0 <= top < min(bottom, rows - 1))
        or excess_right > max(1, int(columns * _MAX_EXCESS))
        or excess_bottom > max(1, int(rows * _MAX_EXCESS))
    ):
        return header
    region = left, top, min(right + 1, columns), min(bottom + 1, rows)
    return replace(header, region=region, region_clamped=max(excess_right, excess_bottom) > 0)
