"""Tests of row formats: columns, quoting, formulas, and reading complete rows back."""

from __future__ import annotations

import csv
import hashlib
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
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.results.row_formats import (
    JSON_LINES,
    RowReader,
    RowWriter,
    columns,
    format_for,
    open_writer,
)
from echoquad_runtime.storage.row_names import encode_text, to_row_name

CLASSES = ("ASD", "NORM")
# The header of the reference pipeline, then the columns that EchoQuad adds.
HEADER = (
    "file,method,pred_image,prob_ASD,prob_NORM,pred_LA,p_LA_ASD,p_LA_NORM,pred_RA,p_RA_ASD,p_RA_NORM,"
    "pred_LV,p_LV_ASD,p_LV_NORM,pred_RV,p_RV_ASD,p_RV_NORM,flags,device,precision,typicality"
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
FORMULAS = ["=1+1.png", "+1.png", "-1.png", "@SUM(A1:A9).png", "\t=1.png", '=HYPERLINK("http://x";"y").png']


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
    writer = RowWriter(stream, classes)
    for row in rows:
        writer.write(row)
    return stream.getvalue()


def as_jsonl(*rows: Prediction) -> bytes:
    stream = io.BytesIO()
    writer = RowWriter(stream, CLASSES, JSON_LINES)
    for row in rows:
        writer.write(row)
    return stream.getvalue()


# ---------------------------------------------------------------------------------------------- CSV


def test_csv_header_matches_reference_pipeline() -> None:
    assert as_csv() == f"{HEADER}\n".encode()
    assert ",".join(columns(CLASSES)) == HEADER


def test_csv_row() -> None:
    assert as_csv(prediction()).decode().splitlines()[1] == (
        "test/ASD/ASD3-0.png,majority,ASD,0.5449,0.4551,NORM,0.4119,0.5881,ASD,0.6996,0.3004,"
        "ASD,1.0000,0.0000,NORM,0.0000,1.0000,tie,cpu,fp32,"
    )


def test_lines_end_with_line_feed() -> None:
    data = as_csv(prediction(), prediction(flags=()))
    assert b"\r" not in data
    assert data.count(b"\n") == 3
    assert data.endswith(b",,cpu,fp32,\n")


def test_flags_share_one_cell() -> None:
    assert b",tie;odd,cpu," in as_csv(prediction(flags=("tie", "odd")))


def test_any_class_names_are_read_back() -> None:
    names = columns(("a", "b", "c"))
    assert names[3:6] == ["prob_a", "prob_b", "prob_c"]
    assert names[6:10] == ["pred_LA", "p_LA_a", "p_LA_b", "p_LA_c"]
    assert len(names) == len(set(names)) == 3 + 3 + 4 * 4 + 4


@pytest.mark.parametrize("name", NAMES)
def test_odd_file_names_are_read_back(name: str) -> None:
    data = as_csv(prediction(name), prediction("next.png"))
    rows = list(csv.DictReader(io.StringIO(data.decode("utf-8"), newline="")))
    assert [row["file"] for row in rows] == [name, "next.png"]
    assert rows[0]["precision"] == "fp32"


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), st.sampled_from(["tie", ""]))
def test_any_text_is_read_back(name: str, flag: str) -> None:
    data = as_csv(prediction(name, flags=(flag,) if flag else ()), prediction("next.png"))
    rows = list(csv.reader(io.StringIO(data.decode("utf-8"), newline="")))
    assert [row[0] for row in rows] == ["file", to_row_name(name), "next.png"]
    assert {len(row) for row in rows} == {21}


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_csv_row_equals_that_of_the_csv_module(name: str) -> None:
    line = as_csv(prediction(name)).decode().split("\n", 1)[1]
    stream = io.StringIO()
    # The csv module quotes cells with characters of its line terminator.
    csv.writer(stream, lineterminator="\r\n;\t").writerow([to_row_name(name)])
    # The csv module quotes a single empty cell.
    assert line.startswith(stream.getvalue().removesuffix("\r\n;\t") + ",") or name == ""


