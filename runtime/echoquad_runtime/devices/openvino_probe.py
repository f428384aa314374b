"""What keeps OpenVINO, onnxruntime's provider of that name, from computing here; found by trying.

It is OpenVINO on the CPU. Its GPU and NPU are other devices, with other numbers, and are not offered.
"""

from __future__ import annotations

import os
import platform
from importlib import util
from pathlib import Path

from echoquad_runtime.devices.execution_providers import OPENVINO_PROVIDER, probe
from echoquad_runtime.devices.onnxruntime_loader import installed_wheels, load_onnxruntime, named, reinstall

__all__ = ["openvino_unavailable_reason"]


def openvino_unavailable_reason(*, bfloat16: bool = False) -> str | None:
    """Say in one line why OpenVINO cannot be used here; None when it has just computed the right numbers.

    Parameters
    ----------
    bfloat16
        Whether it must compute in bfloat16 too. Where the processor does not, OpenVINO says nothing and
        computes in float32.

    Raises
    ------
    MissingExtraError
        onnxruntime is not installed.
    """
    ort, wheels = load_onnxruntime(), installed_wheels()
    wheel = named(wheels) or "onnxruntime"
    if OPENVINO_PROVIDER not in ort.get_available_providers():
        system, machine = platform.system(), platform.machine()
        if system not in ("Linux", "Windows") or machine.lower() not in ("x86_64", "amd64"):
            return f"onnxruntime-openvino has no wheel for {system} on {machine}"
        clash = " (installed over each other)" if len(wheels) > 1 else ""
        return f"no OpenVINO provider in {wheel}{clash}; do: {reinstall('openvino')}"
    if not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        # And 1.22 keeps the number of threads and the precision from OpenVINO.
        return f"{wheel} does not tell which nodes OpenVINO computes, as 1.24 does; do: {reinstall('openvino')}"
    _add_libraries()
    failure = probe(OPENVINO_PROVIDER)
    if failure is not None:
        return f"{wheel} does not compute with OpenVINO: {failure}; do: {reinstall('openvino')}"
    if bfloat16 and probe(OPENVINO_PROVIDER, bfloat16=True) is not None:
        return "OpenVINO does not compute in bfloat16 on this processor; do: choose another precision"
    return None


def _add_libraries() -> None:
    """Tell Windows where the wheel ``openvino`` keeps its libraries: there they are not in onnxruntime's own."""
    if platform.system() != "Windows":
        return
    found = util.find_spec("openvino")  # its libraries are wanted, not its Python
    if found is None or found.origin is None:
        return
    folder = Path(found.origin).parent / "libs"
    path = os.environ.get("PATH", "")
    if folder.is_dir() and str(folder) not in path.split(os.pathsep):
        os.add_dll_directory(str(folder))  # type: ignore[attr-defined,unused-ignore]
        os.environ["PATH"] = f"{folder}{os.pathsep}{path}"
