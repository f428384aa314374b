"""Sources: whatever kind of file a frame is in, its pixels; and the frames that a file of several holds.

Images and text matrices are read whole, by `image` and `matrix`. Of DICOM files,
clips and numpy files the header is read once and kept for a while, and of their frames one at a time.
"""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Protocol

from echoquad_runtime.errors import FrameDamagedError, FrameError, FrameFormatError, FrameReadError
from echoquad_runtime.frames.formats import (
    HEAD_BYTES,
    IMAGE_EXTENSIONS,
    NPY,
    FileFormat,
    Flip,
    ReadOptions,
    detect_format,
    is_dicom,
)
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.frames.image import decode_grey, decode_grey_and_flags, decode_image, read_bytes
from echoquad_runtime.frames.quality_flags import COLOUR
from echoquad_runtime.quadrants import Grey
from echoquad_runtime.storage.atomic import open_regular

if TYPE_CHECKING:
    from PIL import Image

    from echoquad_runtime.frames.decoded_frame import Pixels

__all__ = [
    "decode_checked",
    "decode_frame",
    "decode_pixels",
    "forget",
    "frames_in",
    "head_of",
    "load_checked",
    "load_grey",
    "load_image",
    "read_checked",
    "read_frame",
]

_MOST_KEPT: Final = 32  # files whose headers are kept
_MOST_CLIPS: Final = 4  # among them, which are open and have decoded frames; the walk is a few short ones ahead

Open = Callable[[], AbstractContextManager[IO[bytes]]]


class _Source(Protocol):
    """A file of one frame or several.

    Attributes
    ----------
    count, announced
        How many are there, and how many it says there are.
    several
        Whether they are counted in names.
    heavy
        Whether it holds a file's worth of memory, and is not to be kept.
    """

    count: int
    announced: int
    several: bool
    heavy: bool

    def pixels(self, number: int, flip: Flip) -> Pixels:
        """Decode a frame, counted from 1."""
        ...


# ---------------------------------------------------------------------------------------------- frames of a file


def frames_in(path: Path, name: str, reading: ReadOptions) -> Iterator[FrameFile | Failure]:
    """Give the frames of a file: itself, or each of several as ``NAME#1``, ``NAME#2`` and so on.

    Yields
    ------
    FrameFile or Failure
        A failure where its header cannot be read, and one behind the frames that are there where some are missing.
    """
    try:
        kind = detect_format(head_of(path), path.suffix)
        if kind == "image" or (kind == "matrix" and not _is_npy(path)):
            yield FrameFile(path, name, flip=reading.flip)
            return
        source = _opened(path, kind)
    except FrameError as error:
        yield Failure(name, _bare(error))
        return
    if not source.several:
        yield FrameFile(path, name, flip=reading.flip)
        return
    for number in range(1, source.count + 1, reading.every):
        yield FrameFile(path, f"{name}#{number}", number, reading.flip)
    if source.count < source.announced:
        what = (
            f"frames {source.count + 1} to {source.announced}"
            if source.announced > source.count + 1
            else "the last frame"
        )
        yield Failure(
            name, FrameDamagedError(f"{what} of {source.announced} are not in the file: it is truncated; copy it again")
        )


def head_of(path: Path) -> bytes:
    """Read the first bytes of a file, for `detect_format`.

    Raises
    ------
    FrameReadError
        If it cannot be read.
    """
    with _reading(path) as stream:
        return stream.read(HEAD_BYTES)


def _is_npy(path: Path) -> bool:
    return path.suffix.lower() == ".npy" or head_of(path).startswith(NPY)


# ---------------------------------------------------------------------------------------------- one frame


def load_checked(file: FrameFile) -> tuple[Grey, tuple[str, ...]]:
    """Read a frame as grey, uint8 [H, W], with the flags that only its file can tell.

    Raises
    ------
    FrameError
        One of its kinds: it cannot be read, is no frame, is damaged, too large, or of pixels no rule covers.
    """
    if (data := _image_bytes(file)) is not None:
        return decode_checked(data)
    return _grey_and_flags(_pixels(file))


def load_grey(file: FrameFile) -> Grey:
    """Read a frame as grey, uint8 [H, W].

    Raises
    ------
    FrameError
        As `load_checked`.
    """
    if (data := _image_bytes(file)) is not None:
        return decode_frame(data)
    return _pixels(file).grey()


def load_image(file: FrameFile) -> Image.Image:
    """Read a frame as a picture in its own colours, cropped and turned over as its grey is.

    Raises
    ------
    FrameError
        As `load_checked`.
    """
    if (data := _image_bytes(file)) is not None:
        return decode_pixels(data).image() if _is_dicom_or_numpy(data) else decode_image(data)
    return _pixels(file).image()


def read_frame(path: Path) -> Grey:
    """Read a file of one frame as grey, uint8 [H, W].

    Raises
    ------
    FrameError
        As `load_checked`, or if it holds several frames.
    """
    return decode_frame(read_bytes(path))


def read_checked(path: Path) -> tuple[Grey, tuple[str, ...]]:
    """Read a file of one frame as grey, uint8 [H, W], with the flags that only its file can tell.

    Raises
    ------
    FrameError
        As `read_frame`.
    """
    return decode_checked(read_bytes(path))


def decode_checked(data: bytes) -> tuple[Grey, tuple[str, ...]]:
    """Decode the bytes of a file of one frame, an image or DICOM or numpy, as `read_checked` does.

    Raises
    ------
    FrameError
        As `read_frame`.
    """
    return _grey_and_flags(decode_pixels(data)) if _is_dicom_or_numpy(data) else decode_grey_and_flags(data)


