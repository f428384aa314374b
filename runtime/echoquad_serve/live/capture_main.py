"""The program of a capture process: open a live source, decode it, and send each frame as soon as it is there.

Standard input carries the settings in one line of JSON, then lines that switch pictures for people on and off, and ends
when the service does. Standard output carries messages: a line of JSON, and the bytes that it announces.

====================================================  ===================================================
message                                               bytes that follow
====================================================  ===================================================
``{"frame": [H, W], "captured": T, "part": N, ...}``  grey levels, uint8 [H, W]
``{"picture": SIZE}``                                 the same frame as JPEG, in its own colours
``{"error": TEXT}``                                   none; the process ends
====================================================  ===================================================

The time of capture is that of the system's monotonic clock, which all processes share: CLOCK_MONOTONIC on Linux, the
time since the start on macOS and Windows. On Windows it has steps of 16 ms before Python 3.13.

- v4l2: the kernel's time of the frame, if it is of that clock.
- RTSP: the time of arrival; less if the presentation times show that the frame has waited in a buffer.
- lavfi, files: the time at which the frame is due at the source's own rate.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import IO, Any, Final

import numpy as np

from echoquad_runtime.errors import FrameError
from echoquad_runtime.frames import sources
from echoquad_runtime.frames.formats import MAX_PIXELS
from echoquad_runtime.frames.isolation import limits
from echoquad_runtime.frames.isolation.reader_main import set_signals, take_stdout

__all__ = ["ArrivalClock", "Decimator", "Pacer", "kernel_time", "main"]

_PICTURE_SIDE: Final = 1920  # pixels of the longer side; a larger frame is reduced by a whole number
_PICTURE_QUALITY: Final = 80
_PICTURE_NICENESS: Final = 10  # a decision comes first
_MAX_DAMAGED: Final = 300  # packets in a row: ten seconds
_MAX_STREAM_PIXELS: Final = 2 * MAX_PIXELS  # FFmpeg's own limit counts rows rounded up to 64 pixels

_FILE_FORMATS: Final = "avi,matroska,webm,mov,mp4"
"""Demuxers for files. FFmpeg would try hundreds, among them playlists that refer to other files."""

_RTSP_OPTIONS: Final = {
    "rtsp_transport": "tcp",
    "analyzeduration": "500000",  # microseconds; what comes meanwhile is kept, with the key frame in it
    "timeout": "5000000",  # microseconds of silence of the connection
    "protocol_whitelist": "rtsp,rtsps,rtp,tcp,tls,udp",
}


class _EndedError(Exception):
    """The source cannot be opened, or has ended."""


def main(settings: dict[str, Any]) -> None:
    """Capture until the source ends or fails, or the parent does.

    Parameters
    ----------
    settings
        ``kind``, ``address``, ``options`` of the source; ``max_fps``: frames per second to send at most; ``memory``:
        bytes of address space that this process may take beyond what it has at its start.
    """
    output = _Output(take_stdout())
    set_signals()
    watched = threading.Event()
    threading.Thread(target=_obey, args=(watched,), name="echoquad-capture-orders", daemon=True).start()
    try:
        import av

        # Errors are raised; what FFmpeg prints may name the patient of a file.
        av.logging.set_level(None)
        limits.set_limits(settings["memory"])
        _Capture(settings, output, watched).run()
    except _EndedError as error:
        output.send_error(str(error))
    except FrameError as error:
        output.send_error(str(error))
    except MemoryError:
        output.send_error("decoding takes more memory than the limit; choose a smaller picture")
    except Exception as error:  # its text may hold an address with a password
        reason = getattr(error, "strerror", None) or type(error).__name__
        output.send_error(f"the source cannot be opened or read ({reason}); check its address and its cable")
    os._exit(0)  # the other thread waits for standard input, which a regular end would wait for


def _obey(watched: threading.Event) -> None:
    for line in iter(sys.stdin.buffer.readline, b""):
        (watched.set if line.strip() == b"watch" else watched.clear)()
    os._exit(0)  # the service has ended, however it did


class _Output:
    """The messages to the service, of both threads."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._lock = stream, threading.Lock()

    def send(self, message: dict[str, Any], data: Any = b"") -> None:
        """Send a message and the bytes that it announces."""
        with self._lock:
            self._stream.write(json.dumps(message).encode("ascii") + b"\n")
            self._stream.write(data)
            self._stream.flush()

    def send_error(self, text: str) -> None:
        """Send an error, the last message."""
        printable = "".join(character if character.isprintable() else " " for character in text)
        with contextlib.suppress(OSError):  # the service has ended
            self.send({"error": printable[: limits.MAX_MESSAGE]})


