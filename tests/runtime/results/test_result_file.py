"""Tests of result files: resume, torn rows, run records, locks and full disks."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echoquad_runtime.errors import OutputError, ResultError, UsageError
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.results import result_file as results
from echoquad_runtime.results.result_file import (
    ResultFile,
    RowNames,
    check_resume,
    is_stream,
    partial_path,
    read_run_record,
    run_record_path,
)
from echoquad_runtime.storage import file_lock as lock
from echoquad_runtime.storage.row_names import to_row_name

CLASSES = ("ASD", "NORM")
RUN = {"bundle": "4d58e14f08980922", "method": "majority", "device": "cpu", "precision": "fp32", "shard": None}
NAMES = ["a.png", 'b"\n,.png', "=1.png", "a.png", "c/\udcff.png", "é;.png", "z.png"]
endings = pytest.mark.parametrize("ending", ["csv", "jsonl"])


def prediction(file: str, **changes: Any) -> Prediction:
    rng = np.random.default_rng(len(file))
    values: dict[str, Any] = {
        "file": file,
        "classes": CLASSES,
        "method": "majority",
        "label": "ASD",
        "probabilities": tuple(rng.uniform(size=2).tolist()),
        "quadrant_labels": ("NORM", "ASD", "ASD", "NORM"),
        "quadrant_probabilities": tuple(tuple(row) for row in rng.uniform(size=(4, 2)).tolist()),
        "flags": (),
        "device": "cpu",
        "precision": "fp32",
    }
    return Prediction(**{**values, **changes})


def run(
    path: Path, names: Sequence[str], *, stop: int | None = None, resume: bool = False, **changes: Any
) -> ResultFile:
    """Write a row for each name without one; with `stop`, close without finishing after that many rows."""
    with ResultFile(path, resume=resume) as rows:
        wanted = [name for name in names if not rows.claim(name)]
        rows.begin(CLASSES, {**RUN, **changes})
        for name in wanted[:stop]:
            rows.write(prediction(name))
        if stop is None:
            rows.finish()
    return rows


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def whole(tmp_path: Path) -> Callable[[str], bytes]:
    """Return a function from an extension to the bytes of an uninterrupted run over `NAMES`."""

    def make(ending: str) -> bytes:
        path = tmp_path / "reference" / f"out.{ending}"
        path.parent.mkdir(exist_ok=True)
        run(path, NAMES)
        return path.read_bytes()

    return make


# ---------------------------------------------------------------------------------------------- one run


@endings
def test_file_and_run_record_appear_at_the_end(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"out.{ending}"
    path.write_text("of yesterday")
    with ResultFile(path) as rows:
        rows.begin(CLASSES, RUN)
        for count, name in enumerate(NAMES, 1):
            rows.write(prediction(name))
            # Every row is complete and with the operating system: a process killed here loses none.
            assert partial_path(path).read_bytes().count(b"cpu") == count
        assert path.read_text() == "of yesterday"
        assert rows.finish()
    assert left(tmp_path) == [f"out.{ending}", f"out.{ending}.run.json"]
    record = read_run_record(path)
    assert record is not None
    assert {name: record[name] for name in RUN} == RUN
    assert record["rows"] == len(NAMES) == rows.rows
    assert record["sha256"] == results.hashlib.sha256(path.read_bytes()).hexdigest()
    assert not rows.interrupted


def test_run_without_rows_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("of yesterday")
    run(path, NAMES, stop=0)
    with ResultFile(path):
        pass
    with pytest.raises(RuntimeError), ResultFile(path) as rows:
        rows.begin(CLASSES, RUN)
        raise RuntimeError
    assert left(tmp_path) == ["out.csv"]
    assert path.read_text() == "of yesterday"


def test_finished_file_without_rows(tmp_path: Path) -> None:
    for name, size in (("out.csv", 1), ("out.jsonl", 0)):
        run(tmp_path / name, [])
        assert len((tmp_path / name).read_bytes().splitlines()) == size


# ---------------------------------------------------------------------------------------------- going on


@endings
@pytest.mark.parametrize("stop", range(1, len(NAMES) + 1))
def test_resumed_file_is_byte_identical(ending: str, stop: int, tmp_path: Path, whole: Callable[[str], bytes]) -> None:
    path = tmp_path / f"out.{ending}"
    assert run(path, NAMES, stop=stop).interrupted
    assert left(tmp_path) == [f"out.{ending}.partial", f"out.{ending}.partial.json"]
    rows = run(path, NAMES, resume=True)
    assert (rows.existing_rows, rows.rows, rows.torn_bytes) == (stop, len(NAMES), 0)
    assert path.read_bytes() == whole(ending)
    assert read_run_record(path)["sha256"] == results.hashlib.sha256(whole(ending)).hexdigest()  # type: ignore[index]


@endings
@pytest.mark.parametrize("tail", [b"", b"\0" * 5000])
def test_torn_rows_are_dropped_on_resume(
    ending: str, tail: bytes, tmp_path: Path, whole: Callable[[str], bytes]
) -> None:
    expected = whole(ending)
    path, record = tmp_path / f"out.{ending}", tmp_path / f"out.{ending}.partial.json"
    run(path, NAMES, stop=len(NAMES))
    assert partial_path(path).read_bytes() == expected
    described = record.read_bytes()
    row_ends = (b"cpu,fp32,\n", b'"typicality": null}\n')
    ends = [index for index in range(1, len(expected) + 1) if expected[:index].endswith(row_ends)]
    for cut in range(0, len(expected), 43):
        partial_path(path).write_bytes(expected[:cut] + tail)
        record.write_bytes(described)
        rows = run(path, NAMES, resume=True)
        assert path.read_bytes() == expected
        whole_ends = [end for end in ends if end <= cut]
        assert rows.existing_rows == len(whole_ends)
        assert rows.torn_bytes == (cut + len(tail) - whole_ends[-1] if whole_ends else 0)
        path.unlink()


def test_existing_rows_are_not_overwritten_without_resume(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    run(path, NAMES, stop=2)
    before = partial_path(path).read_bytes()
    with pytest.raises(
        ResultError, match=r"out\.csv\.partial: the file holds rows of an interrupted run; continue with --resume"
    ):
        ResultFile(path)
    assert partial_path(path).read_bytes() == before
    assert left(tmp_path) == ["out.csv.partial", "out.csv.partial.json"]
    run(path, NAMES, resume=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bundle": "0123456789abcdef"}, "its bundle is 4d58e14f0898, this run's is 0123456789ab"),
        ({"precision": "int8"}, "its precision is fp32, this run's is int8"),
        ({"method": "average"}, "its vote method is majority, this run's is average"),
        ({"device": "cuda"}, "its device is cpu, this run's is cuda"),
        ({"shard": "1/2"}, "its shard is none, this run's is 1/2"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_resume_refuses_rows_of_another_run(
    changes: dict[str, str], words: str, finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.csv"
    run(path, NAMES, stop=None if finished else 2)
    before = {entry: entry.read_bytes() for entry in tmp_path.iterdir()}
    with pytest.raises(ResultError, match=words):
        run(path, NAMES, resume=True, **changes)
    monkeypatch.setattr(results, "__version__", "99.0")
    with pytest.raises(ResultError, match=r"its EchoQuad is .*, this run's is 99\.0"):
        run(path, NAMES, resume=True)
    assert {entry: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_resume_refuses_names_with_parent_folders(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    run(out, ["a/0.png", "../b/1.png"])
    with pytest.raises(ResultError, match=r"'\.\.'"):
        run(out, ["a/0.png", "b/1.png"], resume=True)


def test_resume_refuses_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    run(path, NAMES, stop=2)
    with (
        pytest.raises(ResultError, match="its columns are not those of this bundle"),
        ResultFile(path, resume=True) as rows,
    ):
        rows.begin(("ASD", "OTHER"), RUN)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"schema": 1}', b"\xff", b"[" * 9999])
def test_resume_refuses_missing_or_malformed_record(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    run(path, NAMES, stop=2)
    (tmp_path / "out.csv.partial.json").write_bytes(data)
    with pytest.raises(ResultError, match=r"out\.csv\.partial\.json does not identify the run of its rows"):
        ResultFile(path, resume=True)
    partial_path(path).unlink()
    run(path, NAMES)
    run_record_path(path).write_bytes(data)
    with pytest.raises(ResultError, match=r"out\.csv\.run\.json is missing or malformed"):
        ResultFile(path, resume=True)


def test_resume_without_rows_starts_a_new_file(tmp_path: Path, whole: Callable[[str], bytes]) -> None:
    path = tmp_path / "out.csv"
    run(path, NAMES, resume=True)
    assert path.read_bytes() == whole("csv")


# ---------------------------------------------------------------------------------------------- finished files


@endings
def test_resume_of_finished_file_adds_only_new_rows(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"out.{ending}"
    run(path, NAMES[:3])
    before = path.read_bytes()
    rows = run(path, ["0.png", *NAMES], resume=True)
    assert (rows.existing_rows, rows.rows) == (3, len(NAMES) + 1)
    assert path.read_bytes().startswith(before)
    run(path, NAMES[:3])
    with ResultFile(path, resume=True) as rows:
        assert [rows.claim(name) for name in NAMES] == [True] * 3 + [False] * 4


def test_resume_without_new_rows_leaves_file_untouched(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    run(path, NAMES)
    before = {entry: (entry.read_bytes(), entry.stat().st_mtime_ns) for entry in tmp_path.iterdir()}
    with ResultFile(path, resume=True) as rows:
        assert all(rows.claim(name) for name in NAMES)
        rows.begin(CLASSES, RUN)
        assert not rows.finish()
    assert not rows.interrupted
    assert {entry: (entry.read_bytes(), entry.stat().st_mtime_ns) for entry in tmp_path.iterdir()} == before


def test_interrupted_resume_keeps_finished_file_and_new_rows(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    run(path, NAMES[:3])
    before = path.read_bytes()
    assert not run(path, NAMES, resume=True, stop=0).interrupted
    assert left(tmp_path) == ["out.csv", "out.csv.run.json"]
    assert run(path, NAMES, resume=True, stop=2).interrupted
    assert path.read_bytes() == before
    assert run(path, NAMES, resume=True).existing_rows == 5
    assert read_run_record(path)["rows"] == len(NAMES)  # type: ignore[index]


@pytest.mark.parametrize("change", [b"x", b"\0", None], ids=["appended", "zeros", "cut"])
def test_resume_refuses_changed_finished_file(change: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    run(path, NAMES)
    lines = path.read_bytes()
    path.write_bytes(lines + change if change else lines[: lines.rfind(b"z.png")])
    with pytest.raises(ResultError, match="the file has changed since its run"):
        ResultFile(path, resume=True)
    assert left(tmp_path) == ["out.csv", "out.csv.run.json"]


# ---------------------------------------------------------------------------------------------- names of existing rows


def test_row_names_count_duplicates() -> None:
    existing = RowNames()
    names = ["a", "b", "a", "=c", "\udcff"]
    for name in names:
        existing.add(to_row_name(name))
    existing.sort()
    assert [existing.claim(name) for name in ["a", "a", "a", "b", "b", "=c", "./=c", "d", "\udcff"]] == [
        *[True, True, False, True, False, True, False, False, True]
    ]


def test_row_names_take_17_bytes_each() -> None:
    existing = RowNames()
    for index in range(20_000):
        existing.add(f"{index}.png")
    existing.sort()
    assert existing._digests.nbytes + existing._used.nbytes == 17 * 20_000
    assert existing._digests.base is not None, "sorted in place, without a copy"
    assert all(existing.claim(f"{index}.png") for index in range(20_000))
    assert not any(existing.claim(f"{index}.png") for index in range(20_100))


# ---------------------------------------------------------------------------------------------- errors


def test_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    with ResultFile(path) as rows:
        for resume in (False, True):
            with pytest.raises(ResultError, match=r"out\.csv: another process is writing it; wait until it ends"):
                ResultFile(path, resume=resume)
        rows.begin(CLASSES, RUN)
        rows.write(prediction("a.png"))
        rows.finish()
        with pytest.raises(ResultError, match="another process"):
            ResultFile(path)
    ResultFile(path).close()


def test_file_system_without_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_lock", refuse)
    assert not run(tmp_path / "out.csv", NAMES).certain
    assert left(tmp_path) == ["out.csv", "out.csv.run.json"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a file system of 32 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32k", "echoquad-test", folder]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@endings
def test_full_disk_keeps_complete_rows(ending: str, small_disk: Path, tmp_path: Path) -> None:
    path = small_disk / f"out.{ending}"
    names = [f"{index:04d}.png" for index in range(300)]
    with (
        pytest.raises(OutputError, match=r"cannot be written \(No space left on device\); check space"),
        ResultFile(path) as rows,
    ):
        rows.begin(CLASSES, RUN)
        for name in names:
            rows.write(prediction(name))
    assert rows.interrupted
    data = partial_path(path).read_bytes()
    assert data.endswith(b"\n")
    assert data.count(b"cpu") == rows.rows > 20
    # With more space it resumes without a loss.
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    assert run(path, names, resume=True).existing_rows == rows.rows
    run(tmp_path / path.name, names)
    assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_disk_that_is_full_at_the_start(small_disk: Path) -> None:
    (small_disk / "else").write_bytes(b"x" * 32768)
    with pytest.raises(OutputError, match="No space left"):
        run(small_disk / "out.csv", NAMES)
    assert left(small_disk) == ["else"]


@pytest.mark.parametrize("step", ["fsync", "replace", "write_json"])
def test_rows_survive_a_failed_finish(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Callable[[str], bytes]
) -> None:
    expected, path = whole("csv"), tmp_path / "out.csv"
    path.write_text("of yesterday")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with (
        pytest.raises(OutputError, match="Input/output error"),
        monkeypatch.context() as patched,
        ResultFile(path) as rows,
    ):
        rows.begin(CLASSES, RUN)
        for name in NAMES:
            rows.write(prediction(name))
        patched.setattr(
            *{"fsync": (os, "fsync"), "replace": (Path, "replace"), "write_json": (results, "write_json")}[step], fail
        )
        rows.finish()
    assert path.read_text() == "of yesterday"
    assert rows.interrupted
    assert run(path, NAMES, resume=True).existing_rows == len(NAMES)
    assert path.read_bytes() == expected


def test_path_that_cannot_be_written_raises(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.csv").mkdir()
    for name in ("absent/out.csv", "file/out.csv", "folder.csv", "x" * 252 + ".csv"):
        with pytest.raises(OutputError, match=r"cannot be written|is a folder"):
            ResultFile(tmp_path / name)
    with pytest.raises(UsageError, match=r"expected \.csv or \.jsonl"):
        ResultFile(tmp_path / "out.txt")
    assert left(tmp_path) == ["file", "folder.csv"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("planted", ["out.csv.partial", "out.csv.partial.json"])
@pytest.mark.parametrize("exists", [True, False])
def test_planted_link_is_not_followed(planted: str, resume: bool, exists: bool, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    if exists:
        victim.write_text("mine")
    (tmp_path / planted).symlink_to(victim)
    with pytest.raises(OutputError, match=f"{planted} is a symbolic link"):
        run(tmp_path / "out.csv", NAMES, resume=resume)
    assert victim.exists() == exists and (not exists or victim.read_text() == "mine")
    assert not (tmp_path / "out.csv").exists()


def test_check_resume_refuses_stdout_and_pipes(tmp_path: Path) -> None:
    check_resume(tmp_path / "out.csv")
    with pytest.raises(UsageError, match="--resume needs a result file; name it with --out"):
        check_resume(None)
    if os.name == "posix":
        os.mkfifo(tmp_path / "pipe.csv")
        assert is_stream(tmp_path / "pipe.csv")
        with pytest.raises(UsageError, match="is not a regular file"):
            check_resume(tmp_path / "pipe.csv")
    assert not is_stream(tmp_path)
    assert not is_stream(tmp_path / "absent.csv")


def test_file_is_synced_about_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, synced, took = [100.0], [], [0.0]

    def fsync(descriptor: int) -> None:
        synced.append(now[0])
        now[0] += took[0]

    monkeypatch.setattr(results.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(results.os, "fsync", fsync)
    with ResultFile(tmp_path / "out.csv") as rows:
        rows.begin(CLASSES, RUN)
        assert synced == []
        for index in range(100):
            now[0] += 0.1
            rows.write(prediction(f"{index}.png"))
        # The first sync includes the run record and the folder.
        assert len(synced) - 2 in (9, 10)
        took[0] = 0.5  # a slow disk is synced for at most 1/20 of the time
        del synced[:]
        for index in range(100, 400):
            now[0] += 0.1
            rows.write(prediction(f"{index}.png"))
        assert 2 <= len(synced) <= 4
        rows.finish()


def test_run_record_is_readable_json(tmp_path: Path) -> None:
    run(tmp_path / "out.csv", NAMES, stop=1)
    found = json.loads((tmp_path / "out.csv.partial.json").read_text("utf-8"))
    assert list(found) == ["schema", "echoquad", "bundle", "method", "device", "precision", "shard"]
    run(tmp_path / "out.csv", NAMES, resume=True)
    found = json.loads((tmp_path / "out.csv.run.json").read_text("utf-8"))
    assert list(found)[-3:] == ["shard", "rows", "sha256"]
