"""Reading frames of any file format: dispatch to the decoder, and enumeration of multi-frame files.

Images and text matrices are read completely, by `image` and `matrix`. Of DICOM, video and numpy files the header is
read once and cached for a while, and frames are read one at a time.
"""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from echoquad_runtime.errors import FrameDamagedError, FrameError, FrameFormatError
from echoquad_runtime.frames import image as image_files
from echoquad_runtime.frames.file_access import OpenStream, open_frame_file, read_bytes, read_errors, read_head
from echoquad_runtime.frames.formats import (
    HEAD_BYTES,
    IMAGE_EXTENSIONS,
    NPY_SIGNATURE,
    FileFormat,
    Flip,
    ReadOptions,
    detect_format,
)
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.frames.quality_flags import COLOUR
from echoquad_runtime.quadrants import Grey

if TYPE_CHECKING:
    from PIL import Image

    from echoquad_runtime.frames.decoded_frame import DecodedFrame

__all__ = [
    "clear_file_cache",
    "decode_grey",
    "decode_grey_and_flags",
    "decode_in_memory",
    "frames_in",
    "load_grey",
    "load_grey_and_flags",
    "load_image",
    "read_grey",
    "read_grey_and_flags",
]

_CACHED_FILES: Final = 32
_CACHED_VIDEOS: Final = 4  # among them; a video is open and caches frames, and the walk is a few short ones ahead


