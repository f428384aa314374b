"""Evaluation of a split: metrics, progress, and unreadable frames."""

from __future__ import annotations

import csv
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echoquad_runtime.contract import QUADRANTS, Contract
from echoquad_runtime.errors import DatasetError
from echoquad_runtime.predict.predictor import Predictor
from echoquad_train.data.dataset import read_split
from echoquad_train.evaluation.evaluate import evaluate
from echoquad_train.evaluation.metrics import EvaluationOptions
from echoquad_train.reporting.evaluation_folder import write_evaluation


@pytest.fixture
def predictor(brightness_engine: Callable[[Contract], Any]) -> Predictor:
    return Predictor(brightness_engine(Contract(("bright", "dark"), input_size=16)), batch_size=3)


KEYS = {
    "split", "frames", "accuracy", "accuracy_ci95", "roc_auc", "confusion", "classes", "per_class", "per_quadrant",
}  # fmt: skip


def test_evaluate_measures_a_split(predictor: Predictor, flat_data: Path) -> None:
    seen: list[tuple[int, int]] = []
    split = read_split(flat_data, "test", ("bright", "dark"))
    found = evaluate(predictor, split, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 8) for done in range(1, 9)]
    assert set(found.metrics.to_dict()) >= KEYS and set(found.metrics.frame.per_quadrant) == set(QUADRANTS)
    assert (found.metrics.split, found.metrics.frame.frames, found.metrics.frame.accuracy) == ("test", 8, 1.0)
    assert found.metrics.frame.roc_auc == 1.0 and found.metrics.unreadable == 0
    assert (found.metrics.device, found.metrics.precision, found.metrics.method) == ("cpu", "fp32", "majority")
    assert found.metrics.contract_sha256 == predictor.contract.sha256
    assert [prediction.file for prediction in found.predictions] == [frame.name for frame in split.frames]
    assert found.scored.labels.tolist() == [0] * 4 + [1] * 4


def test_unreadable_frames_shift_no_label(tmp_path: Path, make_data: Callable[..., Path], predictor: Predictor) -> None:
    data = make_data(tmp_path / "data", frames=3, splits=("test",))
    for name in ("test/bright/test0.png", "test/dark/test2.png"):
        (data / name).write_bytes(b"")
    split = read_split(data, "test", ("bright", "dark"))
    found = evaluate(predictor, split)
    assert found.metrics.frame.accuracy == 1.0 and found.metrics.frame.frames == 4 and found.metrics.unreadable == 2
    assert [failure.file for failure in found.failures] == ["test/bright/test0.png", "test/dark/test2.png"]
    for frame in split.frames:
        frame.path.write_bytes(b"")
    with pytest.raises(DatasetError, match=r"^test: .*test/bright/test0\.png: "):
        evaluate(predictor, split)


@pytest.mark.parametrize("absent", ["bright", "dark"], ids=["positive", "negative"])
@pytest.mark.parametrize(("split", "reference"), [("test", "validation"), ("test", None), ("validation", None)])
def test_split_without_a_class_is_measured_on_those_present(
    tmp_path: Path, flat_data: Path, predictor: Predictor, absent: str, split: str, reference: str | None
) -> None:
    data = Path(shutil.copytree(flat_data, tmp_path / "data"))
    for folder in {split, reference or split}:
        shutil.rmtree(data / folder / absent)
    with pytest.raises(DatasetError, match=absent):
        read_split(data, split, ("bright", "dark"))
    frames = read_split(data, split, ("bright", "dark"), complete=False)
    chosen = read_split(data, reference, ("bright", "dark"), complete=False) if reference else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate(predictor, frames, options=EvaluationOptions(20, abstain_below=0.5), reference=chosen)
        write_evaluation(found, tmp_path / "out", gallery=2)
    record = json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))
    assert (record["frames"], record["accuracy"], record["absent_classes"]) == (4, 1.0, [absent])
    assert record["roc_auc"] is None and record["intervals"]["roc_auc"] == {"estimate": None, "ci95": None}
    assert (record["per_class"][absent]["recall"], record["per_class"][absent]["f1"]) == (None, None)
    missing, there = ("sensitivity", "specificity") if absent == "bright" else ("specificity", "sensitivity")
    assert record["intervals"][missing]["estimate"] is None and record["intervals"][there]["estimate"] == 1.0
    assert (record["intervals"]["f1"]["estimate"] is None) == (absent == "bright")
    assert record["intervals"]["macro_f1"]["estimate"] == record["intervals"]["balanced_accuracy"]["estimate"] == 1.0
    assert f"no frame of {absent}" in (tmp_path / "out" / "report.html").read_text("utf-8")
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").read_text("utf-8-sig").splitlines()))
    assert [row["true_class"] for row in rows] == [name for name in ("bright", "dark") if name != absent] * 4


def test_split_without_any_frame_is_refused(tmp_path: Path, flat_data: Path) -> None:
    (tmp_path / "test" / "bright").mkdir(parents=True)
    with pytest.raises(DatasetError, match="no frame found"):
        read_split(tmp_path, "test", ("bright", "dark"), complete=False)
