"""``echoquad tune``, and how ``predict`` and ``bench`` use its settings."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

QUICK = ("--seconds", "0.2", "--threads", "1")
CONFIG = "fp32 on cpu, 1 thread, one frame at a time"

Run = Callable[..., Any]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config"


@pytest.fixture
def saved(config: Path, tiny_bundle: Path, many: Run) -> Path:
    """Return the file with saved settings of the tiny bundle."""
    many([["tune", tiny_bundle, *QUICK]], env={"ECHOQUAD_CONFIG_DIR": str(config)})
    (file,) = config.rglob("*.json")
    return file


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_tune_prints_a_table_and_saves_its_choice(
    tiny_bundle: Path, frames_folder: Path, echoquad: Run, config: Path, tmp_path: Path
) -> None:
    record = tmp_path / "tune.json"
    options = ["--json", record, "--goal", "throughput", "--max-p99-ms", "9999"]
    ran = echoquad("tune", tiny_bundle, frames_folder, *QUICK, *options, env={"ECHOQUAD_CONFIG_DIR": str(config)})
    head, _, *table, legend, chosen = ran.out.splitlines()
    names = ["threads", "spin", "batch", "cost", "p50 ms", "p99 ms", "frames/s", "CPU ms/frame", "calls"]
    assert re.split(" {2,}", head.strip()) == names
    cells = [line.split() for line in table]
    assert {tuple(row[:4]) for row in cells} == {("fp32", "cpu", "1", "-")}
    assert sorted(int(row[4]) for row in cells) == [1, 2, 4, 8, 16]
    assert min(float(row[5]) for row in cells) == 1.0
    assert all(float(cell) > 0 for row in cells for cell in row[6:11])
    (best,) = [row for row in cells if row[-1] == "chosen"]
    assert legend.startswith("cost: time per frame in batches, relative to the best")
    assert chosen.startswith("chosen for throughput: fp32 on cpu, 1 thread, ")
    (file,) = config.rglob("*.json")
    lines = ran.err.splitlines()
    assert lines[0].startswith("golden frames: fp32 on cpu, 1 thread")
    assert lines[-2] == f"wrote {record.as_posix()}"
    assert all(re.fullmatch(r"its p99 is based on only \d+ calls: .* --seconds", line) for line in lines[1:-2])
    assert lines[-1].startswith(f"saved for this host in {file.as_posix()}; ") and "--untuned" in lines[-1]
    written, in_file = (json.loads(path.read_text("utf-8")) for path in (record, file))
    assert written["choice"] == in_file["choice"]
    assert written["choice"]["batch_size"] == int(best[4])
    assert written["candidates"] == in_file["table"]
    assert (in_file["goal"], in_file["max_p99_ms"]) == ("throughput", 9999.0)
    assert {"CPU", "onnxruntime", "echoquad"} <= written["host"].keys()


PRINT_OPTIONS = """
import sys
from echoquad_runtime.predict import predictor
original = predictor.Predictor.__init__
def init(self, *given, **options):
    print("threads {threads}, spinning {spinning}, batch {batch_size}".format(**options), file=sys.stderr)
    original(self, *given, **options)
