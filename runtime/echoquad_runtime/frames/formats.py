"""Kinds of files that frames come in: told by their first bytes where those tell, else by their names' endings.

What reads a kind is imported when the first such file is met: `echoquad_runtime.frames.reader`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, get_args

from echoquad_runtime.errors import ConfigError

__all__ = [
    "DEFAULT_READ_OPTIONS",
    "DICOM_EXTENSIONS",
    "FLIPS",
    "FRAME_EXTENSIONS",
    "HEAD_BYTES",
    "IMAGE_EXTENSIONS",
    "MATRIX_EXTENSIONS",
    "MAX_FILE_BYTES",
    "MAX_FRAMES",
    "MAX_PIXELS",
    "VIDEO_EXTENSIONS",
    "FileFormat",
    "Flip",
    "ReadOptions",
    "could_be_dicom",
    "detect_format",
    "is_dicom",
]

FileFormat = Literal["image", "dicom", "clip", "matrix"]

IMAGE_EXTENSIONS: Final = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
DICOM_EXTENSIONS: Final = frozenset({".dcm", ".dicom", ".ima"})
VIDEO_EXTENSIONS: Final = frozenset({".avi", ".mp4", ".m4v", ".mov", ".mkv", ".webm"})
MATRIX_EXTENSIONS: Final = frozenset({".txt", ".csv", ".tsv", ".npy"})

FRAME_EXTENSIONS: Final = IMAGE_EXTENSIONS | DICOM_EXTENSIONS | VIDEO_EXTENSIONS
"""File name extensions, in lower case, that count as frames in a folder. A file named explicitly may have any other."""

MAX_PIXELS: Final = 36_000_000  # 6000 x 6000; an 8K screen has 33 million
MAX_FILE_BYTES: Final = 256 * 1024 * 1024  # MAX_PIXELS of uncompressed 16-bit RGB come to 216 million
MAX_FRAMES: Final = 100_000
"""Frames in a file: an hour at 28 a second."""

HEAD_BYTES: Final = 132
"""Bytes from a file's beginning by which `detect_format` tells."""

NPY: Final = b"\x93NUMPY"
_MATROSKA: Final = b"\x1aE\xdf\xa3"
_MP4: Final = (b"ftyp", b"moov", b"mdat", b"wide")

Flip = Literal["none", "vertical", "horizontal", "both"]
FLIPS: Final[tuple[Flip, ...]] = get_args(Flip)


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How a data set's files are read, where files alone do not say: a matter of the data, not of the network.

    Attributes
    ----------
    matrices
        Whether a folder's ``.txt``, ``.csv``, ``.tsv`` and ``.npy`` files are frames; they may be anything else.
    flip
        How numeric matrices are turned over: ``vertical`` swaps top and bottom, ``horizontal`` left and right.
    every
        Of files with several frames, the 1st and each `every`-th after it are taken.

    Raises
    ------
    ConfigError
        If a value cannot be.
    """

    matrices: bool = False
    flip: Flip = "none"
    every: int = 1

    def __post_init__(self) -> None:
        if self.flip not in FLIPS:
            raise ConfigError(f"flip {str(self.flip)[:40]!r} found; expected one of {', '.join(FLIPS)}")
        if type(self.every) is not int or self.every < 1:
            raise ConfigError(f"every {str(self.every)[:40]} found; expected a whole number from 1 on")

    def to_dict(self) -> dict[str, Any]:
        """Give the settings as JSON values."""
        return asdict(self)

    @classmethod
    def found_in(cls, facts: object) -> ReadOptions:
        """Read back what a run's record, or a bundle's, says under ``reading``; what it does not say is the default.

        Raises
        ------
        ConfigError
            If a value cannot be.
        """
        values = facts.get("reading") if isinstance(facts, Mapping) else None
        if not isinstance(values, Mapping):
            return DEFAULT_READ_OPTIONS
        return cls(**{name: values[name] for name in ("matrices", "flip", "every") if name in values})


DEFAULT_READ_OPTIONS: Final = ReadOptions()


def detect_format(head: bytes, ending: str) -> FileFormat:
    """Tell a file's kind.

    Parameters
    ----------
    head
        Its first `HEAD_BYTES` bytes, or all of it where it has fewer.
    ending
        Of its name, in any case, with the dot. It decides only where the bytes do not: text may be a matrix, and what
        calls itself DICOM or a clip and is none is refused as such.
    """
    if is_dicom(head):
        return "dicom"
    if head.startswith(NPY):
        return "matrix"
    if (head[:4], head[8:12]) == (b"RIFF", b"AVI ") or head.startswith(_MATROSKA) or head[4:8] in _MP4:
        return "clip"
    ending = ending.lower()
    for kind, endings in _BY_ENDING:
        if ending in endings:
            return kind
    return "image"


_BY_ENDING: Final[tuple[tuple[FileFormat, frozenset[str]], ...]] = (
    ("matrix", MATRIX_EXTENSIONS),
    ("dicom", DICOM_EXTENSIONS),
    ("clip", VIDEO_EXTENSIONS),
)


def is_dicom(head: bytes) -> bool:
    """Say whether a file begins as DICOM files do: 128 bytes of anything, then ``DICM`` (DICOM PS3.10, 7.1)."""
    return head[128:132] == b"DICM"


def could_be_dicom(name: str) -> bool:
    """Say whether a file of this name may be one that a scanner or an archive wrote without an ending.

    ``IM000012`` has none, and ``1.2.840.113619.2.5`` only seems to. A ``DICOMDIR`` lists files and has no pixels.
    """
    return name != "DICOMDIR" and re.fullmatch(r"[^.]+|.*\.\d+", name) is not None
