"""Reading frames of any file format, each where it is safe: in the calling thread, or in a reader process.

`isolation.routing` decides where. `sources` is the code that reads, in both cases, so the results are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import FrameDamagedError, FrameError, FrameTooLargeError
from echoquad_runtime.frames import sources
from echoquad_runtime.frames.file_access import read_bytes
from echoquad_runtime.frames.formats import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Flip, ReadOptions
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.frames.isolation.limits import TIME_LIMIT
from echoquad_runtime.frames.isolation.reader_pool import can_isolate, reader_pool
from echoquad_runtime.frames.isolation.routing import route_bytes, route_file
from echoquad_runtime.frames.sources import Content, Flags, FrameCounts
from echoquad_runtime.quadrants import Grey

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    from echoquad_runtime.frames.decoded_frame import DecodedFrame
    from echoquad_runtime.frames.isolation.messages import Answer, Operation

__all__ = [
    "clear_file_cache",
    "cut_frame",
    "decode_grey",
    "decode_grey_and_flags",
    "decode_quadrants",
    "frames_in",
    "load_grey",
    "load_grey_and_flags",
    "load_image",
    "load_quadrants",
    "pixel_format",
    "read_grey",
    "read_grey_and_flags",
]

_USUALLY_LOCAL: Final = IMAGE_EXTENSIONS - {".tif", ".tiff"}


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Raise a MemoryError of this process as `FrameTooLargeError`: it costs one file, and not the run."""
    try:
        yield
    except MemoryError:
        short = True
    else:
        short = False
    if short:  # outside of the handler, so that no traceback keeps the memory
        raise FrameTooLargeError("there is not enough memory to decode the frame; expected a smaller frame")


# ---------------------------------------------------------------------------------------------- frames of a file


def frames_in(path: Path, name: str, options: ReadOptions) -> Iterator[FrameFile | Failure]:
    """Enumerate the frames of a file: the file itself, or ``NAME#1``, ``NAME#2`` and so on of a multi-frame file.

    Yields
    ------
    FrameFile or Failure
        A failure if the header cannot be read, and one after the frames that are present if others are missing.
    """
    try:
        counts = _count_frames(path)
    except FrameError as error:
        yield Failure(name, _without_traceback(error))
        return
    if not counts.multi_frame:
        yield FrameFile(path, name, flip=options.flip)
        return
    for number in range(1, counts.present + 1, options.every):
        yield FrameFile(path, f"{name}#{number}", number, options.flip)
    first, last = counts.present + 1, counts.stated
    if first <= last:
        missing = f"frames {first} to {last}" if first < last else "the last frame"
        yield Failure(
            name, FrameDamagedError(f"{missing} of {last} are not in the file: it is truncated; copy it again")
        )


@_memory_errors()
def _count_frames(path: Path) -> FrameCounts:
    file_format, _, isolated = route_file(path)
    if sources.is_single_frame_format(path, file_format):
        return sources.SINGLE_FRAME
    if not isolated or not can_isolate():
        return sources.count_frames(path, file_format)
    answer = _Isolated(path=path, clip=file_format == "video").ask("count")
    if answer.counts is None:
        raise FrameError(_UNEXPECTED)
    return answer.counts


# ---------------------------------------------------------------------------------------------- files


def load_grey_and_flags(file: FrameFile) -> tuple[Grey, Flags]:
    """Read a frame as grey, uint8 [H, W], with the quality flags that only its file shows.

    Raises
    ------
    FrameError
        A subclass: the file cannot be read, is not a frame, is damaged or too large, or no rule covers its pixels; its
        decoder crashes, or exceeds a limit of memory or time.
    """
    return _to_grey_and_flags(_open_file(file))


def load_grey(file: FrameFile) -> Grey:
    """Read a frame as grey, uint8 [H, W].

    Raises
    ------
    FrameError
        As `load_grey_and_flags`.
    """
    return _to_grey(_open_file(file))


def load_image(file: FrameFile) -> Image.Image:
    """Read a frame as a picture in its own colours, with the same crop and orientation as its grey levels.

    Raises
    ------
    FrameError
        As `load_grey_and_flags`.
    """
    return _to_image(_open_file(file))


def load_quadrants(
    file: FrameFile, contract: Contract, out: Grey, *, isolated: bool = False, time_limit: float = TIME_LIMIT
) -> Flags:
    """Read a frame, cut it into quadrants and return its flags.

    Parameters
    ----------
    file
        The file, and the frame in it.
    contract
        Defines the kept fraction and the input size S.
    out
        uint8 [4, 1, S, S] to write LA, RA, LV, RV to, grey levels 0 to 255.
    isolated
        Whether a reader process reads every file, so that threads do not share an interpreter lock.
    time_limit
        Seconds for a reader process.

    Raises
    ------
    FrameError
        As `load_grey_and_flags` and `echoquad_runtime.quadrants.frame_quadrants`.
    """
    if isolated:
        clip = file.path.suffix.lower() in VIDEO_EXTENSIONS
        return _to_quadrants(
            _Isolated(file.path, frame=file.frame, flip=file.flip, clip=clip), contract, out, time_limit
        )
    return _to_quadrants(_open_file(file), contract, out, time_limit)


def read_grey(path: Path) -> Grey:
    """Read a single-frame file as grey, uint8 [H, W].

    Raises
    ------
    FrameError
        As `load_grey_and_flags`, or if the file holds several frames.
    """
    return load_grey(FrameFile(path, path.name))


