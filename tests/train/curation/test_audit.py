"""Audit of phantom data sets: no finding in clean data, and a finding for every planted fault."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from echoquad_runtime.errors import DatasetError
from echoquad_train.curation.audit import Audit, audit
from echoquad_train.curation.contact_sheet import contact_sheet, write_contact_sheet
from echoquad_train.data.patients import patient_pattern
from echoquad_train.phantom.dataset import write_dataset


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms of 20 patients, two frames each. Shared: tests must not modify them."""
    folder = tmp_path_factory.mktemp("clean") / "data"
    write_dataset(folder, patients=20, frames_per_patient=2, seed=0)
    return folder


@pytest.fixture(scope="module")
def clean_audit(clean: Path) -> Audit:
    return audit(clean)


def first(data: Path, split: str, label: str, place: int = 0) -> Path:
    return sorted((data / split / label).iterdir())[place]


@pytest.fixture(scope="module")
def planted(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantoms with one fault of every kind."""
    data = Path(shutil.copytree(clean, tmp_path_factory.mktemp("planted") / "data"))
    for path in data.glob("*/ASD/*.png"):
        with Image.open(path) as image:
            marked = image.convert("L")
        ImageDraw.Draw(marked).text((10, 10), "ASD CLINIC 7", fill=255)
        marked.save(path)
    shutil.copy(first(data, "train", "NORM"), data / "test" / "NORM" / "NORM900-0.png")
    with Image.open(first(data, "train", "NORM", 3)) as image:
        width, height = image.size
        cut = image.crop((width // 50, height // 40, width - width // 60, height - height // 90))
    cut.point(lambda level: min(255, int(level * 1.15 + 8))).save(
        data / "validation" / "NORM" / "NORM901-0.jpg", quality=75
    )
    moved = first(data, "train", "NORM", 5)
    moved.rename(data / "validation" / "NORM" / moved.name)
    broken = first(data, "train", "ASD", 1)
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    return data


@pytest.fixture(scope="module")
def planted_audit(planted: Path) -> Audit:
    return audit(planted)


def test_clean_data_have_no_finding(clean_audit: Audit) -> None:
    leaks = clean_audit.leaks
    assert (leaks.found, leaks.patients, leaks.exact, leaks.unchecked) == (False, {}, (), 0)
    # A phantom does not move: frames of one patient may be near duplicates, frames of two patients may not.
    assert all(len(set(group.patients)) == 1 and not group.leak for group in leaks.near)
    assert (clean_audit.failures, clean_audit.flagged, clean_audit.notes, clean_audit.frames_without_patient) == (
        (),
        (),
        (),
        0,
    )
    assert clean_audit.counts["train"]["ASD"] == {"frames": 14, "unreadable": 0, "patients": 7}
    assert leaks.patients_by_split["train"] == 14 and sum(leaks.patients_by_split.values()) == 20
    assert len(clean_audit.shortcuts) == 3  # two classes: one AUC per kind
    assert all(shortcut.auc is not None for shortcut in clean_audit.shortcuts)
    assert clean_audit.classes["NORM"]["kinds"] == {"PNG L": 20}


def test_copied_file_in_two_splits_is_an_exact_duplicate(planted_audit: Audit, planted: Path) -> None:
    (group,) = planted_audit.leaks.exact
    name = first(planted, "train", "NORM").relative_to(planted).as_posix()
    assert (group.kind, group.leak, group.names) == ("file", True, ("test/NORM/NORM900-0.png", name))


def test_cropped_brightened_copy_in_two_splits_is_a_near_duplicate(planted_audit: Audit) -> None:
    # The moved frame may also be a near duplicate of its patient's other frame.
    (group,) = [group for group in planted_audit.leaks.near if group.leak and len(set(group.patients)) == 2]
    assert group.splits == ("train", "validation")
    assert "validation/NORM/NORM901-0.jpg" in group.names
    assert group.similarity > 0.93


def test_patient_in_two_splits_is_a_leak(planted_audit: Audit) -> None:
    ((_, splits),) = planted_audit.leaks.patients.items()
    assert splits == ("train", "validation")


def test_burnt_in_text_is_flagged_as_shortcut(planted_audit: Audit) -> None:
    found = {shortcut.kind: shortcut for shortcut in planted_audit.flagged}
    assert found["text"].class_name == "NORM" and found["text"].auc > 0.9


def test_truncated_file_is_unreadable(planted_audit: Audit, planted: Path) -> None:
    (failure,) = planted_audit.failures
    assert failure.file == first(planted, "train", "ASD", 1).relative_to(planted).as_posix()
    assert planted_audit.counts["train"]["ASD"]["unreadable"] == 1
    assert failure.file not in {frame.name for frame in planted_audit.readable}


def test_audit_json_has_the_documented_keys(planted_audit: Audit) -> None:
    record = json.loads(json.dumps(planted_audit.to_dict(), allow_nan=False))
    assert list(record) == [
        *["schema", "echoquad", "data", "patient_regex", "seed", "frames", "counts", "notes", "unreadable", "patients"],
        *["duplicates", "classes", "shortcuts", "leak", "rules"],
    ]
    assert record["leak"] is True
    assert list(record["duplicates"]) == ["exact", "near", "unchecked"]
    assert list(record["duplicates"]["near"][0]) == [
        *["kind", "files", "patients", "splits", "leak", "conflict", "distance", "similarity"]
    ]
    assert list(record["shortcuts"][0]) == ["kind", "class", "auc", "chance_99", "patients", "flagged"]


def test_same_seed_gives_the_same_audit_json(clean_audit: Audit, clean: Path) -> None:
    assert audit(clean).to_dict() == clean_audit.to_dict()


def test_leak_counts_and_summary_contain_no_name(planted_audit: Audit) -> None:
    counts = planted_audit.leaks.counts
    near = sum(group.leak for group in planted_audit.leaks.near)
    assert (counts["patients_across"], counts["exact_across"], counts["near_across"]) == (1, 1, near)
    assert "NORM" not in json.dumps(counts) + planted_audit.leaks.summary
    assert planted_audit.leaks.summary.startswith("LEAK: 1 patient, 1 exact duplicate and ")


def test_contact_sheet_shows_samples_and_leaks(planted_audit: Audit, clean_audit: Audit, tmp_path: Path) -> None:
    sheet = contact_sheet(planted_audit)
    words = [text.get_text() for axes in sheet.axes for text in axes.texts]
    titles = [axes.get_title(loc="left") for axes in sheet.axes]
    assert "validation/NORM/NORM901-0.jpg" in words and "train\nASD" in words
    leaks = [group for group in (*planted_audit.leaks.exact, *planted_audit.leaks.near) if group.leak]
    assert sum(title.startswith("LEAK: ") for title in titles) == len(leaks) >= 2
    assert not any(axes.get_title(loc="left").startswith("LEAK") for axes in contact_sheet(clean_audit).axes)
    write_contact_sheet(clean_audit, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width > 1000 and np.asarray(image.convert("L")).std() > 20


def test_missing_split_and_class_are_noted(clean: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(clean, tmp_path / "data"))
    shutil.rmtree(data / "validation")
    shutil.rmtree(data / "test" / "ASD")
    found = audit(data)
    assert found.notes == ("validation: this split is missing", "test: no frame of class ASD")
    assert found.counts["test"]["ASD"] == {"frames": 0, "unreadable": 0, "patients": 0}
    contact_sheet(found)


def test_too_few_patients_or_a_single_class_give_no_auc(tmp_path: Path, make_data) -> None:
    few = audit(make_data(tmp_path / "few", frames=1), patient_pattern("."))
    assert [(shortcut.auc, shortcut.flagged) for shortcut in few.shortcuts] == [(None, False)] * 3
    single = audit(make_data(tmp_path / "single", classes=("only",), splits=("train",)))
    assert single.shortcuts == ()
    assert any(note.startswith("only is the only class") for note in single.notes)
    contact_sheet(few), contact_sheet(single)


def test_each_of_three_classes_is_predicted_against_the_rest(tmp_path: Path, make_data) -> None:
    found = audit(make_data(tmp_path / "data", classes=("a", "b", "c"), frames=9, splits=("train",)))
    assert [(shortcut.kind, shortcut.class_name) for shortcut in found.shortcuts][:3] == [
        ("border", "a"),
        ("border", "b"),
        ("border", "c"),
    ]
    brightness = [shortcut for shortcut in found.shortcuts if shortcut.kind == "file"]
    assert all(shortcut.flagged for shortcut in brightness), "the classes differ in brightness"


def test_uniform_frames_are_no_near_duplicates(tmp_path: Path) -> None:
    for split, level in (("train", 0), ("validation", 90)):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            shade = level + (3 if label == "b" else 0)
            Image.fromarray(np.full((40, 40), shade, np.uint8)).save(tmp_path / split / label / f"{split}.png")
    leaks = audit(tmp_path).leaks
    assert (leaks.exact, leaks.near) == ((), ())


def test_missing_or_unreadable_data_raise_dataset_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        audit(tmp_path / "none")
    (tmp_path / "ED").mkdir()
    with pytest.raises(DatasetError, match=r"only ED.*echoquad data split"):
        audit(tmp_path)
    (tmp_path / "train" / "ED").mkdir(parents=True)
    with pytest.raises(DatasetError, match="no frame found"):
        audit(tmp_path)
    (tmp_path / "train" / "ED" / "x.png").write_text("text")
    with pytest.raises(DatasetError, match=r"train/ED/x\.png"):
        audit(tmp_path)
