"""``echoquad bench``: figures, JSON, histogram and the latency gate."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


def test_bench_prints_and_writes_figures_by_stage(
    tiny_bundle: Path, echoquad: Callable[..., Any], frames_folder: Path, tmp_path: Path
) -> None:
    (frames_folder / "broken.png").write_text("no image")
    figures = tmp_path / "bench.json"
    options = ["--frames", "10", "--batch-size", "4", "--json", figures, "--device", "cpu"]
    ran = echoquad("bench", tiny_bundle, frames_folder, *options, code=5)
    assert ran.error[0] == "E_FRAME_FORMAT" and ran.errors[0].startswith("broken.png: ")
    lines = ran.out.splitlines()
    assert lines[0].startswith("10 frames on cpu in fp32, one at a time")
    assert [line.split("  ")[0] for line in lines[3:7]] == ["decode", "quadrants", "infer", "vote"]
    assert "frames per second in batches of 4" in lines[-2]
    assert lines[-1].startswith("peak memory ")
    found = json.loads(figures.read_text("utf-8"))
    wanted = "device precision batch_size frames stages latency_ms frames_per_second load_ms first_frame_ms peak_rss_mb"
    assert {*wanted.split(), "versions"} <= found.keys()
    assert found["stages"].keys() == {"decode", "quadrants", "infer", "vote"}
    assert found["latency_ms"].keys() == {"p50", "p95", "p99", "max"}
    assert (found["device"], found["precision"], found["batch_size"], found["frames"]) == ("cpu", "fp32", 4, 10)
    assert found["frames_per_second"] > 0
    assert {"echoquad", "python", "numpy", "pillow"} <= found["versions"].keys()


def test_bench_without_inputs_takes_the_golden_frames(
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
    assert empty.errors[0].startswith("no frame can be read")
    assert none.error[0] == "E_BUNDLE_NOT_FOUND"


def test_live_source_reports_deadlines_and_draws_a_histogram(
    echoquad: Callable[..., Any], tiny_bundle: Path, frames_folder: Path, tmp_path: Path
) -> None:
    picture, values = tmp_path / "latencies.png", tmp_path / "bench.json"
    options = ["--fps", "50", "--threads", "1", "--device", "cpu", "--histogram", picture, "--max-p99-ms", "60000"]
    ran = echoquad("bench", tiny_bundle, frames_folder, "--frames", "15", "--json", values, *options)
    assert "15 frames on cpu in fp32, live at 50 per second; stages are medians" in ran.out
    found = json.loads(values.read_text("utf-8"))
    assert f"deadlines missed: {found['missed_deadlines']} of 15" in ran.out
    assert f"cores used: {found['cpu_cores']:.2f}; {found['idle_cpu_percent']:.1f} % of one while waiting" in ran.out
    for name, value in found["latency_ms"].items():
        assert re.search(rf"^latency {name} +{value:.2f}$", ran.out, re.MULTILINE)
    assert (found["fps"], found["frames"], found["threads"]) == (50, 15, 1)
    assert sum(found["histogram"]["counts"]) + found["histogram"]["above"] == 15
    with Image.open(picture) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
    assert f"wrote {picture.as_posix()}" in ran.err


def test_exceeded_p99_exits_3_after_the_figures_are_written(
    echoquad: Callable[..., Any], tiny_bundle: Path, frames_folder: Path, tmp_path: Path
) -> None:
    (frames_folder / "a" / "0.png").write_bytes(b"broken")
    values = tmp_path / "bench.json"
    options = ["--frames", "3", "--device", "cpu", "--max-p99-ms", "0.001"]
    ran = echoquad("bench", tiny_bundle, frames_folder, "--json", values, *options, code=3)
    code, message = ran.error
    p99 = json.loads(values.read_text("utf-8"))["latency_ms"]["p99"]
    assert code == "E_GATE" and f"{p99:.2f} ms" in message and "0.001 ms" in message
    assert "not timed: a/0.png: " in ran.err
    assert re.search(rf"^latency p99 +{p99:.2f}$", ran.out, re.MULTILINE)


def test_bench_reports_unreadable_frames_and_exits_5(
    echoquad: Callable[..., Any], tiny_bundle: Path, frames_folder: Path
) -> None:
    (frames_folder / "a" / "0.png").write_bytes(b"broken")
    ran = echoquad("bench", tiny_bundle, frames_folder, "--frames", "2", "--max-p99-ms", "60000", code=5)
    code, message = ran.error
    assert code == "E_FRAME_FORMAT" and message.startswith("a/0.png: ")
    assert "deadlines" not in ran.out


@pytest.mark.parametrize(
    ("options", "exit_code", "code", "words"),
    [
        (("--histogram", "latencies.jpg"), 2, "E_USAGE", "--histogram latencies.jpg: the extension is '.jpg'"),
        (("--fps", "0"), 1, "E_CONFIG", "fps is 0"),
        (("--max-p99-ms", "-1"), 2, "E_USAGE", "--max-p99-ms"),
        (("--frames", "0"), 2, "E_USAGE", "--frames"),
    ],
)
def test_invalid_bench_options_are_refused(
    echoquad: Callable[..., Any],
    tiny_bundle: Path,
    options: tuple[str, str],
    exit_code: int,
    code: str,
    words: str,
) -> None:
    found, message = echoquad("bench", tiny_bundle, *options, code=exit_code).error
    assert found == code and words in message
