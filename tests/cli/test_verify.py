"""``echoquad verify``, ``bench`` and ``doctor``: what a cart is checked with."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echoquad_runtime._version import __version__
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.devices.execution_providers import CUDA_PROVIDER
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime

FILES = ("bundle.json", "model.fp32.onnx", "golden.npz", "MODEL_CARD.md")
WITHOUT_TORCH = "sys.modules |= dict.fromkeys(['torch', 'torchvision', 'onnx', 'sklearn', 'matplotlib'])"

cpu_wheel_alone = pytest.mark.skipif(
    CUDA_PROVIDER in load_onnxruntime().get_available_providers(), reason="this onnxruntime has CUDA"
)


def test_a_whole_bundle(tiny_bundle: Path, echoquad: Callable[..., Any]) -> None:
    ran = echoquad("verify", tiny_bundle, "--device", "cpu")
    assert ran.out.startswith(f"PASS {tiny_bundle.as_posix()}: 3 files whole, 6 golden frames on cpu in fp32: worst ")
    assert len(ran.out.splitlines()) == 1
    what, provider, versions = ran.out.rstrip("\n").split("; ")
    assert what.endswith("0 frame flips, 0 quadrant flips")
    assert provider == "CPUExecutionProvider"
    found = platform.python_version(), f"{platform.system()} {platform.machine()}"
    assert re.fullmatch(
        rf"echoquad {re.escape(__version__)}, onnxruntime\S* \S+, Python {found[0]}, {found[1]}", versions
    )
    assert ran.err == ""  # the CPU was asked for: nothing to explain


@cpu_wheel_alone
def test_the_cpu_that_auto_settles_for_is_explained(tiny_bundle: Path, echoquad: Callable[..., Any]) -> None:
    ran = echoquad("verify", tiny_bundle)
    assert " on cpu in fp32" in ran.out
    assert len(ran.err.splitlines()) == 1
    assert ran.err.startswith("on the CPU: onnxruntime")


def test_a_bundle_that_is_not_whole(
    make_tiny_bundle: Callable[..., Path], many: Callable[..., Any], tmp_path: Path
) -> None:
    folders = {}
    for name in FILES:
        for fault in ("flipped", "cut", "gone"):
            folder = make_tiny_bundle(tmp_path / f"{fault}-{name}")
            data = bytearray((folder / name).read_bytes())
            data[len(data) // 2] ^= 1
            if fault == "gone":
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(data if fault == "flipped" else data[: len(data) // 2])
            folders[fault, name] = folder
    lies = make_tiny_bundle(tmp_path / "lies", graph={"logit_scale": 1.5})
    lines = [["verify", folder] for folder in [*folders.values(), lies]]
    found, modules = many([*lines, ["predict", lies, "x.png", "--precision", "fp64"]])
    assert "torch" not in modules
    for ((fault, name), folder), ran in zip(folders.items(), found[: len(folders)], strict=True):
        missing = (fault, name) == ("gone", "bundle.json")  # no bundle at all, rather than one that was changed
        assert (ran.code, ran.out, len(ran.err.splitlines())) == (1 if missing else 3, "", 1), (fault, name, ran)
        assert ran.errors[0].startswith(f"{folder.as_posix()}: "), (fault, name)
        assert missing or name in ran.errors[0], (fault, name)
    ran = found[len(folders)]
    assert (ran.code, ran.out) == (3, "")
    assert f"{lies.as_posix()}: FAILED, 3 files whole" in ran.errors[0]
    assert ran.errors[0].endswith("do not deploy it on this device")
    assert found[-1].code == 1


# The record


def test_a_record_is_kept_whatever_is_found(
    tiny_bundle: Path,
    make_tiny_bundle: Callable[..., Path],
    many: Callable[..., Any],
    left_in: Callable[..., Any],
    tmp_path: Path,
) -> None:
    lies = make_tiny_bundle(tmp_path / "lies", graph={"logit_scale": 1.5})
    nan = make_tiny_bundle(tmp_path / "nan", graph={"logit_scale": float("nan")})
    damaged = make_tiny_bundle(tmp_path / "damaged")
    (damaged / "MODEL_CARD.md").write_text("another")
    bundles = {"good": tiny_bundle, "lies": lies, "nan": nan, "damaged": damaged, "none": tmp_path / "none"}
    for name in bundles:
        (tmp_path / f"{name}.json").write_text("an older record")
    found, modules = many(
        [["verify", folder, "--device", "cpu", "--json", tmp_path / f"{name}.json"] for name, folder in bundles.items()]
    )
    assert "torch" not in modules
    assert left_in(tmp_path) == []
    records = {name: json.loads((tmp_path / f"{name}.json").read_text("utf-8")) for name in bundles}
    for (name, folder), ran in zip(bundles.items(), found, strict=True):
        assert ran.code == {"good": 0, "none": 1}.get(name, 3), name
        assert ran.err.startswith(f"wrote {(tmp_path / name).as_posix()}.json\n"), name
        assert records[name]["verdict"] == ("failed" if ran.code else "passed"), name
        assert records[name]["bundle"] == folder.as_posix()
    (check,) = records["good"]["checks"]
    assert (check["passed"], check["frame_flips"], len(check["golden"])) == (True, 0, 6)
    (check,) = records["lies"]["checks"]
    assert check["passed"] is False and check["max_abs_dlogit"] > 1e-4
    assert records["nan"]["checks"][0]["max_abs_dlogit"] is None
    assert "MODEL_CARD.md" in records["damaged"]["error"] and records["damaged"]["checks"] == []
    assert "no bundle here" in records["none"]["error"] and records["none"]["manifest_sha256"] is None


def test_a_record_that_cannot_be_written(
    tiny_bundle: Path, make_tiny_bundle: Callable[..., Path], many: Callable[..., Any], tmp_path: Path
) -> None:
    lies = make_tiny_bundle(tmp_path / "lies", graph={"logit_scale": 1.5})
    nowhere = tmp_path / "nowhere" / "record.json"
    lines = [["verify", folder, "--device", "cpu", "--json", nowhere] for folder in (tiny_bundle, lies)]
    (good, bad), _ = many(lines)
    assert good.code == 1 and good.out.startswith("PASS ")
    assert "record.json: cannot be written" in good.errors[0]
    assert bad.code == 3 and "FAILED" in bad.errors[0]
    assert bad.err.startswith("the record is not written: ")


# Several devices and precisions

# What another machine may find: a device that works, here the CPU under another name, and one that does not.
OTHER_DEVICES = """
import echoquad_runtime.devices.session_factory as devices, echoquad_runtime.engine.onnx_engine as session
devices.probe_devices = lambda: {"cpu": None, "openvino": None, "cuda": "no NVIDIA driver was found; do: install it"}
def open_session(model, *, device, **options):
    return devices.open_session(model, device="cpu", **{**options, "bfloat16": False})
