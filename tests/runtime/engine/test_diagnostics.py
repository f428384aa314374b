"""Host diagnostics: the status of every check, the exit code, and suggested wheels."""

from __future__ import annotations

import json

import pytest

from echoquad_runtime.devices import onnxruntime_loader as wheels
from echoquad_runtime.devices.execution_providers import CPU_PROVIDER, CUDA_PROVIDER, OPENVINO_PROVIDER
from echoquad_runtime.devices.onnxruntime_loader import installed_wheels, load_onnxruntime
from echoquad_runtime.engine import diagnostics
from echoquad_runtime.engine.diagnostics import CheckStatus, DiagnosticCheck, DiagnosticReport, run_diagnostics
from echoquad_runtime.errors import MissingExtraError

if not installed_wheels():
    pytest.skip("onnxruntime is not installed", allow_module_level=True)

ort = load_onnxruntime()


@pytest.fixture
def one_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "installed_wheels", lambda names=(): {} if names else {"onnxruntime": "1.31.1"})


def by_name(report: DiagnosticReport) -> dict[str, DiagnosticCheck]:
    return {check.name: check for check in report.checks}


def test_diagnostics_of_this_machine() -> None:
    report = run_diagnostics("cpu")
    checks = by_name(report)
    assert checks["python"].status == checks["onnxruntime"].status == checks["cpu"].status == "ok"
    assert "computed" in checks["cpu"].detail
    assert "cuda" not in checks
    assert {"echoquad", "python", "platform", "machine", "cpus", "numpy", "pillow"} <= report.facts.keys()
    assert all(isinstance(value, str) and "\n" not in value for value in report.facts.values())
    assert all("\n" not in check.detail for check in report.checks)


def test_report_is_json() -> None:
    report = run_diagnostics()
    read = json.loads(json.dumps(report.to_dict()))
    assert read.keys() == {"device", "healthy", "exit_code", "checks", "facts"}
    assert read["checks"][0].keys() == {"name", "status", "detail"}


def test_cpu_wheel_is_healthy(one_wheel: None) -> None:
    if CUDA_PROVIDER in ort.get_available_providers():
        pytest.skip("this is the GPU wheel")
    report = run_diagnostics("auto")
    assert "cuda" not in by_name(report)
    assert (report.healthy, report.exit_code) == (True, 0)


@pytest.mark.parametrize(("device", "status", "code"), [("auto", "warning", 0), ("cuda", "failed", 4)])
@pytest.mark.usefixtures("one_wheel")
def test_failing_cuda_is_a_warning_unless_requested(
    monkeypatch: pytest.MonkeyPatch, device: diagnostics.Device, status: CheckStatus, code: int
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA_PROVIDER, "CPUExecutionProvider"])
    monkeypatch.setattr(diagnostics, "cuda_unavailable_reason", lambda: "no NVIDIA driver was found")
    report = run_diagnostics(device)
    assert by_name(report)["cuda"] == DiagnosticCheck("cuda", status, "no NVIDIA driver was found")
    assert (report.exit_code, report.healthy) == (code, code == 0)


@pytest.mark.usefixtures("one_wheel")
def test_cuda_requested_of_a_cpu_wheel_exits_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "cuda_unavailable_reason", lambda: "no CUDA provider")
    assert run_diagnostics("cuda").exit_code == 4


def test_working_cuda_is_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "cuda_unavailable_reason", lambda: None)
    assert by_name(run_diagnostics("cuda"))["cuda"].status == "ok"


@pytest.mark.parametrize(("device", "status", "code"), [("auto", "warning", 0), ("openvino", "failed", 4)])
@pytest.mark.usefixtures("one_wheel")
def test_failing_openvino_is_a_warning_unless_requested(
    monkeypatch: pytest.MonkeyPatch, device: diagnostics.Device, status: CheckStatus, code: int
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [OPENVINO_PROVIDER, "CPUExecutionProvider"])
    monkeypatch.setattr(diagnostics, "openvino_unavailable_reason", lambda: "it does not compute")
    report = run_diagnostics(device)
    assert by_name(report)["openvino"] == DiagnosticCheck("openvino", status, "it does not compute")
    assert (report.exit_code, report.healthy) == (code, code == 0)
    assert "openvino" not in by_name(run_diagnostics("cpu"))


