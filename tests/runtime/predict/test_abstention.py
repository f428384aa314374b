"""Tests of abstention: a frame with low confidence is INDETERMINATE in rows, overlays, resume and merge."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.contract import INDETERMINATE, Contract
from echoquad_runtime.errors import ConfigError, ResultError
from echoquad_runtime.overlay.drawing import draw_overlay
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.predict.predictor import Predictor
from echoquad_runtime.results.result_file import ResultFile, read_run_record
from echoquad_runtime.results.row_formats import open_writer
from echoquad_runtime.results.shards import merge
from echoquad_runtime.voting import apply_temperature

CONTRACT = Contract(("ASD", "NORM"), input_size=32)


def prediction(p: float = 0.7, label: str = "ASD") -> Prediction:
    row = (p, 1 - p)
    return Prediction("a.png", ("ASD", "NORM"), "majority", label, row, ("ASD",) * 4, (row,) * 4, (), "cpu", "fp32")


def test_low_confidence_gives_indeterminate_label() -> None:
    sure = prediction()
    assert sure.abstaining(None, CONTRACT) is sure and sure.abstaining(0.7, CONTRACT) is sure
    unsure = sure.abstaining(0.71, CONTRACT)
    assert (unsure.label, unsure.predicted_class) == (INDETERMINATE, "ASD")
    assert unsure.probabilities == sure.probabilities and unsure.quadrant_labels == sure.quadrant_labels
    assert (sure.label, sure.predicted_class) == ("ASD", "ASD")


def test_confidence_is_calibrated_probability_of_predicted_class() -> None:
    assert prediction().confidence(CONTRACT) == pytest.approx(0.7)
    assert prediction(label="NORM").confidence(CONTRACT) == pytest.approx(0.3)  # the majority differs from the mean
    sharper = replace(CONTRACT, frame_temperature=0.25)
    assert prediction().confidence(sharper) == pytest.approx(0.7**4 / (0.7**4 + 0.3**4))
    assert prediction().abstaining(0.9, sharper).label == "ASD"
    assert prediction().abstaining(0.9, CONTRACT).label == INDETERMINATE


def test_predictor_abstains_below_threshold(tiny_bundle: Path, frames_folder: Path) -> None:
    every = list(Predictor(tiny_bundle).predict(frames_folder))
    contract = Predictor(tiny_bundle).contract
    threshold = float(np.median([found.confidence(contract) for found in every]))  # type: ignore[union-attr]
    some = list(Predictor(tiny_bundle, abstain_below=threshold).predict(frames_folder))
    labels = [found.label for found in some]  # type: ignore[union-attr]
    assert 0 < labels.count(INDETERMINATE) < len(labels)
    assert [found.predicted_class for found in some] == [found.label for found in every]  # type: ignore[union-attr]
    one = Predictor(tiny_bundle, abstain_below=1.0)(np.zeros((40, 40), np.uint8))
    assert one.label == INDETERMINATE and one.predicted_class in contract.classes


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.01, float("nan")])
def test_threshold_out_of_range_raises(threshold: float, tiny_bundle: Path) -> None:
    with pytest.raises(ConfigError, match=r"abstain_below is .*; expected a probability above 0 and at most 1"):
        Predictor(tiny_bundle, abstain_below=threshold)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_row_has_indeterminate_label_and_probabilities(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{ending}"
    with open_writer(path, ("ASD", "NORM")) as writer:
        writer.write(prediction().abstaining(0.8, CONTRACT))
    if ending == "csv":
        with path.open(newline="") as stream:
            (row,) = csv.DictReader(stream)
    else:
        row = json.loads(path.read_text())
    assert row["pred_image"] == INDETERMINATE and float(row["prob_ASD"]) == 0.7 and row["pred_LA"] == "ASD"


def test_overlay_shows_indeterminate_and_predicted_class(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = Image.new("L", (640, 480), 90)
    words: list[str] = []
    from PIL import ImageDraw

    plain = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda self, at, text, *rest, **more: (words.append(text), plain(self, at, text, *rest, **more))[1],
    )
    draw_overlay(frame, prediction().abstaining(0.8, CONTRACT), CONTRACT)
    assert "INDETERMINATE  mean 0.70" in words
    assert any(text.startswith("leans to ASD, 4 of 4 quadrants") for text in words)


def identity(below: str | None, shard: str | None = None) -> dict[str, Any]:
    ran = {"bundle": "b" * 64, "method": "majority", "device": "cpu", "precision": "fp32", "shard": shard}
    return {**ran, "abstain_below": below}


def write_rows(
    path: Path, named: dict[str, Any], *, resume: bool = False, finish: bool = True, name: str = "a.png"
) -> None:
    with ResultFile(path, resume=resume) as rows:
        rows.begin(("ASD", "NORM"), named)
        rows.write(replace(prediction(), file=name))
        if finish:
            rows.finish()


@pytest.mark.parametrize("finish", [True, False])
def test_resume_refuses_other_threshold(tmp_path: Path, finish: bool) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, identity("0.8"), finish=finish)
    for other, words in (("0.9", "0.9"), (None, "none")):
        with pytest.raises(ResultError, match=f"its abstain_below is 0.8, this run's is {words}"):
            write_rows(path, identity(other), resume=True)
    write_rows(path, identity("0.8"), resume=True)
    assert (read_run_record(path) or {})["abstain_below"] == "0.8"


def test_resume_accepts_record_without_threshold(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    old = identity(None)
    del old["abstain_below"]
    write_rows(path, old)
    write_rows(path, identity(None), resume=True)
    with pytest.raises(ResultError, match=r"its abstain_below is none, this run's is 0.8"):
        write_rows(path, identity("0.8"), resume=True)


def test_merge_refuses_shards_with_other_threshold(tmp_path: Path) -> None:
    from echoquad_runtime.results.shards import Shard

    parts = []
    for index, below in ((1, "0.8"), (2, None)):
        path = tmp_path / f"{index}.csv"
        name = next(f"{n}.png" for n in range(99) if Shard(index, 2).holds(f"{n}.png"))
        write_rows(path, identity(below, f"{index}/2"), name=name)
        parts.append(path)
    with pytest.raises(ResultError, match=r"its abstain_below is none, that of .* is 0.8; expected shards of one"):
        merge(parts, tmp_path / "all.csv")


def test_temperature_one_changes_nothing() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(3), 5)
    assert apply_temperature(p, 1.0) is p
    assert apply_temperature(p, 0.5) == pytest.approx(p**2 / (p**2).sum(axis=1, keepdims=True))
    assert np.isfinite(apply_temperature(np.array([1.0, 0.0]), 0.05)).all()
