"""Video files: frames of AVI, MP4 and Matroska, decoded one after the other by PyAV, in presentation order.

The luma of YCbCr is taken as decoded. Full-range luma is the grey level; limited-range luma of 16 to 235 is stretched,
``round((Y - 16) * 255 / 219)``. A stream that states no range is of limited range, as players assume, except for the
formats of JPEG and grey formats. RGB and palettes are converted by ITU-R 601-2. A rotation in the header is applied.

The container stays open: several threads ask for frames in order, or nearly so, and each frame is decoded once. The
last frames are cached, for late threads and for overlays.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from echoquad_runtime.errors import FrameDamagedError, FrameError, FrameExtraError, FrameFormatError, FrameTooLargeError
from echoquad_runtime.frames.decoded_frame import DecodedFrame
from echoquad_runtime.frames.file_access import OpenStream
from echoquad_runtime.frames.formats import (
    HEAD_BYTES,
    MATROSKA_SIGNATURE,
    MAX_FRAMES,
    MAX_PIXELS,
    Flip,
    detect_format,
)
from echoquad_runtime.frames.quality_flags import COLOUR_SAMPLE, is_coloured
from echoquad_runtime.quadrants import Grey

__all__ = ["VideoFile", "stretch_limited_range"]

_CACHE_BYTES: Final = 32 << 20  # of decoded frames
_FULL_RANGE, _UNSPECIFIED_RANGE = 2, 0  # of AVColorRange
_FULL_RANGE_FORMATS: Final = ("yuvj", "gray")  # of full range unless they state otherwise


class VideoFile:
    """A video file.

    Parameters
    ----------
    open_stream
        Opens the bytes of the file.

    Attributes
    ----------
    frame_count
        Number of frames whose packets are in the file.
    stated_frame_count
        Number of frames that the header states, or `frame_count` if it states none.
    multi_frame
        True.
    in_memory
        False.

    Raises
    ------
    FrameError
        If it cannot be read, has no video stream, or exceeds a limit.
    """

    multi_frame, in_memory = True, False

    def __init__(self, open_stream: OpenStream) -> None:
        self._open = open_stream
        self._lock = threading.Lock()
        self._stack = ExitStack()
        self._frames: Iterator[tuple[int, Any]] | None = None
        self._next = 1  # a lower bound of the number of the frame that is decoded next
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._cached_bytes = 0
        self._numbers: dict[int, int] | None = None  # of frames, by presentation time
        self.frame_count, self.stated_frame_count = self._count_frames()

    def decode(self, number: int, flip: Flip) -> DecodedFrame:
        """Decode a frame, counted from 1; `flip` is for matrices and ignored.

        Raises
        ------
        FrameError
            If it cannot be decoded or its pixel format is not supported.
        """
        with self._lock:
            frame = self._find(number)
            if number == self.frame_count:
                self._close()
        return _to_frame(frame)

    def __del__(self) -> None:
        try:  # noqa: SIM105 - contextlib may be gone at interpreter exit
            self._stack.close()
        except Exception:
            pass

    # ------------------------------------------------------------------------------------------ reading

    def _count_frames(self) -> tuple[int, int]:
        """Count the packets and collect their presentation times, without decoding."""
        with ExitStack() as stack:
            container, stream = self._open_container(stack)
            size = stream.codec_context.width * stream.codec_context.height
            if size > MAX_PIXELS:
                raise FrameTooLargeError(
                    f"the clip's frames have {size} pixels; expected at most {MAX_PIXELS // 1_000_000} million"
                )
            times: list[int | None] = []
            empty = 0  # packets by which AVI repeats a frame
            for packet in _until_damaged(container.demux(stream)):
                if packet.size and not packet.is_corrupt:
                    times.append(packet.pts)
                elif packet.dts is not None and not packet.is_corrupt:
                    empty += 1
                if len(times) > MAX_FRAMES:
                    raise FrameTooLargeError(f"the clip has more than {MAX_FRAMES} frames; cut it")
            stated = int(stream.frames or 0) - empty
        if not times:
            raise FrameDamagedError("the clip has no frames; it is damaged or truncated: copy it again")
        known = [time for time in times if time is not None]
        if len(set(known)) == len(times):
            self._numbers = {time: number for number, time in enumerate(sorted(known), 1)}
        return len(times), max(len(times), stated)

    def _open_container(self, stack: ExitStack) -> tuple[Any, Any]:
        av = _load_av()
        source = stack.enter_context(self._open())
        head = source.read(HEAD_BYTES)
        source.seek(0)
        # ffmpeg would try its hundreds of formats, among them playlists that refer to other files.
        if detect_format(head, "") != "video":
            raise FrameFormatError("the file is not a clip of a supported format; expected AVI, MP4 or Matroska")
        name = "avi" if head.startswith(b"RIFF") else "matroska" if head.startswith(MATROSKA_SIGNATURE) else "mov"
        try:
            container = stack.enter_context(av.open(source, format=name, **_open_options(av)))
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # several frames are read in threads already
            return container, stream
        except MemoryError:
            fault = "MemoryError"
        except Exception as error:
            fault = type(error).__name__
        raise FrameDamagedError(f"the clip cannot be opened ({fault}): it is damaged, truncated or has no video stream")

    def _find(self, number: int) -> Any:
        if not 1 <= number <= self.frame_count:
            raise FrameDamagedError(f"there is no frame {number}; the clip holds {self.frame_count}")
        if number in self._cache:
            return self._cache[number]
        if self._frames is None or number < self._next:
            self._close()
            self._stack = ExitStack()
            self._frames, self._next = self._decode_all(*self._open_container(self._stack)), 1
        for found, frame in self._frames:
            self._next = found + 1
            self._add_to_cache(found, frame)
            if found == number:
                return frame
            if found > number:
                break
        raise FrameDamagedError("the frame cannot be decoded; the clip is damaged: copy it again")

    def _add_to_cache(self, number: int, frame: Any) -> None:
        self._cache[number] = frame
        self._cached_bytes += _buffer_bytes(frame)
        while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= _buffer_bytes(oldest)

    def _decode_all(self, container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
        """Yield the number and the frame of every frame that can be decoded."""
        shown = 0
        for packet in _until_damaged(container.demux(stream)):
            if packet.is_corrupt:
                continue
            try:
                frames = packet.decode()
            except Exception:  # reported when that frame is asked for; without times, it is taken as the next one
                shown += 1
                continue
            for frame in frames:
                shown += 1
                number = shown if self._numbers is None else self._numbers.get(frame.pts, 0)
                if number and not frame.is_corrupt:
                    yield number, frame

    def _close(self) -> None:
        self._frames = None
        with contextlib.suppress(Exception):
            self._stack.close()


def _until_damaged(packets: Iterator[Any]) -> Iterator[Any]:
    """Yield packets until damage ends the file."""
    with contextlib.suppress(Exception):
        yield from packets


def _load_av() -> Any:
    try:
        import av
    except ImportError:
        av = None
    if av is None:
        raise FrameExtraError('clips need PyAV, which is not installed; install it: pip install "echoquad[video]"')
    return av


def _open_options(av: Any) -> dict[str, str]:
    """Return the option for metadata that is not UTF-8; PyAV 19 removed it."""
    return {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}


def _buffer_bytes(frame: Any) -> int:
    return sum(plane.buffer_size for plane in frame.planes)


# ---------------------------------------------------------------------------------------------- pixels


def _to_frame(frame: Any) -> DecodedFrame:
    if frame.width * frame.height > MAX_PIXELS:
        raise FrameTooLargeError(
            f"the frame is {frame.width}x{frame.height} pixels; expected at most {MAX_PIXELS // 1_000_000} million"
        )
    try:
        return _convert(frame)
    except FrameError:
        raise
    except Exception as error:
        fault = type(error).__name__
    raise FrameFormatError(f"the frame's pixels cannot be converted ({fault}); convert the clip")


def _convert(frame: Any) -> DecodedFrame:
    pixel_format = frame.format
    if pixel_format.is_rgb or pixel_format.has_palette or pixel_format.name in ("monow", "monob"):
        return _VideoFrame(frame, np.asarray(Image.fromarray(frame.to_ndarray(format="rgb24")).convert("L")))
    if max(component.bits for component in pixel_format.components) > 8:
        raise FrameFormatError("the clip has more than 8 bits per sample; convert it to 8")
    if len(pixel_format.components) > 1 and not pixel_format.is_planar:  # YUYV and the like
        frame = frame.reformat(format="yuv422p")
    luma = frame.planes[0]
    levels = np.frombuffer(luma, np.uint8)[: luma.line_size * luma.height].reshape(luma.height, luma.line_size)
    levels = levels[:, : luma.width]
    limited = frame.color_range != _FULL_RANGE and not (
        frame.color_range == _UNSPECIFIED_RANGE and pixel_format.name.startswith(_FULL_RANGE_FORMATS)
    )
    return _VideoFrame(frame, stretch_limited_range(levels) if limited else levels)


def stretch_limited_range(luma: Grey) -> Grey:
    """Stretch limited-range luma to grey levels: 16 is black, 235 is white (ITU-R BT.601, 2.5.3)."""
    return np.asarray(_STRETCHED[luma])


_STRETCHED: Final[npt.NDArray[np.uint8]] = np.clip(((np.arange(256) - 16) * 510 + 219) // 438, 0, 255).astype(np.uint8)


class _VideoFrame:
    """A decoded video frame: its grey levels, and PyAV's frame for its colours."""

    flags: tuple[str, ...] = ()

    def __init__(self, frame: Any, levels: Grey) -> None:
        # Both PyAV and numpy rotate counterclockwise.
        self._frame, self._rotations = frame, round((getattr(frame, "rotation", 0) or 0) / 90) % 4
        self._levels = np.ascontiguousarray(np.rot90(levels, self._rotations))

    def grey(self) -> Grey:
        """Return the grey levels, uint8 [H, W]."""
        return self._levels

    def is_coloured(self) -> bool:
        """Return whether a substantial part of a small sample is coloured."""
        frame = self._frame
        if len(frame.format.components) == 1 and not frame.format.has_palette:
            return False
        width, height = min(COLOUR_SAMPLE, frame.width), min(COLOUR_SAMPLE, frame.height)
        sample = frame.reformat(width=width, height=height, format="rgb24", interpolation="POINT")
        return is_coloured(sample.to_ndarray())

    def image(self) -> Image.Image:
        """Return an RGB picture."""
        return Image.fromarray(np.ascontiguousarray(np.rot90(self._frame.to_ndarray(format="rgb24"), self._rotations)))