class _FrameSource(Protocol):
    """An open file of one frame or several.

    Attributes
    ----------
    frame_count, stated_frame_count
        Number of frames in the file, and the number that it states.
    multi_frame
        Whether a frame's name has the suffix ``#N``.
    in_memory
        Whether it holds the bytes of the file in memory, and so must not be cached.
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


# ---------------------------------------------------------------------------------------------- frames of a file


def frames_in(path: Path, name: str, options: ReadOptions) -> Iterator[FrameFile | Failure]:
    """Enumerate the frames of a file: the file itself, or ``NAME#1``, ``NAME#2`` and so on of a multi-frame file.

    Yields
    ------
    FrameFile or Failure
        A failure if the header cannot be read, and one after the frames that are present if others are missing.
    """
    try:
        file_format = _detect(path)
        if file_format == "image" or (file_format == "matrix" and not _is_npy(path)):
            yield FrameFile(path, name, flip=options.flip)
            return
        source = _open_source(path, file_format)
    except FrameError as error:
        yield Failure(name, _without_traceback(error))
        return
    if not source.multi_frame:
        yield FrameFile(path, name, flip=options.flip)
        return
    for number in range(1, source.frame_count + 1, options.every):
        yield FrameFile(path, f"{name}#{number}", number, options.flip)
    first, last = source.frame_count + 1, source.stated_frame_count
    if first <= last:
        missing = f"frames {first} to {last}" if first < last else "the last frame"
        yield Failure(
            name, FrameDamagedError(f"{missing} of {last} are not in the file: it is truncated; copy it again")
        )


def _detect(path: Path) -> FileFormat:
    return detect_format(read_head(path), path.suffix)


def _is_npy(path: Path) -> bool:
    return path.suffix.lower() == ".npy" or read_head(path).startswith(NPY_SIGNATURE)


# ---------------------------------------------------------------------------------------------- one frame


def load_grey_and_flags(file: FrameFile) -> tuple[Grey, tuple[str, ...]]:
    """Read a frame as grey, uint8 [H, W], with the quality flags that only its file shows.

    Raises
    ------
    FrameError
        A subclass: the file cannot be read, is not a frame, is damaged or too large, or no rule covers its pixels.
    """
    content = _read(file)
    return decode_grey_and_flags(content) if isinstance(content, bytes) else _grey_and_flags(content)


def load_grey(file: FrameFile) -> Grey:
    """Read a frame as grey, uint8 [H, W].

    Raises
    ------
    FrameError
        As `load_grey_and_flags`.
    """
    content = _read(file)
    return decode_grey(content) if isinstance(content, bytes) else content.grey()


def load_image(file: FrameFile) -> Image.Image:
    """Read a frame as a picture in its own colours, with the same crop and orientation as its grey levels.

    Raises
    ------
    FrameError
        As `load_grey_and_flags`.
    """
    content = _read(file)
    if not isinstance(content, bytes):
        return content.image()
    return decode_in_memory(content).image() if _is_dicom_or_npy(content) else image_files.decode_image(content)


def read_grey(path: Path) -> Grey:
    """Read a single-frame file as grey, uint8 [H, W].

    Raises
    ------
    FrameError
        As `load_grey_and_flags`, or if the file holds several frames.
    """
    return decode_grey(read_bytes(path))


def read_grey_and_flags(path: Path) -> tuple[Grey, tuple[str, ...]]:
    """Read a single-frame file as grey, uint8 [H, W], with the quality flags that only its file shows.

    Raises
    ------
    FrameError
        As `read_grey`.
    """
    return decode_grey_and_flags(read_bytes(path))


def decode_grey_and_flags(data: bytes) -> tuple[Grey, tuple[str, ...]]:
    """Decode the bytes of a single-frame file (image, DICOM or numpy) as `read_grey_and_flags` does.

    Raises
    ------
    FrameError
        As `read_grey`.
    """
    if _is_dicom_or_npy(data):
        return _grey_and_flags(decode_in_memory(data))
    return image_files.decode_grey_and_flags(data)


def decode_grey(data: bytes) -> Grey:
    """Decode the bytes of a single-frame file (image, DICOM or numpy) to grey, uint8 [H, W].

    Raises
    ------
    FrameError
        As `read_grey`.
    """
    return decode_in_memory(data).grey() if _is_dicom_or_npy(data) else image_files.decode_grey(data)


def decode_in_memory(data: bytes) -> DecodedFrame:
    """Decode the bytes of a single-frame DICOM or numpy file.

    Raises
    ------
    FrameError
        As `load_grey_and_flags`, or if the file holds several frames.
    """
    source = _make_source(detect_format(data[:HEAD_BYTES], ""), lambda: io.BytesIO(data))
    if source.multi_frame:
        raise FrameFormatError(
            f"the file holds {source.stated_frame_count} frames; expected one; pass its path instead"
        )
    return source.decode(1, "none")


def _is_dicom_or_npy(data: bytes) -> bool:
    """Return whether bytes are DICOM or numpy; video in memory is not supported and refused as an unknown image."""
    return detect_format(data[:HEAD_BYTES], "") in ("dicom", "matrix")


def _grey_and_flags(frame: DecodedFrame) -> tuple[Grey, tuple[str, ...]]:
    grey = frame.grey()
    return grey, (*frame.flags, COLOUR) if frame.is_coloured() else frame.flags


def _read(file: FrameFile) -> bytes | DecodedFrame:
    """Return the bytes of an image file, which is most often recognised by its name alone, or the decoded frame."""
    if file.frame is None and file.path.suffix.lower() in IMAGE_EXTENSIONS:
        return read_bytes(file.path)
    file_format = _detect(file.path)
    if file_format == "image":
        if file.frame is not None:
            raise FrameFormatError("'#N' selects a frame of a multi-frame file; this file holds a single image")
        return read_bytes(file.path)
    if file_format == "matrix" and not _is_npy(file.path):
        from echoquad_runtime.frames.matrix import decode_text

        return decode_text(read_bytes(file.path), file.flip)
    source = _open_source(file.path, file_format)
    if source.multi_frame and file.frame is None:
        raise FrameFormatError(
            f"the file holds {source.stated_frame_count} frames; name one, as in {file.path.name[-40:]}#1"
        )
    return source.decode(file.frame or 1, file.flip)


# ---------------------------------------------------------------------------------------------- cache of open files


def _make_source(file_format: FileFormat, open_stream: OpenStream) -> _FrameSource:
    if file_format == "dicom":
        from echoquad_runtime.frames.dicom.file import DicomFile

        return DicomFile(open_stream)
    if file_format == "video":
        from echoquad_runtime.frames.video import VideoFile

        return VideoFile(open_stream)
    from echoquad_runtime.frames.matrix import NpyFile

    return NpyFile(open_stream)


_cache: OrderedDict[tuple[object, ...], _FrameSource] = OrderedDict()
_lock = threading.Lock()


def _open_source(path: Path, file_format: FileFormat) -> _FrameSource:
    """Open a file, or return it from the cache if it has not changed since."""
    with read_errors():
        status = path.stat()
    key = file_format, os.fspath(path.absolute()), status.st_size, status.st_mtime_ns
    with _lock:
        if (cached := _cache.get(key)) is not None:
            _cache.move_to_end(key)
            return cached
    # Opened outside the lock, so that an unresponsive disk blocks only its own readers.
    opened = _make_source(file_format, lambda: open_frame_file(path))
    if opened.in_memory:
        return opened
    with _lock:
        source = _cache.setdefault(key, opened)
        while len(_cache) > _CACHED_FILES:
            _cache.popitem(last=False)
        videos = [other for other in _cache if other[0] == "video"]
        for oldest in videos[:-_CACHED_VIDEOS]:
            del _cache[oldest]
    return source


def clear_file_cache() -> None:
    """Close all cached files."""
    with _lock:
        _cache.clear()


def _without_traceback(error: FrameError) -> FrameError:
    """Remove what an error refers to: a traceback would keep the bytes of the file in memory."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
