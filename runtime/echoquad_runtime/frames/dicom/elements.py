"""Data elements of a DICOM header: only those that describe pixels.

Patient, study and date elements are skipped unread. No error message quotes a value from the file, except image sizes:
in a damaged file a patient's name can be anywhere. For the same reason pydicom's own warnings and errors, which quote
values, are suppressed.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple, ParamSpec, TypeVar

from echoquad_runtime.errors import (
    FrameDamagedError,
    FrameError,
    FrameExtraError,
    FrameFormatError,
    FrameTooLargeError,
)
from echoquad_runtime.frames.dicom.transfer_syntaxes import BIG_ENDIAN, IMPLICIT
from echoquad_runtime.frames.formats import MAX_FILE_BYTES, is_dicom

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = [
    "MAX_VALUE_BYTES",
    "UNDEFINED_LENGTH",
    "Elements",
    "PixelDataElement",
    "call_anonymized",
    "inflate",
    "read_elements",
    "read_transfer_syntax",
]

_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")

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
}
_PIXEL_DATA: Final = 0x7FE00010
_FLOAT_PIXEL_DATA: Final = frozenset({0x7FE00008, 0x7FE00009})

_LONG_VRS: Final = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"})
"""Value representations whose length field has 32 bits."""

UNDEFINED_LENGTH: Final = 0xFFFFFFFF

_MAX_ELEMENTS: Final = 100_000  # a header has some hundreds
MAX_VALUE_BYTES: Final = 4 << 20  # of a value that is read: an offset table of half a million frames
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


def read_transfer_syntax(stream: IO[bytes]) -> tuple[str, int]:
    """Return the transfer syntax UID and the offset of the data set, in bytes.

    Both come from group 2, which is always explicit VR, little-endian (DICOM PS3.10, 7.1).

    Raises
    ------
    FrameFormatError
        If the file is not DICOM or states no transfer syntax.
    """
    head = stream.read(132 + _MAX_META_BYTES)
    if not is_dicom(head):
        raise FrameFormatError("not a DICOM file: the preamble of 128 bytes and 'DICM' is missing; save it again")
    offset, syntax = 132, ""
    while offset + 8 <= len(head):
        group, element, vr, length = struct.unpack_from("<HH2sH", head, offset)
        if group != 2:
            break
        offset += 8
        if vr.decode("latin-1") in _LONG_VRS:
            (length,) = struct.unpack_from("<I", head, offset)
            offset += 4
        if element == 0x10:
            syntax = head[offset : offset + length].decode("latin-1").rstrip("\0 ")
        offset += length
    if not syntax:
        raise FrameFormatError("the DICOM file states no transfer syntax; save it again")
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


class _BoundedStream(io.BytesIO):
    """A stream that refuses to read a value of more than `MAX_VALUE_BYTES`, whatever length the header states.

    It blanks the character set, which pydicom looks up while it reads, quoting an unknown one. No text is needed here.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__()
        self._stream, self._blank = stream, False

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_VALUE_BYTES:
            raise FrameDamagedError("a value of the DICOM header is too long; the file is damaged: copy it again")
        data = self._stream.read(size)
        if self._blank:
            data = b" " * len(data)
        self._blank = size == 8 and data[:4] in (b"\x08\0\x05\0", b"\0\x08\0\x05")  # the value follows its header
        return data

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()


class PixelDataElement(NamedTuple):
    """The Pixel Data element: value representation, length field, and offset of its value in the stream, in bytes."""

    vr: str
    length: int
    offset: int


def read_elements(stream: IO[bytes], syntax: str, begin: int) -> tuple[Elements, PixelDataElement]:
    """Read the wanted elements of the data set that begins at `begin`, up to Pixel Data.

    Raises
    ------
    Exception
        Whatever pydicom raises for a damaged header: call this through `call_anonymized`.
    """
    read_dataset = _load_pydicom()
    pixel_data: list[tuple[int, str | None, int]] = []
    passed = 0

    def stop(tag: int, vr: str | None, length: int) -> bool:
        nonlocal passed
        passed += 1
        if passed > _MAX_ELEMENTS:
            raise FrameDamagedError(f"the DICOM header has more than {_MAX_ELEMENTS} elements; save it again")
        if tag == _PIXEL_DATA or tag in _FLOAT_PIXEL_DATA:
            pixel_data.append((tag, vr, length))
            return True
        return False

    stream.seek(begin)
    implicit = syntax == IMPLICIT
    dataset = read_dataset(
        _BoundedStream(stream), implicit, syntax != BIG_ENDIAN, stop_when=stop, specific_tags=list(_TAGS.values())
    )
    if not pixel_data:
        raise FrameFormatError("the DICOM file has no pixels (a report or a directory?); expected images")
    tag, vr, length = pixel_data[-1]
    if tag != _PIXEL_DATA:
        raise FrameFormatError("the DICOM file's pixels are floating-point numbers; expected 8 or 16 bits")
    header_bytes = 12 if not implicit and vr in _LONG_VRS else 8
    return (
        Elements(dataset, "<>"[syntax == BIG_ENDIAN]),
        PixelDataElement(vr or "", length, stream.tell() + header_bytes),
    )


def _load_pydicom() -> Any:
    try:
        from pydicom.filereader import read_dataset
    except ImportError:
        read_dataset = None
    if read_dataset is None:
        raise FrameExtraError(
            'DICOM files need pydicom, which is not installed; install it: pip install "echoquad[dicom]"'
        )
    # pydicom's log records and warnings quote values, and those may be names.
    logging.getLogger("pydicom").propagate = False
    warnings.filterwarnings("ignore", module=r"(pydicom|openjpeg|echoquad_runtime\.frames\.dicom)")
    return read_dataset


class Elements:
    """Values of a data set, converted from their raw bytes.

    pydicom's own conversion warns about malformed values and quotes them.
    """

    def __init__(self, dataset: Dataset, byte_order: str) -> None:
        self._dataset, self._byte_order = dataset, byte_order

    def __contains__(self, name: str) -> bool:
        return _TAGS[name] in self._dataset

    def sequence(self, name: str) -> list[Elements]:
        """Return the items of a sequence."""
        items = self._dataset[_TAGS[name]].value if name in self else []
        return [Elements(item, self._byte_order) for item in items]

    def integer(self, tag: int) -> int:
        """Return the 16- or 32-bit integer at `tag` of a sequence item; -1 if there is none."""
        item = self._dataset.get_item(tag) if tag in self._dataset else None
        data = item.value if item is not None else b""
        if isinstance(data, int):
            return data
        if not isinstance(data, bytes) or len(data) not in (2, 4):
            return -1
        return int(struct.unpack(self._byte_order + ("H" if len(data) == 2 else "I"), data)[0])

    def raw(self, name: str) -> bytes:
        """Return the bytes of a value; empty if it is absent."""
        value = self._dataset.get_item(_TAGS[name]).value if name in self else b""
        return value if isinstance(value, bytes) else b""

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
