"""The program of a reader process: read frames into shared memory. `ReaderProcess` starts it.

Standard input carries one JSON object per line: first the settings, then one request per frame. Standard output
carries one JSON object per line: one answer to the settings, then one per request. The files that are decoded here are
untrusted, so the parent accepts nothing but JSON of the expected form.

This module imports only what reading a frame takes. In particular it never imports onnxruntime.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import FrameError, FrameTooLargeError
from echoquad_runtime.frames.frame_file import FrameFile
from echoquad_runtime.predict.frame_reader import read_quadrants

__all__ = ["main"]


def main(settings: dict[str, Any]) -> None:
    """Answer the parent's requests until standard input ends.

    Parameters
    ----------
    settings
        ``contract``: the contract's JSON. ``shape``: the five numbers [B, 4, 1, S, S] of the shared memory.
        ``memory``: its file descriptor, on Windows its name.
    """
    answers = _take_stdout()
    _set_signals()
    contract = Contract.from_json(settings["contract"])
    quadrants = _map_memory(settings["memory"], settings["shape"])
    _send(answers, {"flags": []})
    while request := sys.stdin.buffer.readline():
        with _exit_with_parent():
            answer = _answer(json.loads(request), contract, quadrants)
        _send(answers, answer)


def _answer(request: dict[str, Any], contract: Contract, quadrants: npt.NDArray[np.uint8]) -> dict[str, Any]:
    file = FrameFile(Path(request["path"]), request["name"], request["frame"], request["flip"])
    try:
        return {"flags": read_quadrants(file, contract, quadrants[request["index"]])}
    except FrameError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except MemoryError:
        message = "there is not enough memory to decode the frame; expected a smaller frame"
        return {"error": FrameTooLargeError.__name__, "message": message}
    except Exception as error:  # its text may quote a patient's name
        message = f"reading failed with {type(error).__name__}, which is a bug in EchoQuad; please report it"
        return {"error": FrameError.__name__, "message": message}


def _send(answers: IO[bytes], answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer).encode("ascii") + b"\n")
    answers.flush()


def _take_stdout() -> IO[bytes]:
    """Return standard output for answers alone: what decoders print to descriptor 1 goes to the null device."""
    answers = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    return answers


def _map_memory(memory: int | str, shape: list[int]) -> npt.NDArray[np.uint8]:
    size = int(np.prod(shape))
    if sys.platform == "win32":
        mapped = mmap.mmap(-1, size, tagname=str(memory))
    else:
        mapped = mmap.mmap(int(memory), size)
        os.close(int(memory))
    return np.frombuffer(mapped, np.uint8).reshape(shape)


def _set_signals() -> None:
    """Set the signal handling that a process inherits from the thread that starts it.

    The parent decides when this process ends. A signal to the whole process group (Ctrl-C) or to the service (systemd's
    SIGTERM) must not interrupt it: the parent finishes the current frames first.
    """
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    if sys.platform == "linux":
        import fcntl

        signal.signal(signal.SIGIO, signal.SIG_DFL)
        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())


@contextlib.contextmanager
def _exit_with_parent() -> Iterator[None]:
    """End this process, on Linux, if the parent dies within the block.

    A decoder that hangs never comes back to read standard input, and a thread that waits there would not get the
    interpreter lock if the decoder holds it. The kernel sends SIGIO when the parent's end of the pipe closes, and its
    default action ends the process. The parent sends nothing within the block, so the signal has no other cause.
    """
    if sys.platform != "linux":
        yield
        return
    import fcntl

    flags = fcntl.fcntl(0, fcntl.F_GETFL)
    fcntl.fcntl(0, fcntl.F_SETFL, flags | os.O_ASYNC)
    try:
        yield
    finally:
        fcntl.fcntl(0, fcntl.F_SETFL, flags)