session.open_session = open_session
"""


def test_every_precision_and_every_device(
    make_tiny_bundle: Callable[..., Path], echoquad: Callable[..., Any], many: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = make_tiny_bundle(tmp_path / "bundle", precisions=("fp32", "int8"))
    record = tmp_path / "record.json"
    cpu = ["--device", "cpu"]
    (every, both, wrong), _ = many(
        [
            ["verify", bundle, "--precision", "all", *cpu],
            ["verify", bundle, "--all-devices", "--precision", "int8"],
            ["verify", bundle, "--all-devices", *cpu, "--json", record],
        ]
    )
    assert (every.code, wrong.code) == (0, 2)
    assert wrong.errors[0].startswith("--all-devices and --device cpu: expected one of the two")
    assert not record.exists()
    lines = every.out.splitlines()
    assert [line.split()[:3] for line in lines[2:-1]] == [
        ["cpu", "fp32", "CPUExecutionProvider"],
        ["cpu", "int8", "CPUExecutionProvider"],
    ]
    assert all(line.split()[-3:] == ["0", "0", "passed"] for line in lines[2:-1])
    assert lines[-1].startswith(f"PASS {bundle.as_posix()}: 4 files whole, 2 of 2 checks of 6 golden frames; echoquad ")
    assert both.out.splitlines()[2].split()[:2] == ["cpu", "int8"] and " fp32 " not in both.out

    ran = echoquad("verify", bundle, "--all-devices", "--json", record, driver=OTHER_DEVICES)
    lines = ran.out.splitlines()
    assert [line.split()[1] for line in lines[2:7]] == ["fp32", "int8", "fp32", "int8", "bf16"]
    assert lines[7] == "cuda is not usable: no NVIDIA driver was found; do: install it"
    assert "5 of 5 checks of 6 golden frames" in lines[8]
    found = json.loads(record.read_text("utf-8"))
    assert found["devices_not_usable"] == {"cuda": "no NVIDIA driver was found; do: install it"}
    assert [check["passed"] for check in found["checks"]] == [True] * 5


def test_one_of_several_that_fails_fails_all(
    make_tiny_bundle: Callable[..., Path],
    make_tiny_graph: Callable[..., bytes],
    many: Callable[..., Any],
    tmp_path: Path,
) -> None:
    contract = Bundle(make_tiny_bundle(tmp_path / "plain")).contract
    wrong = make_tiny_graph(contract, logit_scale=1.5)
    bundle = make_tiny_bundle(tmp_path / "bundle", precisions=("fp32", "int8"), graphs={"int8": wrong})
    (ran,), _ = many([["verify", bundle, "--precision", "all", "--device", "cpu"]])
    assert ran.code == 3
    assert [line.split()[-1] for line in ran.out.splitlines()[2:]] == ["passed", "FAILED"]
    assert ran.errors[0].startswith(f"{bundle.as_posix()}: FAILED in 1 of 2 checks: int8 on cpu: 4 files whole")
    assert ran.errors[0].endswith("do not deploy it on this device")


def test_a_changed_bundle_judges_nothing(
    bundle_copy: Path, echoquad: Callable[..., Any], frames_folder: Path, tmp_path: Path
) -> None:
    model = bundle_copy / "model.fp32.onnx"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    ran = echoquad("predict", bundle_copy, frames_folder, "--out", tmp_path / "out.csv", code=3)
    assert "model.fp32.onnx has SHA-256" in ran.errors[0]
    assert not (tmp_path / "out.csv").exists()


def test_bench(tiny_bundle: Path, echoquad: Callable[..., Any], frames_folder: Path, tmp_path: Path) -> None:
    (frames_folder / "broken.png").write_text("no image")
    figures = tmp_path / "bench.json"
    options = ["--frames", "10", "--batch-size", "4", "--json", figures, "--device", "cpu"]
    ran = echoquad("bench", tiny_bundle, frames_folder, *options, code=5)
    assert ran.errors[0].startswith("broken.png: ")
    lines = ran.out.splitlines()
    assert lines[0].startswith("10 frames on cpu in fp32, one at a time")
    assert [line.split("  ")[0] for line in lines[3:7]] == ["decode", "quadrants", "infer", "vote"]
    assert "frames a second in batches of 4" in lines[-2]
    assert lines[-1].startswith("peak memory ")
    found = json.loads(figures.read_text("utf-8"))
    wanted = "device precision batch_size frames stages latency_ms frames_per_second load_ms first_frame_ms peak_rss_mb"
    assert {*wanted.split(), "versions"} <= found.keys()
    assert found["stages"].keys() == {"decode", "quadrants", "infer", "vote"}
    assert found["latency_ms"].keys() == {"p50", "p95", "p99", "max"}
    assert (found["device"], found["precision"], found["batch_size"], found["frames"]) == ("cpu", "fp32", 4, 10)
    assert found["frames_per_second"] > 0
    assert {"echoquad", "python", "numpy", "pillow"} <= found["versions"].keys()


def test_bench_without_frames_takes_the_golden_ones(
    tiny_bundle: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (golden, empty, none), _ = many(
        [
            ["bench", tiny_bundle, "--frames", "3"],
            ["bench", tiny_bundle, tmp_path / "empty"],
            ["bench", tmp_path / "empty"],
        ]
    )
    assert (golden.code, empty.code, none.code) == (0, 1, 1)
    assert golden.out.startswith("3 frames on ")
    assert "no frame can be read for the benchmark; the first: " in empty.errors[0]
    assert "no bundle here" in none.errors[0]


def test_doctor(echoquad: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    report = tmp_path / "doctor.json"
    ran = echoquad("doctor", "--device", "cpu", "--json", report)
    for line in ("[ok] python: ", "[ok] onnxruntime: ", "[ok] cpu: computed the expected numbers", "[ok] torch: "):
        assert line in ran.out
    assert "matmul mean 256, expected 256" in ran.out
    assert ran.err == f"wrote {report.as_posix()}\n"
    found = json.loads(report.read_text("utf-8"))
    assert found.keys() == {"device", "healthy", "exit_code", "checks", "facts"}
    assert (found["device"], found["healthy"], found["exit_code"]) == ("cpu", True, 0)
    assert {"python", "onnxruntime", "cpu", "torch"} <= {check["name"] for check in found["checks"]}


def test_doctor_without_torch_is_well(echoquad: Callable[..., Any]) -> None:
    ran = echoquad("doctor", "--device", "cpu", driver=WITHOUT_TORCH)
    assert '[ok] torch: not installed; only training and export need it: pip install "echoquad[export]"' in ran.out


@cpu_wheel_alone
def test_cuda_is_not_there_and_nothing_pretends_it_is(
    tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any], echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    cuda = ["--device", "cuda"]
    found, _ = many(
        [
            ["predict", tiny_bundle, frames_folder, "--out", out, *cuda],
            ["verify", tiny_bundle, *cuda],
            ["bench", tiny_bundle, *cuda],
        ]
    )
    for ran in found:
        assert (ran.code, ran.out, len(ran.err.splitlines())) == (4, "", 1)
        assert "device cuda cannot be used: no CUDA provider in onnxruntime" in ran.errors[0]
        assert 'pip install "echoquad[gpu]"' in ran.errors[0]
    assert not out.exists()
    doctor = echoquad("doctor", *cuda, code=4, driver=WITHOUT_TORCH)
    assert "[failed] cuda: no CUDA provider in onnxruntime" in doctor.out
    assert doctor.errors == ["failed: cuda; see the lines above"]


@pytest.mark.gpu
def test_cuda_decides_as_the_cpu(
    tiny_bundle: Path, frames_folder: Path, echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    from echoquad_runtime.devices.cuda_probe import cuda_unavailable_reason

    if (obstacle := cuda_unavailable_reason()) is not None:
        pytest.skip(obstacle)
    decided = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.jsonl"
        echoquad("predict", tiny_bundle, frames_folder, "--out", out, "--device", device)
        rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        assert {row["device"] for row in rows} == {device}
        decided[device] = [[value for key, value in row.items() if key.startswith("pred_")] for row in rows]
    assert decided["cpu"] == decided["cuda"]
    echoquad("verify", tiny_bundle, "--device", "cuda")
    assert "[ok] cuda: " in echoquad("doctor", "--device", "cuda").out
