"""The header of the object that a report is about: which study it belongs to, and whose.

The file is untrusted. Only its beginning is read, up to a limit, and the values of patient and study are neither parsed
nor decoded: a report carries the bytes that the object has, so that an archive files both under the same patient. A
value that DICOM does not allow is left out. No value gets into a message, a warning or a log.
"""

from __future__ import annotations

import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from pydicom.charset import convert_encodings, decode_bytes, python_encoding
from pydicom.filereader import read_dataset

from echoquad_runtime.frames.formats import is_dicom
from echoquad_runtime.storage.regular_file import read_regular
from echoquad_serve.errors import DeliveryError, DeliveryRefusedError

__all__ = ["SourceHeader", "quiet_pydicom", "read_source_header"]

MAX_HEADER_BYTES: Final = 8 << 20
"""Bytes of the file that are read; the wanted elements are near its beginning."""

_MODULES: Final[Mapping[int, str]] = {
    # Patient
    0x00100010: "PN",  # name
    0x00100020: "LO",  # identifier
    0x00100021: "LO",  # issuer of the identifier
    0x00100030: "DA",  # birth date
    0x00100040: "CS",  # sex
    # General Study
    0x00080020: "DA",  # study date
    0x00080030: "TM",  # study time
    0x00080050: "SH",  # accession number
    0x00080090: "PN",  # referring physician's name
    0x00081030: "LO",  # study description
    0x00200010: "SH",  # study identifier
    # Patient Study
    0x00101010: "AS",  # patient's age
    0x00101020: "DS",  # patient's size
    0x00101030: "DS",  # patient's weight
}
_REQUIRED: Final = frozenset(
    {0x00100010, 0x00100020, 0x00100030, 0x00100040, 0x00080020, 0x00080030, 0x00080050, 0x00080090, 0x00200010}
)
"""Elements that every object has, if only empty."""

_CHARACTER_SET, _TIME_ZONE, _FRAMES, _LOSSY = 0x00080005, 0x00080201, 0x00280008, 0x00282110
_SOP_CLASS, _SOP_INSTANCE, _STUDY, _SERIES, _INSTANCE_NUMBER = (
    0x00080016,
    0x00080018,
    0x0020000D,
    0x0020000E,
    0x00200013,
)
_OTHERS: Final = (
    _CHARACTER_SET, _TIME_ZONE, _FRAMES, _LOSSY, _SOP_CLASS, _SOP_INSTANCE, _STUDY, _SERIES, _INSTANCE_NUMBER,
)  # fmt: skip

_DEFLATED: Final = b"1.2.840.10008.1.2.1.99"
_IMPLICIT: Final = b"1.2.840.10008.1.2"
_BIG_ENDIAN: Final = b"1.2.840.10008.1.2.2"

_UID: Final = re.compile(rb"[0-9]+(\.[0-9]+)+")
_CONTROL: Final = re.compile(rb"[\x00-\x1a\x1c-\x1f\x7f]")  # all but ESC, which changes the character set
_VALID: Final[Mapping[str, re.Pattern[bytes]]] = {
    "AS": re.compile(rb"[0-9]{3}[DWMY]"),
    "CS": re.compile(rb"[MFO]"),  # of the sex
    "DS": re.compile(rb"(?=.{1,16}$)[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"),
    "TM": re.compile(rb"([01][0-9]|2[0-3])([0-5][0-9]([0-5][0-9](\.[0-9]{1,6})?)?)?"),
}
_MOST: Final = {"SH": 16, "LO": 64, "PN": 3 * 64}  # characters

