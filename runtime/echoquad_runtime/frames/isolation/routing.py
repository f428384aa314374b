"""Routing: which files are decoded in the calling thread, and which in a reader process.

PNG, JPEG and BMP are decoded in the calling thread: their decoders are mature, release the interpreter lock, and need
memory in proportion to a size that is checked first. So is DICOM with native pixels, which only takes Python and numpy.
Everything else goes through larger decoders, or takes memory and time that no header states: compressed and deflated
DICOM, clips, matrices and TIFF.

The frames of most files are counted where they are decoded. Those of compressed DICOM are counted in the calling
thread: that takes only the walk over the elements, which has bounds, and a second journey to a reader process costs
about 2 % of the frames per second.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, NamedTuple

from echoquad_runtime.frames.dicom.transfer_syntaxes import DEFLATED, NATIVE
from echoquad_runtime.frames.file_access import open_frame_file, read_errors
from echoquad_runtime.frames.formats import HEAD_BYTES, TIFF_SIGNATURES, FileFormat, detect_format

__all__ = ["Route", "route_bytes", "route_file"]


class Route(NamedTuple):
    """The format of a file, and whether a reader process decodes it, and counts its frames."""

    file_format: FileFormat
    isolated: bool
    count_isolated: bool


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
        tiff = head.startswith(TIFF_SIGNATURES)
        return Route(file_format, tiff, tiff)
    if file_format != "dicom":
        return Route(file_format, isolated=True, count_isolated=True)
    stream.seek(0)
    syntax = _transfer_syntax(stream)
    return Route(file_format, syntax not in NATIVE, count_isolated=syntax in ("", DEFLATED))


def _transfer_syntax(stream: IO[bytes]) -> str:
    """Return the transfer syntax of a DICOM file, reading only its file meta information; empty if it states none."""
    from echoquad_runtime.frames.dicom.elements import read_transfer_syntax

    try:
        return read_transfer_syntax(stream)[0]
    except Exception:  # not DICOM, or damaged: the reader process finds the same error and reports it
        return ""
