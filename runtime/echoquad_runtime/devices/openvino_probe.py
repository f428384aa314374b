"""The OpenVINO probe: whether onnxruntime's OpenVINO provider computes on this machine's CPU, and otherwise why not.

OpenVINO's GPU and NPU devices round differently and are not supported.
"""

from __future__ import annotations

import os
import platform
from importlib import util
from pathlib import Path

from echoquad_runtime.devices.execution_providers import OPENVINO_PROVIDER, probe_provider
from echoquad_runtime.devices.onnxruntime_loader import (
    format_versions,
    install_command,
    installed_wheels,
    load_onnxruntime,
    missing_provider,
)

__all__ = ["openvino_unavailable_reason"]


def openvino_unavailable_reason(*, bfloat16: bool = False) -> str | None:
    """Return in one line why OpenVINO is unavailable; None if it has just computed the expected numbers.

    Parameters
    ----------
    bfloat16
        Whether it must also compute in bfloat16. On a processor without bfloat16, OpenVINO silently computes in
        float32.

    Raises
    ------
    MissingExtraError
        onnxruntime is not installed.
    """
    ort = load_onnxruntime()
    wheel = format_versions(installed_wheels()) or "onnxruntime"
    if OPENVINO_PROVIDER not in ort.get_available_providers():
        system, machine = platform.system(), platform.machine()
        if system not in ("Linux", "Windows") or machine.lower() not in ("x86_64", "amd64"):
            return f"onnxruntime-openvino has no wheel for {system} on {machine}"
        return missing_provider("OpenVINO", "openvino")
    if not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        # Also, 1.22 does not pass the number of threads and the precision on to OpenVINO.
        return (
            f"{wheel} does not report which nodes OpenVINO computes; expected 1.24 or newer; "
            f"do: {install_command('openvino')}"
        )
    _add_dll_directory()
    failure = probe_provider(OPENVINO_PROVIDER)
    if failure is not None:
        return f"{wheel} does not compute with OpenVINO: {failure}; do: {install_command('openvino')}"
    if bfloat16 and probe_provider(OPENVINO_PROVIDER, bfloat16=True) is not None:
        return "OpenVINO does not compute in bfloat16 on this processor; do: choose another precision"
    return None


def _add_dll_directory() -> None:
    """Add the libraries of the ``openvino`` wheel to Windows' search path; onnxruntime's wheel lacks them."""
    if platform.system() != "Windows":
        return
    spec = util.find_spec("openvino")  # locates the package without importing it
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent / "libs"
    path = os.environ.get("PATH", "")
    if folder.is_dir() and str(folder) not in path.split(os.pathsep):
        os.add_dll_directory(str(folder))  # type: ignore[attr-defined,unused-ignore]
        os.environ["PATH"] = f"{folder}{os.pathsep}{path}"
