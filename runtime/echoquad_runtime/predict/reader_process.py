"""Reader processes: read, decode and cut frames outside of the interpreter lock, and isolated from the run.

Threads that decode wait for each other: Pillow and zlib release the interpreter lock, but the Python code around them
takes it. A process has a lock of its own. It may also die: a decoder that crashes on a damaged file, or a process that
the kernel ends for its memory, costs that file and nothing else.

A reader process is a fresh interpreter, not a fork, and does not import the user's ``__main__`` as `multiprocessing`
does. It writes quadrants to memory that it shares with the parent, and answers in JSON. The memory has no name, so
nothing is left behind however either side ends.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import echoquad_runtime
from echoquad_runtime import errors
from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import ConfigError, FrameDamagedError, FrameError, FrameReadError
from echoquad_runtime.frames.frame_file import FrameFile
from echoquad_runtime.predict.frame_reader import Flags

__all__ = ["ReaderProcess", "reader_processes"]

_MAX_THREADS_WITHOUT: Final = 4
"""Number of threads up to which decoding in threads is as fast."""

_ATTEMPTS: Final = 2
"""Attempts per file: the kernel ends the process with the most memory, whatever file it reads."""

_MAX_ANSWER: Final = 1 << 16
"""Maximum bytes in an answer line of a reader process."""

_WAIT_SECONDS: Final = 5.0
"""Seconds to wait for a process that was killed; one that waits for a dead disk may not end."""

_ERRORS: Final = {
    name: error for name, error in vars(errors).items() if isinstance(error, type) and issubclass(error, FrameError)
}
"""Errors that a reader process may name; any other name is a plain `FrameError`."""

_STOPPED: Final = "its reader process was stopped; run again to read it"

# The settings come on standard input: a command line is limited in length, and other users can read it.
_PROGRAM: Final = """\
import json, sys
settings = json.loads(sys.stdin.buffer.readline())
sys.path[:] = settings["path"]
from echoquad_runtime.predict.reader_main import main
main(settings)
"""

if sys.platform == "win32":
    _CREATION_FLAGS: Final = subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP  # no Ctrl-C either
else:
    _CREATION_FLAGS: Final = 0

_ONE_THREAD: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def reader_processes(workers: int | None, threads: int) -> int:
    """Return the number of reader processes to use; 0 reads in threads.

    Parameters
    ----------
    workers
        The number that the user asks for; None is 0 for up to four threads, else one per thread.
    threads
        Number of threads that may compute.
    """
    if workers is not None:
        return workers
    return threads if threads > _MAX_THREADS_WITHOUT and _executable() else 0


class ReaderProcess:
    """A `FrameReader` that reads in a separate process, started for the first frame and replaced if it dies.

    One thread at a time calls `read`. Any thread may call `kill` and `close`.

    Parameters
    ----------
    contract
        Defines the kept fraction and the input size S.
    frames
        Number B of frames in the shared memory.

    Attributes
    ----------
    quadrants
        uint8 [B, 4, 1, S, S], grey levels 0 to 255. The memory is page-aligned, shared with the process, and stays
        valid after `close` as long as an array refers to it.
    """

    def __init__(self, contract: Contract, frames: int) -> None:
        shape = (frames, 4, 1, contract.input_size, contract.input_size)
        self._memory = _SharedMemory(int(np.prod(shape)))
        self.quadrants: npt.NDArray[np.uint8] = np.frombuffer(self._memory.mapped, np.uint8).reshape(shape)
        self._settings = {"contract": contract.to_json(), "shape": shape, "memory": self._memory.handle}
        self._child: _Child | None = None
        self._closed = False
        self._lock = threading.Lock()  # guards the two fields above
        self._reading = threading.Lock()  # held while a frame is read

    @property
    def pid(self) -> int | None:
        """Process ID of the reader process; None before it starts."""
        child = self._child
        return None if child is None else child.process.pid

    def start(self) -> None:
        """Start the process, if it does not run, without waiting until it is ready.

        Raises
        ------
        ConfigError
            If it cannot be started.
        """
        with self._reading:
            self._running()

    def read(self, file: FrameFile, index: int) -> Flags:
        """Write the quadrants of a frame to ``quadrants[index]`` and return the frame's flags.

        If the process dies, it is replaced and the file is tried once more.

        Raises
        ------
        FrameError
            As `read_quadrants`; or if the process dies twice; or if `kill` or `close` stops it meanwhile.
        ConfigError
            If no reader process can be started.
        """
        request = {
            "path": os.fspath(_absolute(file.path)),
            "name": file.name,
            "frame": file.frame,
            "flip": file.flip,
            "index": index,
        }
        exits: list[str] = []
        started = False
        with self._reading:
            while len(exits) < _ATTEMPTS:
                child = self._running()
                ready = child.is_ready()
                started = started or ready
                answer = child.ask(request) if ready else None
                if isinstance(answer, FrameError):
                    raise answer
                if answer is not None:
                    return answer
                exits.append(child.end())
                if child.killed:
                    raise FrameReadError(_STOPPED)
        if not started:
            raise ConfigError(f"a reader process {exits[-1]} before it was ready; read in threads: --workers 0")
        raise _exit_error(exits)

    def kill(self) -> None:
        """End the process at once. A waiting `read` raises; the next one starts a new process."""
        with self._lock:
            if self._child is not None:
                self._child.kill()

    def close(self) -> None:
        """End the process and release the shared memory once no array refers to it. Later calls of `read` raise."""
        with self._lock:
            self._closed = True
        self.kill()
        if self._reading.acquire(timeout=_WAIT_SECONDS):
            try:
                if self._child is not None:
                    self._child.end()
                self._memory.close()
            finally:
                self._reading.release()

    def __enter__(self) -> ReaderProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _running(self) -> _Child:
        """Return the running process; start one if there is none or it has died."""
        with self._lock:
            if self._closed:
                raise FrameReadError(_STOPPED)
            if self._child is None or not self._child.is_alive():
                if self._child is not None:
                    self._child.end()
                self._child = _Child(self._settings, self._memory.descriptors)
            return self._child


class _Child:
    """A running reader process. Only the reading thread uses it, except for `kill`."""

    def __init__(self, settings: dict[str, Any], descriptors: tuple[int, ...]) -> None:
        executable = _executable()
        if not executable:
            raise ConfigError(
                "no reader process can start: sys.executable is not a Python interpreter; use --workers 0"
            )
        command = [executable, "-I", "-X", f"utf8={sys.flags.utf8_mode}", "-c", _PROGRAM, "echoquad-reader"]
        environment = os.environ | dict.fromkeys(_ONE_THREAD, "1")
        try:
            with _signals_blocked():
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    pass_fds=descriptors,
                    env=environment,
                    creationflags=_CREATION_FLAGS,
                )
        except OSError as error:
            raise ConfigError(
                f"a reader process cannot be started ({error.strerror}); use fewer, or read in threads with --workers 0"
            ) from error
        self.killed = False
        self._ready: bool | None = None  # None before the first answer
        self._garbled = False
        self._send({**settings, "path": _module_path()})

    def is_alive(self) -> bool:
        """Return whether the process can take requests."""
        return not self.killed and self.process.poll() is None

    def is_ready(self) -> bool:
        """Wait until the process has started; return False if it has died."""
        if self._ready is None:
            self._ready = self._receive() == ()
        return self._ready

    def ask(self, request: dict[str, Any]) -> Flags | FrameError | None:
        """Send a request and return the answer; None if the process has died or its answer is malformed."""
        try:
            self._send(request)
            return self._receive()
        except BaseException:  # an interrupt: the pending answer must not be taken for that of the next request
            self.kill()
            raise

    def _send(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # the process has died and will not answer
            self.process.stdin.write(json.dumps(request).encode("ascii") + b"\n")
            self.process.stdin.flush()

    def _receive(self) -> Flags | FrameError | None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline(_MAX_ANSWER)
        answer = _parse(line)
        if line and answer is None:
            self._garbled = True
            self.process.kill()
        return answer

    def kill(self) -> None:
        """End the process at once, from any thread."""
        self.killed = True
        self.process.kill()

    def end(self) -> str:
        """End the process, release its pipes, and return how it ended, such as ``ended with SIGABRT``."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.wait(_WAIT_SECONDS)  # the pipes close a moment before the process exits
        except subprocess.TimeoutExpired:
            self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # an unsent request in the buffer
                stream.close()
        if self._garbled:
            return "sent a malformed answer"
        return f"ended with {_status(self.process.returncode)}"


