"""A data set that is being received: written as a DICOM file (PS3.10), as it comes, and never decoded."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pynetdicom import PYNETDICOM_IMPLEMENTATION_UID

from echoquad_serve.errors import IntakeError, StorageFullError

__all__ = ["MAX_OBJECT_BYTES", "ReceivedFile", "ReceivedTooLargeError", "remove_leftovers"]

MAX_OBJECT_BYTES: Final = 4 * 1024**3
_IMPLEMENTATION: Final = str(PYNETDICOM_IMPLEMENTATION_UID)
_PREFIX: Final = "dicom-"
_CHECK_BYTES: Final = 16 * 1024**2
"""Room is checked again after so many bytes."""


def remove_leftovers(folder: Path) -> int:
    """Remove what a killed process was receiving; return how many files that were."""
    leftovers = list(folder.glob(f"{_PREFIX}*.dcm"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


class ReceivedTooLargeError(ValueError):
    """The data set has more than `MAX_OBJECT_BYTES`."""


class ReceivedFile:
    """A file in the folder of incoming files that a data set is written to, in the order of its parts.

    A fault does not interrupt the peer, since it takes its answer only after the last part: `fault` has the reason,
    the file is removed, and further parts are dropped.

    The class has what pynetdicom expects of its temporary files: `name`, `file`, `write`, `flush` and `close`.

    Parameters
    ----------
    folder
        Where the file is created, under a random name.
    sop_class_uid, sop_instance_uid, transfer_syntax
        For the file's meta information; valid UIDs.
    check_room
        Raises an `IntakeError` if there is no room for so many bytes.
    """

    def __init__(
        self,
        folder: Path,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax: str,
        check_room: Callable[[int], None],
    ) -> None:
        self.path = folder / f"{_PREFIX}{secrets.token_hex(16)}.dcm"
        self.fault: Exception | None = None
        self.size = 0
        self._hash = hashlib.sha256()
        self._check_room = check_room
        self._checked = 0
        self._stream = None
        try:
            check_room(0)
            self._stream = self.path.open("xb")
            self._stream.write(_preamble(sop_class_uid, sop_instance_uid, transfer_syntax))
        except Exception as error:
            self._fail(error)

    @property
    def name(self) -> str:
        """The path, as that of a temporary file."""
        return str(self.path)

    @property
    def file(self) -> ReceivedFile:
        """The file itself, as that of a temporary file."""
        return self

    @property
    def sha256(self) -> str:
        """SHA-256 of the data set, in hexadecimal digits."""
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        """Append a part of the data set."""
        self.size += len(data)
        if self._stream is None:
            return
        try:
            if self.size > MAX_OBJECT_BYTES:
                raise ReceivedTooLargeError(f"the data set has more than {MAX_OBJECT_BYTES} bytes")
            if self.size - self._checked > _CHECK_BYTES:
                self._checked = self.size
                self._check_room(_CHECK_BYTES)
            self._stream.write(data)
            self._hash.update(data)
        except Exception as error:
            self._fail(error)

    def flush(self) -> None:
        """Do nothing: `finish` flushes, and pynetdicom would do so after each part."""

    def finish(self) -> None:
        """Close the file after the last part.

        Raises
        ------
        IntakeError
            If there was no room for it.
        ReceivedTooLargeError
            If it is too large.
        """
        try:
            if self._stream is not None:
                self._stream.close()
        except OSError as error:  # the disk is full, and some bytes were still in memory
            self._fail(error)
        if isinstance(self.fault, IntakeError | ReceivedTooLargeError):
            raise self.fault
        if self.fault is not None:
            raise StorageFullError(f"the object cannot be written ({type(self.fault).__name__})") from self.fault

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._stream is not None and not self._stream.closed:
            try:
                self._stream.close()
            except OSError as error:
                self._fail(error)

    def remove(self) -> None:
        """Close and remove the file, if it is still there."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _fail(self, error: Exception) -> None:
        self.fault = self.fault or error
        stream, self._stream = self._stream, None
        if stream is not None:
            with contextlib.suppress(OSError):  # what it still held does not fit either
                stream.close()
        self.path.unlink(missing_ok=True)


def _preamble(sop_class_uid: str, sop_instance_uid: str, transfer_syntax: str) -> bytes:
    """Return the beginning of a DICOM file: 128 zeros, ``DICM``, and the meta information (PS3.10, section 7.1)."""
    meta = struct.pack("<HH2sxxI", 0x0002, 0x0001, b"OB", 2) + b"\x00\x01"
    values = {0x0002: sop_class_uid, 0x0003: sop_instance_uid, 0x0010: transfer_syntax, 0x0012: _IMPLEMENTATION}
    for element, uid in values.items():
        value = uid.encode("ascii") + b"\x00" * (len(uid) % 2)
        meta += struct.pack("<HH2sH", 0x0002, element, b"UI", len(value)) + value
    return bytes(128) + b"DICM" + struct.pack("<HH2sHI", 0x0002, 0x0000, b"UL", 4, len(meta)) + meta
