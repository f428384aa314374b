"""``echoquad doctor``: its report, its exit codes and its error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echoquad_runtime.devices.execution_providers import CUDA_PROVIDER
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime

WITHOUT_TORCH = "sys.modules |= dict.fromkeys(['torch', 'torchvision', 'onnx', 'sklearn', 'matplotlib'])"


def test_doctor_reports_each_check_and_writes_json(echoquad: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    report = tmp_path / "doctor.json"
    ran = echoquad("doctor", "--device", "cpu", "--json", report)
    for line in ("[ok] python: ", "[ok] onnxruntime: ", "[ok] cpu: computed the expected numbers", "[ok] torch: "):
        assert line in ran.out
    assert "] isolation: a reader process decodes; it may take 2048 MiB and 60 seconds for a file" in ran.out
    assert "matmul mean 256, expected 256" in ran.out
    assert ran.err == f"wrote {report.as_posix()}\n"
    found = json.loads(report.read_text("utf-8"))
    assert found.keys() == {"device", "healthy", "exit_code", "checks", "facts"}
    assert (found["device"], found["healthy"], found["exit_code"]) == ("cpu", True, 0)
    assert {"python", "onnxruntime", "cpu", "torch"} <= {check["name"] for check in found["checks"]}


def test_doctor_of_a_frozen_program_warns_that_decoders_are_not_isolated(echoquad: Callable[..., Any]) -> None:
    frozen = f"{WITHOUT_TORCH}; from echoquad_runtime.frames.isolation import reader_pool as pools"
    ran = echoquad("doctor", "--device", "cpu", driver=f"{frozen}; pools.can_isolate = lambda: False")
    assert "[warning] isolation: this program has no Python interpreter" in ran.out


def test_doctor_without_torch_exits_0(echoquad: Callable[..., Any]) -> None:
    ran = echoquad("doctor", "--device", "cpu", driver=WITHOUT_TORCH)
    assert '[ok] torch: not installed; only training and export need it: pip install "echoquad[export]"' in ran.out


@pytest.mark.skipif(CUDA_PROVIDER in load_onnxruntime().get_available_providers(), reason="this onnxruntime has CUDA")
def test_doctor_of_an_unavailable_device_exits_4(echoquad: Callable[..., Any]) -> None:
    ran = echoquad("doctor", "--device", "cuda", code=4, driver=WITHOUT_TORCH)
    assert "[failed] cuda: " in ran.out
    assert ran.error[0] == "E_DEVICE_UNAVAILABLE" and "cuda" in ran.errors[0]


def test_doctor_of_a_faulty_host_exits_1(echoquad: Callable[..., Any], tmp_path: Path) -> None:
    report = tmp_path / "doctor.json"
    ran = echoquad("doctor", "--json", report, code=1, driver=f"{WITHOUT_TORCH}; sys.modules['onnxruntime'] = None")
    assert "[failed] onnxruntime: " in ran.out
    assert ran.error[0] == "E_HOST" and "onnxruntime" in ran.errors[0]
    assert json.loads(report.read_text("utf-8"))["healthy"] is False