@pytest.mark.parametrize("name", FORMULAS)
def test_no_cell_is_a_formula(name: str) -> None:
    data = as_csv(prediction(name, label="-ASD", quadrant_labels=("=1", "ASD", "@x", "ASD")), classes=("-ASD", "+NORM"))
    for delimiter in ",;":  # the separator depends on the locale
        for row in csv.reader(io.StringIO(data.decode(), newline=""), delimiter=delimiter):
            assert [cell for cell in row if cell[:1] in {*"=+-@\t\r"}] == []
    found = json.loads(as_jsonl(prediction(name)))
    assert found["file"] == f"./{name}"  # both formats have the same name


def test_json_lines_keep_class_name_that_looks_like_a_formula() -> None:
    assert b",'-ASD,0.5449," in as_csv(prediction(label="-ASD"))
    assert json.loads(as_jsonl(prediction(label="-ASD")))["pred_image"] == "-ASD"


def test_invalid_utf8_name_is_escaped() -> None:
    name = os.fsdecode(b"a\xff.png") if os.name != "nt" else "a\udcff.png"
    assert as_csv(prediction(name)).splitlines()[1].startswith(b"a\\udcff.png,majority")
    assert json.loads(as_jsonl(prediction(name)))["file"] == name


# ---------------------------------------------------------------------------------------------- JSON lines


def test_json_lines_have_the_columns_of_the_csv() -> None:
    line = as_jsonl(prediction())
    assert line.endswith(b"}\n")
    found = json.loads(line)
    assert list(found) == HEADER.split(",")
    assert found["flags"] == ["tie"]
    assert (found["prob_ASD"], found["p_RV_ASD"], found["pred_RV"]) == (0.54491, 0.00004, "NORM")


@pytest.mark.parametrize("name", NAMES)
def test_json_line_never_contains_a_line_break(name: str) -> None:
    data = as_jsonl(prediction(name), prediction("next.png"))
    assert data.count(b"\n") == 2
    assert [json.loads(line)["file"] for line in data.split(b"\n")[:-1]] == [name, "next.png"]


def test_json_lines_without_rows_are_an_empty_file(tmp_path: Path) -> None:
    with open_writer(tmp_path / "out.jsonl", CLASSES):
        pass
    assert (tmp_path / "out.jsonl").read_bytes() == b""


# ---------------------------------------------------------------------------------------------- read back

ENDINGS = {".csv": as_csv, ".jsonl": as_jsonl}
names = st.lists(st.text(st.characters(exclude_characters="\0"), max_size=20), min_size=1, max_size=5)


def reader(data: bytes, ending: str = ".csv", **options: Any) -> RowReader:
    return RowReader(io.BytesIO(data), format_for(Path(f"x{ending}")), **options)


@pytest.mark.parametrize("ending", ENDINGS)
@given(names)
def test_row_reader_returns_the_bytes_of_each_row(ending: str, given_names: list[str]) -> None:
    data = ENDINGS[ending](*(prediction(name) for name in given_names))
    found = reader(data, ending)
    rows = list(found)
    assert [encode_text(row.name) for row in rows] == [encode_text(to_row_name(name)) for name in given_names]
    assert {row.run for row in rows} == {("majority", "cpu", "fp32")}
    assert found.columns == columns(CLASSES)
    assert found.complete_bytes == len(data)
    assert found.hash.hexdigest() == hashlib.sha256(data).hexdigest()
    assert data.endswith(b"".join(row.data for row in rows))


@pytest.mark.parametrize("ending", ENDINGS)
@given(names, st.data())
def test_row_reader_stops_at_a_torn_row(ending: str, given_names: list[str], data: st.DataObject) -> None:
    rows = [ENDINGS[ending](prediction(name)) for name in given_names]
    head = ENDINGS[ending]()
    whole = head + b"".join(row.removeprefix(head) for row in rows)
    cut = data.draw(st.integers(0, len(whole)))
    tail = data.draw(st.sampled_from([b"", b"\0" * 9, b"\0" * 5000, b"\0\n", b"\0\n" + whole]))
    found = reader(whole[:cut] + tail, ending)
    read = list(found)
    ends = [len(head)]
    for row in rows:
        ends.append(ends[-1] + len(row) - len(head))
    expected = [end for end in ends if end <= cut]
    assert found.complete_bytes == (expected[-1] if expected else 0)
    assert len(read) == max(0, len(expected) - 1)


