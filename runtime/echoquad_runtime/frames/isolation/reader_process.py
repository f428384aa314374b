"""A reader process: reads, decodes and cuts frames outside of this process, which survives whatever a file does.

A decoder may crash on a damaged file, take more memory than the machine has, or never return. In a process of its own,
it costs that file and nothing else: the process has limits (see `limits`), and another one takes its place. A process
also has an interpreter lock of its own, which threads that decode share.

A reader process is a fresh interpreter, not a fork, and does not import the user's ``__main__`` as `multiprocessing`
does. It has no name, file or socket, so nothing is left behind however either side ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import echoquad_runtime
from echoquad_runtime.errors import (
    ConfigError,
    FrameCrashError,
    FrameError,
    FrameReadError,
    FrameTooLargeError,
)
from echoquad_runtime.frames.isolation.limits import MEMORY_LIMIT, timeout_error
from echoquad_runtime.frames.isolation.messages import Answer, AnswerStream, MalformedAnswerError, Request

__all__ = ["ReaderProcess", "module_path", "start_interpreter"]

_START_SECONDS: Final = 120.0
"""Seconds for the start of a process, on a busy machine too."""

_WAIT_SECONDS: Final = 5.0
"""Seconds to wait for a process that was killed; one that waits for a dead disk may not end."""

_PIPE_BYTES: Final = 1 << 20  # a frame fits in, so that the process need not wait until it is read

# The settings come on standard input: a command line is limited in length, and other users can read it.
_PROGRAM: Final = """\
import json, sys
settings = json.loads(sys.stdin.buffer.readline())
sys.path[:] = settings["path"]
from echoquad_runtime.frames.isolation.reader_main import main
main(settings)
"""

if sys.platform == "win32":
    _CREATION_FLAGS: Final = subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP  # no Ctrl-C either
else:
    _CREATION_FLAGS: Final = 0

_ENVIRONMENT: Final = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"),
    # glibc keeps the memory of a frame for the next one: returning it and faulting it in again took 1.4 of 5.2 ms for a
    # frame of lossless JPEG.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}

_Cause = Literal["start", "crash", "killed", "memory", "time", "stopped"]


class _EndedError(Exception):
    """A process has ended instead of answering, or cannot be used further and was ended.

    Parameters
    ----------
    cause
        ``start``: before it was ready. ``killed``: by the system. ``memory``, ``time``: it exceeded a limit.
        ``stopped``: by `ReaderProcess.kill`. ``crash``: anything else.
    how
        How it ended, such as ``ended with SIGABRT``.
    """

    def __init__(self, cause: _Cause, how: str) -> None:
        super().__init__(how)
        self.cause, self.how = cause, how


class ReaderProcess:
    """A process that reads files, started for the first one and replaced if it dies.

    One thread at a time calls `ask`. Any thread may call `kill` and `close`.
    """

    def __init__(self) -> None:
        self._child: _Child | None = None
        self._closed = False
        self._lock = threading.Lock()  # guards the two fields above
        self._asking = threading.Lock()  # held while a file is read

    @property
    def pid(self) -> int | None:
        """Process ID of the process; None before it starts."""
        child = self._child
        return None if child is None else child.process.pid

    def start(self) -> None:
        """Start the process, if it does not run, without waiting until it is ready.

        Raises
        ------
        ConfigError
            If it cannot be started.
        """
        self._running()

    def ask(self, request: Request, time_limit: float) -> Answer:
        """Perform a request and return its answer, in which the file's own error may be.

        A process that has read other files may die because of them. It is replaced, and the file is tried once more. So
        is a file whose process the system kills: the kernel picks the process with the most memory, whatever it reads.

        Raises
        ------
        FrameTooLargeError
            If the decoder takes more memory than the limit.
        FrameTimeoutError
            If it takes longer than `time_limit` seconds.
        FrameCrashError
            If the decoder crashes.
        FrameReadError
            If the system kills the process twice, or `kill` or `close` stops it meanwhile.
        ConfigError
            If no process can be started.
        """
        ends: list[_EndedError] = []
        with self._asking:
            while len(ends) < 2:
                child = self._running()
                fresh = not child.has_answered
                try:
                    return child.ask(request, time_limit)
                except _EndedError as ended:
                    ends.append(ended)
                    if ended.cause in ("time", "stopped") or (fresh and ended.cause in ("crash", "memory")):
                        break
        raise _error(ends, time_limit)

    def kill(self) -> None:
        """End the process at once. A waiting `ask` raises; the next one starts a new process."""
        with self._lock:
            if self._child is not None:
                self._child.kill()

    def close(self) -> None:
        """End the process. Later calls of `ask` raise."""
        with self._lock:
            self._closed = True
        self.kill()
        if self._asking.acquire(timeout=_WAIT_SECONDS):
            try:
                if self._child is not None:
                    self._child.end()
            finally:
                self._asking.release()

    def abandon(self) -> None:
        """Close the pipes of a process that belongs to the parent of this one, after a fork."""
        if self._child is not None:
            self._child.abandon()

    def _running(self) -> _Child:
        """Return the running process; start one if there is none or it has died."""
        with self._lock:
            if self._closed:
                raise FrameReadError(_STOPPED)
            if self._child is None or not self._child.is_alive():
                if self._child is not None:
                    self._child.end()
                self._child = _Child()
            return self._child


class _Child:
    """A running reader process. Only the asking thread uses it, except for `kill`."""

    def __init__(self) -> None:
        self.process = start_interpreter(_PROGRAM, "echoquad-reader")
        self._answers = AnswerStream(self.process)
        self._stopped = self._ready = self.has_answered = False
        self._send(json.dumps({"path": module_path(), "memory": MEMORY_LIMIT}).encode("ascii") + b"\n")

    def is_alive(self) -> bool:
        """Return whether the process can take requests."""
        return not self._stopped and self.process.poll() is None

    def ask(self, request: Request, time_limit: float) -> Answer:
        """Send a request and return the answer.

        Raises
        ------
        _EndedError
            If the process ends, or has to be ended.
        """
        try:
            if not self._ready:
                with self._answers.time_limit(_START_SECONDS):
                    self._answers.read_ready()
                self._ready = True
            with self._answers.time_limit(time_limit):
                self._send(request.to_line(time_limit))
                if request.data is not None:
                    self._send(request.data)
                answer = self._answers.read()
            if answer.out_of_memory:
                raise MemoryError
        except (EOFError, TimeoutError, MemoryError, MalformedAnswerError) as error:
            raise self._ended(error) from None
        except BaseException:  # an interrupt: the pending answer must not be taken for that of the next request
            self.kill()
            raise
        self.has_answered = True
        return answer

    def _ended(self, error: Exception) -> _EndedError:
        """End the process after an error, and return the cause."""
        if not isinstance(error, EOFError):  # otherwise it ends by itself, a moment after its pipes
            self.process.kill()
        status = self.end()
        if self._stopped:
            return _EndedError("stopped", status)
        if isinstance(error, MalformedAnswerError):
            status = "sent a malformed answer"
        if not self._ready:
            return _EndedError("start", status)
        if isinstance(error, TimeoutError) or status == "ended with SIGXCPU":
            return _EndedError("time", status)
        if isinstance(error, MemoryError):
            return _EndedError("memory", status)
        return _EndedError("killed" if status == "ended with SIGKILL" else "crash", status)

    def _send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        rest = memoryview(data)
        with contextlib.suppress(OSError):  # the process has died and will not answer
            while rest:
                rest = rest[self.process.stdin.write(rest) or 0 :]

    def kill(self) -> None:
        """End the process at once, from any thread."""
        self._stopped = True
        self.process.kill()

    def end(self) -> str:
        """Wait for the end of the process, release its pipes, and return how it ended."""
        try:
            self.process.wait(_WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._close_pipes()
        return f"ended with {_status(self.process.returncode)}"

    def abandon(self) -> None:
        """Release the pipes of a process of which this one is not the parent."""
        self.process.returncode = 0  # nothing to wait for
        self._close_pipes()

    def _close_pipes(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def start_interpreter(program: str, name: str) -> subprocess.Popen[bytes]:
    """Start a fresh interpreter that runs a program, with unbuffered pipes as its standard input and output.

    It ignores the user's environment and site, blocks SIGINT, SIGTERM and SIGHUP, and computes on one thread.

    Raises
    ------
    ConfigError
        If it cannot be started.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        raise ConfigError("no reader process can start: sys.executable is not a Python interpreter")
    command = [sys.executable, "-I", "-B", "-X", f"utf8={sys.flags.utf8_mode}", "-c", program, name]
    try:
        with _signals_blocked():
            process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | _ENVIRONMENT,
                creationflags=_CREATION_FLAGS,
            )
    except OSError as error:
        raise ConfigError(
            f"a reader process cannot be started ({error.strerror}); use fewer --workers, or free memory"
        ) from error
    _enlarge_pipe(process)
    return process


