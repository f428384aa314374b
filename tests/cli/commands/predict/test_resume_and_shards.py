"""``predict --resume``, ``predict --shard`` and ``echoquad merge``: rows of several runs equal those of one."""

from __future__ import annotations

import csv
import io
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NAMES = ["a/0.png", "a/1.jpg", "a/2.bmp", "b/3.tif", "b/4.PNG", "b/5.png"]

posix_only = pytest.mark.skipif(os.name != "posix", reason="Windows has none of it")


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def wait_for_rows(process: Any, out: Path, count: int) -> None:
    """Wait until a run has written some rows."""
    partial, end = out.with_name(f"{out.name}.partial"), time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        if partial.exists() and partial.read_bytes().count(b"\n") > count:
            return
        time.sleep(0.005)
    pytest.fail("the run ended before it could be interrupted")


def tear(out: Path, kept: int) -> None:
    """Turn a finished file into one that was interrupted in the middle of the row after row `kept`."""
    lines = out.read_bytes().splitlines(keepends=True)
    kept += out.suffix == ".csv"
    record = out.with_name(f"{out.name}.run.json")
    out.with_name(f"{out.name}.partial").write_bytes(b"".join(lines[:kept]) + lines[kept][:40])
    record.rename(out.with_name(f"{out.name}.partial.json"))
    out.unlink()


@posix_only
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_keeps_its_rows_and_resumes(
    number: int, code: int, tiny_bundle: Path, many_frames: Path, started: Any, echoquad: Any, tmp_path: Path
) -> None:
    out, pictures = tmp_path / "out.csv", tmp_path / "pictures"
    line = ["predict", tiny_bundle, many_frames, "--out", out, "--overlay", pictures]
    process = started(*line)
    wait_for_rows(process, out, 2)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stdout == b""
    *_, kept, last = stderr.decode().splitlines()
    assert last == "interrupted"
    partial = tmp_path / "out.csv.partial"
    rows = partial.read_bytes().count(b",cpu,fp32,\n")
    assert kept.startswith(f"{rows} rows ") and partial.as_posix() in kept and "--resume" in kept
    assert b"Traceback" not in stderr
    assert not out.exists()
    assert partial.read_bytes().endswith(b"\n")
    assert [path.name for path in pictures.iterdir() if path.name.startswith(".")] == []
    echoquad(*line, "--resume")
    echoquad("predict", tiny_bundle, many_frames, "--out", tmp_path / "whole.csv")
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert len(list(pictures.iterdir())) == 60  # each row has its picture


