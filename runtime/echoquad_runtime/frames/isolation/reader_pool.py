"""The pool of reader processes: lends one to each thread that reads a file, and keeps them for the next one.

The pool belongs to the process and has as many reader processes as threads read at the same time. The frames of a clip
are decoded in sequence, so the reader process that has a clip open reads all of its frames, and threads wait for it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from echoquad_runtime.errors import FrameCrashError, FrameError, FrameTimeoutError, FrameTooLargeError
from echoquad_runtime.frames.isolation.limits import TIME_LIMIT

if TYPE_CHECKING:
    from echoquad_runtime.frames.isolation.messages import Answer, Request
    from echoquad_runtime.frames.isolation.reader_process import ReaderProcess

__all__ = ["ReaderPool", "can_isolate", "reader_pool"]

logger = logging.getLogger(__name__)

_MAX_IDLE: Final = 64
_MAX_CLIPS: Final = 32  # of which the pool remembers the process

_MAX_LOSSES: Final = 3
"""Frames of a file that may end their process; with thousands of frames, such a file would otherwise take days."""

_MAX_FILES: Final = 1000  # of which the pool remembers the losses


def can_isolate() -> bool:
    """Return whether this program can start reader processes; warn once, in the log, if it cannot.

    A frozen program has no Python interpreter to start.
    """
    if sys.executable and not getattr(sys, "frozen", False):
        return True
    _warn_once()
    return False


@functools.cache
def _warn_once() -> None:
    logger.warning(
        "this program has no Python interpreter for reader processes: a damaged file may end it, or exhaust its memory"
    )


class ReaderPool:
    """Reader processes that threads share.

    Attributes
    ----------
    idle
        Number of processes that wait for a file.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._idle: list[ReaderProcess] = []  # the one that was used last is at the end
        self._lent: dict[int, ReaderProcess | None] = {}  # by thread; None while it waits for one
        self._clips: OrderedDict[str, ReaderProcess] = OrderedDict()  # by path; the most recently read is at the end
        self._losses: OrderedDict[tuple[object, ...], list[FrameError]] = OrderedDict()  # by file

    @property
    def idle(self) -> int:
        """See the class."""
        return len(self._idle)

    def ask(self, request: Request, *, clip: bool = False, time_limit: float = TIME_LIMIT) -> Answer:
        """Perform a request in a reader process.

        Parameters
        ----------
        request
            What to do with a file.
        clip
            Whether the file is a clip, whose frames are decoded in sequence.
        time_limit
            Seconds for reading and decoding, once a process is available.

        Raises
        ------
        FrameError
            If the file cannot be read or decoded, or as `ReaderProcess.ask`. Once three frames of a file have ended
            their process, its other frames are not tried.
        ConfigError
            As `ReaderProcess.ask`.
        """
        self._check_losses(request)
        try:
            with self._lend(os.fspath(request.path) if clip and request.path is not None else None) as process:
                answer = process.ask(request, time_limit)
        except (FrameCrashError, FrameTimeoutError, FrameTooLargeError) as error:
            self._record_loss(request, error)
            raise
        if answer.error is not None:
            raise answer.error
        return answer

    def _check_losses(self, request: Request) -> None:
        if not self._losses or (key := _file_key(request)) is None:
            return
        with self._condition:
            losses = self._losses.get(key, [])
            if len(losses) >= _MAX_LOSSES:
                raise type(losses[-1])(f"{losses[-1]}; after {_MAX_LOSSES} such frames of a file, others are not tried")

    def _record_loss(self, request: Request, error: FrameError) -> None:
        if (key := _file_key(request)) is not None:
            with self._condition:
                self._losses.setdefault(key, []).append(type(error)(str(error)))
                self._losses.move_to_end(key)
                while len(self._losses) > _MAX_FILES:
                    self._losses.popitem(last=False)

    def start(self, processes: int) -> None:
        """Start processes until there are as many, without waiting until they are ready.

        Raises
        ------
        ConfigError
            If one cannot be started.
        """
        with self._condition:
            missing = processes - len(self._idle) - len(self._lent)
        for _ in range(missing):
            process = _new_process()
            process.start()
            with self._condition:
                self._idle.insert(0, process)

    def is_reading(self, thread: threading.Thread) -> bool:
        """Return whether a reader process reads a file for `thread`, or will: it then cannot take forever."""
        return thread.ident in self._lent

    def stop(self, threads: Iterable[threading.Thread]) -> None:
        """End the processes that read for `threads`; their files fail."""
        with self._condition:
            lent = [self._lent.get(thread.ident or 0) for thread in threads]
        for process in lent:
            if process is not None:
                process.kill()

    def trim(self, idle: int = 0) -> None:
        """End all processes that wait for a file but the `idle` most recently used ones, and forget lost frames."""
        with self._condition:
            self._losses.clear()
            surplus = self._idle[: max(0, len(self._idle) - idle)]
            self._remove_idle(surplus)
        for process in surplus:
            process.kill()  # all of them first: waiting for each takes a while
        for process in surplus:
            process.close()

    def close(self) -> None:
        """End all processes."""
        with self._condition:
            lent = [process for process in self._lent.values() if process is not None]
        for process in lent:
            process.close()
        self.trim()

    def abandon(self) -> None:
        """Release all processes without ending them: they belong to the parent of this process, after a fork."""
        for process in {*self._idle, *self._lent.values()}:
            if process is not None:
                process.abandon()

    @contextlib.contextmanager
    def _lend(self, clip: str | None) -> Iterator[ReaderProcess]:
        thread = threading.get_ident()
        with self._condition:
            self._lent[thread] = None
            try:
                process = self._lent[thread] = self._take(clip)
            except BaseException:
                del self._lent[thread]
                raise
        try:
            yield process
        finally:
            with self._condition:
                del self._lent[thread]
                self._idle.append(process)
                self._condition.notify_all()
            if len(self._idle) > _MAX_IDLE:
                self.trim(_MAX_IDLE)

    def _take(self, clip: str | None) -> ReaderProcess:
        """Return a process for a file: for a clip the one that has it open, else one that has none, else any."""
        if clip is not None:
            while (home := self._clips.get(clip)) is not None:
                if home in self._idle:
                    self._clips.move_to_end(clip)
                    self._idle.remove(home)
                    return home
                self._condition.wait()
        # Reversed: a process whose memory and files are still in the processor's caches.
        clips = list(self._clips.values())
        process = min(reversed(self._idle), key=lambda one: _last_index(clips, one), default=None)
        if process is None:
            process = _new_process()
        else:
            self._idle.remove(process)
        if clip is not None:
            self._clips[clip] = process
            while len(self._clips) > _MAX_CLIPS:
                self._clips.popitem(last=False)
        return process

    def _remove_idle(self, processes: list[ReaderProcess]) -> None:
        self._idle = [process for process in self._idle if process not in processes]
        for clip in [clip for clip, process in self._clips.items() if process in processes]:
            del self._clips[clip]
        self._condition.notify_all()


def _file_key(request: Request) -> tuple[object, ...] | None:
    """Return what identifies a multi-frame file until it changes; None for any other."""
    if request.path is None or request.frame is None:
        return None
    try:
        status = request.path.stat()
    except (OSError, ValueError):
        return (request.path,)
    return request.path, status.st_size, status.st_mtime_ns


def _last_index(clips: list[ReaderProcess], process: ReaderProcess) -> int:
    """Return the position of a process's last clip, -1 if it has none."""
    return max((index for index, other in enumerate(clips) if other is process), default=-1)


def _new_process() -> ReaderProcess:
    from echoquad_runtime.frames.isolation.reader_process import ReaderProcess

    return ReaderProcess()


_pools = [ReaderPool()]  # one; another one after a fork


def reader_pool() -> ReaderPool:
    """Return the pool of this process."""
    return _pools[0]


def _replace_after_fork() -> None:
    _pools[0].abandon()
    _pools[0] = ReaderPool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_replace_after_fork)
atexit.register(lambda: reader_pool().close())
