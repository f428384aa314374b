from __future__ import annotations

import json

import pytest

from echoquad_runtime.devices import onnxruntime_loader as wheels
from echoquad_runtime.devices.session_factory import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    OPENVINO_PROVIDER,
    installed_wheels,
    load_onnxruntime,
)
from echoquad_runtime.engine import diagnostics as doctor
from echoquad_runtime.engine.diagnostics import Check, Report, Status, examine
from echoquad_runtime.errors import MissingExtraError

if not installed_wheels():
    pytest.skip("onnxruntime is not installed", allow_module_level=True)

ort = load_onnxruntime()


@pytest.fixture
def one_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_wheels", lambda names=(): {} if names else {"onnxruntime": "1.31.1"})


def by_name(report: Report) -> dict[str, Check]:
    return {check.name: check for check in report.checks}


def test_this_machine() -> None:
    report = examine("cpu")
    checks = by_name(report)
    assert checks["python"].status == checks["onnxruntime"].status == checks["cpu"].status == "ok"
    assert "computed" in checks["cpu"].detail
    assert "cuda" not in checks
    assert {"echoquad", "python", "platform", "machine", "cpus", "numpy", "pillow"} <= report.facts.keys()
    assert all(isinstance(value, str) and "\n" not in value for value in report.facts.values())
    assert all("\n" not in check.detail for check in report.checks)


def test_the_report_is_json() -> None:
    report = examine()
    read = json.loads(json.dumps(report.to_dict()))
    assert read.keys() == {"device", "healthy", "exit_code", "checks", "facts"}
    assert read["checks"][0].keys() == {"name", "status", "detail"}


def test_a_cpu_wheel_is_healthy(one_wheel: None) -> None:
    if CUDA_PROVIDER in ort.get_available_providers():
        pytest.skip("this is the GPU wheel")
    report = examine("auto")
    assert "cuda" not in by_name(report)
    assert (report.healthy, report.exit_code) == (True, 0)


@pytest.mark.parametrize(("device", "status", "code"), [("auto", "warning", 0), ("cuda", "failed", 4)])
@pytest.mark.usefixtures("one_wheel")
def test_cuda_that_does_not_work(
    monkeypatch: pytest.MonkeyPatch, device: doctor.Device, status: Status, code: int
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA_PROVIDER, "CPUExecutionProvider"])
    monkeypatch.setattr(doctor, "cuda_obstacle", lambda: "no NVIDIA driver was found")
    report = examine(device)
    assert by_name(report)["cuda"] == Check("cuda", status, "no NVIDIA driver was found")
    assert (report.exit_code, report.healthy) == (code, code == 0)


@pytest.mark.usefixtures("one_wheel")
def test_cuda_asked_of_a_cpu_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cuda_obstacle", lambda: "no CUDA provider")
    assert examine("cuda").exit_code == 4


def test_cuda_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cuda_obstacle", lambda: None)
    assert by_name(examine("cuda"))["cuda"].status == "ok"


@pytest.mark.parametrize(("device", "status", "code"), [("auto", "warning", 0), ("openvino", "failed", 4)])
@pytest.mark.usefixtures("one_wheel")
def test_openvino_that_does_not_work(
    monkeypatch: pytest.MonkeyPatch, device: doctor.Device, status: Status, code: int
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [OPENVINO_PROVIDER, "CPUExecutionProvider"])
    monkeypatch.setattr(doctor, "openvino_obstacle", lambda: "it does not compute")
    report = examine(device)
    assert by_name(report)["openvino"] == Check("openvino", status, "it does not compute")
    assert (report.exit_code, report.healthy) == (code, code == 0)
    assert "openvino" not in by_name(examine("cpu"))


@pytest.mark.usefixtures("one_wheel")
def test_openvino_asked_of_a_cpu_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(doctor, "openvino_obstacle", lambda: "no OpenVINO provider")
    assert "openvino" not in by_name(examine("auto"))
    assert examine("openvino").exit_code == 4


@pytest.mark.parametrize(("narrow", "words"), [(None, "in bfloat16 too"), ("no", "not in bfloat16 on this processor")])
@pytest.mark.usefixtures("one_wheel")
def test_openvino_that_works(monkeypatch: pytest.MonkeyPatch, narrow: str | None, words: str) -> None:
    monkeypatch.setattr(doctor, "openvino_obstacle", lambda bfloat16=False: narrow if bfloat16 else None)
    report = examine("openvino")
    assert by_name(report)["openvino"] == Check("openvino", "ok", f"computed the expected numbers, {words}")
    assert report.exit_code == 0


@pytest.mark.parametrize(("other", "extra"), [("gpu", "gpu"), ("openvino", "openvino"), ("directml", "cpu")])
def test_two_wheels_leave_room_for_the_one_that_was_wanted(
    monkeypatch: pytest.MonkeyPatch, other: str, extra: str
) -> None:
    both = {"onnxruntime": "1.31.1", f"onnxruntime-{other}": "1.24.1"}
    monkeypatch.setattr(doctor, "installed_wheels", lambda: both)
    assert doctor._one_wheel().detail.endswith(f'then pip install "echoquad[{extra}]"')


