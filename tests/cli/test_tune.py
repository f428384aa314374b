"""``echoquad tune``, and what ``predict`` and ``bench`` make of it."""

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
WORDS = "fp32 on cpu, 1 thread, one frame at a time"

Run = Callable[..., Any]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config"


@pytest.fixture
def kept(config: Path, tiny_bundle: Path, many: Run) -> Path:
    """Give the file of a choice that was made for the tiny bundle."""
    many([["tune", tiny_bundle, *QUICK]], env={"ECHOQUAD_CONFIG_DIR": str(config)})
    (file,) = config.rglob("*.json")
    return file


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_tune(tiny_bundle: Path, frames_folder: Path, echoquad: Run, config: Path, tmp_path: Path) -> None:
    record = tmp_path / "tune.json"
    options = ["--json", record, "--goal", "throughput", "--max-p99-ms", "9999"]
    ran = echoquad("tune", tiny_bundle, frames_folder, *QUICK, *options, env={"ECHOQUAD_CONFIG_DIR": str(config)})
    head, _, *table, what, chosen = ran.out.splitlines()
    names = ["threads", "spin", "batch", "cost", "p50 ms", "p99 ms", "frames/s", "CPU ms/frame", "calls"]
    assert re.split(" {2,}", head.strip()) == names
    cells = [line.split() for line in table]
    assert {tuple(row[:4]) for row in cells} == {("fp32", "cpu", "1", "-")}
    assert sorted(int(row[4]) for row in cells) == [1, 2, 4, 8, 16]
    assert min(float(row[5]) for row in cells) == 1.0
    assert all(float(cell) > 0 for row in cells for cell in row[6:11])
    (best,) = [row for row in cells if row[-1] == "chosen"]
    assert what.startswith("cost: time a frame in batches, over the best")
    assert chosen.startswith("chosen for throughput: fp32 on cpu, 1 thread, ")
    assert chosen.endswith(" at a time")
    (file,) = config.rglob("*.json")
    lines = ran.err.splitlines()
    assert lines[0] == "golden frames: fp32 on cpu, 1 thread: passed"
    assert lines[-2] == f"wrote {record.as_posix()}"
    assert all(re.fullmatch(r"its p99 comes from \d+ calls alone: measure .*", line) for line in lines[1:-2])
    assert lines[-1] == f"kept for this host in {file.as_posix()}; predict and bench use it, unless told --untuned"
    written, in_file = (json.loads(path.read_text("utf-8")) for path in (record, file))
    assert written["choice"] == in_file["choice"]
    assert written["choice"]["batch_size"] == int(best[4])
    assert written["candidates"] == in_file["table"]
    assert (in_file["goal"], in_file["max_p99_ms"]) == ("throughput", 9999.0)
    assert {"CPU", "onnxruntime", "echoquad"} <= written["host"].keys()


TELL_WITH_WHAT = """
import sys
from echoquad_runtime.predict import predictor
made = predictor.Predictor.__init__
def init(self, *given, **options):
    print("threads {threads}, spinning {spinning}, batch {batch_size}".format(**options), file=sys.stderr)
    made(self, *given, **options)
predictor.Predictor.__init__ = init
"""


