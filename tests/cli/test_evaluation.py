"""``echoquad evaluate`` and ``predict --abstain-below`` as a user runs them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_two_models_are_compared(
    warm: Callable[..., Any], data: Path, trained: tuple[Path, Any], exported: tuple[Path, Any], tmp_path: Path
) -> None:
    run, bundle, out = trained[0], exported[0], tmp_path / "out"
    options = ["--split", "validation", "--bootstrap", "50", "--gallery", "2", "--at-specificity", "0.8"]
    (ran,) = warm([["evaluate", run, bundle, data, "--out", out, *options]])
    assert ran.code == 0
    assert "McNemar's exact test p = 1;" in ran.out  # the bundle decides as the run does
    found = json.loads((out / "compare.json").read_text("utf-8"))
    assert (found["mcnemar_p"], found["agreement"]) == (1.0, 1.0)
    assert [model["kind"] for model in found["models"]] == ["run", "bundle"]
    assert (out / "report.html").is_file()
    for letter in "ab":
        metrics = json.loads((out / letter / "metrics.json").read_text("utf-8"))
        assert metrics["chosen_on"].startswith("cross-fitted")
        assert [point["target"] for point in metrics["operating_points"]] == [0.8, 0.9]
        assert metrics["intervals"]["resamples"] == 50
        assert metrics["trained_calibration"]["split"] == "validation"
        assert set(metrics["calibration"]["refitted"]["temperatures"]) == {3.0}  # as the recipe gives it


def test_thresholds_are_chosen_on_validation(
    warm: Callable[..., Any], data: Path, exported: tuple[Path, Any], tmp_path: Path
) -> None:
    (ran,) = warm([["evaluate", exported[0], data, "--out", tmp_path / "out", "--abstain-below", "0.9"]])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))
    assert ran.code == 0 and "of validation for the thresholds" in ran.err
    assert "of the validation split" in metrics["chosen_on"]
    at = metrics["abstention"]["at"]
    with (tmp_path / "out" / "predictions.csv").open(newline="", encoding="utf-8") as stream:
        rows = [row["pred_image"] for row in csv.DictReader(stream)]
    assert rows.count("INDETERMINATE") == at["indeterminate"]
    assert metrics["model"]["manifest_sha256"] in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_what_cannot_be_measured_is_refused(
    warm: Callable[..., Any], data: Path, exported: Any, tmp_path: Path
) -> None:
    bundle, out = exported[0], tmp_path / "out"
    lines = {
        ("evaluate", bundle, bundle, bundle, data, "--out", out): (2, "3 models found before"),
        ("evaluate", bundle, tmp_path / "no", data, "--out", out): (
            1,
            "no: no such folder; expected a run or a bundle",
        ),
        ("evaluate", bundle, data, "--out", out, "--at-specificity", "1.5"): (
            1,
            "--at-specificity 1.5 found; expected",
        ),
        ("evaluate", bundle, data, "--out", out, "--abstain-below", "2"): (1, "abstain_below is 2; expected"),
        ("evaluate", bundle, data, "--out", out, "--patient-regex", "("): (1, "--patient-regex '(': no regular"),
        ("evaluate", bundle, data, "--out", out, "--threshold-from", tmp_path / "x"): (1, "x: no such folder"),
    }
    for ran, (code, words) in zip(warm([list(line) for line in lines]), lines.values(), strict=True):
        assert ran.code == code and words in ran.errors[0]
    assert not out.exists()


def test_predict_abstains(warm: Callable[..., Any], data: Path, exported: tuple[Path, Any], tmp_path: Path) -> None:
    bundle, out = exported[0], tmp_path / "rows.csv"
    frames = data / "test"
    (ran,) = warm(
        [["predict", bundle, frames, "--out", out, "--abstain-below", "1", "--overlay", tmp_path / "pictures"]]
    )
    with out.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    undecided = [row for row in rows if row["pred_image"] == "INDETERMINATE"]
    assert undecided and f"{len(undecided)} INDETERMINATE" in ran.err
    assert json.loads(out.with_name("rows.csv.run.json").read_text("utf-8"))["abstain_below"] == "1"
    again, other = warm(
        [
            ["predict", bundle, frames, "--out", out, "--abstain-below", "1", "--resume"],
            ["predict", bundle, frames, "--out", out, "--abstain-below", "0.5", "--resume"],
        ]
    )
    assert again.code == 0 and other.code == 1
    assert "its bound for abstaining is 1, this run's is 0.5" in other.errors[0]
