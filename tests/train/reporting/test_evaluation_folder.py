"""Evaluation folder: every file is written, for unfriendly class names too."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import OutputError
from echoquad_runtime.predict.predictor import Predictor
from echoquad_train.data.dataset import read_split
from echoquad_train.evaluation.evaluate import evaluate
from echoquad_train.reporting.evaluation_folder import write_evaluation


def png_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


@pytest.mark.parametrize("classes", [("bright", "dark"), ("bright", "心房", "zz$x_{$")])
def test_write_evaluation_writes_every_file(
    tmp_path: Path,
    make_data: Callable[..., Path],
    brightness_engine: Callable[[Contract], Any],
    classes: tuple[str, ...],
) -> None:
    data = make_data(tmp_path / "data", classes, splits=("test",))
    ordered = tuple(sorted(classes))
    contract = Contract(ordered, input_size=16, quadrants=("RV", "LV", "RA", "LA"))
    found = evaluate(Predictor(brightness_engine(contract)), read_split(data, "test", ordered))
    paths = write_evaluation(found, tmp_path / "new" / "out")
    assert [path.name for path in paths] == [
        *["metrics.json", "predictions.csv", "confusion.png", "roc.png", "precision_recall.png", "reliability.png"],
        *["probabilities.png", "quadrants.png", "agreement.png", "risk_coverage.png", "report.html"],
    ]
    assert json.loads(paths[0].read_text("utf-8")) == found.metrics.to_dict() | {"mistakes": []}
    assert "apex-up (RV top left, LV top right, RA bottom left, LA bottom right)" in paths[-1].read_text("utf-8")
    with paths[1].open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [prediction.file for prediction in found.predictions]
    assert [row["pred_image"] for row in rows] == [prediction.label for prediction in found.predictions]
    for path in paths[2:-1]:
        width, height = png_size(path)
        assert 500 < width < 1500 and 500 < height < 1500
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_evaluation(found, tmp_path / "file" / "out")
