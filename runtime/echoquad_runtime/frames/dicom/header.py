"""The DICOM header: how the pixels of a file are stored, and the checks on it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import IO, Final

from echoquad_runtime.errors import FrameFormatError, FrameTooLargeError
from echoquad_runtime.frames.dicom.elements import Elements, PixelDataElement, read_elements
from echoquad_runtime.frames.dicom.transfer_syntaxes import BIG_ENDIAN, JPEG_BASELINE, SUPPORTED, UNCOMPRESSED
from echoquad_runtime.frames.formats import MAX_FRAMES, MAX_PIXELS
from echoquad_runtime.quadrants import Box

__all__ = ["COLOUR", "MONOCHROME", "PALETTE_COLOR", "Header", "Palette", "ParsedHeader", "Window", "read_header"]

MONOCHROME: Final = ("MONOCHROME1", "MONOCHROME2")
PALETTE_COLOR: Final = "PALETTE COLOR"
COLOUR: Final = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")

_WINDOW_FUNCTIONS: Final = ("LINEAR", "LINEAR_EXACT", "SIGMOID")

_NOT_IMAGES: Final = tuple(
    f"1.2.840.10008.5.1.4.1.1.{end}"
    for end in ("66", "481.2", "11.", "88.", "104.", "9.", "30", "68.")  # some of them have pixels
)
"""SOP classes without images: raw data, segmentations, dose, presentation states, reports, documents, waveforms."""


@dataclass(frozen=True, slots=True)
class Window:
    """The values of ``slope * stored + intercept`` that are shown from black to white (DICOM PS3.3, C.11.2)."""

    center: float
    width: float
    slope: float
    intercept: float
    function: str


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
    region
        The ultrasound region to crop to; None for the whole frame.
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
    window: Window | None
    palette: Palette | None
    region: Box | None

    @property
    def big_endian(self) -> bool:
        """Whether the first byte of a word is the most significant."""
        return self.syntax == BIG_ENDIAN


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
    Exception
        Whatever pydicom raises for a damaged header: call this through `call_anonymized`.
    """
    elements, pixel_data = read_elements(stream, syntax, begin)
    header, frames = _parse(elements, syntax, word_vr=pixel_data.vr == "OW")
    return ParsedHeader(header, frames, pixel_data, elements.uint64s("offsets"))


def _parse(elements: Elements, syntax: str, *, word_vr: bool) -> tuple[Header, int]:
    if elements.text("sop_class").startswith(_NOT_IMAGES):
        raise FrameFormatError("the DICOM file is not an image (a report, a segmentation, a dose?); leave it out")
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
        window=_window(elements),
        palette=_palette(elements),
        region=None,
    )
    _check(header)
    if not 1 <= frames <= MAX_FRAMES:
        raise FrameTooLargeError(f"the DICOM header states no frames or too many; expected 1 to {MAX_FRAMES}")
    if header.rows * header.columns > MAX_PIXELS:
        raise FrameTooLargeError(
            f"the DICOM header states {header.columns}x{header.rows} pixels; expected at most "
            f"{MAX_PIXELS // 1_000_000} million"
        )
    if "modality_lut" in elements or "voi_lut" in elements:
        raise FrameFormatError("the DICOM file has a Modality LUT or a VOI LUT; save it with a window instead")
    return replace(header, region=_region(elements, header)), frames


def _check(header: Header) -> None:
    """Refuse a header that no rule covers, without quoting what was found.

    Raises
    ------
    FrameFormatError
        If a value is unsupported or contradicts another.
    """
    if header.syntax not in SUPPORTED:
        raise FrameFormatError(
            "the DICOM file's transfer syntax is not supported (MPEG?); expected uncompressed, JPEG, JPEG-LS, "
            "JPEG 2000 or RLE; convert it"
        )
    monochrome, palette = header.photometric in MONOCHROME, header.photometric == PALETTE_COLOR
    if not monochrome and not palette and header.photometric not in COLOUR:
        raise FrameFormatError(
            "the DICOM file's photometric interpretation is not supported; expected "
            f"{', '.join((*MONOCHROME, PALETTE_COLOR, *COLOUR))}; convert it"
        )
    if header.samples_per_pixel != (1 if monochrome or palette else 3):
        raise FrameFormatError(
            "the DICOM header's samples per pixel do not match its photometric interpretation; save the file again"
        )
    if header.bits_allocated not in (8, 16) or not 1 <= header.bits_stored <= header.bits_allocated:
        raise FrameFormatError("the DICOM file's samples have other than 8 or 16 bits; convert it")
    if header.syntax in JPEG_BASELINE and header.bits_stored != 8:
        raise FrameFormatError("the DICOM file is 12-bit JPEG; expected 8 bits; convert it")
    if not header.bits_stored - 1 <= header.high_bit < header.bits_allocated:
        raise FrameFormatError("the DICOM header's bits stored and high bit contradict each other; save the file again")
    if header.planar_configuration not in (0, 1) or (header.signed and not monochrome):
        raise FrameFormatError(
            "the DICOM header's planar configuration or pixel representation is invalid; save the file again"
        )
    if (
        header.photometric == "YBR_FULL_422"
        and header.syntax in UNCOMPRESSED
        and (header.columns % 2 or header.bits_allocated != 8)
    ):
        raise FrameFormatError("the DICOM file's YBR_FULL_422 pixels have an odd width or 16 bits; convert it")
    if header.rows < 1 or header.columns < 1:
        raise FrameFormatError("the DICOM header states an image without pixels; expected rows and columns")
    if palette and header.palette is None:
        raise FrameFormatError("the DICOM file has palette pixels but no palette; save it again")
    window = header.window
    if window is not None and not (
        all(map(math.isfinite, (window.center, window.width, window.slope, window.intercept)))
        and window.function in _WINDOW_FUNCTIONS
        and (window.width > 0 if window.function != "LINEAR" else window.width >= 1)
    ):
        raise FrameFormatError("the DICOM file's window is invalid; save it with another window, or without one")


def _window(elements: Elements) -> Window | None:
    if not elements.text("window_center") or not elements.text("window_width"):
        return None
    return Window(
        center=elements.decimal("window_center", 0),
        width=elements.decimal("window_width", 0),
        slope=elements.decimal("rescale_slope", 1),
        intercept=elements.decimal("rescale_intercept", 0),
        function=elements.text("window_function") or "LINEAR",
    )


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


def _region(elements: Elements, header: Header) -> Box | None:
    """Return the only 2D tissue region if it lies inside the frame (DICOM PS3.3, C.8.5.5).

    DICOM's right and bottom are the last pixels inside the region, not the first outside.
    """
    boxes = [
        [item.integer(tag) for tag in (0x00186018, 0x0018601A, 0x0018601C, 0x0018601E)]
        for item in elements.sequence("regions")
        if [item.integer(tag) for tag in (0x00186012, 0x00186014)] == [1, 1]
    ]
    if len(boxes) != 1:
        return None
    left, top, right, bottom = boxes[0]
    if not (0 <= left < right < header.columns and 0 <= top < bottom < header.rows):
        return None
    return left, top, right + 1, bottom + 1
