"""A frame on disk, and the failure that replaces it if it cannot be read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from echoquad_runtime.errors import EchoQuadError
from echoquad_runtime.frames.formats import Flip

__all__ = ["Failure", "FrameFile"]


@dataclass(frozen=True, slots=True)
class FrameFile:
    """A frame on disk.

    Attributes
    ----------
    path
        The file.
    name
        Its name in results: relative to what the user gave, with forward slashes; a suffix ``#12`` is the twelfth frame
        of a multi-frame file.
    frame
        Number of the frame in a multi-frame file, counted from 1; None if the file is a single frame.
    flip
        How a numeric matrix is flipped.
    """

    path: Path
    name: str
    frame: int | None = None
    flip: Flip = "none"


@dataclass(frozen=True, slots=True)
class Failure:
    """A frame that could not be read or decided, or an input without frames, and the error that explains it."""

    file: str
    error: EchoQuadError
