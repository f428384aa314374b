"""``echoquad bench``: what it prints, the picture, and the gate's exit code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image


def test_figures_picture_and_json_of_a_live_source(
    echoquad, tiny_bundle: Path, frames_folder: Path, tmp_path: Path
) -> None:
    picture, values = tmp_path / "latencies.png", tmp_path / "bench.json"
    options = ["--fps", "50", "--threads", "1", "--device", "cpu", "--histogram", picture, "--max-p99-ms", "60000"]
    ran = echoquad("bench", tiny_bundle, frames_folder, "--frames", "15", "--json", values, *options)
    assert "15 frames on cpu in fp32, live at 50 a second; stages are medians" in ran.out
    found = json.loads(values.read_text("utf-8"))
    assert f"deadlines missed: {found['missed_deadlines']} of 15" in ran.out
    assert (
        f"cores kept busy: {found['cpu_cores']:.2f}; {found['idle_cpu_percent']:.1f} % of one while waiting" in ran.out
    )
    for name, value in found["latency_ms"].items():
        assert re.search(rf"^latency {name} +{value:.2f}$", ran.out, re.MULTILINE)
    assert (found["fps"], found["frames"], found["threads"]) == (50, 15, 1)
    assert sum(found["histogram"]["counts"]) + found["histogram"]["above"] == 15
    with Image.open(picture) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
    assert f"wrote {picture.as_posix()}" in ran.err


def test_the_gate_is_exit_code_3_after_all_is_written(
    echoquad, tiny_bundle: Path, frames_folder: Path, tmp_path: Path
) -> None:
    (frames_folder / "a" / "0.png").write_bytes(b"broken")
    values = tmp_path / "bench.json"
    options = ["--frames", "3", "--device", "cpu", "--max-p99-ms", "0.001"]
    ran = echoquad("bench", tiny_bundle, frames_folder, "--json", values, *options, code=3)
    (error,) = ran.errors
    p99 = json.loads(values.read_text("utf-8"))["latency_ms"]["p99"]
    assert error.startswith(f"the p99 latency is {p99:.2f} ms over 3 frames on cpu in fp32; expected at most 0.001 ms")
    assert "not timed: a/0.png: the file holds text" in ran.err
    assert re.search(rf"^latency p99 +{p99:.2f}$", ran.out, re.MULTILINE)


def test_what_could_not_be_read_is_told(echoquad, tiny_bundle: Path, frames_folder: Path) -> None:
    (frames_folder / "a" / "0.png").write_bytes(b"broken")
    ran = echoquad("bench", tiny_bundle, frames_folder, "--frames", "2", "--max-p99-ms", "60000", code=5)
    (error,) = ran.errors
    assert error.startswith("a/0.png: the file holds text")
    assert "deadlines" not in ran.out


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--histogram", "latencies.jpg"), 2, "--histogram latencies.jpg: the ending is '.jpg'; expected .png"),
        (("--fps", "0"), 1, "fps is 0; expected a number above 0"),
        (("--max-p99-ms", "-1"), 2, "--max-p99-ms"),
        (("--frames", "0"), 2, "--frames"),
    ],
)
def test_options_that_cannot_be(echoquad, tiny_bundle: Path, options: tuple[str, str], code: int, words: str) -> None:
    (error,) = echoquad("bench", tiny_bundle, *options, code=code).errors
    assert words in error
