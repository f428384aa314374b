"""Frames of any file format, read and decoded in this process: dispatch to the decoder, and a cache of open files.

`echoquad_runtime.frames.reader` decides which files are read here and which in a reader process, whose program is this
module too. Images and text matrices are read completely, by `image` and `matrix`. Of DICOM, video and numpy files, and
images of several frames, the header is read once and cached for a while, and frames are read one at a time.
"""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import FrameFormatError
from echoquad_runtime.frames.file_access import OpenStream, open_frame_file, read_bytes, read_errors, read_head
from echoquad_runtime.frames.formats import HEAD_BYTES, IMAGE_EXTENSIONS, NPY_SIGNATURE, FileFormat, Flip, detect_format
from echoquad_runtime.frames.frame_file import FrameFile
from echoquad_runtime.frames.images import image as image_files
from echoquad_runtime.frames.images.several_images import file_may_be_stack
from echoquad_runtime.frames.quality_flags import COLOUR, quality_flags
from echoquad_runtime.quadrants import Grey, frame_quadrants

if TYPE_CHECKING:
    from echoquad_runtime.frames.decoded_frame import DecodedFrame

__all__ = [
    "SINGLE_FRAME",
    "Content",
    "Flags",
    "FrameCounts",
    "clear_cache",
    "count_frames",
    "cut_quadrants",
    "decode_in_memory",
    "is_single_frame_format",
    "pixel_format",
    "read_content",
    "stream_decoder",
    "to_grey",
    "to_grey_and_flags",
    "to_image",
    "to_levels",
]

_CACHED_FILES: Final = 32
_CACHED_VIDEOS: Final = 4  # among them; a video is open and caches frames, and the walk is a few short ones ahead

Flags = tuple[str, ...]
"""Quality flags of a frame, as `echoquad_runtime.frames.quality_flags` names them."""


class _FrameSource(Protocol):
    """An open file of one frame or several.

    Attributes
    ----------
    frame_count, stated_frame_count
        Number of frames in the file, and the number that it states.
    multi_frame
        Whether a frame's name has the suffix ``#N``.
    in_memory
        Whether it holds the bytes of the file in memory, so that only the last such file is cached.
    """

    frame_count: int
    stated_frame_count: int

    @property
    def multi_frame(self) -> bool:
        """See the class."""
        ...

    @property
    def in_memory(self) -> bool:
        """See the class."""
        ...

    def decode(self, number: int, flip: Flip) -> DecodedFrame:
        """Decode a frame, counted from 1."""
        ...


class FrameCounts(NamedTuple):
    """How many frames a file has.

    Attributes
    ----------
    multi_frame
        Whether a frame's name has the suffix ``#N``.
    present, stated
        Number of frames in the file, and the number that its header states.
    """

    multi_frame: bool
    present: int
    stated: int


SINGLE_FRAME: Final = FrameCounts(multi_frame=False, present=1, stated=1)

Content: TypeAlias = "bytes | DecodedFrame"
"""The bytes of a single-frame file, which are decoded on request, or the frame of any other file."""


# ---------------------------------------------------------------------------------------------- files


def is_single_frame_format(path: Path, file_format: FileFormat) -> bool:
    """Return whether a file holds one frame, so that nobody needs to count: most images, and text matrices."""
    if file_format == "image":
        return not file_may_be_stack(path)
    return file_format == "matrix" and not _is_npy(path)


def count_frames(path: Path, file_format: FileFormat) -> FrameCounts:
    """Return how many frames a file has, from its header.

    Raises
    ------
    FrameError
        If the header cannot be read, or the file is of an unsupported kind.
    """
    if is_single_frame_format(path, file_format):
        return SINGLE_FRAME
    source = _open_source(path, file_format)
    return FrameCounts(source.multi_frame, source.frame_count, source.stated_frame_count)


def read_content(file: FrameFile, file_format: FileFormat | None = None) -> Content:
    """Return the bytes of an image file, or the decoded frame of any other file.

    Parameters
    ----------
    file
        The file, and the frame in it.
    file_format
        Its format, if it is known already.

    Raises
    ------
    FrameError
        A subclass: the file cannot be read, is not a frame, is damaged or too large, or no rule covers its pixels.
    """
    if file_format is None and file.frame is None and file.path.suffix.lower() in IMAGE_EXTENSIONS:
        return read_bytes(file.path)  # most often; its name alone is enough
    file_format = file_format or detect_format(read_head(file.path), file.path.suffix)
    if file_format == "image":
        if file.frame is None:
            return read_bytes(file.path)
        if file_may_be_stack(file.path) and (stack := _open_source(file.path, file_format)).multi_frame:
            return stack.decode(file.frame, file.flip)
        raise FrameFormatError("'#N' selects a frame of a multi-frame file; this file holds a single image")
    if file_format == "matrix" and not _is_npy(file.path):
        from echoquad_runtime.frames.matrix import decode_text

        return decode_text(read_bytes(file.path), file.flip)
    source = _open_source(file.path, file_format)
    if source.multi_frame and file.frame is None:
        raise FrameFormatError(
            f"the file holds {source.stated_frame_count} frames; name one, as in {file.path.name[-40:]}#1"
        )
    return source.decode(file.frame or 1, file.flip)


def decode_in_memory(data: bytes) -> DecodedFrame:
    """Decode the bytes of a single-frame DICOM or numpy file.

    Raises
    ------
    FrameError
        As `read_content`, or if the file holds several frames.
    """
    source = _make_source(detect_format(data[:HEAD_BYTES], ""), lambda: io.BytesIO(data))
    if source.multi_frame:
        raise FrameFormatError(
            f"the file holds {source.stated_frame_count} frames; expected one; pass its path instead"
        )
    return source.decode(1, "none")