@posix_only
def test_second_run_on_the_same_file_is_refused(
    tiny_bundle: Path, many_frames: Path, started: Any, echoquad: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    line = ["predict", tiny_bundle, many_frames, "--out", out]
    process = started(*line, "--overlay", tmp_path / "pictures")
    wait_for_rows(process, out, 1)
    process.send_signal(signal.SIGSTOP)
    for options in ([], ["--resume"]):
        code, message = echoquad(*line, *options, code=1).error
        assert code == "E_RESULT" and message.startswith(f"{out.as_posix()}: another process")
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(out.read_bytes().splitlines()) == 61


@pytest.mark.parametrize("extension", ["csv", "jsonl"])
def test_resume_continues_after_an_incomplete_row(
    extension: str, tiny_bundle: Path, mixed: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / f"out.{extension}"
    line = ["predict", tiny_bundle, mixed, "--out", out]
    ((whole,), _) = many([line])
    expected = out.read_bytes()
    tear(out, 4)
    found, _ = many([line, [*line, "--method", "average", "--resume"], [*line, "--resume"], [*line, "--resume"]])
    refused, other, resumed, again = found
    assert refused.code == other.code == 1
    assert refused.error[0] == other.error[0] == "E_RESULT"
    assert refused.errors[0].startswith(f"{out.as_posix()}.partial: ") and "--resume" in refused.errors[0]
    assert other.errors[0].startswith(f"{out.as_posix()}.partial: ")
    assert "majority" in other.errors[0] and "average" in other.errors[0]
    # Frames that failed before are tried again: errors and exit code are those of a single run.
    assert (resumed.code, resumed.errors) == (whole.code, whole.errors) == (5, whole.errors)
    (kept,) = [text for text in resumed.err.splitlines() if text.startswith("4 rows ")]
    assert "40 bytes" in kept
    assert resumed.err.splitlines()[-1].startswith("2 frames: ")
    assert resumed.err.splitlines()[-1].endswith(f"; 4 rows were there; wrote {out.as_posix()}")
    assert (again.code, again.errors) == (5, whole.errors)
    last = again.err.splitlines()[-1]
    assert last.startswith("no new frame; 6 rows ") and last.endswith(f"unchanged: {out.as_posix()}")
    assert out.read_bytes() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frames", out.name, f"{out.name}.run.json"]


def test_resume_adds_rows_for_new_frames(
    tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    (frames_folder / "b").rename(tmp_path / "later")
    line = ["predict", tiny_bundle, frames_folder, "--out", out, "--resume"]
    many([line])
    assert [row["file"] for row in table(out.read_text())] == NAMES[:3]
    (tmp_path / "later").rename(frames_folder / "b")
    many([line])
    assert [row["file"] for row in table(out.read_text())] == NAMES


def test_resume_without_the_frames_does_not_finish_the_file(
    tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    line = ["predict", tiny_bundle, frames_folder, "--out", out, "--resume"]
    many([line])
    expected = out.read_bytes()
    tear(out, 2)
    frames_folder.rename(tmp_path / "unmounted")
    ((ran,), _) = many([line])
    assert (ran.code, ran.error_codes) == (1, ["E_INPUT_NOT_FOUND"])
    assert not out.exists()
    (tmp_path / "unmounted").rename(frames_folder)
    many([line])
    assert out.read_bytes() == expected


def test_invalid_resume_and_shard_options_exit_2(
    tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    lines = {("--resume",): "--out", ("--shard", "3/2"): "--shard 3/2: ", ("--shard", "half"): "--shard half: "}
    if os.name == "posix":
        os.mkfifo(tmp_path / "pipe.csv")
        lines["--resume", "--out", str(tmp_path / "pipe.csv")] = "pipe.csv"
    found, _ = many([["predict", tiny_bundle, frames_folder, *options] for options in lines])
    for (options, words), ran in zip(lines.items(), found, strict=True):
        assert (ran.code, ran.out, ran.error_codes) == (2, "", ["E_USAGE"]), options
        assert words in ran.errors[0]


@pytest.mark.parametrize("extension", ["csv", "jsonl"])
@pytest.mark.parametrize("count", [2, 9])
def test_merged_shards_equal_a_single_run(
    extension: str, count: int, tiny_bundle: Path, mixed: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    single, merged = tmp_path / f"single.{extension}", tmp_path / f"merged.{extension}"
    shards = [tmp_path / f"part{index}.{extension}" for index in range(1, count + 1)]
    line = ["predict", tiny_bundle, mixed]
    lines: list[Any] = [[*line, "--out", single]]
    lines += [[*line, "--shard", f"{index}/{count}", "--out", out] for index, out in enumerate(shards, 1)]
    found, _ = many([*lines, ["merge", *shards, "--out", merged], ["merge", *shards[1:], "--out", tmp_path / "x.csv"]])
    assert merged.read_bytes() == single.read_bytes()
    whole, *parts, done, refused = found
    assert sorted(error for part in parts for error in part.errors) == sorted(whole.errors)
    assert {part.code for part in parts} <= {0, 1, 5}  # 1 for a shard whose frames all failed; its file is written
    assert done.err == f"6 rows of {count} shards; wrote {merged.as_posix()}\n"
    assert (refused.code, refused.error[0]) == ((1, "E_RESULT") if extension == "csv" else (2, "E_USAGE"))
    if count == 9:
        assert any("no frame in this shard; wrote" in part.err for part in parts)


def test_shards_on_stdout_divide_the_frames(tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any]) -> None:
    found, _ = many([["predict", tiny_bundle, frames_folder, "--shard", f"{index}/3"] for index in (1, 2, 3)])
    assert sorted(row["file"] for ran in found for row in table(ran.out)) == NAMES


def test_merge_refuses_missing_files_and_wrong_extensions(many: Callable[..., Any], tmp_path: Path) -> None:
    ((absent, wrong, unnamed), _) = many(
        [
            ["merge", tmp_path / "absent.csv", "--out", tmp_path / "all.csv"],
            ["merge", tmp_path / "absent.csv", "--out", tmp_path / "all.jsonl"],
            ["merge", "--out", tmp_path / "all.csv"],
        ]
    )
    assert absent.code == 1 and "absent.csv: no such file" in absent.errors[0]
    assert (wrong.code, unnamed.code) == (2, 2)
    assert wrong.error[0] == unnamed.error[0] == "E_USAGE"
    assert list(tmp_path.iterdir()) == []


def test_system_files_are_counted_in_one_line(
    tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    clean = ["predict", tiny_bundle, frames_folder]
    (plain,), _ = many([clean])
    for name in ("@eaDir", "a/.thumbnails"):
        (frames_folder / name).mkdir()
        shutil.copy(frames_folder / "a" / "0.png", frames_folder / name / "0.png")
    (frames_folder / ".DS_Store").write_bytes(b"")
    (found,), _ = many([clean])
    assert found.out == plain.out and found.code == 0
    lines = [line for line in found.err.splitlines() if line.startswith("skipped ")]
    assert lines == ["skipped 3 hidden or system entries (.DS_Store 1, .thumbnails 1, @eaDir 1)"]
    assert "skipped" not in plain.err