def test_predict_and_bench_use_it_and_say_so(
    tiny_bundle: Path, frames_folder: Path, kept: Path, config: Path, many: Run
) -> None:
    predict, bench = ["predict", tiny_bundle, frames_folder], ["bench", tiny_bundle, "--frames", "3"]
    (tuned, batched, threads, untuned, auto, same, timed, timed_untuned, forgot, nothing, after), modules = many(
        [
            ["python", TELL_WITH_WHAT],
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
    day = "as tuned on 20"
    assert tuned.err.splitlines()[1].startswith(day)
    assert tuned.err.splitlines()[1].endswith(f" for latency: {WORDS}")
    assert len(tuned.err.splitlines()) == len(untuned.err.splitlines()) == 3
    assert same.err.splitlines()[:2] == tuned.err.splitlines()[:2]
    for ran, made in (
        (tuned, "threads 1, spinning False, batch 1"),
        (batched, "threads 1, spinning False, batch 3"),
        (threads, "threads 2, spinning False, batch 1"),
        (untuned, "threads None, spinning True, batch None"),
        (auto, "threads None, spinning True, batch None"),
        (after, "threads None, spinning True, batch None"),
    ):
        assert ran.err.splitlines()[0] == made
    assert "1 thread, 3 frames at a time (--batch-size as given)" in batched.err
    assert "2 threads, not spinning, one frame at a time (--threads as given)" in threads.err
    assert "tun" not in untuned.err
    assert "for latency are for fp32 on cpu; they are not used\n" in auto.err
    # It is the same graph: not a digit of a decision hangs on how it is run.
    assert tuned.out == batched.out == threads.out == untuned.out == auto.out == after.out
    assert {(row["device"], row["precision"]) for row in rows(tuned.out)} == {("cpu", "fp32")}
    assert timed.err.splitlines()[0] == "threads 1, spinning False, batch 1"
    assert timed.err.splitlines()[1].startswith(day)
    assert timed_untuned.err.splitlines()[0] == "threads None, spinning True, batch None"
    assert forgot.out == f"removed {kept.as_posix()}\n"
    assert nothing.out == "nothing was kept for this bundle\n"
    assert not kept.exists()
    assert "tun" not in after.err


def test_a_file_of_no_use_is_a_line_and_no_more(
    tiny_bundle: Path, frames_folder: Path, kept: Path, config: Path, many: Run
) -> None:
    whole = kept.read_text("utf-8")
    env = {"ECHOQUAD_CONFIG_DIR": str(config)}
    moved = json.loads(whole)
    moved["host"]["CPUs to use"] = "512"
    for text, why in (
        (whole[: len(whole) // 2], "echoquad tune did not write this file"),
        (json.dumps(moved), "CPUs to use was 512 at the time and is "),
    ):
        kept.write_text(text, "utf-8")
        (ran, bench), _ = many(
            [["predict", tiny_bundle, frames_folder], ["bench", tiny_bundle, "--frames", "3"]], env=env
        )
        assert (ran.code, bench.code) == (0, 0)
        for one in (ran, bench):
            assert one.err.startswith(f"{kept.as_posix()}: saved settings are ignored, {why}")
        assert len(rows(ran.out)) == 6


def test_a_place_that_cannot_be_written_costs_the_file_but_not_the_table(
    tiny_bundle: Path, many: Run, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (ran,), _ = many([["tune", tiny_bundle, *QUICK]], env={"ECHOQUAD_CONFIG_DIR": str(tmp_path / "file")})
    assert ran.code == 1
    assert f"chosen for latency: {WORDS}\n" in ran.out
    assert len(ran.errors) == 1
    assert "file/tuning: cannot be written" in ran.errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nothing_to_choose(
    tiny_bundle: Path, make_tiny_bundle: Run, kept: Path, config: Path, many: Run, tmp_path: Path
) -> None:
    before = kept.read_bytes()
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
        assert ran.code == 3
        assert "too slow" in ran.out
        assert ran.errors[0].startswith(f"{tiny_bundle.as_posix()}: nothing keeps a p99 of 0.001 ms on this host; the")
        assert f" ms ({WORDS}); allow more by --max-p99-ms" in ran.errors[0]
    assert fails.code == 3
    assert fails.out.splitlines()[2].split() == ["fp32", "cpu", *["-"] * 9, "refused"]
    assert "nothing runs and passes its golden frames on this host; the first: worst |dlogit| " in fails.errors[0]
    assert kept.read_bytes() == before
    assert len(list(config.rglob("*.json"))) == 1


def test_what_is_refused_is_in_the_table_with_its_reason(
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
    assert f"without --exhaustive: {WORDS}, at 1.000 of the best cost" in ran.out


def test_frames_that_cannot_be_read(
    tiny_bundle: Path, frames_folder: Path, many: Run, config: Path, tmp_path: Path
) -> None:
    (frames_folder / "broken.png").write_text("no image")
    found, _ = many(
        [["tune", tiny_bundle, frames_folder, *QUICK], ["tune", tiny_bundle, tmp_path / "none.png", *QUICK]],
        env={"ECHOQUAD_CONFIG_DIR": str(config)},
    )
    assert [ran.code for ran in found] == [5, 1]
    assert found[0].errors[0].startswith("broken.png: ")
    assert f"chosen for latency: {WORDS}\n" in found[0].out
    assert "no frame can be read" in found[1].errors[0]
    assert found[1].out == ""


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGINT to send")
def test_ctrl_c_leaves_what_was_kept(tiny_bundle: Path, kept: Path, started: Any, left_in: Any, tmp_path: Path) -> None:
    before = kept.read_bytes()
    env = {**os.environ, "ECHOQUAD_CONFIG_DIR": str(kept.parents[1]), "PYTHONUNBUFFERED": "1"}
    process = started("tune", tiny_bundle, "--threads", "1", "--seconds", "600", env=env)
    assert process.stderr.readline().startswith(b"golden frames: ")
    time.sleep(0.3)  # now it measures
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, b"")
    assert stderr.decode().splitlines()[-1] == "interrupted"
    assert kept.read_bytes() == before
    assert left_in(tmp_path) == []
    assert list(kept.parent.iterdir()) == [kept]


WRONG = {
    ("--goal", "beauty"): "'latency', 'throughput', 'power'",
    ("--max-p99-ms", "-1"): "'--max-p99-ms'",
    ("--seconds", "long"): "'--seconds'",
    ("--threads", "0"): "'--threads'",
    ("--device", "abacus"): "'--device'",
}


def test_wrong_use(tiny_bundle: Path, many: Run, tmp_path: Path) -> None:
    found, _ = many([["tune", tiny_bundle, *words] for words in WRONG] + [["tune"]], cwd=tmp_path)
    for ran, text in zip(found, [*WRONG.values(), "Missing argument 'BUNDLE'"], strict=True):
        assert (ran.code, ran.out, len(ran.err.splitlines())) == (2, "", 1)
        assert text in ran.err
    found, _ = many([["tune", tiny_bundle, "--seconds", "0"], ["tune", tmp_path]])
    assert [ran.code for ran in found] == [1, 1]
    assert "seconds is 0.0; expected a number above 0" in found[0].errors[0]
    assert "no bundle here" in found[1].errors[0]
