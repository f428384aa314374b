"""Video files: frames of AVI, MP4 and Matroska, decoded one after the other by PyAV, in presentation order.

The luma of YCbCr is taken as decoded. Full-range luma is the grey level; limited-range luma of 16 to 235 is stretched,
``round((Y - 16) * 255 / 219)``. A stream that states no range is of limited range, as players assume, except for the
formats of JPEG and grey formats. Samples of 9 to 16 bits are scaled to 8 by the same rule: black and white of n bits
are 0 and ``2^n - 1``, or ``16 * 2^(n-8)`` and ``235 * 2^(n-8)`` (ITU-R BT.2100, table 9). RGB and palettes are
converted by ITU-R 601-2. The display matrix is applied: rotations by multiples of 90 degrees, and mirrorings.

The frames are those that a player shows. A frame that an edit list hides is none. The frames are counted from their
packets where a packet is known to be a frame (see `VideoFile._read_times`), else by decoding.

The container stays open: several threads ask for frames in order, or nearly so, and each frame is decoded once. The
last frames are cached, for late threads and for overlays.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Final, Literal

from echoquad_runtime.errors import FrameDamagedError, FrameExtraError, FrameFormatError, FrameTooLargeError
from echoquad_runtime.frames.clips.avi import read_avi_chunks
from echoquad_runtime.frames.clips.matroska import is_matroska_complete
from echoquad_runtime.frames.clips.mp4 import check_mp4
from echoquad_runtime.frames.clips.video_frame import UPRIGHT, Matrix, display_matrix, to_frame
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

__all__ = ["VideoFile"]

_Container = Literal["avi", "matroska", "mov"]
"""FFmpeg's name of a container; that of MP4 is ``mov``."""

_CACHE_BYTES: Final = 32 << 20  # of decoded frames
_MAX_DECODED_PIXELS: Final = 2 * MAX_PIXELS
"""FFmpeg's own limit, which holds before a size is known here; it counts rows rounded up to 64 pixels."""

_FRAME_PER_PACKET: Final = frozenset({"h264", "hevc", "vp9", "av1"})
"""Codecs of which MP4 and Matroska hold one packet for each shown frame, with its time of presentation."""

_TRIAL_PACKETS: Final = 8
"""Packets that are decoded to confirm that each is a frame: the first ones may refer to frames that were cut off, or be
the two fields of a frame."""

_REORDERED: Final = 16
"""Frames by which a decoder may be out of order: H.264 and HEVC hold back at most 16."""


