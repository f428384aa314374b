"""The CUDA probe: the unavailable reasons of simulated wheels, drivers and libraries."""

from __future__ import annotations

import ctypes
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest

from echoquad_runtime.devices import cuda_probe as cuda
from echoquad_runtime.devices import onnxruntime_loader as wheels
from echoquad_runtime.devices.execution_providers import CPU_PROVIDER, CUDA_PROVIDER

if not wheels.installed_wheels():
    pytest.skip("onnxruntime is not installed", allow_module_level=True)


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    *,
    providers: tuple[str, ...] = (CUDA_PROVIDER, CPU_PROVIDER),
    installed: dict[str, str] | None = None,
    driver: tuple[int, str | None] = (13000, None),
    failure: str | None = "CUDA failure 36: API call is not supported",
    missing: str | None = None,
) -> str | None:
    """Return the unavailable reason of a simulated machine."""
    installed = {"onnxruntime-gpu": "1.31.1"} if installed is None else installed
    fake = SimpleNamespace(
        __version__="1.31.1",
        cuda_version="13.0",
        get_available_providers=lambda: list(providers),
        preload_dlls=lambda: print("Failed to load libcublas.so.13"),  # noqa: T201
    )
    monkeypatch.setattr(cuda, "load_onnxruntime", lambda: fake)
    for module in (cuda, wheels):
        monkeypatch.setattr(
            module, "installed_wheels", lambda names=None: {"nvidia-cublas-cu12": "12.6"} if names else installed
        )
    monkeypatch.setattr(cuda, "nvidia_driver", lambda: driver)
    monkeypatch.setattr(cuda, "probe_provider", lambda _: failure)
    monkeypatch.setattr(cuda, "_missing_library", lambda *_: missing)
    return cuda.cuda_unavailable_reason()


def test_working_cuda_has_no_unavailable_reason(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert pretend(monkeypatch, failure=None) is None
    assert capfd.readouterr() == ("", "")


def test_wheel_without_cuda_is_uninstalled_first(monkeypatch: pytest.MonkeyPatch) -> None:
    message = pretend(monkeypatch, providers=(CPU_PROVIDER,), installed={"onnxruntime": "1.31.1"})
    assert message is not None
    if sys.platform != "darwin":
        assert message.startswith("no CUDA provider in onnxruntime 1.31.1; do: pip uninstall -y onnxruntime, ")


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no CUDA to install")
def test_two_wheels_are_both_uninstalled(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.30.0"}
    assert pretend(monkeypatch, providers=(CPU_PROVIDER,), installed=both) == (
        "no CUDA provider in onnxruntime 1.31.1 and onnxruntime-gpu 1.30.0 (installed over each other); "
        'do: pip uninstall -y onnxruntime onnxruntime-gpu, then pip install "echoquad[gpu]"'
    )


def test_old_driver_is_the_unavailable_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    message = pretend(monkeypatch, driver=(12080, None), missing="libcublas.so.13 cannot be loaded")
    assert message is not None
    assert message.startswith("the NVIDIA driver supports CUDA up to 12.8, too old for onnxruntime-gpu 1.31.1")
    assert '"onnxruntime-gpu[cuda,cudnn]<1.27"' in message


def test_missing_library_is_the_unavailable_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pretend(monkeypatch, missing="libcublasLt.so.13 cannot be loaded") == (
        "libcublasLt.so.13 cannot be loaded, required by onnxruntime-gpu 1.31.1 (built for CUDA 13.0) "
        '(pip lists nvidia-cublas-cu12 12.6); do: pip install "echoquad[gpu]"'
    )


def test_failing_probe_is_the_unavailable_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    message = pretend(monkeypatch)
    assert message is not None
    assert "does not compute on CUDA: CUDA failure 36" in message


def test_missing_driver_is_the_unavailable_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    version, cause = cuda.nvidia_driver()
    assert version == 0
    assert cause is not None
    assert "no NVIDIA driver was found" in cause


@pytest.mark.parametrize("visible", [None, ""])
def test_driver_without_gpu_is_the_unavailable_reason(monkeypatch: pytest.MonkeyPatch, visible: str | None) -> None:
    def name_error(_code: int, label: object) -> int:
        label._obj.value = b"CUDA_ERROR_NO_DEVICE"  # type: ignore[attr-defined]
        return 0

    driver = SimpleNamespace(cuInit=lambda _: 100, cuDriverGetVersion=lambda _: 0, cuGetErrorName=name_error)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    _, cause = cuda.nvidia_driver()
    assert cause is not None
    assert "cuInit: 100, CUDA_ERROR_NO_DEVICE" in cause
    assert ("CUDA_VISIBLE_DEVICES=''" in cause) is (visible == "")


@pytest.mark.skipif(os.name == "nt", reason="Windows names no missing library")
def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **_: object) -> None:
        if "cuda" in name:
            raise OSError("libcublasLt.so.13: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ctypes, "CDLL", load)
    module = ModuleType("onnxruntime")
    module.__file__ = "/site-packages/onnxruntime/__init__.py"
    missing = cuda._missing_library(module, 13)
    assert missing == "libcublasLt.so.13 cannot be loaded"
