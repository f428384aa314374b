"""The calibration set: which frames are drawn, and the ranges of tensors."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from PIL import Image

from echoquad_export.precision.calibration_set import Ranges, draw_calibration_set
from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import DatasetError

CONTRACT = Contract(("A", "B"), input_size=8)


def write(path: Path, seed: int, height: int = 21) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, 30), np.uint8)).save(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write 12 training frames, 9 of A and 3 of B, and 2 validation frames."""
    for index in range(9):
        write(tmp_path / "train" / "A" / f"{index}.png", index)
    for index in range(3):
        write(tmp_path / "train" / "B" / f"{index}.png", 100 + index)
    for name in ("A", "B"):
        write(tmp_path / "validation" / name / "0.png", 200 + ord(name))
    return tmp_path


def test_draw_balances_the_classes(data: Path) -> None:
    drawn = draw_calibration_set(data, CONTRACT, frames=6)
    assert drawn.quadrants.shape == (6, 4, 8, 8) and drawn.quadrants.dtype == np.uint8
    every = {name: draw_calibration_set(data, CONTRACT, frames=100).quadrants for name in "AB"}
    assert len(every["A"]) == 12
    from_b = [write_and_cut(data / "train" / "B" / f"{index}.png") for index in range(3)]
    assert sum(any(np.array_equal(frame, other) for other in from_b) for frame in drawn.quadrants) == 3


def write_and_cut(path: Path) -> np.ndarray:
    from echoquad_runtime.frames.reader import read_grey
    from echoquad_runtime.quadrants import frame_quadrants

    return frame_quadrants(read_grey(path), CONTRACT)[:, 0]


def test_draw_depends_on_the_seed_only(data: Path) -> None:
    first, same, other = (draw_calibration_set(data, CONTRACT, frames=5, seed=seed) for seed in (1, 1, 2))
    assert first.sha256 == same.sha256 == hashlib.sha256(first.quadrants.tobytes()).hexdigest() != other.sha256
    assert first.to_dict() == {"split": "train", "frames": 5, "seed": 1, "sha256": first.sha256, "left_out": 0}


def test_frames_of_held_out_splits_are_skipped(data: Path) -> None:
    shutil.copy(data / "train" / "A" / "3.png", data / "validation" / "A" / "again.png")
    (data / "test" / "B" / "deep").mkdir(parents=True)
    shutil.copy(data / "train" / "B" / "1.png", data / "test" / "B" / "deep" / "renamed.png")
    drawn = draw_calibration_set(data, CONTRACT, frames=100)
    assert (len(drawn.quadrants), drawn.left_out) == (10, 2)
    for held in (data / "train" / "A" / "3.png", data / "train" / "B" / "1.png"):
        assert not any(np.array_equal(frame, write_and_cut(held)) for frame in drawn.quadrants)


def test_splits_in_other_spellings_are_drawn_from_and_held_out(data: Path) -> None:
    expected = draw_calibration_set(data, CONTRACT, frames=100)
    shutil.copytree(data / "validation", data / "test")
    shutil.copy(data / "train" / "A" / "3.png", data / "test" / "A" / "again.png")
    for name, spelling in (("train", "Training"), ("validation", "val"), ("test", "TestSet")):
        (data / name).rename(data / spelling)
    drawn = draw_calibration_set(data, CONTRACT, frames=100)
    assert (len(drawn.quadrants), drawn.left_out) == (len(expected.quadrants) - 1, 1)


def test_held_out_data_raises_dataset_error(data: Path) -> None:
    shutil.copytree(data / "train", data / "test")  # a test set passed as a training split
    with pytest.raises(DatasetError, match=r"all 12 frames of train/"):
        draw_calibration_set(data, CONTRACT)
    shutil.rmtree(data / "train")
    with pytest.raises(DatasetError, match=r"no train/ folder"):
        draw_calibration_set(data, CONTRACT)
    with pytest.raises(DatasetError, match=r"no train/ folder"):
        draw_calibration_set(data / "test", CONTRACT)


def test_missing_or_unreadable_frames_raise_dataset_error(data: Path) -> None:
    for path in (data / "train").rglob("*.png"):
        path.unlink()
    with pytest.raises(DatasetError, match="no frame found"):
        draw_calibration_set(data, CONTRACT)
    for name in ("A", "B"):
        (data / "train" / name / "broken.png").write_bytes(b"no image")
    with pytest.raises(DatasetError):
        draw_calibration_set(data, CONTRACT)


def test_one_remaining_class_is_enough(data: Path) -> None:
    for path in (data / "train" / "B").iterdir():
        shutil.copy(path, data / "validation" / "B" / f"copy of {path.name}")
    drawn = draw_calibration_set(data, CONTRACT, frames=7)
    assert (len(drawn.quadrants), drawn.left_out) == (7, 3)


def doubling() -> onnx.ModelProto:
    """Build y = 2 x - 100 and z = y, where x is the 8-bit input cast to float."""
    nodes = [
        helper.make_node("Cast", ["quadrants"], ["x"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "two"], ["doubled"]),
        helper.make_node("Sub", ["doubled", "hundred"], ["y"]),
        helper.make_node("Identity", ["y"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes,
        "doubling",
        [helper.make_tensor_value_info("quadrants", onnx.TensorProto.UINT8, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["N", 1, 8, 8])],
        [
            helper.make_tensor(name, onnx.TensorProto.FLOAT, [], [value])
            for name, value in (("two", 2), ("hundred", 100))
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_ranges_are_the_extremes_including_zero() -> None:
    quadrants = np.random.default_rng(0).integers(10, 200, (6, 4, 8, 8), np.uint8)
    quadrants[2, 1, 3, 3], quadrants[4, 0, 0, 0] = 1, 254
    ranges = Ranges(doubling(), quadrants, ["x", "y", "z"])
    assert ranges.range("x") == (0.0, 254.0)  # extended to include 0
    assert ranges.range("y") == ranges.range("z") == (-98.0, 408.0)


@pytest.mark.parametrize("percentile", [99.9, 99.0, 90.0])
def test_percentile_ranges_agree_with_numpy(percentile: float) -> None:
    quadrants = np.clip(np.random.default_rng(0).normal(60, 25, (20, 4, 8, 8)), 0, 255).astype(np.uint8)
    low, high = Ranges(doubling(), quadrants, ["y"]).range("y", percentile)
    values = 2.0 * quadrants - 100
    # grey levels are 2 apart in y; the histogram bins are finer
    expected = np.percentile(values, [100 - percentile, percentile])
    np.testing.assert_allclose([low, high], [min(expected[0], 0), expected[1]], atol=2.5)
    assert ((values >= low) & (values <= high)).mean() >= 2 * percentile / 100 - 1


def test_constant_tensor_has_a_range() -> None:
    ranges = Ranges(doubling(), np.full((2, 4, 8, 8), 50, np.uint8), ["y", "x"])
    assert ranges.range("y") == ranges.range("y", 99.0) == (0.0, 0.0)
    assert ranges.range("x", 99.0) == (0.0, 50.0)
