"""A frame on disk, and the failure that takes its place where it cannot be judged."""

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
        Where it lies.
    name
        How it is named in results: relative to what the user gave, with forward slashes; ``#12`` at its end is the
        twelfth frame of a file of several.
    frame
        Which of the file's frames, counted from 1; None where it is its only one.
    flip
        How it is turned over if it is a numeric matrix.
    """

    path: Path
    name: str
    frame: int | None = None
    flip: Flip = "none"


@dataclass(frozen=True, slots=True)
class Failure:
    """A frame that could not be judged, or an input that names none, and the error that says why."""

    file: str
    error: EchoQuadError
