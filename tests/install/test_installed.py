"""The wheel after ``pip install``, on a cart: no torch, no checkout, no GPU."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

HEAVY = ("torch", "torchvision", "onnx", "onnxscript", "sklearn", "scipy", "matplotlib", "safetensors", "pandas", "cv2")


def test_the_cart_is_small_and_has_no_torch(cpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    files = [path for path in cpu.site.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e6
    code = sum(path.stat().st_size for path in files if path.suffix == ".pyc") / 1e6
    with capsys.disabled():
        print(f"\nsite-packages with echoquad[cpu]: {size:.0f} MB, {code:.0f} MB of it compiled Python")  # noqa: T201
    assert size <= 200
    assert [name for name in HEAVY if (cpu.site / name).exists()] == []
    assert "No broken requirements found." in cpu.pip("check")


def test_a_cart_does_its_work(cpu: Any, tiny_bundle: Path, frames_folder: Path, tmp_path: Path) -> None:
    assert cpu.echoquad("--version").out.startswith("echoquad ")
    assert cpu.echoquad("verify", tiny_bundle).out.startswith("PASS ")
    ran = cpu.echoquad("predict", tiny_bundle, frames_folder, "--overlay", tmp_path / "pictures")
    rows = list(csv.DictReader(io.StringIO(ran.out)))
    assert [(row["device"], row["precision"]) for row in rows] == [("cpu", "fp32")] * 6
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == 6
    cpu.echoquad("bench", tiny_bundle, "--frames", "4", "--json", tmp_path / "bench.json")
    figures = json.loads((tmp_path / "bench.json").read_text("utf-8"))
    assert figures["device"] == "cpu"
    assert "onnxruntime" in figures["versions"]
    doctor = cpu.echoquad("doctor")
    assert "[ok] cpu: computed the expected numbers" in doctor.out
    assert '[ok] torch: not installed; only training and export need it: pip install "echoquad[export]"' in doctor.out
    # Phantoms need no torch: a cart can draw its own frames to try itself on.
    assert (
        "test: ASD 1, NORM 1"
        in cpu.echoquad("data", "phantom", tmp_path / "data", "--patients", "6", "--frames", "1").out
    )


def test_cuda_on_a_cart_without_it_is_refused(cpu: Any, tiny_bundle: Path, frames_folder: Path) -> None:
    for command in (["predict", tiny_bundle, frames_folder], ["verify", tiny_bundle], ["bench", tiny_bundle]):
        ran = cpu.echoquad(*command, "--device", "cuda", code=4)
        assert ran.out == ""
        assert len(ran.err.splitlines()) == 1
        assert "device cuda cannot be used: no CUDA provider in onnxruntime" in ran.err
    ran = cpu.echoquad("doctor", "--device", "cuda", code=4)
    assert "[failed] cuda: no CUDA provider in onnxruntime" in ran.out


def test_what_a_cart_lacks_it_says(cpu: Any, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    cpu.echoquad("data", "phantom", data, "--patients", "6", "--frames", "1")
    commands = {
        ("train", data, "--out", out): "train",
        ("evaluate", data, data, "--out", out): "train",
        ("export", data, "--out", out): "export",
        ("demo", "--out", out): "export",
    }
    for command, extra in commands.items():
        ran = cpu.echoquad(*command, code=1)
        assert ran.out == ""
        assert ran.err.startswith("error: this needs ")
        assert ran.err.endswith(f', which is not installed; do: pip install "echoquad[{extra}]"\n')
        assert not out.exists()


def test_the_library_on_a_cart(cpu: Any, tiny_bundle: Path, frames_folder: Path) -> None:
    code = f"""
import sys
import echoquad
assert "numpy" not in sys.modules and "onnxruntime" not in sys.modules
from echoquad import Predictor
found = [result.label for result in Predictor({str(tiny_bundle)!r}).predict([{str(frames_folder)!r}])]
print(found, sorted(set({HEAVY}) & set(sys.modules)), echoquad.__file__)
"""
    found, heavy, file = cpu.run_python(code).replace("] [", "]|[").replace("] /", "]|/").split("|")
    assert found.count("ASD") + found.count("NORM") == 6
    assert heavy == "[]"
    assert file.startswith(str(cpu.folder))


def test_a_gpu_wheel_without_a_driver_tells_the_truth(
    gpu_without_driver: Any, tiny_bundle: Path, frames_folder: Path
) -> None:
    echoquad = gpu_without_driver.echoquad
    cause = "no NVIDIA driver was found"
    ran = echoquad("predict", tiny_bundle, frames_folder, "--device", "cuda", code=4)
    assert ran.out == ""
    assert len(ran.err.splitlines()) == 1
    assert ran.err.startswith(f"error: device cuda cannot be used: {cause}")

    ran = echoquad("predict", tiny_bundle, frames_folder, "--device", "auto")
    assert {row["device"] for row in csv.DictReader(io.StringIO(ran.out))} == {"cpu"}
    first, second = ran.err.splitlines()  # and not a word of onnxruntime's own
    assert first.startswith(f"on the CPU: {cause}")
    assert second.startswith("6 frames: ")

    ran = echoquad("verify", tiny_bundle)
    assert ran.out.startswith("PASS ")
    assert len(ran.err.splitlines()) == 1
    ran = echoquad("doctor")
    assert f"[warning] cuda: {cause}" in ran.out
    assert ran.err == ""
    ran = echoquad("doctor", "--device", "cuda", code=4)
    assert f"[failed] cuda: {cause}" in ran.out
    assert "onnxruntime-gpu: " in ran.out
