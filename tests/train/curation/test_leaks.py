"""Leaks that training finds in decoded splits: shared patients and shared pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image

from echoquad_runtime.contract import Contract, parse_layout
from echoquad_train.curation.leaks import Leaks, leaks_of_stores
from echoquad_train.data.dataset import load_quadrants, read_classes, read_split
from echoquad_train.data.patients import patient_pattern


def leaks_of(data: Path, regex: str | None = None, layout: str = "reference") -> Leaks:
    classes = read_classes(data)
    contract = Contract(classes=classes, input_size=48, quadrants=parse_layout(layout))
    stores = {split: load_quadrants(read_split(data, split, classes), contract) for split in ("train", "validation")}
    return leaks_of_stores(stores, patient_pattern(regex), contract.quadrants)


def test_splits_are_those_of_the_run(flat_data: Path) -> None:
    """A fold trains and validates on frames of one folder: what they share is a leak."""
    classes = read_classes(flat_data)
    contract = Contract(classes=classes, input_size=48)
    train, validation = (read_split(flat_data, name, classes) for name in ("train", "validation"))
    first, second = (load_quadrants(split, contract) for split in (train, validation))
    found = leaks_of_stores({"train": first, "validation": first})
    assert found.found and found.counts["exact_across"] == len(train.frames)
    assert found.counts["patients"] == {"train": len(train.frames), "validation": len(train.frames)}
    assert leaks_of_stores({"train": first}).counts["patients"].keys() == {"train"}
    assert not leaks_of_stores({"train": second, "validation": first}).found


def test_clean_splits_have_no_leak(flat_data: Path) -> None:
    found = leaks_of(flat_data)
    assert not found.found
    assert found.counts == {
        "patients": {"train": 8, "validation": 8},
        "patients_across": 0,
        "exact_across": 0,
        "near_across": 0,
        "unchecked": 0,
    }
    assert found.summary == (
        "leaks: 0 patients, 0 exact duplicates and 0 near duplicates in more than one split "
        "(patients: train 8, validation 8)"
    )


def test_shared_patient_exact_and_near_duplicate_are_found(flat_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(flat_data, tmp_path / "data"))
    train, validation = data / "train" / "dark", data / "validation" / "dark"
    shutil.copy(train / "train0.png", validation / "copy.png")
    shutil.copy(train / "train0.png", train / "twice.png")  # within one split: no leak
    with Image.open(train / "train1.png") as image:
        image.point(lambda level: min(255, level + 10)).save(validation / "near.jpg", quality=90)
    for split in ("train", "validation"):
        with Image.open(data / split / "bright" / f"{split}2.png") as image:
            image.save(data / split / "bright" / f"patient7_{split}.bmp")
    found = leaks_of(data)
    counts = found.counts
    assert (counts["patients_across"], counts["exact_across"], counts["near_across"]) == (1, 1, 1)
    assert found.patients == {"patient7": ("train", "validation")}
    assert found.exact[0].kind == "pixels"
    assert found.near[0].names == ("train/dark/train1.png", "validation/dark/near.jpg")
    assert found.summary.startswith("LEAK: 1 patient, 1 exact duplicate and 1 near duplicate in more than one split")


def test_pictures_are_compared_alike_in_every_quadrant_layout(flat_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(flat_data, tmp_path / "data"))
    with Image.open(data / "train" / "dark" / "train1.png") as image:
        image.point(lambda level: min(255, level + 10)).save(data / "validation" / "dark" / "near.jpg", quality=90)
    found = [leaks_of(data, layout=layout) for layout in ("reference", "apex-up", "RV,RA,LV,LA")]
    assert found[0].near and found[0].near == found[1].near == found[2].near


def test_patient_regex_defines_the_patients(flat_data: Path) -> None:
    assert leaks_of(flat_data, r"(\d)").counts["patients_across"] == 4


def test_run_json_records_the_leak_counts(trained) -> None:
    assert trained.reporter.leaks is not None and not trained.reporter.leaks.found
    assert trained.info["audit"] == trained.reporter.leaks.counts
    assert trained.info["patient_regex"] is None