class _Capture:
    """A source that is being captured."""

    def __init__(self, settings: dict[str, Any], output: _Output, watched: threading.Event) -> None:
        self._kind, self._address, self._options = settings["kind"], settings["address"], settings["options"]
        self._output, self._watched = output, watched
        self._decimator = Decimator(settings["max_fps"])
        self._part, self._skipped = 0, 0
        self._pacer = Pacer()
        self._shown: deque[Any] = deque(maxlen=1)  # the newest decoded frame
        self._to_show = threading.Event()
        threading.Thread(target=self._show, name="echoquad-capture-pictures", daemon=True).start()

    def run(self) -> None:
        """Send frames until the source ends, which a file and a graph never do.

        Raises
        ------
        _EndedError
            If the source has no frames, or has ended.
        FrameError
            If the frames are too large or of a format that is not supported.
        """
        while True:
            self._part += 1
            if not self._play():
                raise _EndedError("the source has no frame that can be decoded; check it with a player")
            if self._kind not in ("lavfi", "file"):
                raise _EndedError("the source has ended; check its cable and its power")

    def _play(self) -> int:
        """Send the frames of the source from its beginning, and return how many there were."""
        import av

        count = 0
        with av.open(self._address, **self._open_arguments()) as container:
            stream = next(iter(container.streams.video), None)
            if stream is None or stream.codec_context is None:
                raise _EndedError("the source has no video that can be decoded; check it with a player")
            context = stream.codec_context
            context.thread_count = 1  # threads that decode whole frames hold frames back
            context.options = {"max_pixels": str(_MAX_STREAM_PIXELS)}
            decode, capture_time = sources.stream_decoder(), self._capture_time(stream)
            for arrived, frame in _decoded(container, stream):
                captured = capture_time(frame, arrived)
                count += 1
                if not self._decimator.takes(captured):
                    self._skipped += 1
                    continue
                self._send_frame(decode(frame), captured)
        return count

    def _open_arguments(self) -> dict[str, Any]:
        options = {"max_pixels": str(_MAX_STREAM_PIXELS), **self._options}
        if self._kind == "rtsp":
            return {"options": {**_RTSP_OPTIONS, **options}}
        if self._kind == "file":
            return {"options": {"format_whitelist": _FILE_FORMATS, "protocol_whitelist": "file", **options}}
        return {"format": self._kind, "options": options}

    def _capture_time(self, stream: Any) -> Callable[[Any, float], float]:
        """Return a function that returns the time of capture of a frame, and waits for it if it is to come."""
        if self._kind == "v4l2":
            return lambda frame, arrived: kernel_time(frame.time, arrived)
        if self._kind == "rtsp":
            clock = ArrivalClock()
            return lambda frame, arrived: clock.captured(frame.time, arrived)
        self._pacer.begin(1 / float(stream.average_rate or stream.guessed_rate or 25))
        return lambda frame, _: self._pacer.wait(frame.time)

    def _send_frame(self, decoded: Any, captured: float) -> None:
        grey, flags = sources.to_grey_and_flags(decoded)
        header = {
            "frame": grey.shape,
            "captured": captured,
            "part": self._part,
            "skipped": self._skipped,
            "flags": flags,
        }
        self._output.send(header, np.ascontiguousarray(grey).data.cast("B"))
        if self._watched.is_set():
            self._shown.append(decoded)
            self._to_show.set()

    def _show(self) -> None:
        """Send the newest frame as a picture, again and again, behind the frames that are decided."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _PICTURE_NICENESS)
        while True:
            self._to_show.wait()
            self._to_show.clear()
            with contextlib.suppress(IndexError, FrameError, MemoryError):  # no frame: it has been shown already
                image = self._shown.pop().image()
                image = image.reduce(-(-max(image.size) // _PICTURE_SIDE))
                picture = io.BytesIO()
                image.save(picture, "JPEG", quality=_PICTURE_QUALITY)
                self._output.send({"picture": picture.tell()}, picture.getbuffer())


def _decoded(container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
    """Yield the time of arrival and the frame of everything that can be decoded.

    Raises
    ------
    _EndedError
        If nothing can be decoded for a long time.
    """
    damaged = 0
    for packet in container.demux(stream):
        arrived = time.monotonic()
        try:
            frames = packet.decode()
        except MemoryError:
            raise
        except Exception:
            frames = []
            damaged += 1
            if damaged > _MAX_DAMAGED:
                raise _EndedError("the source sends nothing that can be decoded; check the line") from None
        for frame in frames:
            if not frame.is_corrupt:
                damaged = 0
                yield arrived, frame


def kernel_time(stamp: float | None, arrived: float) -> float:
    """Return the time of capture of a frame of Video4Linux: the kernel's, unless that is of another clock."""
    return stamp if stamp is not None and 0 <= arrived - stamp < 1 else arrived