class _SharedMemory:
    """Memory without a name in the file system, filled with zeros.

    Attributes
    ----------
    mapped
        The memory.
    descriptors
        File descriptors that the process inherits to map it.
    handle
        What the process maps the memory by: the descriptor, on Windows a name that vanishes with its last user.
    """

    def __init__(self, size: int) -> None:
        self.descriptors: tuple[int, ...] = ()
        self.handle: int | str
        if sys.platform == "win32":
            self.handle = f"echoquad-{uuid.uuid4()}"
            self.mapped = mmap.mmap(-1, size, tagname=self.handle)
            return
        import fcntl

        memfd = getattr(os, "memfd_create", None)
        with os.fdopen(memfd("echoquad-quadrants"), "r+b") if memfd else tempfile.TemporaryFile() as file:
            # At least 3: if a standard stream is closed, the file has its descriptor.
            descriptor = fcntl.fcntl(file.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
        os.ftruncate(descriptor, size)
        self.mapped = mmap.mmap(descriptor, size)
        self.descriptors, self.handle = (descriptor,), descriptor

    def close(self) -> None:
        """Close the descriptors. The memory stays as long as an array refers to it."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = ()


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


def _executable() -> str:
    """Return the path of this Python interpreter; empty in a frozen program."""
    return "" if getattr(sys, "frozen", False) else sys.executable or ""


def _module_path() -> list[str]:
    """Return `sys.path` with this package on it: an editable install may import the package without an entry."""
    path = [entry for entry in sys.path if isinstance(entry, str)]
    home = str(Path(echoquad_runtime.__file__).absolute().parents[1])
    return path if home in path else [*path, home]


def _absolute(path: Path) -> Path:
    """Return a path that does not depend on the working directory."""
    try:
        return path.absolute()
    except OSError:  # the working directory was deleted
        return path


def _parse(line: bytes) -> Flags | FrameError | None:
    """Return the flags or the error in a line of a reader process; None if the line is malformed."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return None
    match answer:
        case {"flags": [*flags]} if all(isinstance(flag, str) for flag in flags):
            return tuple(flags)
        case {"error": str(name), "message": str(message)}:
            return _ERRORS.get(name, FrameError)(message)
    return None


def _status(code: int | None) -> str:
    if code is None:
        return "no exit status"
    if code >= 0:
        return f"exit status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:  # a real-time signal
        return f"signal {-code}"


def _exit_error(exits: list[str]) -> FrameError:
    """Return the error of a file with which every process dies."""
    same = len(set(exits)) == 1
    message = f"its reader process {exits[0]}{' twice' if same else f', then {exits[-1]}'}"
    if exits[-1] == "ended with SIGKILL":
        return FrameReadError(f"{message}; the system may be out of memory: use fewer --workers, or free memory")
    return FrameDamagedError(f"{message}; the file is damaged or a decoder fails on it: copy it again, or convert it")
