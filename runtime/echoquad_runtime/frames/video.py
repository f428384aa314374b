"""Clips: frames of AVI, MP4 and Matroska files, decoded one after the other by PyAV, in the order they are shown in.

Of YCbCr the luma is taken as it is decoded: full-range luma is the grey level, limited-range luma of 16 to 235 is
stretched, ``round((Y - 16) * 255 / 219)``. A stream that does not say is of limited range, as players take it, but for
JPEG's own and grey formats. RGB and palettes go through ITU-R 601-2. A rotation in the header is applied.

A clip is a container that is held open: its frames are asked for in order, or nearly, by several threads, and each is
decoded once. The last ones are kept, for threads that come late and for overlays.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from echoquad_runtime.errors import FrameDamagedError, FrameError, FrameExtraError, FrameFormatError, FrameTooLargeError
from echoquad_runtime.frames.decoded_frame import Pixels
from echoquad_runtime.frames.formats import HEAD_BYTES, MAX_FRAMES, MAX_PIXELS, detect_format
from echoquad_runtime.frames.quality_flags import is_coloured
from echoquad_runtime.quadrants import Grey

__all__ = ["Clip", "full_range"]

_KEPT: Final = 32 << 20  # bytes of decoded frames
_SAMPLE: Final = 64  # pixels a side that are looked at for colour
_FULL, _UNSPECIFIED = 2, 0  # of AVColorRange
_FULL_ANYWAY: Final = ("yuvj", "gray")  # formats that are of full range unless they say otherwise


class Clip:
    """A clip on disk.

    Parameters
    ----------
    open_stream
        Opens its bytes.

    Attributes
    ----------
    count
        Frames whose packets are there.
    announced
        Frames that the header announces, or `count` where it does not say.

    Raises
    ------
    FrameError
        If it cannot be read, holds no video, or more than the caps allow.
    """

    def __init__(self, open_stream: Callable[[], AbstractContextManager[IO[bytes]]]) -> None:
        self._open = open_stream
        self._lock = threading.Lock()
        self._stack = ExitStack()
        self._frames: Iterator[tuple[int, Any]] | None = None
        self._next = 1  # number of the next frame that is decoded, or of one before it
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._bytes = 0
        self._numbers: dict[int, int] | None = None
        self.count, self.announced = self._survey()

    def pixels(self, number: int) -> Pixels:
        """Decode a frame, counted from 1.

        Raises
        ------
        FrameError
            If it cannot be decoded, or is of a kind that no rule covers.
        """
        with self._lock:
            frame = self._frame(number)
            if number == self.count:
                self._shut()
        return _pixels(frame)

    def __del__(self) -> None:
        try:  # noqa: SIM105 - contextlib may be gone when the interpreter ends
            self._stack.close()
        except Exception:
            pass

    # ------------------------------------------------------------------------------------------ reading

    def _survey(self) -> tuple[int, int]:
        """Count the packets, and learn at what time each is shown; nothing is decoded."""
        with ExitStack() as stack:
            container, stream = self._opened(stack)
            size = stream.codec_context.width * stream.codec_context.height
            if size > MAX_PIXELS:
                raise FrameTooLargeError(
                    f"the clip's frames have {size} pixels; expected at most {MAX_PIXELS // 1_000_000} million"
                )
            times: list[int | None] = []
            empty = 0  # AVI's way to show a frame once more
            for packet in _until_damaged(container.demux(stream)):
                if packet.size and not packet.is_corrupt:
                    times.append(packet.pts)
                elif packet.dts is not None and not packet.is_corrupt:
                    empty += 1
                if len(times) > MAX_FRAMES:
                    raise FrameTooLargeError(f"the clip holds more than {MAX_FRAMES} frames; cut it")
            announced = int(stream.frames or 0) - empty
        if not times:
            raise FrameDamagedError("the clip holds no frame; it is damaged or truncated: copy it again")
        known = [time for time in times if time is not None]
        if len(set(known)) == len(times):
            self._numbers = {time: number for number, time in enumerate(sorted(known), 1)}
        return len(times), max(len(times), announced)

    def _opened(self, stack: ExitStack) -> tuple[Any, Any]:
        av = _load_av()
        source = stack.enter_context(self._open())
        head = source.read(HEAD_BYTES)
        source.seek(0)
        if (
            detect_format(head, "") != "clip"
        ):  # ffmpeg would try its hundreds of formats, playlists of other files among them
            raise FrameFormatError("the file is no clip of a known kind; expected AVI, MP4 or Matroska")
        name = "avi" if head.startswith(b"RIFF") else "matroska" if head.startswith(b"\x1aE\xdf\xa3") else "mov"
        try:
            container = stack.enter_context(av.open(source, format=name, **_open_options(av)))
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # the frames' readers are threads already
            return container, stream
        except MemoryError:
            kind = "MemoryError"
        except Exception as error:
            kind = type(error).__name__
        raise FrameDamagedError(f"the clip cannot be opened ({kind}): it is damaged, truncated or holds no video")

    def _frame(self, number: int) -> Any:
        if not 1 <= number <= self.count:
            raise FrameDamagedError(f"there is no frame {number}; the clip holds {self.count}")
        if number in self._kept:
            return self._kept[number]
        if self._frames is None or number < self._next:
            self._shut()
            self._stack = ExitStack()
            self._frames, self._next = self._decoded(*self._opened(self._stack)), 1
        for found, frame in self._frames:
            self._next = found + 1
            self._keep(found, frame)
            if found == number:
                return frame
            if found > number:
                break
        raise FrameDamagedError("the frame cannot be decoded; the clip is damaged: copy it again")

    def _keep(self, number: int, frame: Any) -> None:
        self._kept[number] = frame
        self._bytes += _size(frame)
        while self._bytes > _KEPT and len(self._kept) > 1:
            _, old = self._kept.popitem(last=False)
            self._bytes -= _size(old)

    def _decoded(self, container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
        """Give the frames that can be decoded, each with its number."""
        shown = 0
        for packet in _until_damaged(container.demux(stream)):
            if packet.is_corrupt:
                continue
            try:
                frames = packet.decode()
            except Exception:  # it is told when it is asked for; where nothing says which it was, it was the next
                shown += 1
                continue
            for frame in frames:
                shown += 1
                number = shown if self._numbers is None else self._numbers.get(frame.pts, 0)
                if number and not frame.is_corrupt:
                    yield number, frame

    def _shut(self) -> None:
        self._frames = None
        with contextlib.suppress(Exception):
            self._stack.close()


def _until_damaged(packets: Iterator[Any]) -> Iterator[Any]:
    """Give packets up to where the file's damage ends them."""
    with contextlib.suppress(Exception):
        yield from packets