class ArrivalClock:
    """Estimates when frames of a network were captured, from their presentation times and arrivals.

    The frame that arrives earliest by its presentation time has waited least. The others have waited by as much longer
    as they arrive later, which a full buffer or a slow decoder causes. Only the last seconds count, since the clocks of
    camera and host drift. The time that every frame takes, on the line and in the camera, cannot be seen here.
    """

    _WINDOW_S: Final = 20.0
    _JUMP_S: Final = 10.0  # a presentation time so far off begins a new count

    def __init__(self) -> None:
        self._offsets: deque[tuple[float, float]] = deque()  # arrival and offset, both rising

    def captured(self, stamp: float | None, arrived: float) -> float:
        """Return the time of capture of a frame with a presentation time, both in seconds."""
        if stamp is None:
            return arrived
        offset = arrived - stamp
        if self._offsets and abs(offset - self._offsets[0][1]) > self._JUMP_S:
            self._offsets.clear()
        while self._offsets and self._offsets[-1][1] >= offset:
            self._offsets.pop()
        self._offsets.append((arrived, offset))
        while arrived - self._offsets[0][0] > self._WINDOW_S:
            self._offsets.popleft()
        return stamp + self._offsets[0][1]


class Pacer:
    """Plays a source at its own rate.

    Parameters
    ----------
    now, sleep
        Return the time, and let time pass; tests replace them.
    """

    _LATE_S: Final = 0.5  # a source that is later than that goes on from now, rather than in a rush

    def __init__(
        self, now: Callable[[], float] = time.monotonic, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        self._now, self._sleep = now, sleep
        self._anchor: float | None = None  # when the frame of time 0 is due
        self._next, self._interval = -1.0, 0.0

    def begin(self, interval: float) -> None:
        """Begin the source, again or for the first time; its frames are `interval` seconds apart."""
        self._anchor, self._interval = None, interval

    def wait(self, stamp: float | None) -> float:
        """Wait until a frame with a presentation time in seconds is due, and return when it was."""
        now = self._now()
        due = self._next if stamp is None or self._anchor is None else self._anchor + stamp
        if self._anchor is None:
            due = max(self._next, now)
        if not now - self._LATE_S <= due <= now + 10 * max(self._interval, 1.0):
            due = now
            self._anchor = None
        if self._anchor is None and stamp is not None:
            self._anchor = due - stamp
        self._next = due + self._interval
        while (rest := due - self._now()) > 0:
            self._sleep(rest)
        return due


class Decimator:
    """Takes at most a number of frames per second, evenly spread.

    Parameters
    ----------
    max_fps
        Frames per second.
    """

    def __init__(self, max_fps: float) -> None:
        self._interval = 1 / max_fps
        self._due = -math.inf

    def takes(self, captured: float) -> bool:
        """Return whether to take a frame. A quarter of an interval early is in time, since sources are irregular."""
        if captured < self._due - self._interval / 4:
            return False
        late = captured - self._due > self._interval
        self._due = (captured if late else self._due) + self._interval
        return True
