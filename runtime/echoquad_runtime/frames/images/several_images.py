"""Whether an image file announces several images: pages of TIFF, frames of an animated PNG."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO

from echoquad_runtime.errors import FrameError
from echoquad_runtime.frames.file_access import open_frame_file, read_errors
from echoquad_runtime.frames.formats import TIFF_SIGNATURES
from echoquad_runtime.frames.images.image_integrity import MAX_PNG_CHUNKS, PNG_SIGNATURE
from echoquad_runtime.frames.images.tiff_file import TiffFile

__all__ = ["file_may_be_stack", "has_animation", "may_be_stack"]


def file_may_be_stack(path: Path) -> bool:
    """Return `may_be_stack` of a file.

    Raises
    ------
    FrameError
        If it cannot be opened or read.
    """
    with read_errors(), open_frame_file(path) as stream:
        return may_be_stack(stream)


def may_be_stack(stream: IO[bytes]) -> bool:
    """Return whether an image file announces several images, of which one may be a thumbnail; a few bytes tell."""
    head = stream.read(len(PNG_SIGNATURE))
    if head == PNG_SIGNATURE:
        return has_animation(stream)
    if head.startswith(TIFF_SIGNATURES):
        try:
            return TiffFile(stream).has_next_page()
        except FrameError:  # reported when the file is decoded
            return False
    return False


def has_animation(stream: IO[bytes]) -> bool:
    """Return whether a PNG states that it is animated, which it does before its pixels."""
    stream.seek(len(PNG_SIGNATURE))
    for _ in range(MAX_PNG_CHUNKS):
        head = stream.read(8)
        length, kind = struct.unpack(">I4s", head) if len(head) == 8 else (0, b"IDAT")
        if kind == b"acTL" and length == 8:  # an invalid number of frames stands for no animation, as players take it
            return 0 < int.from_bytes(stream.read(4), "big") < 1 << 31
        if kind == b"IDAT":
            return False
        stream.seek(length + 4, 1)
    return False
