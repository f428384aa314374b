"""The CUDA probe: whether CUDA computes on this machine, and otherwise why not (wheel, driver, or a library)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path
from types import ModuleType

from echoquad_runtime.devices.error_summary import summarize_error
from echoquad_runtime.devices.execution_providers import CUDA_PROVIDER, probe_provider
from echoquad_runtime.devices.onnxruntime_loader import (
    format_versions,
    installed_wheels,
    load_onnxruntime,
    missing_provider,
)
from echoquad_runtime.devices.output_suppression import suppress_python_output

__all__ = ["cuda_unavailable_reason", "nvidia_driver"]


def cuda_unavailable_reason() -> str | None:
    """Return in one line why CUDA is unavailable; None if it has just computed the expected numbers.

    Raises
    ------
    MissingExtraError
        onnxruntime is not installed.
    """
    ort = load_onnxruntime()
    if CUDA_PROVIDER not in ort.get_available_providers():
        return "macOS has no CUDA" if sys.platform == "darwin" else missing_provider("CUDA", "gpu")
    supported, problem = nvidia_driver()
    if problem is not None:
        return problem
    with suppress_python_output(), contextlib.suppress(Exception):  # the probe reports a library that is missing
        ort.preload_dlls()
    failure = probe_provider(CUDA_PROVIDER)
    return None if failure is None else _diagnose(ort, supported, failure)


def _diagnose(ort: ModuleType, supported: int, failure: str) -> str:
    """Return the cause of a failed probe.

    Call it only after the probe: it loads onnxruntime's CUDA library itself, and onnxruntime must be the first to load
    its own libraries, in the order that it requires.

    Parameters
    ----------
    supported
        CUDA version that the driver supports; 13000 is 13.0.
    """
    built_for = str(getattr(ort, "cuda_version", "") or "unknown")
    major = int(built_for.partition(".")[0]) if built_for[0].isdigit() else 0
    wheel = f"onnxruntime-gpu {ort.__version__} (built for CUDA {built_for})"
    if supported // 1000 < major:
        older = ', or pip install "onnxruntime-gpu[cuda,cudnn]<1.27" for CUDA 12' if major == 13 else ""
        newest = f"{supported // 1000}.{supported % 1000 // 10}"
        return f"the NVIDIA driver supports CUDA up to {newest}, too old for {wheel}; do: update the driver{older}"
    missing = _missing_library(ort, major)
    if missing is not None:
        libraries = format_versions(installed_wheels(("nvidia-cublas-cu11", "nvidia-cublas-cu12", "nvidia-cublas")))
        required = f"required by {wheel} (pip lists {libraries or 'no CUDA libraries'})"
        return f'{missing}, {required}; do: pip install "echoquad[gpu]"'
    return f"{wheel} does not compute on CUDA: {failure}; do: compare with nvidia-smi"


def nvidia_driver() -> tuple[int, str | None]:
    """Return the CUDA version that the NVIDIA driver supports (13000 is 13.0), and its problem or None."""
    name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    version, label = ctypes.c_int(0), ctypes.c_char_p()
    try:
        driver = ctypes.CDLL(name)
        code = int(driver.cuInit(0))
        driver.cuDriverGetVersion(ctypes.byref(version))
        driver.cuGetErrorName(code, ctypes.byref(label))
    except (OSError, AttributeError):
        advice = "install the NVIDIA driver (in a container: start it with --gpus all)"
        return 0, f"no NVIDIA driver was found ({name} cannot be loaded); do: {advice}"
    if code == 0:
        return version.value, None
    error = f"{code}, {(label.value or b'unknown').decode(errors='replace')}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cause = "" if visible is None else f", with CUDA_VISIBLE_DEVICES={visible!r}"
    return version.value, f"the NVIDIA driver reports no GPU (cuInit: {error}{cause}); do: check nvidia-smi"


def _missing_library(ort: ModuleType, major: int) -> str | None:
    """Return which library prevents loading onnxruntime's CUDA library or cuDNN; None if both load."""
    capi = Path(ort.__file__ or "").parent / "capi"
    if os.name == "nt":  # Windows does not name a missing dependency: load each one before the library that needs it
        parts = ("cudart64_{0}", "cublasLt64_{0}", "cublas64_{0}", "cufft64_{1}", "cudnn64_9")
        names = [f"{part.format(major, major - 1)}.dll" for part in parts]
        names += [str(capi / f"onnxruntime_providers_{part}.dll") for part in ("shared", "cuda")]
    else:
        names = [str(capi / f"libonnxruntime_providers_{part}.so") for part in ("shared", "cuda")]
        names.append("libcudnn.so.9")
    for name in names:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL, winmode=0)  # 0 searches PATH, as onnxruntime does
        except OSError as error:
            text = summarize_error(error)
            library, is_missing, _ = text.partition(": cannot open shared object file")
            return f"{library} cannot be loaded" if is_missing else f"{Path(name).name} cannot be loaded ({text})"
    return None
