"""The program of a reader process: read, decode and cut frames. `ReaderProcess` starts it.

Standard input carries one JSON object per line: first the settings, then one request per frame, each followed by the
bytes of a file in memory if it announces them. Standard output carries one JSON object per line: one answer to the
settings, then one per request, each followed by the levels of the frame if it announces them. The files that are
decoded here are untrusted, so the parent accepts nothing but answers of the expected form.

This module imports only what reading a frame takes. In particular it never imports onnxruntime.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import FrameError
from echoquad_runtime.frames import sources
from echoquad_runtime.frames.file_access import read_head
from echoquad_runtime.frames.formats import detect_format
from echoquad_runtime.frames.frame_file import FrameFile
from echoquad_runtime.frames.isolation import limits
from echoquad_runtime.frames.isolation.limits import MAX_MESSAGE

__all__ = ["main", "set_signals", "take_stdout"]

Levels = npt.NDArray[np.uint8]


def main(settings: dict[str, Any]) -> None:
    """Answer the parent's requests until standard input ends.

    Parameters
    ----------
    settings
        ``memory``: bytes of address space that this process may take beyond what it has when it is ready.
    """
    answers = take_stdout()
    set_signals()
    limits.set_limits(settings["memory"])
    _send(answers, {"ready": True})
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        data = None if request["size"] is None else sys.stdin.buffer.read(request["size"])
        limits.renew_cpu_limit(request["seconds"])
        with _exit_with_parent():
            answer, levels = _answer(request, data)
        _send(answers, answer, levels)
        data = levels = None  # not kept while the next request is awaited


def _answer(request: dict[str, Any], data: bytes | None) -> tuple[dict[str, Any], Levels | None]:
    try:
        return _perform(request, data)
    except FrameError as error:
        # The parent refuses other characters, which may be in the name of the file.
        message = "".join(character if character.isprintable() else "?" for character in str(error))
        return {"error": type(error).__name__, "message": message[:MAX_MESSAGE]}, None
    except MemoryError:
        return {"error": MemoryError.__name__, "message": ""}, None
    except Exception as error:  # its text may quote a patient's name
        message = f"reading failed with {type(error).__name__}, which is a bug in EchoQuad; please report it"
        return {"error": FrameError.__name__, "message": message}, None


def _perform(request: dict[str, Any], data: bytes | None) -> tuple[dict[str, Any], Levels | None]:
    operation = request["operation"]
    if operation == "count":
        path = Path(request["path"])
        return {"counts": sources.count_frames(path, detect_format(read_head(path), path.suffix))}, None
    if operation == "pixel_format":
        return {"pixel_format": sources.pixel_format(data or b"")}, None
    content = data if data is not None else _read(request)
    flags: tuple[str, ...] = ()
    if operation == "image":
        levels = sources.to_levels(sources.to_image(content))
    elif operation == "grey":
        levels = sources.to_grey(content)
    else:
        levels, flags = sources.to_grey_and_flags(content)
    if operation == "quadrants":
        contract = _contract(request["contract"])
        quadrants = np.empty((4, 1, contract.input_size, contract.input_size), np.uint8)
        flags = (*sources.cut_quadrants(levels, contract, quadrants), *flags)
        levels = quadrants
    levels = np.ascontiguousarray(levels)
    return {"shape": levels.shape, "flags": flags}, levels


def _read(request: dict[str, Any]) -> sources.Content:
    return sources.read_content(FrameFile(Path(request["path"]), "", request["frame"], request["flip"]))


@functools.lru_cache(maxsize=4)
def _contract(text: str) -> Contract:
    return Contract.from_json(text)


def _send(answers: IO[bytes], answer: dict[str, Any], levels: Levels | None = None) -> None:
    answers.write(json.dumps(answer).encode("ascii") + b"\n")
    if levels is not None:
        answers.write(levels.data.cast("B"))
    answers.flush()


def take_stdout() -> IO[bytes]:
    """Return standard output for answers alone: what decoders print to descriptor 1 goes to the null device."""
    answers = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    return answers


def set_signals() -> None:
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
