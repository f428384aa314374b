"""The installed onnxruntime wheel, and its import with telemetry refused and nothing printed to the terminal."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Iterable
from types import ModuleType

from echoquad_runtime.devices.error_summary import summarize_error
from echoquad_runtime.devices.output_suppression import suppress_native_stderr, suppress_python_output
from echoquad_runtime.errors import MissingExtraError

__all__ = ["format_versions", "install_command", "installed_wheels", "load_onnxruntime", "missing_provider"]

# Every one of these wheels unpacks into the folder `onnxruntime`, so two of them overwrite each other's files.
_WHEELS = ("onnxruntime", *(f"onnxruntime-{name}" for name in ("gpu", "directml", "openvino", "qnn", "rocm")))


def installed_wheels(names: Iterable[str] = _WHEELS) -> dict[str, str]:
    """Return the version of each installed wheel among `names`; two wheels of onnxruntime are a conflict.

    The versions come from the names of pip's metadata folders. ``importlib.metadata`` does the same, but importing it
    takes as long as importing onnxruntime.
    """
    versions: dict[str, str] = {}
    for folder in sys.path:
        with contextlib.suppress(OSError):  # a zip file, or a folder that does not exist
            for entry in os.listdir(folder or "."):  # noqa: PTH208 - a Path takes longer
                stem, _, suffix = entry.rpartition(".")
                if suffix in ("dist-info", "egg-info"):
                    name, _, version = stem.partition("-")
                    # The first match on sys.path is the one that Python imports.
                    versions.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version.partition("-")[0])
    return {name: versions[name] for name in names if name in versions}


def format_versions(versions: dict[str, str]) -> str:
    """Return package names with their versions, joined by "and"; empty for none."""
    return " and ".join(f"{name} {version}" for name, version in versions.items())


def install_command(extra: str) -> str:
    """Return the pip commands that leave one onnxruntime wheel: they uninstall the present ones first."""
    wheels = " ".join(installed_wheels())
    return (f"pip uninstall -y {wheels}, then " if wheels else "") + f'pip install "echoquad[{extra}]"'


def missing_provider(title: str, extra: str) -> str:
    """Return one line for an onnxruntime wheel that lacks an execution provider, with the command that installs it."""
    wheels = installed_wheels()
    conflict = " (installed over each other)" if len(wheels) > 1 else ""
    return f"no {title} provider in {format_versions(wheels) or 'onnxruntime'}{conflict}; do: {install_command(extra)}"


def load_onnxruntime() -> ModuleType:
    """Import onnxruntime without telemetry and without terminal output.

    All of EchoQuad imports onnxruntime through this function, because telemetry can be refused only before the import.

    Raises
    ------
    MissingExtraError
        onnxruntime is not installed or cannot be imported.
    """
    # From 1.29 on, onnxruntime writes a device identifier to disk and reports models and their hashes to Microsoft.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        with contextlib.ExitStack() as stack:
            if "onnxruntime" not in sys.modules:
                # From 1.23 on, the import warns about /sys/class/drm (Raspberry Pi, WSL) before a log level can be
                # set: its issues 26300, 26763 and 27092. Redirecting the file descriptor is the only remedy.
                stack.enter_context(suppress_python_output())
                stack.enter_context(suppress_native_stderr())
            ort = importlib.import_module("onnxruntime")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
            problem = "onnxruntime is not installed"
        else:
            wheels = format_versions(installed_wheels()) or "onnxruntime"
            problem = f"{wheels} cannot be imported ({summarize_error(error)})"
        raise _missing(problem) from error
    if not hasattr(ort, "InferenceSession"):
        # Uninstalling one of two wheels removes the files that they share.
        wheels = format_versions(installed_wheels()) or "none"
        raise _missing(f"the onnxruntime package is an empty shell (installed wheels: {wheels})")
    ort.disable_telemetry_events()  # the only switch that Windows builds obey
    return ort


def _missing(problem: str) -> MissingExtraError:
    return MissingExtraError(f"{problem}; do: {install_command('cpu')} (with an NVIDIA GPU: [gpu])")