@pytest.mark.parametrize(
    "damaged",
    [
        b"x.png,majority,ASD\n",  # cells are missing
        b"\xff" + b",a" * 19 + b"\n",  # not UTF-8
        b'"x"y' + b",a" * 19 + b"\n",  # not CSV
        b"x" * 5_000_000 + b",a" * 19 + b"\n",  # longer than the maximum
        b'"' + b"x\n" * 2_500_000 + b'"' + b",a" * 19 + b"\n",
        b"\n",
    ],
    ids=["short", "bytes", "quotes", "long", "lines", "empty"],
)
def test_row_reader_stops_at_damaged_csv(damaged: bytes) -> None:
    data = as_csv(prediction("a.png"))
    found = reader(data + damaged + data)
    assert [row.name for row in found] == ["a.png"]
    assert found.complete_bytes == len(data)


@pytest.mark.parametrize("damaged", [b"{}\n", b"[1]\n", b"1\n", b"nothing\n", b'{"file": "a"}\n', b"[" * 9999 + b"\n"])
def test_row_reader_stops_at_damaged_json_line(damaged: bytes) -> None:
    data = as_jsonl(prediction("a.png"))
    assert [row.name for row in reader(data + damaged + data, ".jsonl")] == ["a.png"]
    assert list(reader(damaged, ".jsonl")) == []


@pytest.mark.parametrize("ending", ENDINGS)
def test_row_reader_stops_at_row_of_another_run(ending: str) -> None:
    data = ENDINGS[ending](prediction("a.png"), prediction("b.png", precision="int8"), prediction("c.png"))
    assert [row.name for row in reader(data, ending, run=("majority", "cpu", "fp32"))] == ["a.png"]
    assert len(list(reader(data, ending))) == 3


def test_row_reader_reports_other_columns() -> None:
    assert reader(b"name,age\n").columns is None
    assert reader(as_csv()).columns == columns(CLASSES)
    assert reader(b"").columns is None


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(("name", "expected"), [("out.csv", as_csv), ("out.JSONL", as_jsonl), ("out.CSV", as_csv)])
def test_extension_selects_the_format(tmp_path: Path, name: str, expected: Any) -> None:
    with open_writer(tmp_path / name, CLASSES) as writer:
        writer.write(prediction())
        assert not (tmp_path / name).exists()
    assert (tmp_path / name).read_bytes() == expected(prediction())
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["out", "out.txt", "out.json", "out.csv.gz", ".csv"])
def test_unknown_extension_raises_before_any_file_exists(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"--out .*: the extension is '.*'; expected \.csv or \.jsonl") as caught:
        format_for(tmp_path / name)
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError), open_writer(tmp_path / name, CLASSES):
        pytest.fail("it was opened")
    assert list(tmp_path.iterdir()) == []


def test_exception_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("of yesterday")
    with pytest.raises(RuntimeError, match="stop"), open_writer(path, CLASSES) as writer:
        writer.write(prediction())
        raise RuntimeError("stop")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.csv"]
    assert path.read_text() == "of yesterday"


def test_file_replaces_older_one_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("of yesterday")
    with open_writer(path, CLASSES) as writer:
        for _ in range(2000):
            writer.write(prediction())
        assert path.read_text() == "of yesterday"
    assert len(path.read_bytes().splitlines()) == 2001


def test_missing_folder_raises(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"absent/out\.csv: cannot be written"),
        open_writer(tmp_path / "absent" / "out.csv", CLASSES),
    ):
        pytest.fail("it was opened")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_full_disk_raises_and_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "out.csv").symlink_to("/dev/full")
    with (
        pytest.raises(OutputError, match=r"out\.csv: cannot be written \(No space left on device\)"),
        open_writer(tmp_path / "out.csv", CLASSES) as writer,
    ):
        for _ in range(2000):
            writer.write(prediction())
