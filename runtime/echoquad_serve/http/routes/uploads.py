"""The body of a request, written to a file of the store's folder for incoming files."""

from __future__ import annotations

import os
import secrets
import threading
from contextlib import suppress
from pathlib import Path

from echoquad_runtime.frames.formats import (
    FRAME_EXTENSIONS,
    HEAD_BYTES,
    MATRIX_EXTENSIONS,
    MATROSKA_SIGNATURE,
    NPY_SIGNATURE,
    TIFF_SIGNATURES,
    detect_format,
    is_dicom,
)
from echoquad_serve.errors import StorageFullError

__all__ = ["CHUNK_BYTES", "Upload", "file_name"]

CHUNK_BYTES = 1024 * 1024
"""How much of a body is in memory before it is written."""

_MAX_NAME = 100
_EXTENSIONS = FRAME_EXTENSIONS | MATRIX_EXTENSIONS
_SIGNATURES = (
    (b"\x89PNG", ".png"),
    (b"\xff\xd8\xff", ".jpg"),
    (b"BM", ".bmp"),
    (NPY_SIGNATURE, ".npy"),
    (MATROSKA_SIGNATURE, ".mkv"),
    *((signature, ".tif") for signature in TIFF_SIGNATURES),
)


def file_name(wanted: str, head: bytes) -> str:
    """Return the name of an object: printable, at most 100 characters, and no path.

    Parameters
    ----------
    wanted
        What the client calls it; may be empty.
    head
        The first bytes of the object, by which an object without a name gets its extension.
    """
    base = wanted.replace("\\", "/").rpartition("/")[2]
    name = "".join(letter for letter in base if letter.isprintable()).strip()
    if not name.strip("."):
        return f"upload-{secrets.token_hex(4)}{_extension(head)}"
    if len(name) > _MAX_NAME:
        suffix = _known_extension(name)
        name = name[: _MAX_NAME - len(suffix)] + suffix
    return name


def _known_extension(name: str) -> str:
    extension = os.path.splitext(name)[1].lower()  # noqa: PTH122 - it is no path
    return extension if extension in _EXTENSIONS else ""


def _extension(head: bytes) -> str:
    if is_dicom(head):
        return ".dcm"
    known = next((extension for signature, extension in _SIGNATURES if head.startswith(signature)), None)
    if known is None and detect_format(head, "") == "video":
        return ".avi" if head.startswith(b"RIFF") else ".mp4"
    return known or ""


class Upload:
    """A body on its way to a file, which is removed unless the service takes it.

    The methods block and run in threads; `add` alone does not. Only a part of the body is in memory at any time.

    Parameters
    ----------
    folder
        The store's folder for incoming files.
    wanted_name
        What the client calls the object; may be empty.
    """

    def __init__(self, folder: Path, wanted_name: str) -> None:
        self._folder = folder
        self._wanted_name = wanted_name
        self._pending = bytearray()
        self._head = b""
        self._file: int | None = None
        self._path: Path | None = None
        self._discarded = False
        self._lock = threading.Lock()  # a request may be cancelled while a thread writes for it
        self.size = 0

    @property
    def full(self) -> bool:
        """Whether what was added must be written before more is added."""
        return len(self._pending) >= CHUNK_BYTES

    @property
    def name(self) -> str:
        """Name of the object."""
        return file_name(self._wanted_name, self._head)

    def add(self, data: bytes) -> None:
        """Add a part of the body."""
        self._pending += data
        self.size += len(data)

    def write(self) -> None:
        """Write what was added.

        Raises
        ------
        StorageFullError
            If the disk does not take it.
        """
        try:
            with self._lock:
                self._write()
        except OSError as error:
            message = f"the object cannot be written: {error.strerror or type(error).__name__}; check the store's disk"
            raise StorageFullError(message, retry_after=30.0) from error

    def _write(self) -> None:
        if self._discarded:
            raise OSError("the request has ended")
        if self._file is None:
            self._head = bytes(self._pending[:HEAD_BYTES])
            # A name of the client selects one of the known extensions and nothing else of the path.
            extension = _extension(self._head) or _known_extension(self._wanted_name)
            self._path = self._folder / f"{secrets.token_hex(16)}{extension}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            self._file = os.open(self._path, flags, 0o600)
        view = memoryview(self._pending)
        while view:
            view = view[os.write(self._file, view) :]
        view.release()
        self._pending = bytearray()

    def finish(self) -> Path:
        """Write the rest, close the file, and return its path.

        Raises
        ------
        StorageFullError
            If the disk does not take it.
        """
        self.write()
        assert self._file is not None and self._path is not None
        file, self._file = self._file, None
        os.close(file)
        return self._path

    def discard(self) -> None:
        """Close the file and remove it, if it is still there; nothing is written any more."""
        with self._lock:
            self._discarded = True
            file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                os.close(file)
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
