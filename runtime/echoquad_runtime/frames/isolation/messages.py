"""Messages between this process and a reader process: requests, and answers that are checked before they are believed.

A request or an answer is a line of JSON. The bytes of a file in memory follow a request, the levels of a frame an
answer. A reader process decodes untrusted files, so an answer of any other form counts as the end of the process.
"""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from echoquad_runtime import errors
from echoquad_runtime.errors import FrameError
from echoquad_runtime.frames.formats import MAX_FRAMES, MAX_PIXELS, Flip
from echoquad_runtime.frames.isolation.limits import MAX_MESSAGE
from echoquad_runtime.frames.sources import Flags, FrameCounts

__all__ = ["Answer", "AnswerStream", "MalformedAnswerError", "Operation", "Request"]

Operation = Literal["count", "grey", "grey_and_flags", "image", "pixel_format", "quadrants"]
"""What to do with a file: count its frames; name its pixel format; or decode one to grey, quadrants or a picture."""

_MAX_LINE: Final = 1 << 16
_MAX_LEVELS: Final = 3 * MAX_PIXELS
_READ_BYTES: Final = 1 << 20

_ERRORS: Final = {
    name: error for name, error in vars(errors).items() if isinstance(error, type) and issubclass(error, FrameError)
}
"""Errors that a reader process may name; any other name is a plain `FrameError`."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a reader process shall do with a file.

    Attributes
    ----------
    operation
        What to do.
    path
        The file; None if `data` has its bytes.
    data
        The bytes of a file in memory.
    frame, flip
        As those of a `FrameFile`.
    contract
        JSON of the contract, for quadrants.
    """

    operation: Operation
    path: Path | None = None
    data: bytes | None = None
    frame: int | None = None
    flip: Flip = "none"
    contract: str | None = None

    def to_line(self, seconds: float) -> bytes:
        """Return the line that announces the request; `seconds` limits the processor time."""
        values = {
            "operation": self.operation,
            "path": None if self.path is None else os.fspath(_absolute(self.path)),
            "size": None if self.data is None else len(self.data),
            "frame": self.frame,
            "flip": self.flip,
            "contract": self.contract,
            "seconds": seconds,
        }
        return json.dumps(values).encode("ascii") + b"\n"


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What a reader process found.

    Attributes
    ----------
    levels
        uint8 [H, W], or [H, W, 3] for a picture, or [4, 1, S, S] for quadrants; None if no frame was decoded.
    flags
        The frame's flags.
    counts
        The numbers of frames; None if they were not counted.
    pixel_format
        The pixel format; empty if it was not asked for.
    error
        The error that the file caused, if any.
    out_of_memory
        Whether decoding took more memory than the limit.
    """

    levels: npt.NDArray[np.uint8] | None = None
    flags: Flags = ()
    counts: FrameCounts | None = None
    pixel_format: str = ""
    error: FrameError | None = None
    out_of_memory: bool = False


class MalformedAnswerError(Exception):
    """The answer of a reader process has not the expected form."""


class AnswerStream:
    """The answers of a reader process, read with a time limit.

    Parameters
    ----------
    process
        The process, whose standard output is an unbuffered pipe.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self._process, self._descriptor = process, process.stdout.fileno()
        self._pending = b""
        self._deadline = math.inf
        if sys.platform != "win32":
            self._poll = select.poll()
            self._poll.register(self._descriptor, select.POLLIN)

    @contextmanager
    def time_limit(self, seconds: float) -> Iterator[None]:
        """Limit the time of all reads within the block.

        Raises
        ------
        TimeoutError
            In the block, if an answer is late.
        """
        self._deadline = time.monotonic() + seconds
        if sys.platform == "win32":
            # Pipes cannot be polled. The end of the process ends the read.
            timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self._process.kill)
            timer.daemon = True
            timer.start()
            try:
                yield
            finally:
                timer.cancel()
        else:
            yield

    def read_ready(self) -> None:
        """Read the answer to the settings.

        Raises
        ------
        EOFError, TimeoutError, MalformedAnswerError
            As `read`.
        """
        if self._read_line() != {"ready": True}:
            raise MalformedAnswerError

    def read(self) -> Answer:
        """Read an answer.

        Raises
        ------
        EOFError
            If the process has ended.
        TimeoutError
            If the answer is late.
        MalformedAnswerError
            If it has not the expected form.
        """
        match self._read_line():
            case {"error": MemoryError.__name__}:
                return Answer(out_of_memory=True)
            case {"error": str(name), "message": str(text)} if text.isprintable() and len(text) <= MAX_MESSAGE:
                return Answer(error=_ERRORS.get(name, FrameError)(text))
            case {"counts": [bool(several), int(present), int(stated)]} if 0 <= present <= MAX_FRAMES:
                return Answer(counts=FrameCounts(several, present, stated))
            case {"pixel_format": str(text)} if text.isprintable() and len(text) <= MAX_MESSAGE:
                return Answer(pixel_format=text)
            case {"shape": [*shape], "flags": [*flags]} if all(isinstance(flag, str) for flag in flags):
                return Answer(self._read_levels(shape), tuple(flags))
        raise MalformedAnswerError

    def _read_line(self) -> Any:
        while b"\n" not in self._pending:
            if len(self._pending) > _MAX_LINE:
                raise MalformedAnswerError
            self._pending += self._read_some(_MAX_LINE)
        line, _, self._pending = self._pending.partition(b"\n")
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise MalformedAnswerError from None

    def _read_levels(self, shape: list[Any]) -> npt.NDArray[np.uint8]:
        if not (2 <= len(shape) <= 4 and all(type(side) is int and side > 0 for side in shape)):
            raise MalformedAnswerError
        if (size := math.prod(shape)) > _MAX_LEVELS:
            raise MalformedAnswerError
        levels = np.empty(size, np.uint8)
        filled = 0
        while filled < size:
            data = self._pending or self._read_some(_READ_BYTES)
            taken = min(len(data), size - filled)
            levels[filled : filled + taken] = np.frombuffer(data, np.uint8, taken)
            self._pending = data[taken:]
            filled += taken
        return levels.reshape(shape)

    def _read_some(self, size: int) -> bytes:
        if sys.platform != "win32":
            seconds = self._deadline - time.monotonic()
            if seconds <= 0 or not self._poll.poll(min(seconds, 1e6) * 1000):
                raise TimeoutError
        data = os.read(self._descriptor, size)
        if not data:
            if sys.platform == "win32" and time.monotonic() >= self._deadline:
                raise TimeoutError
            raise EOFError
        return data


def _absolute(path: Path) -> Path:
    """Return a path that does not depend on the working directory."""
    try:
        return path.absolute()
    except OSError:  # the working directory was deleted
        return path
