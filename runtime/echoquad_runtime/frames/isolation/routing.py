"""Routing: which files are decoded in the calling thread, and which in a reader process.

PNG, JPEG and BMP are decoded in the calling thread: their decoders are mature, release the interpreter lock, and need
memory in proportion to a size that is checked first. So is DICOM with native pixels, which only takes Python and numpy.
Everything else goes through larger decoders, or takes memory and time that no header states: compressed and deflated
DICOM, clips, matrices and TIFF.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, NamedTuple

from echoquad_runtime.frames.file_access import open_frame_file, read_errors
from echoquad_runtime.frames.formats import HEAD_BYTES, TIFF_SIGNATURES, FileFormat, detect_format

__all__ = ["Route", "route_bytes", "route_file"]


class Route(NamedTuple):
    """The format of a file, and whether a reader process decodes it."""

    file_format: FileFormat
    isolated: bool


def route_file(path: Path) -> Route:
    """Return the route of a file, by its first bytes and the extension of its name.

    Raises
    ------
    FrameReadError
        If it cannot be opened or read.
    """
    with read_errors(), open_frame_file(path) as stream:
        return _route(stream, path.suffix)


def route_bytes(data: bytes) -> Route:
    """Return the route of a file in memory. A clip in memory is not supported, and routed as an unknown image."""
    return _route(io.BytesIO(data), "")


def _route(stream: IO[bytes], extension: str) -> Route:
    head = stream.read(HEAD_BYTES)
    file_format = detect_format(head, extension)
    if file_format == "image":
        return Route(file_format, head.startswith(TIFF_SIGNATURES))
    if file_format != "dicom":
        return Route(file_format, isolated=True)
    stream.seek(0)
    return Route(file_format, not _has_native_pixels(stream))


def _has_native_pixels(stream: IO[bytes]) -> bool:
    """Return whether a DICOM file states a transfer syntax of native pixels, reading only its file meta information."""
    from echoquad_runtime.frames.dicom.elements import read_transfer_syntax
    from echoquad_runtime.frames.dicom.transfer_syntaxes import NATIVE

    try:
        return read_transfer_syntax(stream)[0] in NATIVE
    except Exception:  # not DICOM, or damaged: the reader process finds the same error and reports it
        return False