@pytest.mark.usefixtures("one_wheel")
def test_openvino_requested_of_a_cpu_wheel_exits_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(diagnostics, "openvino_unavailable_reason", lambda: "no OpenVINO provider")
    assert "openvino" not in by_name(run_diagnostics("auto"))
    assert run_diagnostics("openvino").exit_code == 4


@pytest.mark.parametrize(("narrow", "words"), [(None, "also in bfloat16"), ("no", "not in bfloat16 on this processor")])
@pytest.mark.usefixtures("one_wheel")
def test_working_openvino_is_ok(monkeypatch: pytest.MonkeyPatch, narrow: str | None, words: str) -> None:
    monkeypatch.setattr(diagnostics, "openvino_unavailable_reason", lambda bfloat16=False: narrow if bfloat16 else None)
    report = run_diagnostics("openvino")
    assert by_name(report)["openvino"] == DiagnosticCheck("openvino", "ok", f"computed the expected numbers, {words}")
    assert report.exit_code == 0


@pytest.mark.parametrize(("other", "extra"), [("gpu", "gpu"), ("openvino", "openvino"), ("directml", "cpu")])
def test_two_wheels_suggest_the_matching_extra(monkeypatch: pytest.MonkeyPatch, other: str, extra: str) -> None:
    both = {"onnxruntime": "1.31.1", f"onnxruntime-{other}": "1.24.1"}
    for module in (diagnostics, wheels):
        monkeypatch.setattr(module, "installed_wheels", lambda: both)
    assert diagnostics._check_single_wheel().detail.endswith(f'then pip install "echoquad[{extra}]"')


def test_two_wheels_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.30.0"}
    for module in (diagnostics, wheels):
        monkeypatch.setattr(module, "installed_wheels", lambda names=(): {} if names else both)
    report = run_diagnostics("cpu")
    check = by_name(report)["one onnxruntime wheel"]
    assert check.status == "failed"
    assert check.detail.endswith('do: pip uninstall -y onnxruntime onnxruntime-gpu, then pip install "echoquad[gpu]"')
    assert (report.healthy, report.exit_code) == (False, 1)
    assert report.facts["onnxruntime-gpu"] == "1.30.0"


def test_missing_onnxruntime_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise MissingExtraError("onnxruntime is not installed; do: ...")

    monkeypatch.setattr(diagnostics, "load_onnxruntime", refuse)
    report = run_diagnostics("auto")
    assert by_name(report)["onnxruntime"] == DiagnosticCheck(
        "onnxruntime", "failed", "onnxruntime is not installed; do: ..."
    )
    assert "cpu" not in by_name(report)
    assert report.exit_code == 1


def test_wrong_numbers_on_the_cpu_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "probe_provider", lambda _: "CPUExecutionProvider computed [0.0]; expected [1.0]")
    assert by_name(run_diagnostics("cpu"))["cpu"].status == "failed"


def test_old_python_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "_OLDEST_PYTHON", (99, 0))
    assert diagnostics._check_python().status == "failed"


@pytest.mark.usefixtures("one_wheel")
def test_extra_checks_run_last_and_may_raise() -> None:
    def torch() -> DiagnosticCheck:
        return DiagnosticCheck("torch", "warning", "not installed")

    def broken() -> DiagnosticCheck:
        raise ValueError("a\nb")

    report = run_diagnostics("cpu", extra_checks=[torch, broken])
    assert report.checks[-2:] == (
        DiagnosticCheck("torch", "warning", "not installed"),
        DiagnosticCheck("broken", "failed", "ValueError: a b"),
    )
    assert report.exit_code == 1