# Both print values: pydicom those that it cannot decode, highdicom names of an unusual form.
for _library in ("pydicom", "highdicom"):
    logging.getLogger(_library).setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class SourceHeader:
    """What a report takes from the object that it is about.

    Attributes
    ----------
    sop_class_uid, sop_instance_uid, study_uid, series_uid
        Which object it is.
    instance_number
        Its number in the series; 1 if it states none.
    frames
        Number of frames that it states.
    character_set
        Value of its Specific Character Set; empty for ASCII.
    time_zone
        Its offset from UTC, such as ``+0100``; empty if it states none.
    lossy
        Whether its pixels were ever compressed with loss.
    values
        Value representation and bytes of each element of its patient and its study, by tag.
    """

    sop_class_uid: str
    sop_instance_uid: str
    study_uid: str
    series_uid: str
    instance_number: int
    frames: int
    character_set: bytes
    time_zone: str
    lossy: bool
    values: Mapping[int, tuple[str, bytes]]

    def transcoded(self) -> Mapping[int, tuple[str, bytes]]:
        """Return `values` in UTF-8."""
        encodings = self.character_set.decode("ascii").split("\\")
        with quiet_pydicom():
            names = convert_encodings(encodings)
            return {
                tag: (vr, decode_bytes(value, names, {0x5E, 0x3D} if vr == "PN" else {0x5C}).encode("utf-8", "replace"))
                for tag, (vr, value) in self.values.items()
            }


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Suppress the warnings of pydicom, which quote values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_source_header(path: Path) -> SourceHeader | None:
    """Read the header of an object.

    Returns
    -------
    SourceHeader or None
        None if the file is not DICOM.

    Raises
    ------
    DeliveryError
        If the file cannot be read.
    DeliveryRefusedError
        If its header is damaged, or does not say which study, series and object it is.
    """
    try:
        head = read_regular(path, MAX_HEADER_BYTES)
    except OSError as error:
        raise DeliveryError(f"the object's file cannot be read ({error.strerror or type(error).__name__})") from None
    if not is_dicom(head):
        return None
    cause = ""
    try:
        with quiet_pydicom():
            elements = _parse(head)
    except Exception as error:  # pydicom raises anything for a damaged file
        cause = type(error).__name__
    if cause:  # raised outside the handler, so that no exception with a value in its text is attached
        raise DeliveryRefusedError(
            f"the object's DICOM header is damaged ({cause}), so that nothing can be filed with it"
        )
    uids = [elements.get(tag, b"") for tag in (_SOP_CLASS, _SOP_INSTANCE, _STUDY, _SERIES)]
    if not all(len(uid) <= 64 and _UID.fullmatch(uid) for uid in uids):
        raise DeliveryRefusedError(
            "the object's DICOM header has no valid UID of its class, itself, its study or its series; expected all "
            "four, so that the report can be filed with it"
        )
    sop_class, instance, study, series = (uid.decode("ascii") for uid in uids)
    character_set = _known_character_set(elements.get(_CHARACTER_SET, b""))
    values = {}
    for tag, vr in _MODULES.items():
        value = _checked(elements.get(tag, b""), vr, bool(character_set))
        if value or tag in _REQUIRED:
            values[tag] = (vr, value)
    zone = elements.get(_TIME_ZONE, b"")
    return SourceHeader(
        sop_class_uid=sop_class,
        sop_instance_uid=instance,
        study_uid=study,
        series_uid=series,
        instance_number=_integer(elements.get(_INSTANCE_NUMBER, b"")),
        frames=_integer(elements.get(_FRAMES, b"")),
        character_set=character_set,
        time_zone=zone.decode("ascii") if re.fullmatch(rb"[+-](0[0-9]|1[0-4])[0-5][0-9]", zone) else "",
        lossy=elements.get(_LOSSY) == b"01",
        values=values,
    )


def _parse(head: bytes) -> dict[int, bytes]:
    """Return the bytes of the wanted elements, without padding."""
    stream = BytesIO(head)
    stream.seek(132 if head[128:132] == b"DICM" else 0)
    meta = read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    syntax = _raw(meta.get_item(0x00020010)) if 0x00020010 in meta else b""
    implicit, little_endian = syntax == _IMPLICIT, syntax != _BIG_ENDIAN
    if syntax == _DEFLATED:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stream.read(), MAX_HEADER_BYTES)
        stream = BytesIO(data)
    elif not syntax:
        first = head[stream.tell() : stream.tell() + 8]
        implicit = not first[4:6].isalpha() or not first[4:6].isupper()
        little_endian = struct.unpack_from("<H", first)[0] < 0x0100
    found = read_dataset(
        stream,
        implicit,
        little_endian,
        stop_when=lambda tag, vr, length: tag > _LOSSY,
        specific_tags=[*_MODULES, *_OTHERS],
    )
    return {int(tag): _raw(found.get_item(tag)) for tag in (*_MODULES, *_OTHERS) if tag in found}


def _raw(element: Any) -> bytes:
    return bytes(element.value or b"").strip(b" \0")


def _known_character_set(value: bytes) -> bytes:
    """Return a Specific Character Set; empty for ASCII, and if pydicom does not know it."""
    with suppress(UnicodeDecodeError):
        names = [name.strip() for name in value.decode("ascii").split("\\")]
        if all(name in python_encoding for name in names) and names not in ([""], ["ISO_IR 6"]):
            return "\\".join(names).encode("ascii")
    return b""


def _checked(value: bytes, vr: str, has_character_set: bool) -> bytes:
    """Return a value, or what DICOM allows in its place: nothing, or ``?`` for a character of an unknown set."""
    if vr == "DA":
        return value if re.fullmatch(rb"[0-9]{8}", value) and _is_date(value) else b""
    if vr in _VALID:
        # A size or a weight of zero means that it was not measured.
        return value if _VALID[vr].fullmatch(value) and (vr != "DS" or float(value)) else b""
    if _CONTROL.search(value):
        return b""
    if value.isascii() and b"\x1b" not in value:
        return value if b"\\" not in value and len(value) <= _MOST[vr] else b""
    return value if has_character_set else re.sub(rb"[^\x20-\x7e]", b"?", value)


def _is_date(value: bytes) -> bool:
    try:
        datetime.strptime(value.decode("ascii"), "%Y%m%d")
    except ValueError:
        return False
    return True


def _integer(value: bytes) -> int:
    return int(value) if re.fullmatch(rb"[0-9]{1,9}", value) and int(value) > 0 else 1