def _enlarge_pipe(process: subprocess.Popen[bytes]) -> None:
    if sys.platform == "linux":
        import fcntl

        assert process.stdout is not None
        with contextlib.suppress(OSError):  # a user with many pipes may not
            fcntl.fcntl(process.stdout.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block SIGINT, SIGTERM and SIGHUP in this thread, so that a process that it starts inherits the mask.

    If only the process itself blocked them, Ctrl-C would end one that is just starting.
    """
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def module_path() -> list[str]:
    """Return `sys.path` with this package on it: an editable install may import the package without an entry."""
    path = [entry for entry in sys.path if isinstance(entry, str)]
    home = str(Path(echoquad_runtime.__file__).absolute().parents[1])
    return path if home in path else [*path, home]


def _status(code: int | None) -> str:
    if code is None:
        return "no exit status"
    if code >= 0:
        return f"exit status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:  # a real-time signal
        return f"signal {-code}"


# ---------------------------------------------------------------------------------------------- errors

_STOPPED: Final = "its reader process was stopped; run again to read it"


def _error(ends: list[_EndedError], time_limit: float) -> FrameError | ConfigError:
    """Return the error of a file that no process could read."""
    last = ends[-1]
    twice = "" if len(ends) == 1 else " twice" if ends[0].how == last.how else f", then {last.how}"
    message = f"its reader process {ends[0].how}{twice}"
    if {ended.cause for ended in ends} == {"start"}:
        return ConfigError(f"a reader process {last.how} before it was ready; free memory; check sys.executable")
    if last.cause == "stopped":
        return FrameReadError(_STOPPED)
    if last.cause == "time":
        return timeout_error(time_limit)
    if last.cause == "memory":
        return FrameTooLargeError(
            f"decoding takes more memory than the limit of {MEMORY_LIMIT >> 20} MiB; expected a smaller frame: convert "
            "it to 8-bit PNG"
        )
    if last.cause == "killed":
        return FrameReadError(f"{message}; the system may be out of memory: use fewer --workers, or free memory")
    return FrameCrashError(f"{message}; the file is damaged or a decoder fails on it: copy it again, or convert it")
