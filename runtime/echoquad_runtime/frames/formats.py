"""File formats of frames: recognised by their first bytes, else by the extension of the file's name.

`echoquad_runtime.frames.reader` imports the decoder of a format when it reads the first such file.
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
    "MATROSKA_SIGNATURE",
    "MAX_FILE_BYTES",
    "MAX_FRAMES",
    "MAX_PIXELS",
    "NPY_SIGNATURE",
    "STACK_EXTENSIONS",
    "TIFF_SIGNATURES",
    "VIDEO_EXTENSIONS",
    "FileFormat",
    "Flip",
    "ReadOptions",
    "could_be_dicom",
    "detect_format",
    "is_dicom",
    "picture_or_sound_brand",
]

FileFormat = Literal["image", "dicom", "video", "matrix"]

IMAGE_EXTENSIONS: Final = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
STACK_EXTENSIONS: Final = frozenset({".png", ".tif", ".tiff"})  # images that may hold several frames
DICOM_EXTENSIONS: Final = frozenset({".dcm", ".dicom", ".ima"})
VIDEO_EXTENSIONS: Final = frozenset({".avi", ".mp4", ".m4v", ".mov", ".mkv", ".webm"})
MATRIX_EXTENSIONS: Final = frozenset({".txt", ".csv", ".tsv", ".npy"})

FRAME_EXTENSIONS: Final = IMAGE_EXTENSIONS | DICOM_EXTENSIONS | VIDEO_EXTENSIONS
"""Extensions, in lower case, of the files in a folder that are frames. A file named explicitly may have any other."""

MAX_PIXELS: Final = 36_000_000  # 6000 x 6000; an 8K screen has 33 million
MAX_FILE_BYTES: Final = 256 * 1024 * 1024  # MAX_PIXELS of uncompressed 16-bit RGB take 216 million
MAX_FRAMES: Final = 100_000
"""Frames in a file: an hour at 28 frames per second."""

HEAD_BYTES: Final = 132
"""Number of bytes from the beginning of a file that `detect_format` needs."""

NPY_SIGNATURE: Final = b"\x93NUMPY"
MATROSKA_SIGNATURE: Final = b"\x1aE\xdf\xa3"
TIFF_SIGNATURES: Final = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_FIRST_VRS: Final = rb"(?:AE|CS|DA|LO|OB|PN|SH|ST|TM|UI|UL|UN).."
_DICOM_ELEMENT: Final = re.compile(
    rb"(?s)[\x02\x08]\0.\0(?:%s|[\x02-\x40]\0\0\0)"  # little-endian: a tag, then a VR and a length, or a length alone
    rb"|\0\x08\0.%s" % (_FIRST_VRS, _FIRST_VRS)  # big-endian
)
_MP4_BOXES: Final = (b"ftyp", b"moov", b"mdat", b"wide")

# Brands of files of boxes (ISO/IEC 14496-12) that hold no video: the registered ones of HEIF, AVIF and MPEG-4 sound.
_PICTURE_BRANDS: Final = {
    "AVIF": frozenset({b"avif", b"avis", b"avio", b"MA1A", b"MA1B"}),
    "HEIC": frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}),
    "HEIF": frozenset({b"mif1", b"mif2", b"msf1", b"miaf", b"avci", b"avcs", b"jpeg", b"jpgs", b"j2ki", b"j2is"}),
    "a camera's raw file": frozenset({b"crx "}),
}
_SOUND_BRANDS: Final = frozenset({b"M4A ", b"M4B ", b"M4P ", b"F4A ", b"F4B ", b"aax "})

Flip = Literal["none", "vertical", "horizontal", "both"]
FLIPS: Final[tuple[Flip, ...]] = get_args(Flip)


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How to read a data set's files where the files do not say: a property of the data, not of the network.

    Attributes
    ----------
    matrices
        Whether ``.txt``, ``.csv``, ``.tsv`` and ``.npy`` files in a folder are frames; they may be anything else.
    flip
        Orientation of numeric matrices: ``vertical`` swaps top and bottom, ``horizontal`` left and right.
    every
        Step between the frames taken from a multi-frame file, beginning with the first.

    Raises
    ------
    ConfigError
        If a value is invalid.
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
        """Return the options as JSON values."""
        return asdict(self)

    @classmethod
    def from_record(cls, facts: object) -> ReadOptions:
        """Return the options recorded under ``reading`` by a run or a bundle; missing ones have their default.

        Raises
        ------
        ConfigError
            If a value is invalid.
        """
        values = facts.get("reading") if isinstance(facts, Mapping) else None
        if not isinstance(values, Mapping):
            return DEFAULT_READ_OPTIONS
        return cls(**{name: values[name] for name in ("matrices", "flip", "every") if name in values})


DEFAULT_READ_OPTIONS: Final = ReadOptions()


def detect_format(head: bytes, extension: str) -> FileFormat:
    """Return the format of a file.

    Parameters
    ----------
    head
        Its first `HEAD_BYTES` bytes, or all of a shorter file.
    extension
        Extension of its name, with the dot, in any case. It counts only if the bytes match no format: text may be a
        matrix, and a file that is named as DICOM or video without being one is then refused as such.
    """
    if is_dicom(head):
        return "dicom"
    if picture_or_sound_brand(head):
        return "image"  # whose decoder refuses it by its name
    if (head[:4], head[8:12]) == (b"RIFF", b"AVI ") or head.startswith(MATROSKA_SIGNATURE) or head[4:8] in _MP4_BOXES:
        return "video"
    extension = extension.lower()
    if head.startswith(NPY_SIGNATURE) or extension in MATRIX_EXTENSIONS:
        return "matrix"
    if extension in DICOM_EXTENSIONS:
        return "dicom"
    return "video" if extension in VIDEO_EXTENSIONS else "image"


def picture_or_sound_brand(head: bytes) -> str | None:
    """Return what a file of boxes holds that is like MP4 and no clip: ``HEIC``, ``a sound file`` and others, or None.

    A picture has a brand of pictures among its compatible brands. Sound counts by its major brand alone, because clips
    of iTunes are compatible with that of its sound.
    """
    if head[4:8] != b"ftyp":
        return None
    end = min(len(head), int.from_bytes(head[:4], "big"))
    brands = {head[8:12], *(head[at : at + 4] for at in range(16, end, 4))}
    if head[8:12] in _SOUND_BRANDS:
        return "a sound file"
    return next((name for name, known in _PICTURE_BRANDS.items() if brands & known), None)


def is_dicom(head: bytes) -> bool:
    """Return whether a file begins as DICOM files do: a preamble of 128 bytes, then ``DICM`` (DICOM PS3.10, 7.1).

    Old archives omit the preamble. Their files begin with an element of group 2 or 8.
    """
    return head[128:132] == b"DICM" or _DICOM_ELEMENT.match(head) is not None


def could_be_dicom(name: str) -> bool:
    """Return whether a file name may be that of a DICOM file without an extension, as scanners and archives write them.

    ``IM000012`` has no extension, and that of ``1.2.840.113619.2.5`` is none. A ``DICOMDIR`` lists files and has no
    pixels.
    """
    return name != "DICOMDIR" and re.fullmatch(r"[^.]+|.*\.\d+", name) is not None
