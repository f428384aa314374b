"""Folders as people have them: spellings of splits, Unicode forms of classes, system files, patients above classes."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from echoquad_runtime.errors import DatasetError
from echoquad_runtime.storage.system_files import SkippedEntries
from echoquad_train.curation.split import partition, write_partition
from echoquad_train.data.dataset import read_classes, read_split
from echoquad_train.data.frame_list import list_frames
from echoquad_train.data.split_folders import canonical_split, class_name_warnings, split_folders

MakeData = Callable[..., Path]


@pytest.mark.parametrize(
    ("folder", "split"),
    [
        *((name, "train") for name in ("train", "Train", "TRAIN", "training", "train_set", "TrainData")),
        *((name, "validation") for name in ("validation", "Validation", "val", "Val", "valid", "VALID", "val-split")),
        *((name, "test") for name in ("test", "Test", "testing", "test set")),
        *((name, None) for name in ("dev", "ASD", "tests1", "retrain", "", "data", "valve", "trainer")),
    ],
)
def test_usual_spellings_are_splits(folder: str, split: str | None) -> None:
    assert canonical_split(folder) == split


@pytest.mark.parametrize("names", [("Train", "Val", "Test"), ("training", "valid", "testing")])
def test_other_spellings_are_read_as_the_splits_by_every_listing(
    tmp_path: Path, make_data: MakeData, names: tuple[str, str, str]
) -> None:
    data = make_data(tmp_path / "data", frames=3, splits=names)
    classes = read_classes(data)
    assert classes == ("bright", "dark")
    for split, folder in zip(("train", "validation", "test"), names, strict=True):
        for given in (split, folder):
            found = read_split(data, given, classes)
            assert found.name == split and len(found.frames) == 6
        assert found.frames[0].name == f"{folder}/bright/{folder}0.png"  # as on disk
        assert (found.frames[0].split, found.frames[0].class_name) == (split, "bright")
    assert {frame.class_name for frame in list_frames(data).frames} == set(classes)
    assert {frame.split for frame in list_frames(data).frames} == {"train", "validation", "test"}
    parts = partition(data)
    assert {frame.class_name for frame in parts.frames} == set(classes)
    write_partition(parts, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == sorted(
        ("train", "validation", "test")
    )


def test_two_spellings_of_one_split_are_refused(tmp_path: Path, make_data: MakeData) -> None:
    data = make_data(tmp_path / "data", splits=("train", "val", "Validation"))
    for listing in (lambda: split_folders(data), lambda: read_classes(data), lambda: list_frames(data)):
        with pytest.raises(DatasetError, match=r"Validation and val .*validation"):
            listing()


def test_class_named_as_a_split_beside_other_classes_is_refused(tmp_path: Path, make_data: MakeData) -> None:
    data = make_data(tmp_path / "pool", ("ASD", "NORM", "test"), splits=("x",)) / "x"
    with pytest.raises(DatasetError, match=r"test is named .*ASD, NORM"):
        partition(data)
    with pytest.raises(DatasetError, match=r"ASD, NORM"):
        list_frames(data)


def test_other_folders_beside_the_splits_are_noted_or_refused(tmp_path: Path, make_data: MakeData) -> None:
    data = make_data(tmp_path / "data", splits=("train", "validation", "extra"))
    listing = list_frames(data)
    assert {frame.split for frame in listing.frames} == {"train", "validation"}
    assert any(note.startswith("extra: ") for note in listing.notes)
    with pytest.raises(DatasetError, match="extra"):
        partition(data)
    assert len(read_split(data, "extra", ("bright", "dark")).frames) == 6  # a folder that is named is read


def test_data_folder_one_level_too_high_is_refused(tmp_path: Path, make_data: MakeData) -> None:
    make_data(tmp_path / "train", splits=("train", "val"))
    with pytest.raises(DatasetError, match="names of splits"):
        read_classes(tmp_path)


def test_composed_and_decomposed_names_are_one_class(tmp_path: Path, make_data: MakeData) -> None:
    composed = "Vorhöfe"
    decomposed = unicodedata.normalize("NFD", composed)
    data = make_data(tmp_path / "data", (decomposed, "other"), splits=("train",))
    make_data(data, (composed, "other"), splits=("validation",))
    classes = read_classes(data)
    assert classes == (composed, "other")
    train, validation = (read_split(data, split, classes) for split in ("train", "validation"))
    assert train.counts == validation.counts == {composed: 3, "other": 3}
    assert train.frames[0].class_name == composed and train.frames[0].path.exists()
    assert read_split(data, "train", (decomposed, "other")).counts[decomposed] == 3  # the classes of an older bundle
    if not (data / "train" / composed).exists():  # macOS has one folder for both
        shutil.copytree(data / "validation" / composed, data / "train" / composed)
        assert read_split(data, "train", classes).counts[composed] == 6


def test_names_that_tables_misread_are_warned_of() -> None:
    names = ["ASD", "NA", "nan", "NULL", "null", "None", "true", "FALSE", "1", "2.5", "1e5", "N1", "1_0"]
    warned = class_name_warnings(names)
    assert [text.split("'")[1] for text in warned] == names[1:-2]


def test_system_entries_are_skipped_and_counted(tmp_path: Path, make_data: MakeData) -> None:
    data = make_data(tmp_path / "data")
    frame = data / "train" / "dark" / "train0.png"
    for name in ("dark/@eaDir/a.png", "dark/p/.thumbnails/b.png", "@eaDir/c.png", "dark/$RECYCLE.BIN/d.png"):
        (data / "train" / name).parent.mkdir(parents=True)
        shutil.copy(frame, data / "train" / name)
    for name in ("Thumbs.db", ".DS_Store", "._train0.png"):
        (data / "train" / "dark" / name).write_bytes(b"")
    skipped = SkippedEntries()
    assert len(read_split(data, "train", read_classes(data), skipped=skipped).frames) == 6
    assert skipped.total == 7 and skipped.counts["@eaDir"] == 2
    assert "7 hidden or system entries" in skipped.summary
    assert list_frames(data).skipped.total == 7


def patients_above_classes(folder: Path, make_data: MakeData) -> Path:
    source = make_data(folder / "flat", frames=8, splits=("train",)) / "train"
    for label in ("bright", "dark"):
        for index, path in enumerate(sorted((source / label).iterdir())):
            target = folder / "data" / f"P{index // 2:03}" / label / f"{index % 2}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    return folder / "data"


def test_patients_above_classes_are_split_by_patient(tmp_path: Path, make_data: MakeData) -> None:
    parts = partition(patients_above_classes(tmp_path, make_data), (0.5, 0.25, 0.25))
    assert {frame.class_name for frame in parts.frames} == {"bright", "dark"}
    assert set(parts.patients) == {"P000", "P001", "P002", "P003"}
    assert len(set(zip(parts.patients, parts.splits, strict=True))) == 4
    write_partition(parts, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*/bright/P*/*.png"))) == 8
    rows = (tmp_path / "out" / "split.csv").read_text().splitlines()
    assert rows[1].startswith("P000/bright/0.png,bright,P000,")
    assert read_classes(tmp_path / "out") == ("bright", "dark")


def test_patients_above_classes_are_refused_where_they_would_be_classes(tmp_path: Path, make_data: MakeData) -> None:
    patients_above_classes(tmp_path, make_data).rename(tmp_path / "train")
    for listing in (read_classes, list_frames):
        with pytest.raises(DatasetError, match=r"P000, P001, P002 .*bright, dark.*data split"):
            listing(tmp_path)
