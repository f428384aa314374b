from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echoquad_runtime.errors import OutputError, UsageError
from echoquad_runtime.predictor import Prediction
from echoquad_runtime.writers import CsvWriter, JsonlWriter, check_ending, columns, open_writer

CLASSES = ("ASD", "NORM")
# The document's own header, then what EchoQuad adds.
HEADER = (
    "file,method,pred_image,prob_ASD,prob_NORM,pred_LA,p_LA_ASD,p_LA_NORM,pred_RA,p_RA_ASD,p_RA_NORM,"
    "pred_LV,p_LV_ASD,p_LV_NORM,pred_RV,p_RV_ASD,p_RV_NORM,flags,device,precision"
)
NAMES = [
    "a,b.png",
    'a"b.png',
    "a\nb.png",
    "a\rb.png",
    "a\r\nb.png",
    " a .png",
    "é漢.png",
    "a;b.png",
    "a\tb.png",
    "'",
    "",
]


def prediction(file: str = "test/ASD/ASD3-0.png", **changes: Any) -> Prediction:
    values: dict[str, Any] = {
        "file": file,
        "classes": CLASSES,
        "method": "majority",
        "label": "ASD",
        "probabilities": (0.54491, 0.45509),
        "quadrant_labels": ("NORM", "ASD", "ASD", "NORM"),
        "quadrant_probabilities": ((0.4119, 0.5881), (0.6996, 0.3004), (1.0, 0.0), (0.00004, 0.99996)),
        "flags": ("tie",),
        "device": "cpu",
        "precision": "fp32",
    }
    return Prediction(**{**values, **changes})


def as_csv(*rows: Prediction, classes: Sequence[str] = CLASSES) -> bytes:
    stream = io.BytesIO()
    writer = CsvWriter(stream, classes)
    for row in rows:
        writer.write(row)
    return stream.getvalue()


def as_jsonl(*rows: Prediction) -> bytes:
    stream = io.BytesIO()
    writer = JsonlWriter(stream, CLASSES)
    for row in rows:
        writer.write(row)
    return stream.getvalue()


# ---------------------------------------------------------------------------------------------- CSV


def test_the_header_is_the_documents() -> None:
    assert as_csv() == f"{HEADER}\n".encode()
    assert ",".join(columns(CLASSES)) == HEADER


def test_a_row() -> None:
    assert as_csv(prediction()).decode().splitlines()[1] == (
        "test/ASD/ASD3-0.png,majority,ASD,0.5449,0.4551,NORM,0.4119,0.5881,ASD,0.6996,0.3004,"
        "ASD,1.0000,0.0000,NORM,0.0000,1.0000,tie,cpu,fp32"
    )


def test_lines_end_in_a_line_feed_everywhere() -> None:
    data = as_csv(prediction(), prediction(flags=()))
    assert b"\r" not in data
    assert data.count(b"\n") == 3
    assert data.endswith(b",,cpu,fp32\n")


def test_several_flags_share_a_field() -> None:
    assert b",tie;odd,cpu," in as_csv(prediction(flags=("tie", "odd")))


def test_any_classes() -> None:
    names = columns(("a", "b", "c"))
    assert names[3:6] == ["prob_a", "prob_b", "prob_c"]
    assert names[6:10] == ["pred_LA", "p_LA_a", "p_LA_b", "p_LA_c"]
    assert len(names) == len(set(names)) == 3 + 3 + 4 * 4 + 3


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_read_back(name: str) -> None:
    data = as_csv(prediction(name), prediction("next.png"))
    rows = list(csv.DictReader(io.StringIO(data.decode("utf-8"), newline="")))
    assert [row["file"] for row in rows] == [name, "next.png"]
    assert rows[0]["precision"] == "fp32"


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), st.sampled_from(["tie", ""]))
def test_any_text_is_read_back(name: str, flag: str) -> None:
    data = as_csv(prediction(name, flags=(flag,) if flag else ()), prediction("next.png"))
    rows = list(csv.reader(io.StringIO(data.decode("utf-8"), newline="")))
    assert [row[0] for row in rows] == ["file", name, "next.png"]
    assert {len(row) for row in rows} == {20}


def test_a_name_that_is_no_text_is_written_with_its_bytes_told() -> None:
    name = os.fsdecode(b"a\xff.png") if os.name != "nt" else "a\udcff.png"
    assert as_csv(prediction(name)).splitlines()[1].startswith(b"a\\udcff.png,majority")
    assert json.loads(as_jsonl(prediction(name)))["file"] == name


# ---------------------------------------------------------------------------------------------- JSON lines


def test_json_lines_have_the_csvs_columns() -> None:
    line = as_jsonl(prediction())
    assert line.endswith(b"}\n")
    found = json.loads(line)
    assert list(found) == HEADER.split(",")
    assert found["flags"] == ["tie"]
    assert (found["prob_ASD"], found["p_RV_ASD"], found["pred_RV"]) == (0.54491, 0.00004, "NORM")


@pytest.mark.parametrize("name", NAMES)
def test_a_line_is_a_line_whatever_the_name(name: str) -> None:
    data = as_jsonl(prediction(name), prediction("next.png"))
    assert data.count(b"\n") == 2
    assert [json.loads(line)["file"] for line in data.split(b"\n")[:-1]] == [name, "next.png"]


def test_no_rows_is_an_empty_file(tmp_path: Path) -> None:
    with open_writer(tmp_path / "out.jsonl", CLASSES):
        pass
    assert (tmp_path / "out.jsonl").read_bytes() == b""


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(("name", "expected"), [("out.csv", as_csv), ("out.JSONL", as_jsonl), ("out.CSV", as_csv)])
def test_the_ending_decides(tmp_path: Path, name: str, expected: Any) -> None:
    with open_writer(tmp_path / name, CLASSES) as writer:
        writer.write(prediction())
        assert not (tmp_path / name).exists()
    assert (tmp_path / name).read_bytes() == expected(prediction())
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["out", "out.txt", "out.json", "out.csv.gz", ".csv"])
def test_another_ending_is_refused_before_anything_is_made(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"--out .*: the ending is '.*'; expected \.csv or \.jsonl") as caught:
        check_ending(tmp_path / name)
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError), open_writer(tmp_path / name, CLASSES):
        pytest.fail("it was opened")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_the_block_raises(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("of yesterday")
    with pytest.raises(RuntimeError, match="stop"), open_writer(path, CLASSES) as writer:
        writer.write(prediction())
        raise RuntimeError("stop")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.csv"]
    assert path.read_text() == "of yesterday"


def test_the_result_replaces_an_older_one_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("of yesterday")
    with open_writer(path, CLASSES) as writer:
        for _ in range(2000):
            writer.write(prediction())
        assert path.read_text() == "of yesterday"
    assert len(path.read_bytes().splitlines()) == 2001


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"absent/out\.csv: cannot be written"),
        open_writer(tmp_path / "absent" / "out.csv", CLASSES),
    ):
        pytest.fail("it was opened")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_device_that_is_full(tmp_path: Path) -> None:
    (tmp_path / "out.csv").symlink_to("/dev/full")
    with (
        pytest.raises(OutputError, match=r"out\.csv: cannot be written \(No space left on device\)"),
        open_writer(tmp_path / "out.csv", CLASSES) as writer,
    ):
        for _ in range(2000):
            writer.write(prediction())
