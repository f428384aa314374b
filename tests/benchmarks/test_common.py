"""Helpers of the benchmarks: interleaved timing, frames, processes, and the results file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import common
import numpy as np
import pytest
from PIL import Image

ROWS = [["peer", "frames/s"], ["a | b", "1.0"], ["c", "23.4"]]


def test_rotated_starts_each_round_with_the_next_item() -> None:
    assert [common.rotated("abc", turn) for turn in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]


def test_alternate_interleaves_calls_and_skips_warm_up_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, called = [0.0], []
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(common.time, "sleep", lambda _: None)

    def call(name: str, cost: float) -> None:
        called.append(name)
        clock[0] += cost if len(called) > 4 * common.WARM_UP else 100

    found = common.alternate({"a": lambda: call("a", 0.002), "b": lambda: call("b", 0.005)}, 3)
    assert found == pytest.approx({"a": 2, "b": 5})
    assert "".join(called[::2]) == "abbaabbaabba"  # each turn is a wake-up call and a timed call


def test_paired_ratio_ignores_a_slow_round() -> None:
    slow, fast = [6.0, 6.0, 60.0, 6.0, 6.0], [2.0, 2.0, 20.0, 3.0, 2.0]
    assert common.paired_ratio(slow, fast) == 3


def test_quantiles_of_a_range() -> None:
    assert common.quantiles(range(101)) == {"p50": 50, "p95": 95, "p99": 99, "max": 100}


# Frames


@pytest.mark.parametrize("kind", common.FORMATS)
def test_make_frames_is_deterministic(kind: str, frames_folder: Path, tmp_path: Path) -> None:
    mode, ending, _ = common.FORMATS[kind]
    first = common.make_frames(tmp_path / "a", kind, 8, frames_folder, (80, 60))
    again = common.make_frames(tmp_path / "b", kind, 8, frames_folder, (80, 60))
    assert [path.name for path in first] == [f"frame-{index:05}{ending}" for index in range(8)]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    for path in first:
        with Image.open(path) as image:
            assert (image.mode, image.size) == (mode, (80, 60))
    assert first[6].read_bytes() == first[0].read_bytes()  # the folder holds six


def test_make_frames_draws_from_the_whole_folder(frames_folder: Path, tmp_path: Path) -> None:
    few = common.make_frames(tmp_path / "a", "l-png", 3, frames_folder, (80, 60))
    many = common.make_frames(tmp_path / "b", "l-png", 6, frames_folder, (80, 60))
    assert [path.read_bytes() for path in few] == [path.read_bytes() for path in many[:3]]
    assert len({path.read_bytes() for path in many}) == 6


def test_make_frames_draws_phantoms_without_a_source(tmp_path: Path) -> None:
    first, second = common.make_frames(tmp_path, "l-png", 2, None, (120, 90))
    with Image.open(first) as a, Image.open(second) as b:
        assert a.size == b.size == (120, 90)
        assert np.abs(np.asarray(a, np.int16) - np.asarray(b)).mean() > 1


def test_folder_without_frames_ends_the_script(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no frame found"):
        common.make_frames(tmp_path / "a", "l-png", 2, tmp_path)


def test_link_tree_makes_hard_links_in_subfolders(frames_folder: Path, tmp_path: Path) -> None:
    frames = sorted(path for path in frames_folder.rglob("*") if path.is_file())
    common.link_tree(tmp_path / "tree", frames, 23, per_folder=10)
    found = sorted(path for path in (tmp_path / "tree").rglob("*") if path.is_file())
    folders = [path.parent.name for path in found]
    assert folders == ["0000"] * 10 + ["0001"] * 10 + ["0002"] * 3
    assert all(path.samefile(frames[index % 6]) for index, path in enumerate(found))


# Processes


def test_run_process_measures_time_and_peak_memory() -> None:
    ran = common.run_process("-c", "x = b'y' * 200_000_000; import sys; print(len(x)); print('note', file=sys.stderr)")
    assert (ran.out, ran.err) == ("200000000\n", "note\n")
    assert 200 < ran.peak_mb < 260  # without the peak of this process
    assert 0 < ran.cpu < 1.1 * ran.seconds


def test_unexpected_exit_code_ends_the_script() -> None:
    with pytest.raises(SystemExit, match="ended with 3, expected 0: oh no"):
        common.run_process("-c", "import sys; print('oh no', file=sys.stderr); sys.exit(3)")
    assert common.run_process("-c", "raise SystemExit(3)", expected=3).out == ""


def test_one_core_pins_and_restores() -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("no CPU affinity on this system")
    before = os.sched_getaffinity(0)
    with common.one_core():
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


# Report


def test_replace_section_keeps_other_sections() -> None:
    document = common.replace_section("# Results\n\nWords.\n", "peers", "one")
    document = common.replace_section(document, "memory", "two")
    assert document == (
        "# Results\n\nWords.\n\n<!-- begin peers -->\none\n<!-- end peers -->\n\n"
        "<!-- begin memory -->\ntwo\n<!-- end memory -->\n"
    )
    again = common.replace_section(document, "peers", r"new \1 \g<0>")  # not a pattern
    assert again == document.replace("one", r"new \1 \g<0>")
    assert common.replace_section(again, "memory", "two") == again


def test_section_name_can_be_a_prefix_of_another() -> None:
    document = common.replace_section(common.replace_section("", "mem", "a"), "memory", "b")
    assert common.replace_section(document, "mem", "c") == document.replace("\na\n", "\nc\n")


def test_report_prints_table_and_json_and_writes_the_section(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "RESULTS.md"
    secret = tmp_path / "hospital" / "bundle"
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/peers.py", "run", str(secret), "--rounds", "3"])
    common.report("peers", ROWS, {"kept": [1.5]}, results, threads=3, notes=["A note."])
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == ["peer   frames/s", "a | b       1.0", "c          23.4", "A note."]
    record = json.loads(last)
    assert record["kept"] == [1.5] and record["benchmark"] == "peers"
    assert record["command"] == "python benchmarks/peers.py run bundle --rounds 3"
    assert record["machine"].endswith("3 threads") and {"python", "onnxruntime", "numpy"} <= record["versions"].keys()

    text = results.read_text("utf-8")
    assert text.startswith("# Results\n\nWritten by the scripts") and "hospital" not in text
    for part in (
        "## peers\n\n`python benchmarks/peers.py run bundle --rounds 3`",
        "| peer | frames/s |\n|---|---:|\n| a \\| b | 1.0 |\n| c | 23.4 |\n\nA note.",
        f"{record['date']}; {record['machine']}; python {record['versions']['python']}, ",
    ):
        assert part in text
    common.report("peers", ROWS[:2], {}, results)
    assert "23.4" not in results.read_text("utf-8")
    assert results.read_text("utf-8").count("## peers") == 1


def test_report_without_results_file_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common.report("peers", ROWS, {})
    assert capsys.readouterr().out and not list(tmp_path.iterdir())
