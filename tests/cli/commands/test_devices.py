"""``--device`` and ``--precision``: what is not available is refused, and nothing falls back silently."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echoquad_runtime.devices import session_factory
from echoquad_runtime.devices.execution_providers import CUDA_PROVIDER, OPENVINO_PROVIDER
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime


@pytest.mark.parametrize(("device", "provider"), [("cuda", CUDA_PROVIDER), ("openvino", OPENVINO_PROVIDER)])
def test_unavailable_device_exits_4(
    device: str, provider: str, tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    if provider in load_onnxruntime().get_available_providers():
        pytest.skip(f"this onnxruntime has {provider}")
    out = tmp_path / "out.csv"
    commands: list[list[object]] = [["verify", tiny_bundle], ["predict", tiny_bundle, frames_folder, "--out", out]]
    commands += [["bench", tiny_bundle]]
    if device == "openvino":
        commands.append(["verify", tiny_bundle, "--precision", "bf16"])
    found, _ = many([[*command, "--device", device] for command in commands])
    for ran in found:
        assert (ran.code, ran.out, len(ran.err.splitlines())) == (4, "", 1)
        assert ran.error[0] == "E_DEVICE_UNAVAILABLE" and f"device {device}" in ran.errors[0]
        assert device != "cuda" or 'pip install "echoquad[gpu]"' in ran.errors[0]
    assert not out.exists()


def test_bfloat16_on_another_device_than_openvino_exits_2(
    tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any]
) -> None:
    commands: list[list[object]] = [["verify", tiny_bundle], ["predict", tiny_bundle, frames_folder]]
    lines = [
        [*command, "--precision", "bf16", "--device", on] for command in commands for on in ("auto", "cpu", "cuda")
    ]
    found, _ = many(lines)
    for line, ran in zip(lines, found, strict=True):
        assert (ran.code, ran.out, ran.error[0]) == (2, "", "E_USAGE")
        assert "bf16" in ran.errors[0] and "openvino" in ran.errors[0] and f"device {line[-1]}" in ran.errors[0]


def test_torch_does_not_compute_with_openvino(tmp_path: Path, warm: Callable[..., Any]) -> None:
    pytest.importorskip("torch")
    run, data, out = tmp_path / "run", tmp_path / "data", tmp_path / "out"
    run.mkdir()
    (run / "run.json").write_text("{}")
    asked = ("--out", out, "--device", "openvino")
    train, evaluate = warm([["train", data, *asked], ["evaluate", run, data, *asked]])
    assert (train.code, evaluate.code) == (2, 2)
    assert "'openvino' is not one of 'auto', 'cpu', 'cuda'" in train.errors[0]
    assert evaluate.errors[0].startswith("--device openvino: ")
    assert not out.exists()


@pytest.mark.gpu
def test_cuda_decides_as_the_cpu_does(
    tiny_bundle: Path, frames_folder: Path, echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    if (reason := session_factory.cuda_unavailable_reason()) is not None:
        pytest.skip(reason)
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