def decode_frame(data: bytes) -> Grey:
    """Decode the bytes of a file of one frame, an image or DICOM or numpy, to grey, uint8 [H, W].

    Raises
    ------
    FrameError
        As `read_frame`.
    """
    return decode_pixels(data).grey() if _is_dicom_or_numpy(data) else decode_grey(data)


def decode_pixels(data: bytes) -> Pixels:
    """Decode a DICOM or a numpy file of one frame, in memory.

    Raises
    ------
    FrameError
        As `load_checked`, or if it holds several frames.
    """
    source = _source("dicom" if is_dicom(data) else "matrix", lambda: io.BytesIO(data))
    if source.several:
        raise FrameFormatError(f"the file holds {source.announced} frames; expected one; give it as a file on disk")
    return source.pixels(1, "none")


def _is_dicom_or_numpy(data: bytes) -> bool:
    """Return whether the first bytes are those of DICOM or numpy; a clip in memory is refused as no image."""
    return detect_format(data[:HEAD_BYTES], "") in ("dicom", "matrix")


def _grey_and_flags(pixels: Pixels) -> tuple[Grey, tuple[str, ...]]:
    grey = pixels.grey()
    return grey, (*pixels.flags, COLOUR) if pixels.is_coloured() else pixels.flags


def _image_bytes(file: FrameFile) -> bytes | None:
    """Read an image file whole; None where it is of another kind."""
    if file.frame is not None:
        return None
    if (
        file.path.suffix.lower() not in IMAGE_EXTENSIONS
        and detect_format(head_of(file.path), file.path.suffix) != "image"
    ):
        return None
    return read_bytes(file.path)


def _pixels(file: FrameFile) -> Pixels:
    kind = detect_format(head_of(file.path), file.path.suffix)
    if kind == "matrix" and not _is_npy(file.path):
        from echoquad_runtime.frames.matrix import text_pixels

        return text_pixels(read_bytes(file.path), file.flip)
    if kind == "image":
        raise FrameFormatError("the file is a single image; expected a clip, of which this were a frame")
    source = _opened(file.path, kind)
    if source.several and file.frame is None:
        raise FrameFormatError(f"the file holds {source.announced} frames; name one, as in {file.path.name[-40:]}#1")
    return source.pixels(file.frame or 1, file.flip)


# ---------------------------------------------------------------------------------------------- open files


class _Dicom:
    def __init__(self, open_stream: Open) -> None:
        from echoquad_runtime.frames.dicom.file import DicomFile

        self._file = DicomFile(open_stream)
        self.count, self.announced = self._file.count, self._file.announced
        self.several, self.heavy = self.announced > 1, self._file.inflated

    def pixels(self, number: int, flip: Flip) -> Pixels:
        from echoquad_runtime.frames.dicom.pixels import pixels_of

        return pixels_of(self._file.header, self._file.encoded(number))


class _Clip:
    several, heavy = True, False

    def __init__(self, open_stream: Open) -> None:
        from echoquad_runtime.frames.video import Clip

        self._clip = Clip(open_stream)
        self.count, self.announced = self._clip.count, self._clip.announced

    def pixels(self, number: int, flip: Flip) -> Pixels:
        return self._clip.pixels(number)


class _Npy:
    heavy = False

    def __init__(self, open_stream: Open) -> None:
        from echoquad_runtime.frames.matrix import NpyFile

        self._file = NpyFile(open_stream)
        self.count = self.announced = self._file.count
        self.several = self._file.several

    def pixels(self, number: int, flip: Flip) -> Pixels:
        return self._file.pixels(number, flip)


def _source(kind: FileFormat, open_stream: Open) -> _Source:
    if kind == "dicom":
        return _Dicom(open_stream)
    return _Clip(open_stream) if kind == "clip" else _Npy(open_stream)


_kept: OrderedDict[tuple[object, ...], _Source] = OrderedDict()
_lock = threading.Lock()


def _opened(path: Path, kind: FileFormat) -> _Source:
    """Open a file, or give it as it was opened before; one that has changed since is another."""
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(error) from None
    key = kind, os.fspath(path.absolute()), status.st_size, status.st_mtime_ns
    with _lock:
        if (found := _kept.get(key)) is not None:
            _kept.move_to_end(key)
            return found
    # Outside of the lock: a dead disk holds up its own readers alone.
    made = _source(kind, lambda: _reading(path))
    if made.heavy:
        return made
    with _lock:
        source = _kept.setdefault(key, made)
        while len(_kept) > _MOST_KEPT:
            _kept.popitem(last=False)
        clips = [one for one in _kept if one[0] == "clip"]
        for old in clips[:-_MOST_CLIPS]:
            del _kept[old]
    return source


def forget() -> None:
    """Let go of all files that are kept open."""
    with _lock:
        _kept.clear()


class _reading:  # noqa: N801 - used as a function
    """Opens a regular file; what the system says of it becomes a FrameReadError."""

    def __init__(self, path: Path) -> None:
        self._opened = open_regular(path)

    def __enter__(self) -> IO[bytes]:
        try:
            return self._opened.__enter__()
        except (OSError, ValueError) as error:  # ValueError: a null character in the name
            raise _unreadable(error) from None

    def __exit__(self, *what: Any) -> bool | None:
        return self._opened.__exit__(*what)


def _unreadable(error: Exception) -> FrameReadError:
    reason = getattr(error, "strerror", None) or type(error).__name__
    return FrameReadError(f"it cannot be read ({reason}); expected a file with a frame")


def _bare(error: FrameError) -> FrameError:
    """Give an error without what hangs from it: its traceback would keep a file's bytes for as long as it is kept."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
