"""Tests of shards: assignment by name, and merged files that equal a single run byte for byte."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from echoquad_runtime.errors import EchoQuadError, InputNotFoundError, ResultError, UsageError
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.results import shards
from echoquad_runtime.results.result_file import ResultFile, partial_path, read_run_record, run_record_path
from echoquad_runtime.results.shards import Shard, merge

CLASSES = ("ASD", "NORM")
RUN = {"bundle": "4d58e14f08980922", "method": "majority", "device": "cpu", "precision": "fp32"}
part = st.text(st.characters(exclude_characters="\0/"), min_size=1).filter(lambda text: text not in (".", ".."))
path = st.lists(part, min_size=1, max_size=3).map("/".join)
endings = pytest.mark.parametrize("ending", ["csv", "jsonl"])

NAMES = ["a/1.png", "a/10.png", "a/2.png", "a-b/1.png", "a.png", '"x"\n,.png', "=1.png", "b/c/d.png", "\udcff.png"]
NAMES += ["\ue000.png"]
NAMES += [f"patient{index:03d}/frame.png" for index in range(40)]


def prediction(file: str, **changes: Any) -> Prediction:
    rng = np.random.default_rng(sum(map(ord, file)))
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


def run(path: Path, names: Sequence[str], shard: Shard | None = None, *, resume: bool = False, **changes: Any) -> Path:
    """Write the rows of a run over a folder with these names, or over a shard of it."""
    with ResultFile(path, resume=resume) as rows:
        names = sorted(names, key=lambda name: name.split("/"))
        wanted = [name for name in names if (shard is None or shard.holds(name)) and not rows.claim(name)]
        rows.begin(CLASSES, {**RUN, "shard": str(shard) if shard else None, **changes})
        for name in wanted:
            rows.write(prediction(name, **{key: changes[key] for key in ("device",) if key in changes}))
        rows.finish()
    return path


def run_shards(folder: Path, count: int, ending: str = "csv", names: Sequence[str] = NAMES) -> list[Path]:
    return [run(folder / f"part{i}.{ending}", names, Shard(i, count)) for i in range(1, count + 1)]


# ---------------------------------------------------------------------------------------------- which shard


@given(st.lists(path, unique=True, max_size=20), st.integers(1, 9))
def test_each_frame_is_in_exactly_one_shard(names: list[str], count: int) -> None:
    held = [[name for name in names if Shard(index, count).holds(name)] for index in range(1, count + 1)]
    assert sorted(name for names in held for name in names) == sorted(names)


def test_shards_are_even_and_stable() -> None:
    counts = [sum(Shard(index, 7).holds(f"{number}.png") for number in range(7000)) for index in range(1, 8)]
    assert 850 < min(counts) <= max(counts) < 1150
    # No release and no host may move a frame to another shard.
    assert [name for name in NAMES[:10] if Shard(1, 3).holds(name)] == ["a/1.png", "a/2.png", "=1.png", "\udcff.png"]


@pytest.mark.parametrize("text", ["1/1", "2/4", "04/4", "999999/999999"])
def test_shard_is_parsed(text: str) -> None:
    index, count = map(int, text.split("/"))
    assert Shard.parse(text) == Shard(index, count)


@pytest.mark.parametrize(
    "text", ["", "1", "0/4", "5/4", "1/0", "-1/4", "1/4/2", "a/b", "1 /4", "1/٤", "1/4\n", "1/1000000"]
)
def test_malformed_shard_raises(text: str) -> None:
    with pytest.raises(UsageError, match="expected i/n with i from 1 to n, such as 2/4"):
        Shard.parse(text)


# ---------------------------------------------------------------------------------------------- merged


@endings
@pytest.mark.parametrize("count", [1, 2, 5, 60])
def test_merged_shards_equal_single_run(ending: str, count: int, tmp_path: Path) -> None:
    single = run(tmp_path / f"single.{ending}", NAMES)
    parts = run_shards(tmp_path, count, ending)
    random.Random(7).shuffle(parts)
    out = tmp_path / f"all.{ending}"
    merged = merge(parts, out)
    assert out.read_bytes() == single.read_bytes()
    assert (merged.rows, merged.complete) == (len(NAMES), True)
    # It can be resumed like a single run.
    assert read_run_record(out) == read_run_record(single)


@endings
@example(names=["]", "\ud800"], count=1)
@given(names=st.lists(path, unique=True, max_size=12), count=st.integers(1, 4))
def test_merge_equals_single_run_for_any_names(
    ending: str, names: list[str], count: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    single = run(folder / f"single.{ending}", names)
    merge(run_shards(folder, count, ending, names), folder / f"all.{ending}")
    assert (folder / f"all.{ending}").read_bytes() == single.read_bytes()


def test_resumed_shards_are_merged_in_order(tmp_path: Path) -> None:
    parts = run_shards(tmp_path, 3, names=NAMES[::2])
    for index, path in enumerate(parts, 1):
        run(path, NAMES, Shard(index, 3), resume=True)
    merge(parts, tmp_path / "all.csv")
    assert (tmp_path / "all.csv").read_bytes() == run(tmp_path / "single.csv", NAMES).read_bytes()


def test_frame_given_twice_keeps_both_rows(tmp_path: Path) -> None:
    parts = run_shards(tmp_path, 2, names=[*NAMES, *NAMES[:4]])
    assert merge(parts, tmp_path / "all.csv").rows == len(NAMES) + 4


def test_shards_of_several_devices_are_merged(tmp_path: Path) -> None:
    parts = run_shards(tmp_path, 2)
    run(parts[1], NAMES, Shard(2, 2), device="cuda")
    merge(parts, tmp_path / "all.csv")
    assert read_run_record(tmp_path / "all.csv")["device"] == "cpu+cuda"  # type: ignore[index]


@pytest.mark.skipif(os.name != "posix", reason="named pipes")
def test_merge_into_pipe_writes_no_record(tmp_path: Path) -> None:
    parts = run_shards(tmp_path, 2)
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    merge(parts, pipe)
    assert os.read(reader, 100_000) == run(tmp_path / "single.csv", NAMES).read_bytes()
    os.close(reader)
    assert not run_record_path(pipe).exists()


def test_merge_without_records_checks_rows(tmp_path: Path) -> None:
    parts = run_shards(tmp_path, 3)
    for path in parts:
        run_record_path(path).unlink()
    merged = merge(parts, tmp_path / "all.csv")
    assert (merged.rows, merged.complete) == (len(NAMES), False)
    assert not run_record_path(tmp_path / "all.csv").exists()
    parts[2].write_bytes(parts[0].read_bytes())
    with pytest.raises(ResultError, match=r"the frame .* is in .*part1\.csv and in .*part3\.csv; expected it in one"):
        merge(parts, tmp_path / "all.csv")


def test_merge_memory_is_bounded(tmp_path: Path) -> None:
    names = [f"{index:05d}.png" for index in range(6000)]
    parts = run_shards(tmp_path, 4, names=names)
    merge(parts, tmp_path / "warm.csv")
    tracemalloc.start()
    merge(parts, tmp_path / "all.csv")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "all.csv").stat().st_size > 700_000
    assert most < 350_000


# ---------------------------------------------------------------------------------------------- refused


def spoil(path: Path, **changes: Any) -> None:
    record = json.loads(run_record_path(path).read_text())
    run_record_path(path).write_text(json.dumps({**record, **changes}))


def append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


REFUSED: dict[str, tuple[Any, str]] = {
    "a shard is missing": (
        lambda parts: parts.pop(1),
        r"shard 2/4 is missing; name .* all 4",
    ),
    "a shard twice": (lambda parts: parts.append(parts[0]), r"part1\.csv: it is shard 1/4, as is .*part1\.csv"),
    "another bundle": (
        lambda parts: spoil(parts[2], bundle="other"),
        r"part3\.csv: its bundle is other, that of .*part1.csv is 4d58e14f0898; ",
    ),
    "another precision": (
        lambda parts: spoil(parts[2], precision="int8"),
        r"its precision is int8, that of .* is fp32",
    ),
    "another method": (lambda parts: spoil(parts[2], method="average"), r"its vote method is average"),
    "another release": (lambda parts: spoil(parts[2], echoquad="99"), r"its EchoQuad is 99"),
    "another count": (lambda parts: run(parts[2], [], Shard(3, 9)), r"files are of 4 and of 9 shards"),
    "a whole run": (lambda parts: run(parts[2], NAMES), r"part3\.csv: it is a run without --shard"),
    "unfinished": (
        lambda parts: partial_path(parts[1]).touch(),
        r"its run is not finished, since part2\.csv\.partial exists",
    ),
    "cut": (lambda parts: parts[1].write_bytes(parts[1].read_bytes()[:-9]), r"part2\.csv: row \d+ is incomplete"),
    "cut after a row": (
        lambda parts: parts[1].write_bytes(b"".join(parts[1].read_bytes().splitlines(keepends=True)[:-1])),
        r"part2\.csv: the file has changed since its run",
    ),
    "zeros": (lambda parts: append(parts[1], b"\0" * 99), r"part2\.csv: row \d+ is incomplete"),
    "empty": (lambda parts: parts[1].write_bytes(b""), r"part2\.csv: row 1 is incomplete"),
    "another header": (
        lambda parts: (parts[1].write_bytes(b"a,b\n"), run_record_path(parts[1]).unlink()),
        "is incomplete",
    ),
    "a frame of another shard": (
        lambda parts: append(parts[1], parts[0].read_bytes().splitlines(keepends=True)[-1]),
        r"part2\.csv: .* is not in shard 2/4; run the shard again",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_merge_refuses_parts_that_do_not_form_one_run(what: str, tmp_path: Path) -> None:
    parts = run_shards(tmp_path, 4)
    change, words = REFUSED[what]
    change(parts)
    out = tmp_path / "all.csv"
    out.write_text("of yesterday")
    with pytest.raises(ResultError, match=words) as caught:
        merge(parts, out)
    assert "\n" not in str(caught.value)
    assert out.read_text() == "of yesterday"
    assert not run_record_path(out).exists()
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_merge_refuses_unusable_paths(tmp_path: Path) -> None:
    parts = run_shards(tmp_path, 2)
    wrong: list[tuple[list[Path], Path, type[EchoQuadError], str]] = [
        ([tmp_path / "absent.csv"], tmp_path / "all.csv", InputNotFoundError, "no such file"),
        ([tmp_path], tmp_path / "all.csv", UsageError, "its extension is ''"),
        (parts, tmp_path / "all.jsonl", UsageError, r"its extension is '\.csv', that of --out '\.jsonl'"),
        (parts, parts[0], UsageError, "it is one of the shards"),
        (parts, tmp_path / "all.txt", UsageError, r"expected \.csv or \.jsonl"),
    ]
    for paths, out, error, words in wrong:
        with pytest.raises(error, match=words):
            merge(paths, out)


def test_merge_refuses_other_columns_without_records(tmp_path: Path) -> None:
    parts = run_shards(tmp_path, 2, "jsonl")
    line = json.loads(parts[1].read_text("utf-8").splitlines()[0])
    parts[1].write_text(json.dumps({**line, "more": 1}) + "\n")
    run_record_path(parts[1]).unlink()
    with pytest.raises(ResultError, match=r"part2\.jsonl: its columns are not those of .*part1\.jsonl"):
        merge(parts, tmp_path / "all.jsonl")


def test_merge_refuses_too_many_sorted_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ResultFile(tmp_path / "part1.csv") as rows:
        rows.begin(CLASSES, {**RUN, "shard": "1/1"})
        for index in range(40, 0, -1):
            rows.write(prediction(f"{index:02d}.png"))
        rows.finish()
    merge([tmp_path / "part1.csv"], tmp_path / "all.csv")
    names = [line.partition(",")[0] for line in (tmp_path / "all.csv").read_text().splitlines()[1:]]
    assert names == [f"{index:02d}.png" for index in range(1, 41)]
    monkeypatch.setattr(shards, "_MAX_RUNS", 39)
    with pytest.raises(ResultError, match="form 40 sorted runs; expected at most 39"):
        merge([tmp_path / "part1.csv"], tmp_path / "all.csv")


def test_merge_accepts_no_record_without_its_shard(tmp_path: Path) -> None:
    parts = run_shards(tmp_path, 2)
    record = json.loads(run_record_path(parts[1]).read_text("utf-8"))
    del record["shard"]
    run_record_path(parts[1]).write_text(json.dumps(record), "utf-8")
    with pytest.raises(ResultError, match="without --shard"):
        merge(parts, tmp_path / "all.csv")