class VideoFile:
    """A video file.

    Parameters
    ----------
    open_stream
        Opens the bytes of the file.

    Attributes
    ----------
    frame_count
        Number of frames that a player shows, damaged ones included.
    stated_frame_count
        The same and the number of frames that are missing at the end, if the file is truncated.
    multi_frame
        True.
    in_memory
        False.

    Raises
    ------
    FrameError
        If it cannot be read, has no video stream, is of an unsupported kind, or exceeds a limit.
    MemoryError
        If there is not enough memory, which is no damage.
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
        self._matrix: Matrix | None = None  # of the first frame: reading one ties a frame to the garbage collector
        self.frame_count, self.stated_frame_count = self._count_frames()

    def decode(self, number: int, flip: Flip) -> DecodedFrame:
        """Decode a frame, counted from 1; `flip` is for matrices and ignored.

        Raises
        ------
        FrameError
            If it cannot be decoded or its pixel format is not supported.
        MemoryError
            If there is not enough memory, which is no damage.
        """
        with self._lock:
            try:
                frame = self._find(number)
            except MemoryError:
                self._close()  # so that a later call does not take the rest of the clip for damaged
                raise
            if number == self.frame_count:
                self._close()
        return to_frame(frame, self._matrix or UPRIGHT)

    def __del__(self) -> None:
        try:  # noqa: SIM105 - contextlib may be gone at interpreter exit
            self._stack.close()
        except Exception:
            pass

    # ------------------------------------------------------------------------------------------ reading

    def _count_frames(self) -> tuple[int, int]:
        """Return the number of frames that are shown, and the same with those that are missing at the end."""
        with self._open() as source:
            container_name = _container_name(source.read(HEAD_BYTES))
            beyond, repeated, complete = 0, 0, False
            if container_name == "mov":
                beyond, complete = check_mp4(source), True
            elif container_name == "avi":
                chunks = read_avi_chunks(source)
                repeated, complete = chunks.repeated, chunks.complete
            else:
                complete = is_matroska_complete(source)
                beyond = 0 if complete else 1  # Matroska states no number of frames
        with ExitStack() as stack:
            container, stream = self._open_container(stack)
            packets, times = self._read_times(container, stream, container_name)
            stated = 0 if complete else int(stream.frames or 0) - repeated
        if not packets:
            raise FrameDamagedError("the clip has no frames; it is damaged or truncated: copy it again")
        if times is None:
            count = self._count_decoded()
        else:
            count = len(times)
            known = [time for time in times if time is not None]
            if len(set(known)) == count:
                self._numbers = {time: number for number, time in enumerate(sorted(known), 1)}
        return count, count + max(beyond, stated - packets, 0)

    def _read_times(
        self, container: Any, stream: Any, container_name: _Container
    ) -> tuple[int, list[int | None] | None]:
        """Return the number of packets, and the presentation time of each frame that is shown.

        The times are None if a packet need not be a frame: MPEG-4 packs two frames into a packet and an empty one
        follows, VP8 has packets that are not shown, AVI has no times of presentation.
        """
        codec = stream.codec_context.codec
        each_a_frame = codec.intra_only
        trial = 0 if each_a_frame else _TRIAL_PACKETS
        name = getattr(codec, "canonical_name", codec.name)
        known = each_a_frame or (container_name != "avi" and name.removeprefix("lib") in _FRAME_PER_PACKET)
        packets, decoded = 0, 0
        times: list[int | None] = []
        for packet in _until_damaged(container.demux(stream)):
            if packet.is_corrupt or not packet.size:
                continue
            packets += 1
            if packets > MAX_FRAMES:
                raise FrameTooLargeError(f"the clip has more than {MAX_FRAMES} frames; cut it")
            if packet.is_discard:
                shown = False
            else:
                times.append(packet.pts)
                shown = True
            if not known or not trial:
                continue
            decoded += _count_output(packet.decode)
            trial -= shown
            if not trial:
                decoded += _count_output(stream.codec_context.decode)
                known = decoded == len(times)
        if trial and known:
            decoded += _count_output(stream.codec_context.decode)
            known = decoded == len(times)
        if not each_a_frame:
            known = known and None not in times and len(set(times)) == len(times)
        return packets, times if known else None

    def _count_decoded(self) -> int:
        """Count the frames by decoding them; those of a short clip stay in the cache and are decoded once."""
        with ExitStack() as stack:
            count = 0
            for count, frame in self._decode_all(*self._open_container(stack)):
                if count > MAX_FRAMES:
                    raise FrameTooLargeError(f"the clip has more than {MAX_FRAMES} frames; cut it")
                if frame is not None and self._cached_bytes + _buffer_bytes(frame) <= _CACHE_BYTES:
                    self._add_to_cache(count, frame)
        if not count:
            raise FrameDamagedError("no frame of the clip can be decoded; it is damaged: copy it again")
        return count

    def _open_container(self, stack: ExitStack) -> tuple[Any, Any]:
        av = _load_av()
        source = stack.enter_context(self._open())
        container_name = _container_name(source.read(HEAD_BYTES))
        source.seek(0)
        stream: Any = None
        fault = ""
        try:
            container = stack.enter_context(av.open(source, format=container_name, **_open_options(av)))
            stream = next(iter(track for track in container.streams.video if not _is_cover(track)), None)
            if stream is not None and stream.codec_context is not None:
                stream.codec_context.thread_count = 1  # several frames are read in threads already
                stream.codec_context.options = {"max_pixels": str(_MAX_DECODED_PIXELS)}
        except MemoryError:
            raise
        except Exception as error:
            fault = type(error).__name__
        if fault:
            raise FrameDamagedError(f"the clip cannot be opened ({fault}): it is damaged or truncated; copy it again")
        if stream is None:
            raise FrameFormatError("not supported: the file has no video track; expected a clip")
        if stream.codec_context is None:
            raise FrameFormatError(
                "not supported: the clip's codec, which FFmpeg does not decode here; convert it to H.264 or Motion JPEG"
            )
        size = stream.codec_context.width * stream.codec_context.height
        if size > MAX_PIXELS:
            raise FrameTooLargeError(
                f"the clip's frames have {size} pixels; expected at most {MAX_PIXELS // 1_000_000} million"
            )
        return container, stream

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
            self._next = max(self._next, found + 1)
            if frame is not None:
                self._add_to_cache(found, frame)
                if found == number:
                    return frame
            if found == number or found > number + _REORDERED:
                break
        raise FrameDamagedError("the frame cannot be decoded; the clip is damaged: copy it again")

    def _add_to_cache(self, number: int, frame: Any) -> None:
        self._cache[number] = frame
        self._cached_bytes += _buffer_bytes(frame)
        while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= _buffer_bytes(oldest)

    def _decode_all(self, container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
        """Yield the number and the frame of every frame that is shown; None for one that cannot be decoded.

        Without presentation times, a packet that cannot be decoded counts as one frame, the next one.
        """
        shown = 0
        for packet in _until_damaged(container.demux(stream)):
            if packet.is_corrupt:
                continue
            try:
                frames = packet.decode()
            except MemoryError:  # says nothing about the packet
                raise
            except Exception:
                if self._numbers is None and packet.size and not packet.is_discard:
                    shown += 1
                    yield shown, None
                continue
            for frame in frames:
                self._matrix = self._matrix or display_matrix(frame)
                shown += 1
                number = shown if self._numbers is None else self._numbers.get(frame.pts, 0)
                if number:
                    yield number, None if frame.is_corrupt else frame

    def _close(self) -> None:
        self._frames = None
        with contextlib.suppress(Exception):
            self._stack.close()


def _until_damaged(packets: Iterator[Any]) -> Iterator[Any]:
    """Yield packets until damage ends the file."""
    try:
        yield from packets
    except MemoryError:
        raise
    except Exception:
        return


def _count_output(decode: Callable[[], list[Any]]) -> int:
    try:
        return len(decode())
    except MemoryError:
        raise
    except Exception:
        return 0


def _container_name(head: bytes) -> _Container:
    # ffmpeg would try its hundreds of formats, among them playlists that refer to other files.
    if detect_format(head, "") != "video":
        raise FrameFormatError("the file is not a clip of a supported format; expected AVI, MP4 or Matroska")
    return "avi" if head.startswith(b"RIFF") else "matroska" if head.startswith(MATROSKA_SIGNATURE) else "mov"


def _is_cover(stream: Any) -> bool:
    """Return whether a video stream is a single picture, such as an album's cover."""
    return "attached_pic" in str(getattr(stream, "disposition", ""))


def _load_av() -> Any:
    try:
        import av
    except ImportError:
        av = None
    if av is None:
        raise FrameExtraError('clips need PyAV, which is not installed; install it: pip install "echoquad[video]"')
    return av


def _open_options(av: Any) -> dict[str, Any]:
    """Return the options of `av.open`: a limit for its look at the first frames, and how to read names."""
    options: dict[str, Any] = {"options": {"max_pixels": str(_MAX_DECODED_PIXELS)}}
    if int(av.__version__.partition(".")[0]) < 19:  # PyAV 19 removed it
        options["metadata_errors"] = "replace"
    return options


def _buffer_bytes(frame: Any) -> int:
    return sum(plane.buffer_size for plane in frame.planes)
