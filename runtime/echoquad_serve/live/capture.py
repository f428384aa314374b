"""A live source that is captured in a process of its own.

A decoder may abort on a damaged stream, and a read from a device that was unplugged may never return. In a process of
its own, it costs a moment: the process is killed, and another takes its place (see `capture_loop`). The process is a
fresh interpreter, as those that read files (`echoquad_runtime.frames.isolation`). It sends frames through a pipe, so
that nothing is left behind however either side ends.

The process decodes what others send, so nothing but messages of the expected form is believed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from echoquad_runtime.errors import ConfigError, MissingExtraError
from echoquad_runtime.frames.formats import MAX_PIXELS
from echoquad_runtime.frames.isolation.limits import MAX_MESSAGE, MEMORY_LIMIT
from echoquad_runtime.frames.isolation.reader_process import module_path, start_interpreter
from echoquad_runtime.quadrants import Grey
from echoquad_serve.errors import LiveSourceError
from echoquad_serve.live.source_spec import SourceSpec, parse_source

__all__ = ["Capture", "CapturedFrame", "Picture", "check_source", "open_source"]

_PROGRAM: Final = """\
import json, sys
settings = json.loads(sys.stdin.buffer.readline())
sys.path[:] = settings["path"]
from echoquad_serve.live.capture_main import main
main(settings)
"""

_MAX_LINE: Final = 1 << 16
_MAX_PICTURE_BYTES: Final = 8 << 20
_MAX_FLAGS: Final = 8
_WAIT_SECONDS: Final = 2.0
"""Seconds to wait for a process that was killed; one that waits for a driver may not end."""


@dataclass(frozen=True, slots=True, eq=False)
class CapturedFrame:
    """A frame as the process sends it.

    Attributes
    ----------
    grey
        uint8 [H, W], grey levels.
    captured
        Time of capture in seconds of `time.monotonic`.
    part
        Counts how often the source has begun.
    skipped
        How many frames have been left out until now, since the source delivers more than are wanted.
    flags
        Quality flags that only the decoder can set.
    """

    grey: Grey
    captured: float
    part: int
    skipped: int
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """A recent frame as JPEG in its own colours, at most 1920 pixels wide and high."""

    jpeg: bytes


def check_source(spec: str) -> SourceSpec:
    """Return a source that can be captured here.

    Raises
    ------
    ConfigError
        If `spec` names no source.
    MissingExtraError
        If PyAV is not installed.
    """
    source = parse_source(spec)
    if importlib.util.find_spec("av") is None:
        raise MissingExtraError(
            'a live source needs PyAV, which is not installed; install it: pip install "echoquad[video]"'
        )
    return source


def open_source(spec: str, max_fps: float = 30.0) -> Capture:
    """Start to capture a source, and return at once; `Capture.read` returns frames, or why there are none.

    Parameters
    ----------
    spec
        ``v4l2:/dev/video0``, ``rtsp://...``, ``lavfi:GRAPH``, or a file; see `echoquad_serve.live.source_spec`.
    max_fps
        Frames per second, at most; others are left out before they are converted.

    Raises
    ------
    ConfigError
        If `spec` names no source, `max_fps` is not above 0, or no process can be started.
    MissingExtraError
        If PyAV is not installed.
    """
    return Capture(check_source(spec), max_fps)


class Capture:
    """A process that captures a source.

    One thread calls `read`. Any thread may call the other methods.

    Raises
    ------
    ConfigError
        If `max_fps` is not above 0, or the process cannot be started.
    """

    def __init__(self, source: SourceSpec, max_fps: float) -> None:
        if not 0 < max_fps < math.inf:
            raise ConfigError(f"max_fps is {max_fps:g}; expected more than 0")
        self._process = start_interpreter(_PROGRAM, "echoquad-capture")
        assert self._process.stdout is not None
        self._messages = self._process.stdout
        self._pending = bytearray()
        self._writing = threading.Lock()
        self._order(
            {
                "path": module_path(),
                "kind": source.kind,
                "address": source.address,
                "options": source.options,
                "max_fps": max_fps,
                "memory": MEMORY_LIMIT,
            }
        )

    @property
    def pid(self) -> int:
        """Process ID of the process."""
        return self._process.pid

    def read(self) -> CapturedFrame | Picture:
        """Wait for the next frame or picture.

        Raises
        ------
        LiveSourceError
            If the source cannot be opened or has ended, or the process has ended or was killed.
        """
        match self._read_message():
            case {"error": str(text)} if text.isprintable() and len(text) <= MAX_MESSAGE:
                raise LiveSourceError(text)
            case {"picture": int(size)} if 0 < size <= _MAX_PICTURE_BYTES:
                return Picture(self._read_exactly(size).tobytes())
            case {
                "frame": [int(height), int(width)],
                "captured": float(captured),
                "part": int(part),
                "skipped": int(skipped),
                "flags": [*flags],
            } if (
                height > 0
                and width > 0
                and height * width <= MAX_PIXELS
                and len(flags) <= _MAX_FLAGS
                and all(isinstance(flag, str) and flag.isascii() and flag.isprintable() for flag in flags)
            ):
                grey = self._read_exactly(height * width).reshape(height, width)
                # Not from the future, since ages are not negative.
                return CapturedFrame(grey, min(captured, time.monotonic()), part, skipped, tuple(flags))
        raise LiveSourceError(_MALFORMED)

    def watch(self, watched: bool) -> None:
        """Switch pictures on or off."""
        self._order("watch" if watched else "rest")

    def kill(self) -> None:
        """End the process at once. A waiting `read` raises."""
        self._process.kill()

    def end(self) -> None:
        """End the process and release its pipes, after the last `read`."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_WAIT_SECONDS)
        with self._writing:
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def _order(self, order: object) -> None:
        line = order if isinstance(order, str) else json.dumps(order)
        # The process has ended, or its pipe is closed; `read` finds out.
        with self._writing, contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(line.encode("ascii") + b"\n")

    def _read_message(self) -> Any:
        while b"\n" not in self._pending:
            if len(self._pending) > _MAX_LINE:
                raise LiveSourceError(_MALFORMED)
            self._pending += self._read_some(_MAX_LINE)
        line, _, self._pending = self._pending.partition(b"\n")
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise LiveSourceError(_MALFORMED) from None

    def _read_exactly(self, size: int) -> Grey:
        data = np.empty(size, np.uint8)
        filled = min(len(self._pending), size)
        data[:filled] = np.frombuffer(self._pending, np.uint8, filled) if filled else 0
        self._pending = self._pending[filled:]
        view = data.data
        while filled < size:
            try:
                count = self._messages.readinto(view[filled:])  # type: ignore[attr-defined]
            except (OSError, ValueError):
                count = 0
            if not count:
                raise LiveSourceError(_ENDED)
            filled += count
        return data

    def _read_some(self, size: int) -> bytes:
        try:
            data = self._messages.read(size)
        except (OSError, ValueError):
            data = b""
        if not data:
            raise LiveSourceError(_ENDED)
        return data


_ENDED: Final = "the capture process has ended; it is started again"
_MALFORMED: Final = "the capture process sent a malformed message; it is started again"
