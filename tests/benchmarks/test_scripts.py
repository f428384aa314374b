"""The benchmark scripts run from end to end: their figures mean nothing here, only that there are some."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def run(*line: str | Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, *map(str, line)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    run("-m", "echoquad", "data", "phantom", folder / "data", "--patients", "12", "--frames", "2")
    run("-m", "echoquad", "train", folder / "data", "--out", folder / "run", "--recipe", "scratch",
        "--input-size", "32", "--epochs", "1")  # fmt: skip
    return folder / "run"


def test_engines(trained: Path, tmp_path: Path) -> None:
    run("-m", "echoquad", "export", trained, "--out", tmp_path / "bundle", "--precision", "fp32,int8")
    lines = run("benchmarks/engines.py", trained, tmp_path / "bundle", "--rounds", "3").splitlines()
    record = json.loads(lines[-1])
    assert {"torch eager, batch of 4", "EchoQuad, fp32", "EchoQuad, int8"} <= set(record["median_ms"])
    assert all(value > 0 for value in record["median_ms"].values())
    assert record["input_size"] == 32 and "onnxruntime" in record["versions"] and "threads" in record["machine"]
    assert len(lines) == len(record["median_ms"]) + 2


def test_pareto(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "pareto"
    printed = run("benchmarks/pareto.py", trained, "--out", out, "--rounds", "3")
    record = json.loads(printed.splitlines()[-1])
    assert record == json.loads(out.with_suffix(".json").read_text())
    assert {point["precision"] for point in record["points"]} == {"fp32", "int8"}
    assert any(point["on_front"] for point in record["points"]) and record["refused"] == []
    assert "| resnet18 at 32 | int8 |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
