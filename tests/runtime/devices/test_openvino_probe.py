"""The OpenVINO probe and sessions on OpenVINO, with simulated wheels and machines."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from echoquad_runtime.devices import execution_providers as providers
from echoquad_runtime.devices import onnxruntime_loader as wheels
from echoquad_runtime.devices import openvino_probe as openvino
from echoquad_runtime.devices import session_factory as devices
from echoquad_runtime.devices.execution_providers import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    OPENVINO_PROVIDER,
    PROBE_MODEL,
    probe_provider,
)
from echoquad_runtime.devices.session_factory import open_session
from echoquad_runtime.errors import DeviceUnavailableError, UsageError

if not wheels.installed_wheels():
    pytest.skip("onnxruntime is not installed", allow_module_level=True)

has_openvino = OPENVINO_PROVIDER in wheels.load_onnxruntime().get_available_providers()
OTHERS: list[devices.Device] = ["auto", "cpu", "cuda"]


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Round to 8 significant bits, ties to even; exact for the values in these tests."""
    fraction, exponent = np.frexp(array)
    return np.asarray(np.ldexp(np.round(fraction * 256) / 256, exponent), np.float32)


def fake_session(*, bfloat16: bool = False, on_openvino: int = 3, on_cpu: int = 0) -> Any:
    """Return a fake session that computes y = 2 x + 1, with nodes on the given providers."""

    def run(_: object, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [2 * (to_bfloat16(feeds["x"]) if bfloat16 else feeds["x"]) + 1]

    def part(provider: str) -> SimpleNamespace:
        return SimpleNamespace(ep_name=provider, get_nodes=lambda: [SimpleNamespace(op_type="Det")])

    parts = [part(OPENVINO_PROVIDER)] * on_openvino + [part(CPU_PROVIDER)] * on_cpu
    return SimpleNamespace(run=run, get_provider_graph_assignment_info=lambda: parts)


# ---------------------------------------------------------------------------------------------- unavailable reasons


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    *,
    provided: tuple[str, ...] = (OPENVINO_PROVIDER, CPU_PROVIDER),
    installed: dict[str, str] | None = None,
    has_assignment: bool = True,
    failure: str | None = None,
    bfloat16_failure: str | None = None,
    machine: tuple[str, str] = ("Linux", "x86_64"),
    bfloat16: bool = False,
) -> str | None:
    """Return the unavailable reason of a simulated machine."""
    installed = {"onnxruntime-openvino": "1.24.1"} if installed is None else installed
    session = type("InferenceSession", (), {"get_provider_graph_assignment_info": None} if has_assignment else {})
    fake = SimpleNamespace(InferenceSession=session, get_available_providers=lambda: list(provided))
    monkeypatch.setattr(openvino, "load_onnxruntime", lambda: fake)
    for module in (openvino, wheels):
        monkeypatch.setattr(module, "installed_wheels", lambda: installed)
    monkeypatch.setattr(openvino, "probe_provider", lambda _, bfloat16=False: bfloat16_failure if bfloat16 else failure)
    monkeypatch.setattr(platform, "system", lambda: machine[0])
    monkeypatch.setattr(platform, "machine", lambda: machine[1])
    return openvino.openvino_unavailable_reason(bfloat16=bfloat16)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_working_openvino_has_no_unavailable_reason(monkeypatch: pytest.MonkeyPatch, bfloat16: bool) -> None:
    assert pretend(monkeypatch, bfloat16=bfloat16) is None


def test_wheel_without_openvino_is_uninstalled_first(monkeypatch: pytest.MonkeyPatch) -> None:
    message = pretend(monkeypatch, provided=(CPU_PROVIDER,), installed={"onnxruntime": "1.31.1"})
    assert message == (
        "no OpenVINO provider in onnxruntime 1.31.1; "
        'do: pip uninstall -y onnxruntime, then pip install "echoquad[openvino]"'
    )


def test_two_wheels_are_both_uninstalled(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"onnxruntime": "1.31.1", "onnxruntime-openvino": "1.24.1"}
    assert pretend(monkeypatch, provided=(CPU_PROVIDER,), installed=both) == (
        "no OpenVINO provider in onnxruntime 1.31.1 and onnxruntime-openvino 1.24.1 (installed over each other); "
        'do: pip uninstall -y onnxruntime onnxruntime-openvino, then pip install "echoquad[openvino]"'
    )