def _load_av() -> Any:
    try:
        import av
    except ImportError:
        av = None
    if av is None:
        raise FrameExtraError(
            'the file is a clip, which needs PyAV, which is not installed; do: pip install "echoquad[video]"'
        )
    return av


def _open_options(av: Any) -> dict[str, str]:
    """Return how metadata that is no UTF-8 is taken; PyAV 19 no longer asks."""
    return {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}


def _size(frame: Any) -> int:
    return sum(plane.buffer_size for plane in frame.planes)


# ---------------------------------------------------------------------------------------------- pixels


def _pixels(frame: Any) -> Pixels:
    if frame.width * frame.height > MAX_PIXELS:
        raise FrameTooLargeError(
            f"the frame is {frame.width}x{frame.height} pixels; expected at most {MAX_PIXELS // 1_000_000} million"
        )
    fault = ""
    try:
        return _brought_to_grey(frame)
    except FrameError:
        raise
    except Exception as error:
        fault = type(error).__name__
    raise FrameFormatError(f"the frame's pixels cannot be understood ({fault}); convert the clip")


def _brought_to_grey(frame: Any) -> Pixels:
    kind = frame.format
    if kind.is_rgb or kind.has_palette or kind.name in ("monow", "monob"):
        return _Decoded(frame, np.asarray(Image.fromarray(frame.to_ndarray(format="rgb24")).convert("L")))
    if max(part.bits for part in kind.components) > 8:
        raise FrameFormatError("the clip has more than 8 bits a sample; convert it to 8")
    if len(kind.components) > 1 and not kind.is_planar:  # YUYV and its like
        frame = frame.reformat(format="yuv422p")
    luma = frame.planes[0]
    levels = np.frombuffer(luma, np.uint8)[: luma.line_size * luma.height].reshape(luma.height, luma.line_size)
    levels = levels[:, : luma.width]
    limited = frame.color_range != _FULL and not (
        frame.color_range == _UNSPECIFIED and kind.name.startswith(_FULL_ANYWAY)
    )
    return _Decoded(frame, full_range(levels) if limited else levels)


def full_range(luma: Grey) -> Grey:
    """Stretch limited-range luma to grey levels: 16 is black, 235 is white (ITU-R BT.601, 2.5.3)."""
    return np.asarray(_STRETCHED[luma])


_STRETCHED: Final[npt.NDArray[np.uint8]] = np.clip(((np.arange(256) - 16) * 510 + 219) // 438, 0, 255).astype(np.uint8)


class _Decoded:
    """A decoded frame: its grey levels, and itself for its colours."""

    flags: tuple[str, ...] = ()

    def __init__(self, frame: Any, levels: Grey) -> None:
        # Both count the angle against the clock.
        self._frame, self._turns = frame, round((getattr(frame, "rotation", 0) or 0) / 90) % 4
        self._levels = np.ascontiguousarray(np.rot90(levels, self._turns))

    def grey(self) -> Grey:
        """Give the grey levels."""
        return self._levels

    def is_coloured(self) -> bool:
        """Look at 64 x 64 pixels at most."""
        frame = self._frame
        if len(frame.format.components) == 1 and not frame.format.has_palette:
            return False
        width, height = min(_SAMPLE, frame.width), min(_SAMPLE, frame.height)
        few = frame.reformat(width=width, height=height, format="rgb24", interpolation="POINT")
        return is_coloured(few.to_ndarray())

    def image(self) -> Image.Image:
        """Give the picture in RGB."""
        return Image.fromarray(np.ascontiguousarray(np.rot90(self._frame.to_ndarray(format="rgb24"), self._turns)))
