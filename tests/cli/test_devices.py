"""``--device openvino`` and ``--precision bf16``: where they are offered, and where they are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echoquad_runtime.devices.execution_providers import OPENVINO_PROVIDER
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime


def test_what_is_not_there_is_refused_with_its_own_exit_code(
    tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any]
) -> None:
    if OPENVINO_PROVIDER in load_onnxruntime().get_available_providers():
        pytest.skip("this onnxruntime has OpenVINO")
    asked = ("--device", "openvino")
    commands: list[list[object]] = [["verify", tiny_bundle], ["predict", tiny_bundle, frames_folder]]
    commands += [["bench", tiny_bundle], ["doctor"], ["verify", tiny_bundle, "--precision", "bf16"]]
    found, _ = many([[*command, *asked] for command in commands])
    assert [ran.code for ran in found] == [4] * len(commands)
    for command, ran in zip(commands, found, strict=True):
        if command == ["doctor"]:
            assert "[failed] openvino: " in ran.out
            continue
        assert ran.out == ""
        assert len(ran.err.splitlines()) == 1
        assert ran.errors[0].startswith("device openvino cannot be used: ")


def test_bfloat16_contradicts_every_other_device(
    tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any]
) -> None:
    commands: list[list[object]] = [["verify", tiny_bundle], ["predict", tiny_bundle, frames_folder]]
    lines = [
        [*command, "--precision", "bf16", "--device", on] for command in commands for on in ("auto", "cpu", "cuda")
    ]
    found, _ = many(lines)
    for line, ran in zip(lines, found, strict=True):
        assert (ran.code, ran.out) == (2, "")
        assert ran.errors[0].startswith(f"precision bf16 requires device openvino; found device {line[-1]};")


def test_torch_is_not_asked_to_compute_with_openvino(tmp_path: Path, warm: Callable[..., Any]) -> None:
    run, data, out = tmp_path / "run", tmp_path / "data", tmp_path / "out"
    run.mkdir()
    (run / "run.json").write_text("{}")
    asked = ("--out", out, "--device", "openvino")
    train, evaluate = warm([["train", data, *asked], ["evaluate", run, data, *asked]])
    assert train.code == evaluate.code == 2
    assert "'openvino' is not one of 'auto', 'cpu', 'cuda'" in train.errors[0]
    assert evaluate.errors == ["--device openvino: a run is evaluated by torch, on cpu or cuda; export it for openvino"]
    assert not out.exists()