@pytest.mark.parametrize(
    ("features", "detail"),
    [
        ({"fpu", "avx512_vnni", "avx_vnni"}, "avx512_vnni, avx_vnni"),
        ({"fp", "asimd", "asimddp"}, "asimddp"),
        ({"fpu", "avx2"}, "none of "),
    ],
)
def test_int8_instructions_are_listed(features: set[str], detail: str) -> None:
    (check,) = diagnostics._check_int8(frozenset(features))
    assert check.status == "ok"
    assert check.detail.startswith(detail)


def test_unknown_instructions_are_not_reported() -> None:
    assert diagnostics._check_int8(frozenset()) == []


@pytest.fixture
def on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics.platform, "system", lambda: "Linux")
    monkeypatch.setattr(diagnostics.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(diagnostics, "nvidia_driver", lambda: (0, "no NVIDIA driver was found"))


@pytest.mark.parametrize(
    ("features", "named"),
    [
        ({"amx_int8", "amx_bf16", "avx512_vnni"}, "an Intel Sapphire Rapids with AMX"),
        ({"avx512_vnni"}, "an AMD EPYC with AVX-512 VNNI"),
        ({"avx_vnni"}, "an AMD EPYC with AVX-512 VNNI"),
    ],
)
@pytest.mark.usefixtures("on_linux")
def test_openvino_wheel_is_suggested(monkeypatch: pytest.MonkeyPatch, features: set[str], named: str) -> None:
    monkeypatch.setattr(wheels, "installed_wheels", lambda: {"onnxruntime": "1.32.0"})
    (check,) = diagnostics._suggest_wheels([CPU_PROVIDER], frozenset(features))
    assert (check.name, check.status) == ("onnxruntime-openvino", "ok") and named in check.detail
    assert "benchmarks/engines.py" in check.detail and "\n" not in check.detail
    assert check.detail.endswith(
        'do: pip uninstall -y onnxruntime, then pip install "echoquad[openvino]", then echoquad tune BUNDLE'
    )


@pytest.mark.usefixtures("on_linux")
def test_openvino_wheel_is_not_suggested_without_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = frozenset({"avx512_vnni"})
    assert diagnostics._suggest_wheels([CPU_PROVIDER], frozenset({"avx2"})) == []
    assert diagnostics._suggest_wheels([OPENVINO_PROVIDER, CPU_PROVIDER], fast) == []
    assert diagnostics._suggest_wheels([CUDA_PROVIDER, CPU_PROVIDER], fast) == []
    monkeypatch.setattr(diagnostics.platform, "machine", lambda: "aarch64")
    assert diagnostics._suggest_wheels([CPU_PROVIDER], fast) == []


@pytest.mark.usefixtures("on_linux")
def test_gpu_wheel_is_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "nvidia_driver", lambda: (13000, None))
    (check,) = diagnostics._suggest_wheels([OPENVINO_PROVIDER, CPU_PROVIDER], frozenset({"avx512_vnni"}))
    assert (check.name, check.status) == ("onnxruntime-gpu", "ok") and "there is an NVIDIA GPU" in check.detail
    assert check.detail.endswith('pip install "echoquad[gpu]"')
    assert diagnostics._suggest_wheels([CUDA_PROVIDER, CPU_PROVIDER], frozenset()) == []


@pytest.mark.parametrize(("device", "shown"), [("auto", True), ("cpu", False)])
@pytest.mark.usefixtures("one_wheel", "on_linux")
def test_wheels_are_suggested_for_device_auto_only(
    monkeypatch: pytest.MonkeyPatch, device: diagnostics.Device, shown: bool
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU_PROVIDER])
    monkeypatch.setattr(diagnostics, "cpu_features", lambda: frozenset({"avx512_vnni"}))
    report = run_diagnostics(device)
    assert ("onnxruntime-openvino" in by_name(report)) is shown
    assert (report.healthy, report.exit_code) == (True, 0)