@pytest.mark.parametrize("machine", [("Darwin", "x86_64"), ("Darwin", "arm64"), ("Linux", "aarch64")])
def test_unsupported_machine_gets_no_pip_command(monkeypatch: pytest.MonkeyPatch, machine: tuple[str, str]) -> None:
    message = pretend(monkeypatch, provided=(CPU_PROVIDER,), installed={"onnxruntime": "1.31.1"}, machine=machine)
    assert message == f"onnxruntime-openvino has no wheel for {machine[0]} on {machine[1]}"


def test_wheel_without_node_assignment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pretend(monkeypatch, has_assignment=False, installed={"onnxruntime-openvino": "1.22.0"}) == (
        "onnxruntime-openvino 1.22.0 does not report which nodes OpenVINO computes; expected 1.24 or newer; "
        'do: pip uninstall -y onnxruntime-openvino, then pip install "echoquad[openvino]"'
    )


def test_failing_probe_is_the_unavailable_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    message = pretend(monkeypatch, failure="onnxruntime created a session on CPU")
    assert message is not None
    assert message.startswith("onnxruntime-openvino 1.24.1 does not compute with OpenVINO: onnxruntime created")


def test_processor_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pretend(monkeypatch, bfloat16_failure="computed in float32") is None
    assert pretend(monkeypatch, bfloat16_failure="computed in float32", bfloat16=True) == (
        "OpenVINO does not compute in bfloat16 on this processor; do: choose another precision"
    )


@pytest.mark.skipif(os.name == "nt", reason="os.add_dll_directory is real there")
def test_dll_directory_is_added_on_windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    libraries = tmp_path / "openvino" / "libs"
    libraries.mkdir(parents=True)
    (libraries.parent / "__init__.py").write_text("raise AssertionError('imported')")
    added: list[str] = []
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", "before")
    monkeypatch.setattr(os, "add_dll_directory", added.append, raising=False)
    assert pretend(monkeypatch) is None  # not on Linux
    assert added == []
    for _ in range(2):  # the second call adds nothing
        assert pretend(monkeypatch, machine=("Windows", "AMD64")) is None
    assert added == [str(libraries)]
    assert os.environ["PATH"].split(os.pathsep) == [str(libraries), "before"]


# ---------------------------------------------------------------------------------------------- the probe


