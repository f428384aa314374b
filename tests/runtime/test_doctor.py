from __future__ import annotations

import json
from pathlib import Path

import pytest

from echoquad_runtime import doctor
from echoquad_runtime.devices import CUDA_PROVIDER, OPENVINO_PROVIDER, installed_wheels, load_onnxruntime
from echoquad_runtime.doctor import Check, Report, Status, examine
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
    ("text", "detail"),
    [
        ("flags\t\t: fpu avx2 avx512_vnni avx_vnni\n", "avx512_vnni, avx_vnni"),
        ("Features\t: fp asimd asimddp\n", "asimddp"),
        ("flags : fpu avx2\n", "none of "),
    ],
)
def test_int8_instructions(tmp_path: Path, text: str, detail: str) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    (check,) = doctor._int8(tmp_path / "cpuinfo")
    assert check.status == "ok"
    assert check.detail.startswith(detail)


def test_no_cpuinfo(tmp_path: Path) -> None:
    assert doctor._int8(tmp_path / "absent") == []
    (tmp_path / "empty").write_text("processor : 0\n")
    assert doctor._int8(tmp_path / "empty") == []
