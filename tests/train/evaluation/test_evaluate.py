"""Evaluation of a split: metrics, progress, and unreadable frames."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echoquad_runtime.contract import QUADRANTS, Contract
from echoquad_runtime.errors import DatasetError
from echoquad_runtime.predict.predictor import Predictor
from echoquad_train.data.dataset import read_split
from echoquad_train.evaluation.evaluate import evaluate


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
