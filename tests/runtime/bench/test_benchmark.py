"""Tests of the benchmark: figures, frames, the p99 gate and peak memory."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.bench.benchmark import (
    STAGES,
    encoded_golden_frames,
    read_encoded,
    run_benchmark,
    time_stages,
)
from echoquad_runtime.bench.peak_memory import peak_rss_mb
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.engine.slot_pool import SlotPool
from echoquad_runtime.errors import BundleNotFoundError, ConfigError, FrameError, GateError, InputNotFoundError
from echoquad_runtime.frames.reader import decode_frame
from echoquad_runtime.quadrants import frame_quadrants

Make = Callable[..., Path]


def test_figures_and_json_keys(tiny_bundle: Path) -> None:
    found = run_benchmark(tiny_bundle, device="cpu", batch_size=4, threads=1, count=10).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    # The keys that scripts read.
    assert found.keys() == {
        "device",
        "precision",
        "batch_size",
        "threads",
        "spinning",
        "frames",
        "stages",
        "latency_ms",
        "frames_per_second",
        "load_ms",
        "first_frame_ms",
        "peak_rss_mb",
        "versions",
        "note",
        "fps",
        "missed_deadlines",
        "cpu_cores",
        "idle_cpu_percent",
        "histogram",
    }
    assert (found["device"], found["precision"], found["batch_size"], found["frames"]) == ("cpu", "fp32", 4, 10)
    assert tuple(found["stages"]) == STAGES == ("decode", "quadrants", "infer", "vote")
    assert all(0 < value < 1000 for value in found["stages"].values())
    latency = found["latency_ms"]
    assert list(latency) == ["p50", "p95", "p99", "max"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] <= latency["max"]
    assert found["threads"] == 1
    counted = found["histogram"]
    assert sum(counted["counts"]) + counted["above"] == 10
    assert {found[name] for name in ("fps", "missed_deadlines", "cpu_cores", "idle_cpu_percent")} == {None}
    assert found["frames_per_second"] > 1
    assert found["load_ms"] > 0
    assert found["first_frame_ms"] > 0
    assert 20 < found["peak_rss_mb"] < 100_000
    assert {"echoquad", "python", "numpy", "pillow", "machine"} < found["versions"].keys()
    assert any(name.startswith("onnxruntime") for name in found["versions"])


@pytest.mark.parametrize(("count", "size"), [(1, 1), (1, 8), (5, 2), (3, 100)])
def test_count_need_not_be_multiple_of_batch_size(tiny_bundle: Path, count: int, size: int) -> None:
    found = run_benchmark(tiny_bundle, device="cpu", batch_size=size, count=count)
    assert (found.frames, found.batch_size) == (count, size)


def test_live_source_figures(tiny_bundle: Path) -> None:
    begin = time.perf_counter()
    found = run_benchmark(tiny_bundle, device="cpu", threads=1, count=12, fps=40)
    assert time.perf_counter() - begin > 11 / 40  # frames arrive at 40 per second
    assert len(found.latencies_ms) == 12
    assert found.fps == 40
    assert found.missed_deadlines == sum(one > 25 for one in found.latencies_ms)
    assert found.cpu_cores is not None and 0 < found.cpu_cores < 4
    assert found.idle_cpu_percent is not None and found.idle_cpu_percent >= 0


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_frame_rate_out_of_range_raises(tiny_bundle: Path, fps: float) -> None:
    with pytest.raises(ConfigError, match=r"fps is .*; expected a number above 0"):
        run_benchmark(tiny_bundle, device="cpu", fps=fps)


def test_p99_gate(tiny_bundle: Path) -> None:
    found = run_benchmark(tiny_bundle, device="cpu", count=20)
    p99 = found.latency_ms["p99"]
    assert p99 == pytest.approx(np.percentile(found.latencies_ms, 99))
    found.check_p99(p99)
    with pytest.raises(
        GateError, match=rf"p99 latency is {p99:.2f} ms over 20 frames on cpu in fp32; expected at most"
    ):
        found.check_p99(p99 * 0.999)


def test_unreadable_frame_raises(tiny_bundle: Path) -> None:
    stream = io.BytesIO()
    Image.new("L", (1, 50)).save(stream, "PNG")
    with pytest.raises(FrameError, match="the frame is 1x50 pixels"):
        run_benchmark(tiny_bundle, [("thin.png", stream.getvalue())], device="cpu", count=2)


def test_stages_are_timed_for_a_batch(tiny_bundle: Path, frames_folder: Path) -> None:
    frames, _ = read_encoded([frames_folder], 3)
    slots = SlotPool(OnnxEngine(Bundle(tiny_bundle), device="cpu", threads=1), 4)
    batch = slots.new_batch()
    begin = time.perf_counter()
    seconds = time_stages(slots, [data for _, data in frames], batch)
    assert 0 < sum(seconds) <= time.perf_counter() - begin
    assert len(seconds) == len(STAGES) and min(seconds) > 0
    for slot, (_, data) in zip(batch, frames, strict=False):
        np.testing.assert_array_equal(slot, frame_quadrants(decode_frame(data), slots.engine.contract))
    assert not batch[3].any()


def test_uses_given_frames(tiny_bundle: Path, frames_folder: Path) -> None:
    frames, failures = read_encoded([frames_folder], 10)
    assert (len(frames), failures) == (6, [])
    assert run_benchmark(tiny_bundle, frames, device="cpu", count=7, precision="fp32").frames == 7


def test_golden_phantoms_are_used_without_frames(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    golden = bundle.read_golden()
    encoded = encoded_golden_frames(bundle)
    assert [name for name, _ in encoded] == [name for name in golden.names if name.startswith("phantom")]
    for name, data in encoded:
        np.testing.assert_array_equal(decode_frame(data), golden.frames[golden.names.index(name)])


def test_golden_frames_of_the_dataset_are_used_without_frames(
    tmp_path: Path, tiny_bundle: Path, make_tiny_bundle: Make
) -> None:
    golden = Bundle(tiny_bundle).read_golden()
    names = tuple(name.replace("phantom-", "validation-00") for name in golden.names)
    bundle = Bundle(make_tiny_bundle(tmp_path, golden=dataclasses.replace(golden, names=names)))
    assert [name for name, _ in encoded_golden_frames(bundle)] == [f"validation-00{index}" for index in range(4)]


def test_no_frame_to_time_raises(tmp_path: Path, tiny_bundle: Path, make_tiny_bundle: Make) -> None:
    golden = Bundle(tiny_bundle).read_golden()
    renamed = dataclasses.replace(golden, names=tuple(f"frame-{index}" for index in range(len(golden.names))))
    with pytest.raises(InputNotFoundError, match="no golden frame can be timed"):
        run_benchmark(make_tiny_bundle(tmp_path, golden=renamed), device="cpu")


def test_missing_bundle_raises(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFoundError):
        run_benchmark(tmp_path)


def test_unreadable_files_are_returned_as_failures(frames_folder: Path) -> None:
    (frames_folder / "a" / "0.png").write_bytes(b"broken")
    frames, failures = read_encoded([frames_folder, frames_folder / "absent.png"], 10)
    assert [name for name, _ in frames] == ["a/1.jpg", "a/2.bmp", "b/3.tif", "b/4.PNG", "b/5.png"]
    assert len(failures) == 2
    assert failures[0].file == "a/0.png"
    assert isinstance(failures[0].error, FrameError)
    assert isinstance(failures[1].error, InputNotFoundError)
    assert [name for name, _ in read_encoded([frames_folder], 2)[0]] == ["a/1.jpg", "a/2.bmp"]


def test_no_readable_frame_raises(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(InputNotFoundError, match=r"no frame can be read .*; the first: a\.png: the file holds text"):
        read_encoded([tmp_path], 10)
    with pytest.raises(InputNotFoundError, match="no frame can be read for the benchmark"):
        read_encoded([], 10)


def test_peak_memory_excludes_the_parent() -> None:
    # On Linux, ru_maxrss of a program starts at the peak of its parent, which is larger here.
    ballast = b"x" * 300_000_000
    code = (
        "from echoquad_runtime.bench.peak_memory import peak_rss_mb as p; a = p(); b = b'x' * 10**8; print(a, p() - a)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=env)
    before, grown = map(float, done.stdout.split())
    assert 10 < before < 250
    assert 80 < grown < 120
    assert peak_rss_mb() > len(ballast) / 1e6
