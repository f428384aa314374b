"""Data elements of a DICOM header: only those that describe pixels.

Patient, study and date elements are skipped unread. No error message quotes a value from the file, except image sizes:
in a damaged file a patient's name can be anywhere.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from typing import IO, Final, NamedTuple, ParamSpec, TypeVar

from echoquad_runtime.errors import FrameDamagedError, FrameError, FrameFormatError, FrameTooLargeError
from echoquad_runtime.frames.dicom.data_set import LONG_VRS, DataSetWalker, detect_encoding
from echoquad_runtime.frames.dicom.transfer_syntaxes import BIG_ENDIAN, EXPLICIT, IMPLICIT
from echoquad_runtime.frames.formats import MAX_FILE_BYTES, is_dicom

__all__ = [
    "Elements",
    "PixelDataElement",
    "call_anonymized",
    "inflate",
    "read_elements",
    "read_sop_uids",
    "read_transfer_syntax",
]

_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")

_META_UIDS: Final = frozenset({0x02, 0x03, 0x10})  # elements of group 2: SOP class and instance, transfer syntax

_TAGS: Final = {
    "sop_class": 0x00080016,
    "samples_per_pixel": 0x00280002,
    "photometric": 0x00280004,
    "planar_configuration": 0x00280006,
    "frames": 0x00280008,
    "rows": 0x00280010,
    "columns": 0x00280011,
    "bits_allocated": 0x00280100,
    "bits_stored": 0x00280101,
    "high_bit": 0x00280102,
    "pixel_representation": 0x00280103,
    "window_center": 0x00281050,
    "window_width": 0x00281051,
    "rescale_intercept": 0x00281052,
    "rescale_slope": 0x00281053,
    "window_function": 0x00281056,
    "modality_lut": 0x00283000,
    "voi_lut": 0x00283010,
    "regions": 0x00186011,
    "palette_descriptor": 0x00281101,
    "red": 0x00281201,
    "green": 0x00281202,
    "blue": 0x00281203,
    "red_segments": 0x00281221,
    "green_segments": 0x00281222,
    "blue_segments": 0x00281223,
    "offsets": 0x7FE00001,
    # Of an ultrasound region (DICOM PS3.3, C.8.5.5).
    "spatial_format": 0x00186012,
    "data_type": 0x00186014,
    "region_left": 0x00186018,
    "region_top": 0x0018601A,
    "region_right": 0x0018601C,
    "region_bottom": 0x0018601E,
    # Of a Modality LUT or a VOI LUT.
    "lut_descriptor": 0x00283002,
    "lut_data": 0x00283006,
}
_SEQUENCES: Final = frozenset(_TAGS[name] for name in ("regions", "modality_lut", "voi_lut"))
_ITEM_TAGS: Final = frozenset(
    tag for name, tag in _TAGS.items() if name.startswith(("spatial_", "data_", "region_", "lut_"))
)
_VALUES: Final = frozenset(_TAGS.values()) - _SEQUENCES - _ITEM_TAGS
_PIXEL_DATA: Final = 0x7FE00010
_FLOAT_PIXEL_DATA: Final = frozenset({0x7FE00008, 0x7FE00009})

_MAX_META_BYTES: Final = 1 << 16


def call_anonymized(
    message: str, function: Callable[_Params, _Result], *args: _Params.args, **kwargs: _Params.kwargs
) -> _Result:
    """Call `function`; replace any exception by one that carries no patient data.

    Raises
    ------
    FrameError
        Instead of any other exception, with `message` in place of its text and no reference to it.
    MemoryError
        If there is not enough memory.
    """
    try:
        return function(*args, **kwargs)
    except (FrameError, MemoryError):
        raise
    except Exception as error:
        cause = type(error).__name__
    # Raised outside the handler: inside it, Python would attach the original exception as context.
    raise FrameDamagedError(f"{message} ({cause}); the file is damaged or truncated: copy it again")


def read_sop_uids(stream: IO[bytes]) -> tuple[str, str]:
    """Return the SOP class UID and the SOP instance UID of group 2; empty where a file has none, or is not DICOM."""
    head = stream.read(132 + _MAX_META_BYTES)
    values, _ = _parse_meta(head) if is_dicom(head) else ({}, 0)
    return values.get(0x02, ""), values.get(0x03, "")


def _parse_meta(head: bytes) -> tuple[dict[int, str], int]:
    """Return the UIDs of group 2 by element number, and the offset of the data set, in bytes."""
    offset, values = 132 if head[128:132] == b"DICM" else 0, {}
    while offset + 8 <= len(head):
        group, element, vr, length = struct.unpack_from("<HH2sH", head, offset)
        if group != 2:
            break
        offset += 8
        if vr in LONG_VRS:
            (length,) = struct.unpack_from("<I", head, offset)
            offset += 4
        if element in _META_UIDS:
            values[element] = head[offset : offset + length].decode("latin-1").rstrip("\0 ")
        offset += length
    return values, offset


def read_transfer_syntax(stream: IO[bytes]) -> tuple[str, int]:
    """Return the transfer syntax UID and the offset of the data set, in bytes.

    Both come from group 2, which is always explicit VR, little-endian (DICOM PS3.10, 7.1). Without a transfer syntax,
    as in files without the preamble, the first element shows how an uncompressed data set is encoded.

    Raises
    ------
    FrameFormatError
        If the file is not DICOM.
    """
    head = stream.read(132 + _MAX_META_BYTES)
    if not is_dicom(head):
        raise FrameFormatError(
            "not a DICOM file: neither 'DICM' nor a DICOM element is at its beginning; save it again"
        )
    values, offset = _parse_meta(head)
    syntax = values.get(0x10, "")
    if not syntax:
        implicit, big_endian = detect_encoding(stream, offset)
        syntax = BIG_ENDIAN if big_endian else IMPLICIT if implicit else EXPLICIT
    return syntax, offset


def inflate(stream: IO[bytes]) -> bytes:
    """Decompress a deflated data set of at most `MAX_FILE_BYTES`.

    Raises
    ------
    FrameTooLargeError
        If it is larger.
    FrameDamagedError
        If it is truncated.
    """
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    data = inflater.decompress(stream.read(MAX_FILE_BYTES), MAX_FILE_BYTES)
    if not inflater.eof:
        if len(data) >= MAX_FILE_BYTES:
            raise FrameTooLargeError(
                f"the DICOM file inflates to more than {MAX_FILE_BYTES} bytes; save it uncompressed"
            )
        raise FrameDamagedError("the DICOM file is truncated: its deflated data have no end; copy it again")
    return data


class PixelDataElement(NamedTuple):
    """The Pixel Data element: value representation, length field, and offset of its value in the stream, in bytes."""

    vr: str
    length: int
    offset: int


def read_elements(stream: IO[bytes], syntax: str, begin: int) -> tuple[Elements, PixelDataElement]:
    """Read the wanted elements of the data set that begins at `begin`, up to Pixel Data.

    Raises
    ------
    FrameFormatError
        If there are no pixels, or those of a kind that is not supported.
    FrameDamagedError
        If the header is truncated, malformed, or beyond all bounds.
    """
    implicit, big_endian = detect_encoding(stream, begin)[0], syntax == BIG_ENDIAN
    walker = DataSetWalker(stream, implicit=implicit, big_endian=big_endian)
    values: dict[int, bytes] = {}
    sequences: dict[int, list[Elements]] = {}
    for header in walker.elements(begin, _SEQUENCES):
        if header.tag == _PIXEL_DATA:
            pixel_data = PixelDataElement(header.vr, header.length, header.offset)
            return Elements(values, sequences, big_endian), pixel_data
        if header.tag in _FLOAT_PIXEL_DATA:
            raise FrameFormatError(
                "not supported: the DICOM file's pixels are floating-point numbers; expected 8 or 16 bits; convert it"
            )
        if header.tag in _SEQUENCES:
            items = walker.items(header, _ITEM_TAGS)
            sequences[header.tag] = [Elements(item, {}, big_endian) for item in items]
        elif header.tag in _VALUES:
            values[header.tag] = walker.value(header)
    if walker.truncated:
        raise FrameDamagedError("the DICOM file is truncated: it ends within its header; copy it again")
    raise FrameFormatError(
        "not supported: the DICOM file has no pixels (a report, a waveform, a document?); expected images"
    )


class Elements:
    """Values of a data set or of a sequence item, converted from their raw bytes."""

    def __init__(self, values: Mapping[int, bytes], sequences: Mapping[int, list[Elements]], big_endian: bool) -> None:
        self._values, self._sequences, self._byte_order = values, sequences, "<>"[big_endian]

    def sequence(self, name: str) -> list[Elements]:
        """Return the items of a sequence."""
        return self._sequences.get(_TAGS[name], [])

    def integer(self, name: str) -> int:
        """Return a 16- or 32-bit integer; -1 if there is none."""
        data = self.raw(name)
        if len(data) not in (2, 4):
            return -1
        return int(struct.unpack(self._byte_order + ("H" if len(data) == 2 else "I"), data)[0])

    def raw(self, name: str) -> bytes:
        """Return the bytes of a value; empty if it is absent."""
        return self._values.get(_TAGS[name], b"")

    def text(self, name: str) -> str:
        """Return a value as text, without padding."""
        return self.raw(name).decode("latin-1").strip("\0 ")

    def uint16s(self, name: str) -> tuple[int, ...]:
        """Return the 16-bit integers of a value."""
        return self._integers(name, "H", 2)

    def uint64s(self, name: str) -> tuple[int, ...]:
        """Return the 64-bit integers of a value."""
        return self._integers(name, "Q", 8)

    def _integers(self, name: str, code: str, size: int) -> tuple[int, ...]:
        data = self.raw(name)
        return struct.unpack(f"{self._byte_order}{len(data) // size}{code}", data[: len(data) // size * size])

    def uint16(self, name: str, default: int | None = None) -> int:
        """Return the first 16-bit integer of a value.

        Raises
        ------
        FrameFormatError
            If it is absent and there is no default.
        """
        values = self.uint16s(name)
        if values:
            return values[0]
        if default is None:
            raise FrameFormatError(f"the DICOM header lacks {name.replace('_', ' ')}; save the file again")
        return default

    def decimal(self, name: str, default: float) -> float:
        """Return the first decimal number of a value."""
        text = self.text(name).partition("\\")[0].strip()
        return float(text) if text else default
