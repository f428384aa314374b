"""End-to-end runs of the benchmark scripts; the tests check the form of the results, not the figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def run(*line: str | Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, *map(str, line)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def record_of(script: str, *line: str | Path) -> tuple[dict[str, Any], list[str]]:
    """Run a script; return its JSON record and the lines before it."""
    *lines, last = run(f"benchmarks/{script}.py", *line).splitlines()
    record = json.loads(last)
    assert record["benchmark"] == script and "onnxruntime" in record["versions"] and "threads" in record["machine"]
    return record, lines


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    run("-m", "echoquad", "data", "phantom", folder / "data", "--patients", "12", "--frames", "2")
    run("-m", "echoquad", "train", folder / "data", "--out", folder / "run", "--recipe", "scratch",
        "--input-size", "32", "--epochs", "1")  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="module")
def bundle(trained: Path) -> Path:
    folder = trained.with_name("bundle")
    run("-m", "echoquad", "export", trained, "--out", folder, "--precision", "fp32,int8")
    return folder


def test_engines_script(trained: Path, bundle: Path) -> None:
    record, lines = record_of("engines", trained, bundle, "--rounds", "3")
    assert {"torch eager, batch of 4", "EchoQuad, fp32", "EchoQuad, int8"} <= set(record["median_ms"])
    assert all(value > 0 for value in record["median_ms"].values())
    assert record["input_size"] == 32
    assert len(lines) == len(record["median_ms"]) + 2 and lines[-1].startswith("OpenVINO was not measured")


def test_epoch_script(trained: Path) -> None:
    data = trained.with_name("data")
    record, lines = record_of(
        "epoch", data, "--input-size", "32", "--frames", "8", "--rounds", "1", "--workers", "0", "1"
    )
    assert set(record["ways"]) == {"echoquad", "dataloader, 0 workers", "dataloader, 1 workers"}
    for way in record["ways"].values():
        assert way["data_s"] > 0 and way["compute_s"] > 0
        assert abs(way["data_s"] + way["compute_s"] - way["epoch_s"]) < 1e-6
    assert record["ways"]["echoquad"]["over_echoquad"] == 1 and record["frames"] == 8
    assert len(lines) == 5


def test_pareto_script(trained: Path, tmp_path: Path) -> None:
    """On the folds that `out_of_fold.py` keeps: the fp32 graph is as accurate as the training code."""
    figures, out = tmp_path / "figures.json", tmp_path / "new" / "pareto"
    recipe = "tiny=scratch:input_size=32,epochs=1,batch_size=8"
    line = ("--out", figures, "--recipe", recipe, "--folds", "2", "--keep")
    run("benchmarks/out_of_fold.py", trained.with_name("data"), *line)
    printed = run("benchmarks/pareto.py", figures, "--out", out, "--rounds", "3", "--precision", "fp32")
    record = json.loads(printed.splitlines()[-1])
    assert record == json.loads(out.with_suffix(".json").read_text())
    (point,) = record["points"]
    assert point["on_front"] and point["changed"] == 0 and record["refused"] == []
    assert point["accuracy"] == json.loads(figures.read_text())["rows"][0]["estimates"]["accuracy"]["estimate"]
    assert "| tiny: resnet18 at 32 | fp32 |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_peers_script(trained: Path, bundle: Path, tmp_path: Path) -> None:
    results = tmp_path / "RESULTS.md"
    names = ["torch", "ort-fp32", "ort-int8-threads", "echoquad-fp32", "echoquad-int8", "echoquad-int8-process"]
    names += ["openvino-fp32", "openvino-int8-queue"]
    options = ["--count", "9", "--rounds", "1", "--peers", ",".join(names), "--results", results]
    record, _ = record_of("peers", trained, bundle, *options)
    found = record["kinds"]["rgb-png"]
    assert {"reference", *names[:6]} <= set(found)
    for peer in found.values():
        assert peer["frames_per_second"] > 0 and len(peer["seconds"]) == 1
        assert peer["max_abs_dp"] < 0.05
    assert found["echoquad-fp32"]["max_abs_dp"] < 1e-3
    assert "## peers" in results.read_text("utf-8")


def test_efficiency_script(bundle: Path) -> None:
    record, lines = record_of("efficiency", bundle, "--count", "12", "--rounds", "2")
    for precision in ("fp32", "int8"):
        found = record[precision]["pipeline"]
        assert set(found["stage_ms"]) == {"decode", "quadrants", "inference"}
        assert found["bound_fps"] > 0 and 0 < found["share"] < 2
        assert [one["frames"] for one in record[precision]["engine"]] == [1, 8, 1]
    assert sum("EchoQuad, files to CSV" in line for line in lines) == 2


def test_latency_script(bundle: Path) -> None:
    record, lines = record_of("latency", bundle, "--count", "4", "--rounds", "1", "--seconds", "0.5")
    assert set(record["int8"]["live"]) == {"30", "60"}
    runs = record["int8"]["live"]["30"]
    assert {"decode", "quadrants", "infer", "vote", "in all", "in all, not spinning"} <= set(runs)
    assert runs["in all"]["frames"] == 15 and 0 <= runs["in all"]["missed"] <= 15
    assert record["fp32"]["burst"]["frames"] == 32 and record["fp32"]["sustained"] == []
    assert any(line.startswith("int8: burst of 32, drained in ") for line in lines)


def test_memory_script(bundle: Path) -> None:
    record, lines = record_of("memory", bundle, "--count", "4", "--counts", "20,600", "--size", "120x90")
    assert [one["frames"] for one in record["trees"]] == [20, 600]
    assert record["ratio"] < 1.3 and record["resume"]["frames"] == 600
    steps = [resident for _, resident in record["components_mb"]]
    assert steps == sorted(steps) and (not steps or steps[-1] <= 1.1 * record["trees"][0]["peak_mb"])
    assert any("aim: at most 1.05" in line for line in lines)


def test_scaling_script(bundle: Path) -> None:
    options = ["--count", "4", "--counts", "1,40", "--each", "60", "--rounds", "1", "--size", "200x150"]
    record, lines = record_of("scaling", bundle, *options, "--threads", "2")
    assert [one["frames"] for one in record["counts"]] == [1, 40]
    assert [one["threads"] for one in record["threads"]] == [1, 2]
    assert record["threads"][0]["efficiency"] == 1
    assert any(line.startswith("2 threads, without start") for line in lines)


def test_startup_script(bundle: Path, trained: Path) -> None:
    frame = next((trained.parent / "data").rglob("*.png"))
    record, lines = record_of("startup", bundle, frame, "--rounds", "1", "--threads", "2")
    for precision in ("fp32", "int8"):
        for state in ("no cache", "empty cache", "cache"):
            assert record["ratio"][f"{precision}: echoquad predict, {state}"] > 0
    assert record["median_ms"]["interpreter"] < record["median_ms"]["imports of numpy, Pillow, onnxruntime"]
    assert len(lines) == len(record["median_ms"]) + 2


def test_isolation_script(bundle: Path) -> None:
    pytest.importorskip("gdcm")
    record, lines = record_of("isolation", bundle, "--count", "6", "--rounds", "2", "--precision", "fp32")
    for name in ("uncompressed", "JPEG baseline", "JPEG lossless"):
        found = record[f"fp32, {name}"]
        assert found["threads_fps"] > 0 and found["isolated_fps"] > 0 and 0 < found["share"] < 3
        assert any(line.startswith(f"fp32, {name}") for line in lines)


def test_out_of_fold_script(trained: Path, tmp_path: Path) -> None:
    data, out = trained.with_name("data"), tmp_path / "figures.json"
    options = ["--out", out, "--recipe", "tiny=scratch:input_size=32,epochs=1", "--folds", "2", "--jobs", "2"]
    record, lines = record_of("out_of_fold", data, *options)
    assert [run["fold"] for run in json.loads(out.read_text("utf-8"))["runs"]] == [1, 2]
    assert record["rows"][0]["held_out"] == 10 and record["rows"][0]["seeds"][0]["accuracy"] > 0
    again, lines = record_of("out_of_fold", data, *options)
    assert again["rows"] == record["rows"] and lines[0] == "2 runs, 2 of them finished before"
