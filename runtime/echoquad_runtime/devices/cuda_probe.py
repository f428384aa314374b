"""What keeps CUDA from computing here: the wheel, the driver, its age, or a library; found by trying."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path
from types import ModuleType

from echoquad_runtime.devices.execution_providers import CUDA_PROVIDER, probe
from echoquad_runtime.devices.onnxruntime_loader import (
    installed_wheels,
    load_onnxruntime,
    named,
    one_line,
    reinstall,
    silent_python,
)

__all__ = ["cuda_unavailable_reason", "nvidia_driver"]


def cuda_unavailable_reason() -> str | None:
    """Say in one line why CUDA cannot be used here; None when it has just computed the right numbers.

    Raises
    ------
    MissingExtraError
        onnxruntime is not installed.
    """
    ort = load_onnxruntime()
    if CUDA_PROVIDER not in ort.get_available_providers():
        if sys.platform == "darwin":
            return "macOS has no CUDA"
        wheels = installed_wheels()
        clash = " (installed over each other)" if len(wheels) > 1 else ""
        return f"no CUDA provider in {named(wheels) or 'onnxruntime'}{clash}; do: {reinstall('gpu')}"
    supported, cause = nvidia_driver()
    if cause is not None:
        return cause
    with silent_python(), contextlib.suppress(Exception):  # what this cannot load, the probe will miss
        ort.preload_dlls()
    failure = probe(CUDA_PROVIDER)
    return None if failure is None else _diagnosis(ort, supported, failure)


def _diagnosis(ort: ModuleType, supported: int, failure: str) -> str:
    """Name the cause when there is a driver (for CUDA ``supported``: 13000 is 13.0) and the probe failed.

    It opens onnxruntime's CUDA library by hand, so it comes after the probe: onnxruntime is to be the first
    to load its own libraries, in the order that it knows.
    """
    built_for = str(getattr(ort, "cuda_version", "") or "unknown")
    major = int(built_for.partition(".")[0]) if built_for[0].isdigit() else 0
    wheel = f"onnxruntime-gpu {ort.__version__} (built for CUDA {built_for})"
    if supported // 1000 < major:
        older = ', or pip install "onnxruntime-gpu[cuda,cudnn]<1.27" for CUDA 12' if major == 13 else ""
        most = f"{supported // 1000}.{supported % 1000 // 10}"
        return f"the NVIDIA driver supports CUDA {most} at most, too old for {wheel}; do: update it{older}"
    missing = _missing_library(ort, major)
    if missing is not None:
        has = named(installed_wheels(("nvidia-cublas-cu11", "nvidia-cublas-cu12", "nvidia-cublas")))
        needed = f"which {wheel} needs (pip lists {has or 'no CUDA libraries'})"
        return f'{missing}, {needed}; do: pip install "echoquad[gpu]"'
    return f"{wheel} does not compute on CUDA: {failure}; do: compare with nvidia-smi"


def nvidia_driver() -> tuple[int, str | None]:
    """Return the CUDA version that the NVIDIA driver supports (13000 is 13.0) and what is wrong with it."""
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
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "" if hidden is None else f", with CUDA_VISIBLE_DEVICES={hidden!r}"
    return version.value, f"the NVIDIA driver gives no GPU (cuInit: {error}{why}); do: check nvidia-smi"


def _missing_library(ort: ModuleType, major: int) -> str | None:
    """Say what keeps onnxruntime's CUDA library, or cuDNN, from being loaded; None when nothing does."""
    capi = Path(ort.__file__ or "").parent / "capi"
    if os.name == "nt":  # Windows names no dependency: each one is tried before what needs it
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
            text = one_line(error)
            lost, found, _ = text.partition(": cannot open shared object file")
            return f"{lost} cannot be loaded" if found else f"{Path(name).name} cannot be loaded ({text})"
    return None