def read_grey_and_flags(path: Path) -> tuple[Grey, Flags]:
    """Read a single-frame file as grey, uint8 [H, W], with the quality flags that only its file shows.

    Raises
    ------
    FrameError
        As `read_grey`.
    """
    return load_grey_and_flags(FrameFile(path, path.name))


# ---------------------------------------------------------------------------------------------- files in memory


def decode_grey_and_flags(data: bytes) -> tuple[Grey, Flags]:
    """Decode the bytes of a single-frame file (image, DICOM or numpy) as `read_grey_and_flags` does.

    Raises
    ------
    FrameError
        As `read_grey`.
    """
    return _to_grey_and_flags(_open_bytes(data))


def decode_grey(data: bytes) -> Grey:
    """Decode the bytes of a single-frame file (image, DICOM or numpy) to grey, uint8 [H, W].

    Raises
    ------
    FrameError
        As `read_grey`.
    """
    return _to_grey(_open_bytes(data))


def decode_quadrants(data: bytes, contract: Contract, out: Grey, *, time_limit: float = TIME_LIMIT) -> Flags:
    """Decode the bytes of a single-frame file, cut the frame into quadrants and return its flags, as `load_quadrants`.

    Raises
    ------
    FrameError
        As `read_grey` and `echoquad_runtime.quadrants.frame_quadrants`.
    """
    return _to_quadrants(_open_bytes(data), contract, out, time_limit)


def cut_frame(frame: DecodedFrame, contract: Contract, out: Grey) -> Flags:
    """Cut a frame that is decoded already into quadrants and return its flags, as `load_quadrants`.

    Raises
    ------
    FrameError
        As `echoquad_runtime.quadrants.frame_quadrants`.
    """
    return _to_quadrants(frame, contract, out, TIME_LIMIT)


def pixel_format(data: bytes) -> str:
    """Return Pillow's format and mode of the bytes of an image file; ``PNG L`` is an 8-bit grey PNG.

    Raises
    ------
    FrameError
        If a reader process cannot tell.
    """
    content = _open_bytes(data)
    return content.ask("pixel_format").pixel_format if isinstance(content, _Isolated) else sources.pixel_format(content)


# ---------------------------------------------------------------------------------------------- where a file is read

_UNEXPECTED: Final = "its reader process sent an unexpected answer; please report it"
_PICTURE_AXES: Final = (2, 3)


@dataclass(frozen=True, slots=True)
class _Isolated:
    """A frame that a reader process decodes: that of a file, or of bytes in memory."""

    path: Path | None = None
    data: bytes | None = None
    frame: int | None = None
    flip: Flip = "none"
    clip: bool = False

    def ask(self, operation: Operation, contract: str | None = None, time_limit: float = TIME_LIMIT) -> Answer:
        from echoquad_runtime.frames.isolation.messages import Request

        request = Request(operation, self.path, self.data, self.frame, self.flip, contract)
        return reader_pool().ask(request, clip=self.clip, time_limit=time_limit)

    def levels(
        self, operation: Operation, axes: tuple[int, ...], contract: str | None = None, time_limit: float = TIME_LIMIT
    ) -> tuple[npt.NDArray[np.uint8], Flags]:
        """Return levels with one of several numbers of axes, and flags."""
        answer = self.ask(operation, contract, time_limit)
        if answer.levels is None or answer.levels.ndim not in axes:
            raise FrameError(_UNEXPECTED)
        return answer.levels, answer.flags


@_memory_errors()
def _open_file(file: FrameFile) -> Content | _Isolated:
    if file.frame is None and file.path.suffix.lower() in _USUALLY_LOCAL:  # most often; read in one go
        return _open_bytes(read_bytes(file.path))
    file_format, isolated, _ = route_file(file.path)
    if isolated and can_isolate():
        return _Isolated(file.path, frame=file.frame, flip=file.flip, clip=file_format == "video")
    return sources.read_content(file, file_format)


def _open_bytes(data: bytes) -> bytes | _Isolated:
    return _Isolated(data=data) if route_bytes(data).isolated and can_isolate() else data


@_memory_errors()
def _to_grey_and_flags(content: Content | _Isolated) -> tuple[Grey, Flags]:
    if isinstance(content, _Isolated):
        return content.levels("grey_and_flags", (2,))
    return sources.to_grey_and_flags(content)


@_memory_errors()
def _to_grey(content: Content | _Isolated) -> Grey:
    return content.levels("grey", (2,))[0] if isinstance(content, _Isolated) else sources.to_grey(content)


@_memory_errors()
def _to_image(content: Content | _Isolated) -> Image.Image:
    if not isinstance(content, _Isolated):
        return sources.to_image(content)
    from PIL import Image

    return Image.fromarray(content.levels("image", _PICTURE_AXES)[0])


@_memory_errors()
def _to_quadrants(content: Content | _Isolated, contract: Contract, out: Grey, time_limit: float) -> Flags:
    if isinstance(content, _Isolated):
        quadrants, flags = content.levels("quadrants", (4,), _to_json(contract), time_limit)
        if quadrants.shape != out.shape:
            raise FrameError(_UNEXPECTED)
        out[...] = quadrants
        return flags
    grey, flags = sources.to_grey_and_flags(content)
    return (*sources.cut_quadrants(grey, contract, out), *flags)


@functools.lru_cache(maxsize=4)
def _to_json(contract: Contract) -> str:
    return contract.to_json()


def clear_file_cache() -> None:
    """Close all cached files, and end the reader processes that read none at present."""
    sources.clear_cache()
    reader_pool().trim()


def _without_traceback(error: FrameError) -> FrameError:
    """Remove what an error refers to: a traceback would keep the bytes of the file in memory."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