predictor.Predictor.__init__ = init
"""


def test_predict_and_bench_use_saved_settings_and_report_them(
    tiny_bundle: Path, frames_folder: Path, saved: Path, config: Path, many: Run
) -> None:
    predict, bench = ["predict", tiny_bundle, frames_folder], ["bench", tiny_bundle, "--frames", "3"]
    (tuned, batched, threads, untuned, auto, same, timed, timed_untuned, forgot, nothing, after), modules = many(
        [
            ["python", PRINT_OPTIONS],
            predict,
            [*predict, "--batch-size", "3"],
            [*predict, "--threads", "2"],
            [*predict, "--untuned"],
            [*predict, "--device", "auto"],
            [*predict, "--device", "cpu", "--precision", "fp32"],
            bench,
            [*bench, "--untuned"],
            ["tune", tiny_bundle, "--forget"],
            ["tune", tiny_bundle, "--forget"],
            predict,
        ],
        env={"ECHOQUAD_CONFIG_DIR": str(config)},
    )
    assert "torch" not in modules
    day = re.compile(r".*tuned on 20\d\d-")
    assert day.match(tuned.err.splitlines()[1])
    assert tuned.err.splitlines()[1].endswith(f" for latency: {CONFIG}")
    assert len(tuned.err.splitlines()) == len(untuned.err.splitlines()) == 3
    assert same.err.splitlines()[:2] == tuned.err.splitlines()[:2]
    for ran, options in (
        (tuned, "threads 1, spinning False, batch 1"),
        (batched, "threads 1, spinning False, batch 3"),
        (threads, "threads 2, spinning False, batch 1"),
        (untuned, "threads None, spinning True, batch None"),
        (auto, "threads None, spinning True, batch None"),
        (after, "threads None, spinning True, batch None"),
    ):
        assert ran.err.splitlines()[0] == options
    assert "1 thread, 3 frames at a time (--batch-size" in batched.err
    assert "2 threads, not spinning, one frame at a time (--threads" in threads.err
    assert "tun" not in untuned.err
    assert "latency" in auto.err and "fp32 on cpu" in auto.err and "not used" in auto.err
    # The settings change how the graph runs, not a digit of a decision.
    assert tuned.out == batched.out == threads.out == untuned.out == auto.out == after.out
    assert {(row["device"], row["precision"]) for row in rows(tuned.out)} == {("cpu", "fp32")}
    assert timed.err.splitlines()[0] == "threads 1, spinning False, batch 1"
    assert day.match(timed.err.splitlines()[1])
    assert timed_untuned.err.splitlines()[0] == "threads None, spinning True, batch None"
    assert forgot.out == f"removed {saved.as_posix()}\n"
    assert nothing.out == "no settings are saved for this bundle\n"
    assert not saved.exists()
    assert "tun" not in after.err


def test_invalid_saved_settings_are_ignored_with_a_note(
    tiny_bundle: Path, frames_folder: Path, saved: Path, config: Path, many: Run
) -> None:
    whole = saved.read_text("utf-8")
    env = {"ECHOQUAD_CONFIG_DIR": str(config)}
    moved = json.loads(whole)
    moved["host"]["CPUs to use"] = "512"
    for text, why in ((whole[: len(whole) // 2], "echoquad tune"), (json.dumps(moved), "CPUs to use")):
        saved.write_text(text, "utf-8")
        (ran, bench), _ = many(
            [["predict", tiny_bundle, frames_folder], ["bench", tiny_bundle, "--frames", "3"]], env=env
        )
        assert (ran.code, bench.code) == (0, 0)
        for one in (ran, bench):
            assert one.err.startswith(f"{saved.as_posix()}: ") and why in one.err.splitlines()[0]
        assert len(rows(ran.out)) == 6


def test_unwritable_settings_exit_1_after_the_table(tiny_bundle: Path, many: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (ran,), _ = many([["tune", tiny_bundle, *QUICK]], env={"ECHOQUAD_CONFIG_DIR": str(tmp_path / "file")})
    assert ran.code == 1
    assert f"chosen for latency: {CONFIG}\n" in ran.out
    assert ran.error[0] == "E_OUTPUT" and "file/tuning" in ran.errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_tune_without_acceptable_settings_exits_3_and_saves_nothing(
    tiny_bundle: Path, make_tiny_bundle: Run, saved: Path, config: Path, many: Run, tmp_path: Path
) -> None:
    before = saved.read_bytes()
    wrong = make_tiny_bundle(tmp_path / "wrong", graph={"logit_scale": 1.5})
    (slow, fails, exhaustive), _ = many(
        [
            ["tune", tiny_bundle, *QUICK, "--max-p99-ms", "0.001"],
            ["tune", wrong, *QUICK],
            ["tune", tiny_bundle, *QUICK, "--max-p99-ms", "0.001", "--exhaustive"],
        ],
        env={"ECHOQUAD_CONFIG_DIR": str(config)},
    )
    for ran in (slow, exhaustive):
        assert (ran.code, ran.error[0]) == (3, "E_VERIFICATION")
        assert "too slow" in ran.out
        assert ran.errors[0].startswith(f"{tiny_bundle.as_posix()}: ") and "0.001 ms" in ran.errors[0]
        assert f" ms ({CONFIG}); raise --max-p99-ms" in ran.errors[0]
    assert (fails.code, fails.error[0]) == (3, "E_VERIFICATION")
    assert fails.out.splitlines()[2].split() == ["fp32", "cpu", *["-"] * 9, "refused"]
    assert "golden frames" in fails.errors[0] and "worst |dlogit| " in fails.errors[0]
    assert saved.read_bytes() == before
    assert len(list(config.rglob("*.json"))) == 1


def test_refused_candidates_are_listed_with_their_reason(
    make_tiny_bundle: Run, make_tiny_graph: Run, many: Run, config: Path, tmp_path: Path
) -> None:
    from echoquad_runtime.contract import Contract

    wrong = make_tiny_graph(Contract(classes=("ASD", "NORM"), input_size=32), logit_scale=1.5)
    bundle = make_tiny_bundle(tmp_path / "bundle", precisions=("fp32", "int8"), graphs={"int8": wrong})
    (ran,), _ = many([["tune", bundle, *QUICK, "--exhaustive"]], env={"ECHOQUAD_CONFIG_DIR": str(config)})
    assert ran.code == 0
    assert ["int8", "cpu", *["-"] * 9, "refused"] in [line.split() for line in ran.out.splitlines()]
    (why,) = [line for line in ran.err.splitlines() if line.startswith("refused, int8 on cpu, 1 thread")]
    assert "frame flips; allowed: max_abs_dlogit 0.0001" in why
    assert f"without --exhaustive: {CONFIG}, at 1.000 of the best cost" in ran.out


def test_tune_skips_unreadable_frames_and_exits_5(
    tiny_bundle: Path, frames_folder: Path, many: Run, config: Path, tmp_path: Path
) -> None:
    (frames_folder / "broken.png").write_text("no image")
    found, _ = many(
        [["tune", tiny_bundle, frames_folder, *QUICK], ["tune", tiny_bundle, tmp_path / "none.png", *QUICK]],
        env={"ECHOQUAD_CONFIG_DIR": str(config)},
    )
    assert [ran.code for ran in found] == [5, 1]
    assert found[0].error[0] == "E_FRAME_FORMAT" and found[0].errors[0].startswith("broken.png: ")
    assert f"chosen for latency: {CONFIG}\n" in found[0].out
    assert found[1].errors[0].startswith("no frame can be read")
    assert found[1].out == ""


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGINT to send")
def test_ctrl_c_exits_130_and_leaves_the_saved_settings(
    tiny_bundle: Path, saved: Path, started: Any, left_in: Any, tmp_path: Path
) -> None:
    before = saved.read_bytes()
    env = {**os.environ, "ECHOQUAD_CONFIG_DIR": str(saved.parents[1]), "PYTHONUNBUFFERED": "1"}
    process = started("tune", tiny_bundle, "--threads", "1", "--seconds", "600", env=env)
    assert process.stderr.readline().startswith(b"golden frames: ")
    time.sleep(0.3)  # wait until it measures
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, b"")
    assert stderr.decode().splitlines()[-1] == "interrupted"
    assert saved.read_bytes() == before
    assert left_in(tmp_path) == []
    assert list(saved.parent.iterdir()) == [saved]


WRONG = {
    ("--goal", "beauty"): "'latency', 'throughput', 'power'",
    ("--max-p99-ms", "-1"): "'--max-p99-ms'",
    ("--seconds", "long"): "'--seconds'",
    ("--threads", "0"): "'--threads'",
    ("--device", "abacus"): "'--device'",
}


def test_invalid_tune_options_are_refused(tiny_bundle: Path, many: Run, tmp_path: Path) -> None:
    found, _ = many([["tune", tiny_bundle, *words] for words in WRONG] + [["tune"]], cwd=tmp_path)
    for ran, text in zip(found, [*WRONG.values(), "Missing argument 'BUNDLE'"], strict=True):
        assert (ran.code, ran.out, len(ran.err.splitlines()), ran.error[0]) == (2, "", 1, "E_USAGE")
        assert text in ran.err
    found, _ = many([["tune", tiny_bundle, "--seconds", "0"], ["tune", tmp_path]])
    assert [(ran.code, ran.error[0]) for ran in found] == [(1, "E_CONFIG"), (1, "E_BUNDLE_NOT_FOUND")]
    assert "0.0" in found[0].errors[0]
