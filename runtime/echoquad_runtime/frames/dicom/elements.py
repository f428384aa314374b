"""Elements of a DICOM file's header: those that concern pixels, and no others.

Patient, study and dates are passed over unread. But for sizes, no message says a value that was found in a file: a
damaged one may have a name anywhere. pydicom's own warnings and errors, which quote values, are kept back.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

from echoquad_runtime.errors import (
    FrameDamagedError,
    FrameError,
    FrameExtraError,
    FrameFormatError,
    FrameTooLargeError,
)
from echoquad_runtime.frames.formats import MAX_FILE_BYTES, is_dicom

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = [
    "BIG_ENDIAN",
    "DEFLATED",
    "MAX_VALUE",
    "NATIVE",
    "UNDEFINED",
    "Values",
    "inflated",
    "read_values",
    "reworded",
    "transfer_syntax",
]

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")

IMPLICIT: Final = "1.2.840.10008.1.2"
DEFLATED: Final = "1.2.840.10008.1.2.1.99"
BIG_ENDIAN: Final = "1.2.840.10008.1.2.2"
NATIVE: Final = frozenset({IMPLICIT, "1.2.840.10008.1.2.1", DEFLATED, BIG_ENDIAN})

_WANTED: Final = {
    "sop_class": 0x00080016,
    "samples": 0x00280002,
    "photometric": 0x00280004,
    "planar": 0x00280006,
    "frames": 0x00280008,
    "rows": 0x00280010,
    "columns": 0x00280011,
    "allocated": 0x00280100,
    "stored": 0x00280101,
    "high_bit": 0x00280102,
    "signed": 0x00280103,
    "center": 0x00281050,
    "width": 0x00281051,
    "intercept": 0x00281052,
    "slope": 0x00281053,
    "window_function": 0x00281056,
    "modality_lut": 0x00283000,
    "voi_lut": 0x00283010,
    "regions": 0x00186011,
    "red": 0x00281201,
    "green": 0x00281202,
    "blue": 0x00281203,
    "descriptor": 0x00281101,
    "red_segments": 0x00281221,
    "green_segments": 0x00281222,
    "blue_segments": 0x00281223,
    "offsets": 0x7FE00001,
}
_PIXELS: Final = 0x7FE00010
_OTHER_PIXELS: Final = frozenset({0x7FE00008, 0x7FE00009})  # floats

_LONG: Final = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"})
UNDEFINED: Final = 0xFFFFFFFF

_MAX_ELEMENTS: Final = 100_000  # a header has some hundreds
MAX_VALUE: Final = 4 << 20  # bytes of a value that is read: an offset table of half a million frames
_MAX_META: Final = 1 << 16

_IN_WORDS: Final = {
    "rows": "how many rows its pixels have",
    "columns": "how many columns its pixels have",
    "samples": "how many samples a pixel has",
    "allocated": "how many bits its samples have",
}


def reworded(what: str, function: Callable[_Given, _Result], *args: _Given.args, **options: _Given.kwargs) -> _Result:
    """Call what may raise anything, with a patient's name in it; gives what it gives.

    Raises
    ------
    FrameError
        In place of any other, without its text and without a reference to it.
    """
    try:
        return function(*args, **options)
    except FrameError:
        raise
    except MemoryError:
        kind = "MemoryError"
    except Exception as error:
        kind = type(error).__name__
    # Outside of the handler, or the first error would hang from this one.
    raise FrameDamagedError(f"{what} ({kind}); the file is damaged or truncated: copy it again")


def transfer_syntax(stream: IO[bytes]) -> tuple[str, int]:
    """Read the transfer syntax, and where the data set begins: behind group 2, which is explicit and little-endian.

    Raises
    ------
    FrameFormatError
        If the file is no DICOM, or does not say.
    """
    head = stream.read(132 + _MAX_META)
    if not is_dicom(head):
        raise FrameFormatError(
            "the file is no DICOM, or lacks the 128 bytes and 'DICM' at its beginning; save it again"
        )
    at, syntax = 132, ""
    while at + 8 <= len(head):
        group, element, vr, length = struct.unpack_from("<HH2sH", head, at)
        if group != 2:
            break
        at += 8
        if vr.decode("latin-1") in _LONG:
            (length,) = struct.unpack_from("<I", head, at)
            at += 4
        if element == 0x10:
            syntax = head[at : at + length].decode("latin-1").rstrip("\0 ")
        at += length
    if not syntax:
        raise FrameFormatError("the DICOM file does not say its transfer syntax; save it again")
    return syntax, at


def inflated(stream: IO[bytes]) -> bytes:
    """Inflate a deflated data set, up to `MAX_FILE_BYTES`.

    Raises
    ------
    FrameTooLargeError, FrameDamagedError
        If it is larger, or cut.
    """
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    data = inflater.decompress(stream.read(MAX_FILE_BYTES), MAX_FILE_BYTES)
    if not inflater.eof:
        if len(data) >= MAX_FILE_BYTES:
            raise FrameTooLargeError(
                f"the DICOM file inflates to more than {MAX_FILE_BYTES} bytes; save it uncompressed"
            )
        raise FrameDamagedError("the DICOM file ends before its data do: it is truncated; copy it again")
    return data


class _Bounded(io.BytesIO):
    """A stream of which no value beyond `MAX_VALUE` is read, whatever length a header gives it.

    A character set is blank: pydicom looks it up as it reads, and quotes what it does not know. No text is read here.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__()
        self._stream, self._blank = stream, False

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_VALUE:
            raise FrameDamagedError(
                "the DICOM header has a value beyond all bounds; the file is damaged: copy it again"
            )
        data = self._stream.read(size)
        if self._blank:
            data = b" " * len(data)
        self._blank = size == 8 and data[:4] in (b"\x08\0\x05\0", b"\0\x08\0\x05")  # a value follows its header
        return data

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()


