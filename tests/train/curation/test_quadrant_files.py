"""Quadrant files: stitched they equal the cropped frame, and nothing is left behind on failure."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.errors import DatasetError, VerificationError
from echoquad_runtime.frames.reader import read_grey
from echoquad_runtime.quadrants import crop_box, stitch
from echoquad_train.curation import quadrant_files
from echoquad_train.curation.quadrant_files import write_quadrants


@pytest.mark.parametrize("keep", [1.0, 0.9, 0.5])
def test_stitched_quadrants_equal_the_cropped_frame(make_data, tmp_path: Path, keep: float) -> None:
    data = make_data(tmp_path / "data", splits=("train", "test"))
    done = write_quadrants(data, tmp_path / "out", keep)
    assert (done.frames, done.failures) == (12, ())
    assert done.counts["test", "dark"] == 3
    rows = list(csv.DictReader((tmp_path / "out" / "patch_mapping.csv").read_text("utf-8").splitlines()))
    assert list(rows[0]) == ["file", "split", "class", "LA", "RA", "LV", "RV", "left", "top", "right", "bottom"]
    assert len(rows) == 12 and len(list((tmp_path / "out").rglob("*.png"))) == 48
    for row in rows:
        frame = read_grey(data / row["file"])
        height, width = frame.shape
        left, top, right, bottom = (int(row[key]) for key in ("left", "top", "right", "bottom"))
        assert (left, top, right, bottom) == crop_box(width, height, keep)
        parts = [read_grey(tmp_path / "out" / row[name]) for name in ("LA", "RA", "LV", "RV")]
        assert np.array_equal(stitch(*parts), frame[top:bottom, left:right])
    assert rows[0]["LA"] == "train/bright/train0_LA.png"


def test_quadrant_layout_names_the_files(make_data, tmp_path: Path) -> None:
    data, layout = make_data(tmp_path / "data", frames=1), ("RV", "LV", "RA", "LA")
    write_quadrants(data, tmp_path / "reference", 0.9)
    write_quadrants(data, tmp_path / "out", 0.9, layout=layout)
    for name, position in zip(layout, ("LA", "RA", "LV", "RV"), strict=True):
        found = (tmp_path / "out" / "train" / "dark" / f"train0_{name}.png").read_bytes()
        assert found == (tmp_path / "reference" / "train" / "dark" / f"train0_{position}.png").read_bytes()


def test_unreadable_frames_are_listed_as_failures(make_data, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    (data / "train" / "dark" / "text.png").write_text("text")
    Image.new("L", (1, 1)).save(data / "train" / "dark" / "dot.png")
    done = write_quadrants(data, tmp_path / "out", 0.9)
    assert sorted(failure.file for failure in done.failures) == ["train/dark/dot.png", "train/dark/text.png"]
    assert done.frames == 12


def test_frames_with_one_stem_keep_their_extensions(make_data, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", frames=1)
    with Image.open(data / "train" / "dark" / "train0.png") as image:
        image.save(data / "train" / "dark" / "train0.bmp")
    assert write_quadrants(data, tmp_path / "out", 0.9).frames == 5
    names = sorted(path.name for path in (tmp_path / "out" / "train" / "dark").glob("*_LA.png"))
    assert names == ["train0.bmp_LA.png", "train0.png_LA.png"]


def test_failed_verification_leaves_no_folder(make_data, tmp_path: Path, monkeypatch) -> None:
    data = make_data(tmp_path / "data", frames=1)
    monkeypatch.setattr(quadrant_files, "read_grey", lambda path: read_grey(path) // 2)
    with pytest.raises(VerificationError, match="train/"):
        write_quadrants(data, tmp_path / "out", 0.9)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_no_readable_frame_raises_dataset_error(tmp_path: Path) -> None:
    (tmp_path / "data" / "train" / "a").mkdir(parents=True)
    (tmp_path / "data" / "train" / "a" / "x.png").write_text("text")
    with pytest.raises(DatasetError, match=r"train/a/x\.png"):
        write_quadrants(tmp_path / "data", tmp_path / "out", 0.9)
    assert not (tmp_path / "out").exists()