def stream_decoder() -> Callable[[Any], DecodedFrame]:
    """Return a function that takes the frames that PyAV decodes from a stream, with the levels and flags of a clip's.

    The function raises a FrameError if a frame is too large or its pixel format is not supported.
    """
    from echoquad_runtime.frames.clips.video_frame import display_matrix, to_frame

    matrix: list[tuple[int, int, int, int]] = []  # of the first frame, as for a clip

    def decode(frame: Any) -> DecodedFrame:
        if not matrix:
            matrix.append(display_matrix(frame))
        return to_frame(frame, matrix[0])

    return decode


def _is_npy(path: Path) -> bool:
    return path.suffix.lower() == ".npy" or read_head(path).startswith(NPY_SIGNATURE)


def pixel_format(data: bytes) -> str:
    """Return Pillow's format and mode of an image file; ``PNG L`` is an 8-bit grey PNG."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return f"{image.format} {image.mode}"
    except OSError:  # a format that is read here and that Pillow does not know
        return "other"


# ---------------------------------------------------------------------------------------------- pixels


def to_grey_and_flags(content: Content) -> tuple[Grey, Flags]:
    """Return a frame as grey, uint8 [H, W], with the quality flags that only its file shows.

    Raises
    ------
    FrameError
        As `read_content`.
    """
    if isinstance(content, bytes):
        if not _is_dicom_or_npy(content):
            return image_files.decode_grey_and_flags(content)
        content = decode_in_memory(content)
    grey = content.grey()
    return grey, (*content.flags, COLOUR) if content.is_coloured() else content.flags


def to_grey(content: Content) -> Grey:
    """Return a frame as grey, uint8 [H, W].

    Raises
    ------
    FrameError
        As `read_content`.
    """
    if isinstance(content, bytes):
        return decode_in_memory(content).grey() if _is_dicom_or_npy(content) else image_files.decode_grey(content)
    return content.grey()


def to_image(content: Content) -> Image.Image:
    """Return a frame as a picture in its own colours, with the same crop and orientation as its grey levels.

    Raises
    ------
    FrameError
        As `read_content`.
    """
    if isinstance(content, bytes):
        return decode_in_memory(content).image() if _is_dicom_or_npy(content) else image_files.decode_image(content)
    return content.image()


def to_levels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return the levels of a picture for display: uint8 [H, W] if it is grey, else RGB, uint8 [H, W, 3].

    Raises
    ------
    FrameError
        If no rule covers its pixels.
    """
    if image.mode in ("1", "L", "F") or image.mode.startswith("I"):
        return image_files.to_grey(image)
    return np.asarray(image_files.composite_over_black(image).convert("RGB"))


def cut_quadrants(grey: Grey, contract: Contract, out: Grey) -> Flags:
    """Cut a decoded frame, uint8 [H, W], into quadrants and return the flags that its quadrants show.

    Parameters
    ----------
    grey
        The frame, grey levels 0 to 255.
    contract
        Defines the kept fraction and the input size S.
    out
        uint8 [4, 1, S, S] to write LA, RA, LV, RV to.

    Raises
    ------
    FrameTooSmallError
        If the frame is less than 2 pixels wide or high.
    """
    frame_quadrants(grey, contract, out=out)
    return quality_flags(out, grey)


def _is_dicom_or_npy(data: bytes) -> bool:
    """Return whether bytes are DICOM or numpy; video in memory is not supported and refused as an unknown image."""
    return detect_format(data[:HEAD_BYTES], "") in ("dicom", "matrix")


# ---------------------------------------------------------------------------------------------- cache of open files


def _make_source(file_format: FileFormat, open_stream: OpenStream) -> _FrameSource:
    if file_format == "dicom":
        from echoquad_runtime.frames.dicom.file import DicomFile

        return DicomFile(open_stream)
    if file_format == "video":
        from echoquad_runtime.frames.clips.video import VideoFile

        return VideoFile(open_stream)
    if file_format == "image":
        from echoquad_runtime.frames.images.image_stack import ImageStack

        return ImageStack(open_stream)
    from echoquad_runtime.frames.matrix import NpyFile

    return NpyFile(open_stream)


_cache: OrderedDict[tuple[object, ...], _FrameSource] = OrderedDict()
_cache_in_memory: dict[tuple[object, ...], _FrameSource] = {}  # one at most: it holds the bytes of its file
_lock = threading.Lock()


def _open_source(path: Path, file_format: FileFormat) -> _FrameSource:
    """Open a file, or return it from the cache if it has not changed since."""
    with read_errors():
        status = path.stat()
    key = file_format, os.fspath(path.absolute()), status.st_size, status.st_mtime_ns
    with _lock:
        if key in _cache:
            _cache.move_to_end(key)
        if (cached := _cache.get(key) or _cache_in_memory.get(key)) is not None:
            return cached
    # Opened outside the lock, so that an unresponsive disk blocks only its own readers.
    opened = _make_source(file_format, lambda: open_frame_file(path))
    with _lock:
        if opened.in_memory:
            _cache_in_memory.clear()
            _cache_in_memory[key] = opened
            return opened
        source = _cache.setdefault(key, opened)
        while len(_cache) > _CACHED_FILES:
            _cache.popitem(last=False)
        videos = [other for other in _cache if other[0] == "video"]
        for oldest in videos[:-_CACHED_VIDEOS]:
            del _cache[oldest]
    return source


def clear_cache() -> None:
    """Close all cached files."""
    with _lock:
        _cache.clear()
        _cache_in_memory.clear()