def test_two_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.30.0"}
    monkeypatch.setattr(doctor, "installed_wheels", lambda names=(): {} if names else both)
    report = examine("cpu")
    check = by_name(report)["one onnxruntime wheel"]
    assert check.status == "failed"
    assert check.detail.endswith('do: pip uninstall -y onnxruntime onnxruntime-gpu, then pip install "echoquad[gpu]"')
    assert (report.healthy, report.exit_code) == (False, 1)
    assert report.facts["onnxruntime-gpu"] == "1.30.0"


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise MissingExtraError("onnxruntime is not installed; do: ...")

    monkeypatch.setattr(doctor, "load_onnxruntime", refuse)
    report = examine("auto")
    assert by_name(report)["onnxruntime"] == Check("onnxruntime", "failed", "onnxruntime is not installed; do: ...")
    assert "cpu" not in by_name(report)
    assert report.exit_code == 1


def test_a_cpu_that_computes_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "probe", lambda _: "CPUExecutionProvider computed [0.0] where [1.0] is right")
    assert by_name(examine("cpu"))["cpu"].status == "failed"


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_OLDEST_PYTHON", (99, 0))
    assert doctor._python().status == "failed"


@pytest.mark.usefixtures("one_wheel")
def test_extra_checks_are_made_last_and_may_break() -> None:
    def torch() -> Check:
        return Check("torch", "warning", "not installed")

    def broken() -> Check:
        raise ValueError("a\nb")

    report = examine("cpu", extra_checks=[torch, broken])
    assert report.checks[-2:] == (
        Check("torch", "warning", "not installed"),
        Check("broken", "failed", "ValueError: a b"),
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
def test_int8_instructions(features: set[str], detail: str) -> None:
    (check,) = doctor._int8(frozenset(features))
    assert check.status == "ok"
    assert check.detail.startswith(detail)


def test_no_instructions_are_listed() -> None:
    assert doctor._int8(frozenset()) == []


@pytest.fixture
def on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "system", lambda: "Linux")
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: (0, "no NVIDIA driver was found"))


@pytest.mark.parametrize(
    ("features", "named"),
    [
        ({"amx_int8", "amx_bf16", "avx512_vnni"}, "an Intel Sapphire Rapids with AMX"),
        ({"avx512_vnni"}, "an AMD EPYC with AVX-512 VNNI"),
        ({"avx_vnni"}, "an AMD EPYC with AVX-512 VNNI"),
    ],
)
@pytest.mark.usefixtures("on_linux")
def test_what_openvino_would_bring(monkeypatch: pytest.MonkeyPatch, features: set[str], named: str) -> None:
    monkeypatch.setattr(wheels, "installed_wheels", lambda: {"onnxruntime": "1.32.0"})
    (check,) = doctor._other_wheels([CPU_PROVIDER], frozenset(features))
    assert (check.name, check.status) == ("onnxruntime-openvino", "ok") and named in check.detail
    assert "benchmarks/engines.py" in check.detail and "\n" not in check.detail
    assert check.detail.endswith(
        'do: pip uninstall -y onnxruntime, then pip install "echoquad[openvino]", then echoquad tune BUNDLE'
    )


@pytest.mark.usefixtures("on_linux")
def test_where_openvino_would_bring_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = frozenset({"avx512_vnni"})
    assert doctor._other_wheels([CPU_PROVIDER], frozenset({"avx2"})) == []
    assert doctor._other_wheels([OPENVINO_PROVIDER, CPU_PROVIDER], fast) == []
    assert doctor._other_wheels([CUDA_PROVIDER, CPU_PROVIDER], fast) == []
    monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")
    assert doctor._other_wheels([CPU_PROVIDER], fast) == []


@pytest.mark.usefixtures("on_linux")
def test_what_the_gpu_wheel_would_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: (13000, None))
    (check,) = doctor._other_wheels([OPENVINO_PROVIDER, CPU_PROVIDER], frozenset({"avx512_vnni"}))
    assert (check.name, check.status) == ("onnxruntime-gpu", "ok") and "there is an NVIDIA GPU" in check.detail
    assert check.detail.endswith('pip install "echoquad[gpu]"')
    assert doctor._other_wheels([CUDA_PROVIDER, CPU_PROVIDER], frozenset()) == []


@pytest.mark.parametrize(("device", "shown"), [("auto", True), ("cpu", False)])
@pytest.mark.usefixtures("one_wheel", "on_linux")
def test_other_wheels_are_named_where_no_device_was(
    monkeypatch: pytest.MonkeyPatch, device: doctor.Device, shown: bool
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU_PROVIDER])
    monkeypatch.setattr(doctor, "cpu_features", lambda: frozenset({"avx512_vnni"}))
    report = examine(device)
    assert ("onnxruntime-openvino" in by_name(report)) is shown
    assert (report.healthy, report.exit_code) == (True, 0)
