"""Reader processes: frames are read, decoded and cut outside of the interpreter lock, and apart from the run.

Threads that decode wait for one another: Pillow and zlib release the interpreter lock, but the Python code around them
takes it. A process of its own has a lock of its own. It also may die: a decoder that crashes on a damaged file, or that
the kernel ends for its memory, costs that file and nothing else.

A reader process is a fresh interpreter, never a fork, and does not import the user's ``__main__`` as `multiprocessing`
does. It writes quadrants to memory that it shares with the parent, and answers in JSON. The memory has no name, so that
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
from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import (
    ConfigError,
    FrameDamagedError,
    FrameError,
    FrameExtraError,
    FrameFormatError,
    FrameReadError,
    FrameTooLargeError,
    FrameTooSmallError,
)
from echoquad_runtime.frames.frame_file import FrameFile
from echoquad_runtime.predict.frame_reader import Flags

__all__ = ["ReaderProcess", "reader_processes"]

_MAX_THREADS_WITHOUT: Final = 4
"""Threads up to which decoding in threads is as fast."""

_ATTEMPTS: Final = 2
"""Times that a file is tried: the kernel ends the process with the most memory, whatever it is reading."""

_MAX_ANSWER: Final = 1 << 16
"""Bytes in a line that a reader process answers."""

_PATIENCE: Final = 5.0
"""Seconds to wait for a process that was killed; one that waits for a dead disk may not end."""

_ERRORS: Final = {
    error.__name__: error
    for error in (
        FrameDamagedError,
        FrameExtraError,
        FrameFormatError,
        FrameReadError,
        FrameTooLargeError,
        FrameTooSmallError,
    )
}
"""Errors that a reader process may name; any other name is a plain `FrameError`."""

# The settings come first, on standard input: a command line is limited in length, and other users can read it.
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
    """Return how many reader processes to use; 0 reads in threads.

    Parameters
    ----------
    workers
        The number that the user asks for; None chooses none for up to four threads, else one a thread.
    threads
        Threads that may compute.
    """
    if workers is not None:
        return workers
    return threads if threads > _MAX_THREADS_WITHOUT and _executable() else 0


class ReaderProcess:
    """Reads frames in a process of its own, which starts with the first frame and is replaced if it dies.

    One thread at a time calls `read`. Any thread may call `kill` and `close`.

    Parameters
    ----------
    contract
        Defines the kept fraction and the input size S.
    frames
        Frames B that the shared memory holds.

    Attributes
    ----------
    quadrants
        uint8 [B, 4, 1, S, S], grey levels 0 to 255. The memory is aligned to a page, is shared with the process, and
        stays valid after `close` for as long as an array refers to it.
    """

    def __init__(self, contract: Contract, frames: int) -> None:
        shape = (frames, 4, 1, contract.input_size, contract.input_size)
        self._memory = _SharedMemory(int(np.prod(shape)))
        self.quadrants: npt.NDArray[np.uint8] = np.frombuffer(self._memory.mapped, np.uint8).reshape(shape)
        self._settings = {"contract": contract.to_json(), "shape": shape, "memory": self._memory.handle}
        self._child: _Child | None = None
        self._closed = False
        self._lock = threading.Lock()  # of the two fields above
        self._reading = threading.Lock()  # held for as long as a frame is read

    @property
    def pid(self) -> int | None:
        """Process number of the process that reads; None where none has started."""
        child = self._child
        return None if child is None else child.process.pid

    def start(self) -> None:
        """Start the process, if none runs, without waiting until it is ready.

        Raises
        ------
        ConfigError
            If it cannot be started.
        """
        with self._reading:
            self._running()

    def read(self, file: FrameFile, place: int) -> Flags:
        """Write the quadrants of a frame to ``quadrants[place]`` and return the frame's flags.

        A file with which the process dies is tried once more, in a new process.

        Raises
        ------
        FrameError
            As `read_quadrants` in the caller's thread raises it; or if the process dies twice; or if `kill` or `close`
            stops it meanwhile.
        ConfigError
            If no reader process can be started.
        """
        request = {
            "path": os.fspath(_absolute(file.path)),
            "name": file.name,
            "frame": file.frame,
            "flip": file.flip,
            "place": place,
        }
        endings: list[str] = []
        started = False
        with self._reading:
            while len(endings) < _ATTEMPTS:
                child = self._running()
                ready = child.is_ready()
                started = started or ready
                answer = child.ask(request) if ready else None
                if isinstance(answer, FrameError):
                    raise answer
                if answer is not None:
                    return answer
                endings.append(child.end())
                if child.killed:
                    raise FrameReadError("the process that reads it was stopped; run again to read it")
        if not started:
            raise ConfigError(f"a reader process {endings[-1]} before it was ready; read in threads: --workers 0")
        raise _death(endings)

    def kill(self) -> None:
        """End the process at once. A `read` that waits for it raises; the next one starts a new process."""
        with self._lock:
            if self._child is not None:
                self._child.kill()

    def close(self) -> None:
        """End the process and release the shared memory, once no array refers to it. `read` raises from now on."""
        with self._lock:
            self._closed = True
        self.kill()
        if self._reading.acquire(timeout=_PATIENCE):
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
        """Return the process, a new one if there is none or it has died."""
        with self._lock:
            if self._closed:
                raise FrameReadError("the process that reads it was stopped; run again to read it")
            if self._child is None or not self._child.is_alive():
                if self._child is not None:
                    self._child.end()
                self._child = _Child(self._settings, self._memory.descriptors)
            return self._child


class _Child:
    """A running reader process. All but `kill` is for the thread that reads."""

    def __init__(self, settings: dict[str, Any], descriptors: tuple[int, ...]) -> None:
        executable = _executable()
        if not executable:
            raise ConfigError("this program is no Python interpreter that could be started again; use --workers 0")
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
            what = f"a reader process cannot be started ({error.strerror})"
            raise ConfigError(f"{what}; use fewer, or read in threads: --workers 0") from error
        self.killed = False
        self._ready: bool | None = None  # None before it has answered
        self._garbled = False
        self._send({**settings, "path": _module_path()})

    def is_alive(self) -> bool:
        """Return whether it can be asked."""
        return not self.killed and self.process.poll() is None

    def is_ready(self) -> bool:
        """Wait until it has started. Return False if it has died instead."""
        if self._ready is None:
            self._ready = self._receive() == ()
        return self._ready

    def ask(self, request: dict[str, Any]) -> Flags | FrameError | None:
        """Send a request and return the answer. Return None if there is none, or none that can be read: it is dead."""
        try:
            self._send(request)
            return self._receive()
        except BaseException:  # an interrupt; the answer that is still to come must not pass for the next one
            self.kill()
            raise

    def _send(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has died, and will not answer
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
        """End it at once, from any thread."""
        self.killed = True
        self.process.kill()

    def end(self) -> str:
        """End it if it still runs, release what belongs to it, and return how it ended: ``ended with SIGABRT``."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.wait(_PATIENCE)  # its pipes close a moment before it has ended
        except subprocess.TimeoutExpired:
            self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # a request that was not sent
                stream.close()
        if self._garbled:
            return "gave an answer that cannot be read"
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
        What the process maps it by: the descriptor, on Windows a name, which vanishes with its last user.
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
            # Above the standard streams: where those are closed, the file has the number of one.
            descriptor = fcntl.fcntl(file.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
        os.ftruncate(descriptor, size)
        self.mapped = mmap.mmap(descriptor, size)
        self.descriptors, self.handle = (descriptor,), descriptor

    def close(self) -> None:
        """Close the descriptors. The memory itself stays for as long as an array refers to it."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = ()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block, in this thread, the signals that a process which is started here is not to receive: it inherits that.

    Were they blocked only by the process itself, Ctrl-C would end one that is just starting.
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
    """Return the path of this interpreter; empty in a program that is no interpreter, such as a frozen one."""
    return "" if getattr(sys, "frozen", False) else sys.executable or ""


def _module_path() -> list[str]:
    """Return where modules are imported from, as here; an editable install may import this package by other means."""
    path = [entry for entry in sys.path if isinstance(entry, str)]
    home = str(Path(echoquad_runtime.__file__).absolute().parents[1])
    return path if home in path else [*path, home]


def _absolute(path: Path) -> Path:
    """Return a path that means the same should the working directory change."""
    try:
        return path.absolute()
    except OSError:  # the working directory is deleted
        return path


def _parse(line: bytes) -> Flags | FrameError | None:
    """Return the flags, or the error, that a line of a reader process stands for; None if it is neither."""
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


def _death(endings: list[str]) -> FrameError:
    """Return the error of a file with which every process dies."""
    same = len(set(endings)) == 1
    what = f"the process that reads it {endings[0]}{' twice' if same else f', then {endings[-1]}'}"
    if endings[-1] == "ended with SIGKILL":
        return FrameReadError(f"{what}; the system may have run out of memory: use fewer --workers, or free memory")
    return FrameDamagedError(f"{what}; the file is damaged or a decoder fails on it: copy it again, or convert it")