def read_values(stream: IO[bytes], syntax: str, begin: int) -> tuple[Values, str, int, int]:
    """Read what is wanted up to the pixels; gives VR and length of these, and where they begin.

    Raises
    ------
    Exception
        Whatever pydicom raises of a damaged header: to be called through `reworded`.
    """
    read_dataset = _load_pydicom()
    found: list[tuple[int, str | None, int]] = []
    passed = 0

    def stop(tag: int, vr: str | None, length: int) -> bool:
        nonlocal passed
        passed += 1
        if passed > _MAX_ELEMENTS:
            raise FrameDamagedError(f"the DICOM header has more than {_MAX_ELEMENTS} elements; save it again")
        if tag == _PIXELS or tag in _OTHER_PIXELS:
            found.append((tag, vr, length))
            return True
        return False

    stream.seek(begin)
    implicit = syntax == IMPLICIT
    dataset = read_dataset(
        _Bounded(stream), implicit, syntax != BIG_ENDIAN, stop_when=stop, specific_tags=list(_WANTED.values())
    )
    if not found:
        raise FrameFormatError("the DICOM file has no pixels: a report, a directory or the like; expected images")
    tag, vr, length = found[-1]
    if tag != _PIXELS:
        raise FrameFormatError("the DICOM file's pixels are floating-point numbers; expected 8 or 16 bits")
    return (
        Values(dataset, "<>"[syntax == BIG_ENDIAN]),
        vr or "",
        length,
        stream.tell() + (12 if not implicit and vr in _LONG else 8),
    )


def _load_pydicom() -> Any:
    try:
        from pydicom.filereader import read_dataset
    except ImportError:
        read_dataset = None
    if read_dataset is None:
        raise FrameExtraError(
            'the file is DICOM, which needs pydicom, which is not installed; do: pip install "echoquad[dicom]"'
        )
    # What it logs and warns of quotes values, names among them.
    logging.getLogger("pydicom").propagate = False
    warnings.filterwarnings("ignore", module=r"(pydicom|openjpeg|echoquad_runtime\.dicom)")
    return read_dataset


class Values:
    """A data set's values, read from their bytes: pydicom's own conversion warns of odd ones, and quotes them."""

    def __init__(self, dataset: Dataset, order: str) -> None:
        self._dataset, self._order = dataset, order

    def __contains__(self, name: str) -> bool:
        return _WANTED[name] in self._dataset

    def sequence(self, name: str) -> list[Values]:
        """Give a sequence's items."""
        items = self._dataset[_WANTED[name]].value if name in self else []
        return [Values(item, self._order) for item in items]

    def whole(self, tag: int) -> int:
        """Give the number that a sequence's item has of 16 or 32 bits; -1 where it has none."""
        item = self._dataset.get_item(tag) if tag in self._dataset else None
        data = item.value if item is not None else b""
        if isinstance(data, int):
            return data
        if not isinstance(data, bytes) or len(data) not in (2, 4):
            return -1
        return int(struct.unpack(self._order + ("H" if len(data) == 2 else "I"), data)[0])

    def stored(self, name: str) -> bytes:
        """Give a value as it is stored; nothing where it is not there."""
        value = self._dataset.get_item(_WANTED[name]).value if name in self else b""
        return value if isinstance(value, bytes) else b""

    def text(self, name: str) -> str:
        """Give a value as text."""
        return self.stored(name).decode("latin-1").strip("\0 ")

    def shorts(self, name: str) -> tuple[int, ...]:
        """Give a value's numbers of 16 bits."""
        return self._numbers(name, "H", 2)

    def longs(self, name: str) -> tuple[int, ...]:
        """Give a value's numbers of 64 bits."""
        return self._numbers(name, "Q", 8)

    def _numbers(self, name: str, kind: str, size: int) -> tuple[int, ...]:
        data = self.stored(name)
        return struct.unpack(f"{self._order}{len(data) // size}{kind}", data[: len(data) // size * size])

    def short(self, name: str, default: int | None = None) -> int:
        """Give the first of a value's numbers of 16 bits.

        Raises
        ------
        FrameFormatError
            If it is not there, and has no default.
        """
        found = self.shorts(name)
        if found:
            return found[0]
        if default is None:
            raise FrameFormatError(f"the DICOM header does not say {_IN_WORDS[name]}; save the file again")
        return default

    def decimal(self, name: str, default: float) -> float:
        """Read the first of a value's decimals."""
        text = self.text(name).partition("\\")[0].strip()
        return float(text) if text else default
