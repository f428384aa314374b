"""Which onnxruntime is installed, and its import: without telemetry, and with nothing on the terminal."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from types import ModuleType

from echoquad_runtime.errors import MissingExtraError

__all__ = [
    "installed_wheels",
    "load_onnxruntime",
    "named",
    "one_line",
    "reinstall",
    "silent_descriptor",
    "silent_python",
]

# Each of these unpacks into the same `onnxruntime` folder, so two of them overwrite each other's files.
_WHEELS = ("onnxruntime", *(f"onnxruntime-{of}" for of in ("gpu", "directml", "openvino", "qnn", "rocm")))

# Redirecting stdout, stderr and warnings is process-wide: only one thread may do it at a time.
_REDIRECTING = threading.RLock()


def installed_wheels(names: Iterable[str] = _WHEELS) -> dict[str, str]:
    """Return the versions of the installed wheels among those that provide onnxruntime: two are a clash.

    They are read off the names of the folders that pip leaves beside the packages, as ``importlib.metadata`` does; to
    import that takes as long as to import onnxruntime.
    """
    here: dict[str, str] = {}
    for folder in sys.path:
        with contextlib.suppress(OSError):  # a zip file, a folder that is not there
            for entry in os.listdir(folder or "."):  # noqa: PTH208 - a Path takes longer
                stem, _, kind = entry.rpartition(".")
                if kind in ("dist-info", "egg-info"):
                    name, _, version = stem.partition("-")
                    # What comes first on the path is what would be imported.
                    here.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version.partition("-")[0])
    return {name: here[name] for name in names if name in here}


def load_onnxruntime() -> ModuleType:
    """Import onnxruntime, without its telemetry and without what it writes to the terminal.

    Whatever in EchoQuad needs onnxruntime gets it here: telemetry can be refused only before the import.

    Raises
    ------
    MissingExtraError
        onnxruntime is not installed, or what is installed cannot be imported.
    """
    # From 1.29 on it writes a device identifier to disk and reports models and their hashes to Microsoft.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        with _silent_import():
            ort = importlib.import_module("onnxruntime")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
            found = "onnxruntime is not installed"
        else:
            found = f"{named(installed_wheels()) or 'onnxruntime'} cannot be imported ({one_line(error)})"
        raise MissingExtraError(f"{found}; do: {reinstall('cpu')} (with an NVIDIA GPU: [gpu])") from error
    if not hasattr(ort, "InferenceSession"):
        # What is left when one of two wheels is uninstalled: it takes the files that they shared.
        found = f"the onnxruntime package is an empty shell (pip lists {named(installed_wheels()) or 'no wheel of it'})"
        raise MissingExtraError(f"{found}; do: {reinstall('cpu')} (with an NVIDIA GPU: [gpu])")
    ort.disable_telemetry_events()  # Windows knows only this switch
    return ort


@contextlib.contextmanager
def silent_python() -> Iterator[None]:
    """Keep from the user what onnxruntime's Python side prints and warns."""
    with _REDIRECTING, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _silent_import() -> Iterator[None]:
    """Keep from the user what onnxruntime writes while it is imported for the first time.

    From 1.23 on it warns about ``/sys/class/drm`` on Raspberry Pi, WSL and others before a log level can be
    set (its issues 26300, 26763, 27092): only the file descriptor is left to turn.
    """
    with _REDIRECTING, contextlib.ExitStack() as stack:
        if "onnxruntime" not in sys.modules:
            stack.enter_context(silent_python())
            stack.enter_context(silent_descriptor())
        yield


@contextlib.contextmanager
def silent_descriptor() -> Iterator[None]:
    """Keep off the terminal what compiled code writes to the standard error, for the whole process."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # without a standard error there is nothing to keep clean
            kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, 2)
            os.dup2(sink, 2)
            os.close(sink)
        yield


def named(versions: dict[str, str]) -> str:
    """Return wheels with their versions as words; empty where there is none."""
    return " and ".join(f"{name} {version}" for name, version in versions.items())


def reinstall(extra: str) -> str:
    """Return the pip lines that leave one wheel: an old one must go first, or two overwrite each other."""
    wheels = " ".join(installed_wheels())
    return (f"pip uninstall -y {wheels}, then " if wheels else "") + f'pip install "echoquad[{extra}]"'


def one_line(error: object) -> str:
    """Return an exception's message in one line of at most 240 characters, without onnxruntime's preamble."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : (\w+) :", r"\1:", text)
    # A CUDA call that fails reports a C++ signature first, and the machine's name after; OpenVINO two
    # signatures, then each of its source files that the exception went through.
    text = re.sub(r"^.*?(\w+ failure -?\d+: .*?) ; GPU=.*$", r"\1", text)
    text = re.sub(r"^.*\[OpenVINO-EP\] ", "OpenVINO: ", text)
    text = re.sub(r"Exception from \S+:\d+: ", "", text).rstrip(".")
    return text if len(text) <= 240 else text[:237] + "..."