@pytest.mark.parametrize("computes", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_probe_distinguishes_float32_from_bfloat16(
    monkeypatch: pytest.MonkeyPatch, computes: bool, asked: bool
) -> None:
    monkeypatch.setattr(providers, "create_session", lambda *_, **__: fake_session(bfloat16=computes))
    failure = probe_provider(OPENVINO_PROVIDER, bfloat16=asked)
    assert (failure is None) is (computes == asked)
    assert failure is None or "\n" not in failure


@pytest.mark.skipif(has_openvino, reason="this onnxruntime has OpenVINO")
def test_probe_fails_if_the_session_is_on_another_provider() -> None:
    assert probe_provider(OPENVINO_PROVIDER) is not None


# ---------------------------------------------------------------------------------------------- a session


@pytest.fixture
def openvino_sessions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Simulate a working OpenVINO; return the options of its sessions."""
    asked: list[dict[str, Any]] = []
    real = providers.create_session

    def create(ort: Any, model: bytes, provider: str, **options: Any) -> Any:
        if provider != OPENVINO_PROVIDER:
            return real(ort, model, provider, **options)
        asked.append(options)
        return fake_session()

    monkeypatch.setattr(devices, "openvino_unavailable_reason", lambda bfloat16: None)
    monkeypatch.setattr(devices, "create_session", create)
    yield asked


def test_requested_openvino_runs(openvino_sessions: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "schedulable_cpus", lambda: 8)
    opened = open_session(PROBE_MODEL, device="openvino", threads=3)
    assert (opened.device, opened.provider, opened.note, opened.threads) == ("openvino", OPENVINO_PROVIDER, "", 3)
    assert (openvino_sessions[0]["threads"], openvino_sessions[0]["bfloat16"]) == (3, False)
    open_session(PROBE_MODEL, device="openvino", bfloat16=True)
    assert openvino_sessions[1]["bfloat16"] is True


def test_openvino_threads_are_limited_to_the_cpus(
    openvino_sessions: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "schedulable_cpus", lambda: 2)
    assert open_session(PROBE_MODEL, device="openvino", threads=5).threads == openvino_sessions[0]["threads"] == 2


def test_auto_never_selects_openvino(openvino_sessions: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    ort = wheels.load_onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: [OPENVINO_PROVIDER, CPU_PROVIDER])
    monkeypatch.setattr(devices, "installed_wheels", lambda: {"onnxruntime-openvino": "1.24.1"})
    auto, cpu = (open_session(PROBE_MODEL, device=device) for device in ("auto", "cpu"))  # type: ignore[arg-type]
    assert (auto.device, cpu.device, openvino_sessions) == ("cpu", "cpu", [])
    assert cpu.note == ""
    assert auto.note == (
        "on the CPU: onnxruntime-openvino 1.24.1 is built without CUDA; for OpenVINO choose device openvino"
    )


@pytest.mark.parametrize(("on_openvino", "on_cpu", "is_openvino"), [(3, 0, True), (3, 3, True), (2, 3, False)])
@pytest.mark.usefixtures("openvino_sessions")
def test_openvino_is_refused_if_most_nodes_fall_back(
    monkeypatch: pytest.MonkeyPatch, on_openvino: int, on_cpu: int, is_openvino: bool
) -> None:
    real = providers.create_session
    made = fake_session(on_openvino=on_openvino, on_cpu=on_cpu)
    monkeypatch.setattr(
        devices,
        "create_session",
        lambda ort, model, provider, **o: made if provider == OPENVINO_PROVIDER else real(ort, model, provider, **o),
    )
    if is_openvino:
        assert open_session(PROBE_MODEL, device="openvino").session is made
        return
    with pytest.raises(DeviceUnavailableError, match=r"OpenVINO leaves 3 of the model's 5 nodes \(Det\) to the CPU"):
        open_session(PROBE_MODEL, device="openvino")


@pytest.mark.skipif(has_openvino, reason="this onnxruntime has OpenVINO")
def test_unavailable_openvino_raises() -> None:
    with pytest.raises(DeviceUnavailableError) as caught:
        open_session(PROBE_MODEL, device="openvino")
    assert str(caught.value).startswith("device openvino cannot be used: ")
    assert str(caught.value).endswith("device cpu")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.skipif(has_openvino, reason="this onnxruntime has OpenVINO")
def test_silent_fallback_to_the_cpu_is_detected(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # The real onnxruntime, assumed to have OpenVINO, creates a CPU session with a mere warning.
    monkeypatch.setattr(devices, "openvino_unavailable_reason", lambda bfloat16: None)
    with pytest.raises(DeviceUnavailableError, match="OpenVINO works, but not for this model"):
        open_session(PROBE_MODEL, device="openvino")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("device", OTHERS)
def test_bfloat16_requires_openvino(device: devices.Device) -> None:
    with pytest.raises(UsageError, match=f"openvino; found device {device}; do: ") as caught:
        open_session(PROBE_MODEL, device=device, bfloat16=True)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("bfloat16", "hint"), [(False, "f32"), (True, "bf16")])
def test_openvino_options_state_precision_and_threads(bfloat16: bool, hint: str) -> None:
    options = providers._openvino_options(3, bfloat16)
    settings = json.loads(options["load_config"])["CPU"]
    assert options["device_type"] == "CPU"
    assert settings["INFERENCE_PRECISION_HINT"] == hint
    assert (settings["INFERENCE_NUM_THREADS"], settings["NUM_STREAMS"]) == ("3", "1")
    assert settings["PERFORMANCE_HINT"] == "LATENCY"


# ---------------------------------------------------------------------------------------------- probe_devices


@pytest.mark.parametrize("provided", [(), (CUDA_PROVIDER,), (OPENVINO_PROVIDER,), (CUDA_PROVIDER, OPENVINO_PROVIDER)])
def test_probe_devices_covers_the_providers_of_the_wheel(
    monkeypatch: pytest.MonkeyPatch, provided: tuple[str, ...]
) -> None:
    ort = wheels.load_onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: [*provided, CPU_PROVIDER])
    monkeypatch.setattr(devices, "cuda_unavailable_reason", lambda: "no NVIDIA driver was found")
    monkeypatch.setattr(devices, "openvino_unavailable_reason", lambda: None)
    expected: dict[str, str | None] = {"cpu": None}
    if CUDA_PROVIDER in provided:
        expected["cuda"] = "no NVIDIA driver was found"
    if OPENVINO_PROVIDER in provided:
        expected["openvino"] = None
    assert devices.probe_devices() == expected


def test_probe_devices_reports_wrong_numbers_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "probe_provider", lambda provider: f"{provider} computed [0.0]; expected [1.0]")
    assert devices.probe_devices()["cpu"] == f"{CPU_PROVIDER} computed [0.0]; expected [1.0]"
