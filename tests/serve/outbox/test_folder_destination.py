"""The folder destination: JSON and CSV files, in which a repeat, a crash or a foreign edit leaves each row once."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from echoquad_runtime.errors import ConfigError
from echoquad_runtime.results.row_formats import CSV, JSON_LINES, columns, csv_line
from echoquad_serve.config import DestinationConfig
from echoquad_serve.errors import DeliveryError, DeliveryRefusedError
from echoquad_serve.outbox import daily_rows
from echoquad_serve.outbox.daily_rows import DailyRows
from echoquad_serve.outbox.folder_destination import FolderDestination
from echoquad_serve.records import Delivery, Result

DAY = "2026-11-27"
MakeResult = Callable[..., Result]


@pytest.fixture
def config(tmp_path: Path) -> DestinationConfig:
    return DestinationConfig("files", "folder", path=tmp_path / "out" / "results")


@pytest.fixture
def destination(config: DestinationConfig) -> Iterator[FolderDestination]:
    opened = FolderDestination(config)
    yield opened
    opened.close()


def rows_in(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text("utf-8"), newline="")))


def test_a_result_is_a_json_file_and_rows_with_the_columns_of_predict(
    config: DestinationConfig, destination: FolderDestination, make_result: MakeResult, make_row: Callable[..., Any]
) -> None:
    assert config.path is not None
    result = make_result(rows=(make_row("clip.avi#1"), make_row("clip.avi#2")))
    destination.deliver(Delivery(result, None))
    written = json.loads((config.path / DAY / f"{result.id}.json").read_text("utf-8"))
    assert written["id"] == result.id and written["rows"] == list(result.rows) and "sop_instance_uid" not in written
    rows = rows_in(config.path / f"{DAY}.csv")
    assert list(rows[0]) == [*columns(("ASD", "NORM")), "id"]
    assert [(row["file"], row["id"]) for row in rows] == [("clip.avi#1", result.id), ("clip.avi#2", result.id)]
    assert rows[0]["flags"] == "too dark;tie" and rows[0]["typicality"] == "0.9877"


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"name": "=cmd.png", "classes": ("=1+1", "b,c")},
        {"name": 'a"b\nc;d.png', "label": "INDETERMINATE", "flags": (), "typicality": None},
        {"name": "\udcff.png"},
    ],
)
def test_a_csv_row_of_a_json_row_is_that_of_predict(
    make_prediction: Callable[..., Any], values: dict[str, Any]
) -> None:
    predicted = make_prediction(**{"name": "a.png"} | values)
    assert csv_line(json.loads(JSON_LINES.row(predicted)), columns(predicted.classes)) == CSV.row(predicted)


def test_a_repeat_changes_nothing_even_after_a_restart(
    config: DestinationConfig, destination: FolderDestination, make_result: MakeResult
) -> None:
    assert config.path is not None
    results = [make_result() for _ in range(5)]
    for result in results:
        destination.deliver(Delivery(result, None))
    destination.close()
    before = (config.path / f"{DAY}.csv").read_bytes()
    again = FolderDestination(config)
    for result in results * 2:
        again.deliver(Delivery(result, None))
    again.close()
    assert (config.path / f"{DAY}.csv").read_bytes() == before
    assert len(list((config.path / DAY).iterdir())) == 5


def test_a_failed_result_has_a_json_file_and_no_row(
    config: DestinationConfig, destination: FolderDestination, make_result: MakeResult
) -> None:
    assert config.path is not None
    failure = {"file": "a.png", "code": "E_FRAME_DAMAGED", "message": "..."}
    destination.deliver(Delivery(make_result(status="failed", rows=(), failures=(failure,), bundle={}), None))
    assert not list(config.path.glob("*.csv")) and len(list((config.path / DAY).glob("*.json"))) == 1


def test_rows_of_a_bundle_with_other_classes_go_to_a_file_of_their_own(
    config: DestinationConfig, destination: FolderDestination, make_result: MakeResult, make_row: Callable[..., Any]
) -> None:
    assert config.path is not None
    first, third = make_result(), make_result()
    second = make_result(rows=(make_row("b.png", classes=("A", "B", "C")),))
    for result in (first, second, third, second):
        destination.deliver(Delivery(result, None))
    assert [row["id"] for row in rows_in(config.path / f"{DAY}.csv")] == [first.id, third.id]
    assert [row["id"] for row in rows_in(config.path / f"{DAY}-2.csv")] == [second.id]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(cut=st.integers(0, 10_000), zeros=st.sampled_from([0, 1, 4096]))
def test_wherever_a_write_is_cut_each_row_is_there_once(
    tmp_path_factory: pytest.TempPathFactory, make_row: Callable[..., Any], cut: int, zeros: int
) -> None:
    """Cut the file at any byte, as a power failure does, then deliver what was not recorded as delivered."""
    folder = tmp_path_factory.mktemp("cut")
    names = ['odd"name\n1.png', "b.png", "c.png"]
    results = [(f"{number:032x}", [make_row(name) for name in names]) for number in range(3)]
    rows = DailyRows(folder)
    for result_id, values in results:
        rows.add(DAY, result_id, values)
    path = folder / f"{DAY}.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[: cut % (len(whole) + 1)] + b"\0" * zeros)
    after_restart = DailyRows(folder)
    for result_id, values in results:
        after_restart.add(DAY, result_id, values)
    assert path.read_bytes() == whole
    assert list(folder.iterdir()) == [path]


def test_a_full_disk_in_the_middle_of_a_row_is_repaired_by_the_next_attempt(
    config: DestinationConfig,
    destination: FolderDestination,
    make_result: MakeResult,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert config.path is not None
    first, second = make_result(), make_result()
    destination.deliver(Delivery(first, None))

    def torn(stream: Any, data: bytes) -> None:
        stream.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(daily_rows, "write_all", torn)
        with pytest.raises(DeliveryError, match="No space left"):
            destination.deliver(Delivery(second, None))
    destination.deliver(Delivery(second, None))
    assert [row["id"] for row in rows_in(config.path / f"{DAY}.csv")] == [first.id, second.id]


def test_a_file_that_somebody_removes_or_edits_is_read_again(
    config: DestinationConfig, destination: FolderDestination, make_result: MakeResult
) -> None:
    assert config.path is not None
    first, second, third = make_result(), make_result(), make_result()
    path = config.path / f"{DAY}.csv"
    destination.deliver(Delivery(first, None))
    path.write_bytes(path.read_bytes() + b"a note of somebody\n")
    destination.deliver(Delivery(second, None))
    assert [row["id"] for row in rows_in(path) if row["id"]] == [first.id, second.id]
    assert b"a note of somebody" in path.read_bytes()
    path.unlink()
    destination.deliver(Delivery(third, None))
    assert [row["id"] for row in rows_in(path)] == [third.id]


def test_a_foreign_file_with_the_name_stays_as_it_is(
    config: DestinationConfig, destination: FolderDestination, make_result: MakeResult
) -> None:
    assert config.path is not None
    config.path.mkdir(parents=True)
    foreign = config.path / f"{DAY}.csv"
    foreign.write_text("day;what\n1;2\n")
    destination.deliver(Delivery(make_result(), None))
    assert foreign.read_text() == "day;what\n1;2\n" and len(rows_in(config.path / f"{DAY}-2.csv")) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_a_link_is_not_written_through(
    config: DestinationConfig, destination: FolderDestination, make_result: MakeResult, tmp_path: Path
) -> None:
    assert config.path is not None
    config.path.mkdir(parents=True)
    (config.path / f"{DAY}.csv").symlink_to(tmp_path / "victim")
    with pytest.raises(DeliveryError, match="symbolic link"):
        destination.deliver(Delivery(make_result(), None))
    assert not (tmp_path / "victim").exists()


def test_a_second_service_is_told_to_take_another_folder(
    config: DestinationConfig, destination: FolderDestination, make_result: MakeResult
) -> None:
    destination.deliver(Delivery(make_result(), None))
    second = FolderDestination(config)
    with pytest.raises(DeliveryError, match="another process"):
        second.deliver(Delivery(make_result(), None))
    destination.close()
    second.deliver(Delivery(make_result(), None))
    second.close()


def test_a_folder_that_cannot_be_written_is_tried_again(tmp_path: Path, make_result: MakeResult) -> None:
    (tmp_path / "file").write_text("")
    destination = FolderDestination(DestinationConfig("files", "folder", path=tmp_path / "file"))
    with pytest.raises(DeliveryError) as caught:
        destination.deliver(Delivery(make_result(), None))
    assert not isinstance(caught.value, DeliveryRefusedError) and "\n" not in str(caught.value)


def test_an_id_that_is_no_file_name_is_refused(destination: FolderDestination, make_result: MakeResult) -> None:
    with pytest.raises(DeliveryRefusedError):
        destination.deliver(Delivery(make_result(id="../../etc/cron.d/x"), None))


def test_a_folder_needs_a_path() -> None:
    with pytest.raises(ConfigError, match="path"):
        FolderDestination(DestinationConfig("files", "folder"))
