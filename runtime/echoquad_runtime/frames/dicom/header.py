"""The header of a DICOM file: what it says of its pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import IO, Final

from echoquad_runtime.errors import FrameFormatError, FrameTooLargeError
from echoquad_runtime.frames.dicom.elements import BIG_ENDIAN, Values, read_values
from echoquad_runtime.frames.formats import MAX_FRAMES, MAX_PIXELS
from echoquad_runtime.quadrants import Box

__all__ = ["Header", "Palette", "Placed", "Window", "read_header"]

_NO_FRAMES: Final = tuple(
    f"1.2.840.10008.5.1.4.1.1.{end}"
    for end in ("66", "481.2", "11.", "88.", "104.", "9.", "30", "68.")  # with pixels or without
)
"""SOP classes that are no pictures: raw data, segmentations, dose, presentation states, reports, documents, curves."""


@dataclass(frozen=True, slots=True)
class Window:
    """Which values of ``slope * stored + intercept`` a screen shows from black to white (DICOM PS3.3, C.11.2)."""

    center: float
    width: float
    slope: float
    intercept: float
    function: str


@dataclass(frozen=True, slots=True)
class Palette:
    """A palette as stored: entries, first value mapped, bits of an entry; red, green, blue; whether in segments."""

    entries: int
    first: int
    bits: int
    tables: tuple[bytes, bytes, bytes]
    segmented: bool


@dataclass(frozen=True, slots=True)
class Header:
    """What of a header is needed to decode a frame.

    Attributes
    ----------
    syntax
        The transfer syntax's UID, one of those that are read.
    swapped
        Whether single bytes are swapped in pairs: 8 bits stored as big-endian words.
    box
        The ultrasound region to crop to; None for the whole frame.
    """

    syntax: str
    swapped: bool
    rows: int
    columns: int
    samples: int
    photometric: str
    planar: int
    allocated: int
    stored: int
    high_bit: int
    signed: bool
    window: Window | None
    palette: Palette | None
    box: Box | None

    @property
    def big_endian(self) -> bool:
        """Whether a word's first byte is its most significant."""
        return self.syntax == BIG_ENDIAN


@dataclass(frozen=True, slots=True)
class Placed:
    """A header, the frames that it announces, where the pixels begin, their length, and the table of frames if any."""

    header: Header
    frames: int
    begin: int
    length: int
    offsets: tuple[int, ...]


def read_header(stream: IO[bytes], syntax: str, begin: int) -> Placed:
    """Read a header, whose data set begins at a byte.

    Raises
    ------
    Exception
        Whatever pydicom raises of a damaged one: to be called through `reworded`.
    """
    values, vr, length, pixels = read_values(stream, syntax, begin)
    header, frames = _header(values, syntax, swapped=vr == "OW")
    return Placed(header, frames, pixels, length, values.longs("offsets"))


def _header(values: Values, syntax: str, *, swapped: bool) -> tuple[Header, int]:
    from echoquad_runtime.frames.dicom.pixels import check_header

    if values.text("sop_class").startswith(_NO_FRAMES):
        raise FrameFormatError("the DICOM file is no picture but a report, a mask, a dose or the like; leave it out")
    frames = int(values.decimal("frames", 1.0))
    allocated = values.short("allocated")
    stored = values.short("stored", allocated)
    header = Header(
        syntax=syntax,
        swapped=swapped and syntax == BIG_ENDIAN and allocated == 8,
        rows=values.short("rows"),
        columns=values.short("columns"),
        samples=values.short("samples", 1),
        photometric=values.text("photometric"),
        planar=values.short("planar", 0),
        allocated=allocated,
        stored=stored,
        high_bit=values.short("high_bit", stored - 1),
        signed=values.short("signed", 0) == 1,
        window=_window(values),
        palette=_palette(values),
        box=None,
    )
    check_header(header)
    if not 1 <= frames <= MAX_FRAMES:
        raise FrameTooLargeError(f"the DICOM header announces no frames, or too many; expected 1 to {MAX_FRAMES}")
    if header.rows * header.columns > MAX_PIXELS:
        raise FrameTooLargeError(
            f"the DICOM header announces {header.columns}x{header.rows} pixels; expected at most "
            f"{MAX_PIXELS // 1_000_000} million"
        )
    if "modality_lut" in values or "voi_lut" in values:
        raise FrameFormatError("the DICOM file maps its levels by tables (Modality or VOI LUT); save it with a window")
    return replace(header, box=_region(values, header)), frames


def _window(values: Values) -> Window | None:
    if not values.text("center") or not values.text("width"):
        return None
    return Window(
        center=values.decimal("center", 0),
        width=values.decimal("width", 0),
        slope=values.decimal("slope", 1),
        intercept=values.decimal("intercept", 0),
        function=values.text("window_function") or "LINEAR",
    )


def _palette(values: Values) -> Palette | None:
    descriptor = values.shorts("descriptor")
    if len(descriptor) != 3:
        return None
    entries, first, bits = descriptor
    segmented = not values.stored("red")
    red, green, blue = (values.stored(f"{name}{'_segments' * segmented}") for name in ("red", "green", "blue"))
    if first >= 0x8000 and values.short("signed", 0):
        first -= 0x10000
    return Palette(entries or 0x10000, first, bits, (red, green, blue), segmented)


def _region(values: Values, header: Header) -> Box | None:
    """Find the one 2D tissue region (DICOM PS3.3, C.8.5.5), if it lies inside the frame; its last pixels are in it."""
    boxes = [
        [item.whole(tag) for tag in (0x00186018, 0x0018601A, 0x0018601C, 0x0018601E)]
        for item in values.sequence("regions")
        if [item.whole(tag) for tag in (0x00186012, 0x00186014)] == [1, 1]
    ]
    if len(boxes) != 1:
        return None
    left, top, right, bottom = boxes[0]
    if not (0 <= left < right < header.columns and 0 <= top < bottom < header.rows):
        return None
    return left, top, right + 1, bottom + 1
