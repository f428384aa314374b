"""The audit, on phantoms: nothing where nothing is, and every fault that is planted."""

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
    """Give phantoms of 20 patients, two frames each. Shared: a test must not change them."""
    folder = tmp_path_factory.mktemp("clean") / "data"
    write_dataset(folder, patients=20, frames_per_patient=2, seed=0)
    return folder


@pytest.fixture(scope="module")
def sound(clean: Path) -> Audit:
    return audit(clean)


def first(data: Path, split: str, label: str, place: int = 0) -> Path:
    return sorted((data / split / label).iterdir())[place]


@pytest.fixture(scope="module")
def planted(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the phantoms with a fault of every kind."""
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
def spoilt(planted: Path) -> Audit:
    return audit(planted)


def test_nothing_is_found_where_nothing_is(sound: Audit) -> None:
    leaks = sound.leaks
    assert (leaks.found, leaks.patients, leaks.exact, leaks.unchecked) == (False, {}, (), 0)
    # A phantom's heart is still: frames of one patient may be alike, those of two are not.
    assert all(len(set(twins.patients)) == 1 and not twins.leak for twins in leaks.near)
    assert (sound.failures, sound.flagged, sound.notes, sound.unknown) == ((), (), (), 0)
    assert sound.counts["train"]["ASD"] == {"frames": 14, "unreadable": 0, "patients": 7}
    assert leaks.members["train"] == 14 and sum(leaks.members.values()) == 20
    assert len(sound.shortcuts) == 3  # two classes: one of each kind
    assert all(shortcut.auc is not None for shortcut in sound.shortcuts)
    assert sound.classes["NORM"]["kinds"] == {"PNG L": 20}


def test_a_duplicate_across_splits(spoilt: Audit, planted: Path) -> None:
    (twins,) = spoilt.leaks.exact
    name = first(planted, "train", "NORM").relative_to(planted).as_posix()
    assert (twins.kind, twins.leak, twins.names) == ("file", True, ("test/NORM/NORM900-0.png", name))


def test_a_near_duplicate_across_splits(spoilt: Audit) -> None:
    # The patient who was moved may be alike to the frame that was left behind.
    (twins,) = [twins for twins in spoilt.leaks.near if twins.leak and len(set(twins.patients)) == 2]
    assert twins.splits == ("train", "validation")
    assert "validation/NORM/NORM901-0.jpg" in twins.names
    assert twins.likeness > 0.93


def test_a_patient_across_splits(spoilt: Audit) -> None:
    ((_, splits),) = spoilt.leaks.patients.items()
    assert splits == ("train", "validation")


def test_text_that_gives_the_class_away(spoilt: Audit) -> None:
    found = {shortcut.kind: shortcut for shortcut in spoilt.flagged}
    assert found["text"].name == "NORM" and found["text"].auc > 0.9


def test_a_truncated_file(spoilt: Audit, planted: Path) -> None:
    (failure,) = spoilt.failures
    assert failure.file == first(planted, "train", "ASD", 1).relative_to(planted).as_posix()
    assert spoilt.counts["train"]["ASD"]["unreadable"] == 1
    assert failure.file not in {frame.name for frame in spoilt.read}


def test_the_keys_of_the_record(spoilt: Audit) -> None:
    record = json.loads(json.dumps(spoilt.to_dict(), allow_nan=False))
    assert list(record) == [
        *["schema", "echoquad", "data", "patient_regex", "seed", "frames", "counts", "notes", "unreadable", "patients"],
        *["duplicates", "classes", "shortcuts", "leak", "rules"],
    ]
    assert record["leak"] is True
    assert list(record["duplicates"]) == ["exact", "near", "unchecked"]
    assert list(record["duplicates"]["near"][0]) == [
        *["kind", "files", "patients", "splits", "leak", "conflict", "distance", "likeness"]
    ]
    assert list(record["shortcuts"][0]) == ["kind", "class", "auc", "chance_99", "patients", "flagged"]


def test_the_same_seed_gives_the_same_record(sound: Audit, clean: Path) -> None:
    assert audit(clean).to_dict() == sound.to_dict()


def test_the_counts_name_nobody(spoilt: Audit) -> None:
    counts = spoilt.leaks.counts
    near = sum(twins.leak for twins in spoilt.leaks.near)
    assert (counts["patients_across"], counts["exact_across"], counts["near_across"]) == (1, 1, near)
    assert "NORM" not in json.dumps(counts) + spoilt.leaks.line
    assert spoilt.leaks.line.startswith("LEAK: 1 patient, 1 exact duplicate and ")


def test_the_sheet_shows_samples_and_leaks(spoilt: Audit, sound: Audit, tmp_path: Path) -> None:
    words = [text.get_text() for axes in contact_sheet(spoilt).axes for text in axes.texts]
    titles = [axes.get_title(loc="left") for axes in contact_sheet(spoilt).axes]
    assert "validation/NORM/NORM901-0.jpg" in words and "train\nASD" in words
    leaks = [twins for twins in (*spoilt.leaks.exact, *spoilt.leaks.near) if twins.leak]
    assert sum(title.startswith("LEAK: ") for title in titles) == len(leaks) >= 2
    assert not any(axes.get_title(loc="left").startswith("LEAK") for axes in contact_sheet(sound).axes)
    write_contact_sheet(sound, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width > 1000 and np.asarray(image.convert("L")).std() > 20


def test_what_is_missing_is_told(clean: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(clean, tmp_path / "data"))
    shutil.rmtree(data / "validation")
    shutil.rmtree(data / "test" / "ASD")
    found = audit(data)
    assert found.notes == ("validation: there is no such split", "test: no frame of class ASD")
    assert found.counts["test"]["ASD"] == {"frames": 0, "unreadable": 0, "patients": 0}
    contact_sheet(found)


def test_too_few_patients_and_a_single_class(tmp_path: Path, make_data) -> None:
    few = audit(make_data(tmp_path / "few", frames=1), patient_pattern("."))
    assert [(shortcut.auc, shortcut.flagged) for shortcut in few.shortcuts] == [(None, False)] * 3
    single = audit(make_data(tmp_path / "single", classes=("only",), splits=("train",)))
    assert single.shortcuts == ()
    assert "only is the only class: nothing can be told from it" in single.notes
    contact_sheet(few), contact_sheet(single)


def test_more_than_two_classes_are_told_from_the_rest(tmp_path: Path, make_data) -> None:
    found = audit(make_data(tmp_path / "data", classes=("a", "b", "c"), frames=9, splits=("train",)))
    assert [(shortcut.kind, shortcut.name) for shortcut in found.shortcuts][:3] == [
        ("border", "a"),
        ("border", "b"),
        ("border", "c"),
    ]
    brightness = [shortcut for shortcut in found.shortcuts if shortcut.kind == "file"]
    assert all(shortcut.flagged for shortcut in brightness), "the classes are levels of grey"


def test_flat_frames_are_equal_and_not_alike(tmp_path: Path) -> None:
    for split, level in (("train", 0), ("validation", 90)):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            shade = level + (3 if label == "b" else 0)
            Image.fromarray(np.full((40, 40), shade, np.uint8)).save(tmp_path / split / label / f"{split}.png")
    leaks = audit(tmp_path).leaks
    assert (leaks.exact, leaks.near) == ((), ())


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        audit(tmp_path / "none")
    (tmp_path / "ED").mkdir()
    with pytest.raises(DatasetError, match=r"none of train, validation, test found, only ED.*echoquad data split"):
        audit(tmp_path)
    (tmp_path / "train" / "ED").mkdir(parents=True)
    with pytest.raises(DatasetError, match="no frame found"):
        audit(tmp_path)
    (tmp_path / "train" / "ED" / "x.png").write_text("text")
    with pytest.raises(DatasetError, match=r"no frame can be read; the first failure: train/ED/x\.png"):
        audit(tmp_path)
