"""``echoquad evaluate``: figures and files of a run and of a bundle, comparison, thresholds, abstention."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")

DECISIONS = ("pred_image", "pred_LA", "pred_RA", "pred_LV", "pred_RV", "method", "flags")


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return {row["file"]: row for row in csv.DictReader(stream)}


@pytest.fixture(scope="module")
def evaluations(
    trained: tuple[Path, Any],
    exported: tuple[Path, Any],
    data: Path,
    warm: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, Any]]:
    """Return the evaluation folders of the run and of the bundle, each with the output of the command."""
    folder = tmp_path_factory.mktemp("evaluations")
    models = {"run": trained[0], "bundle": exported[0]}
    found = warm([["evaluate", model, data, "--out", folder / name] for name, model in models.items()])
    return {name: (folder / name, ran) for name, ran in zip(models, found, strict=True)}


@pytest.mark.parametrize("model", ["run", "bundle"])
def test_evaluate_prints_and_writes_metrics(
    model: str, evaluations: dict[str, tuple[Path, Any]], left_in: Callable[..., Any]
) -> None:
    folder, ran = evaluations[model]
    assert ran.code == 0
    files = ["metrics.json", "predictions.csv", "report.html"]
    figures = ["agreement", "confusion", "precision_recall", "probabilities", "quadrants", "reliability"]
    files += [f"{name}.png" for name in [*figures, "risk_coverage", "roc"]]
    assert {path.name for path in folder.iterdir()} - {"mistakes"} == set(files)
    assert left_in(folder.parent) == []
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    wanted = "split frames accuracy accuracy_ci95 roc_auc confusion classes per_class per_quadrant device precision"
    assert set(wanted.split()) <= metrics.keys()
    assert (metrics["split"], metrics["frames"], metrics["classes"]) == ("test", 4, ["ASD", "NORM"])

    lines = ran.out.splitlines()
    assert lines[0].startswith(f"frame accuracy {metrics['accuracy']:.4f} (95 % interval ")
    assert lines[0].endswith(", 4 frames")
    assert lines[2].startswith("quadrants      LA ") and lines[3].startswith("by patient     ")
    head = lines.index("") + 1
    assert lines[head].split() == ["class", "precision", "recall", "F1", "frames", "as", "ASD", "as", "NORM"]
    assert [line.split()[0] for line in lines[head + 2 :]] == ["ASD", "NORM"]
    assert "test: 4 frames and 4 of validation for the thresholds on cpu in fp32" in ran.err
    assert all(f"{folder.as_posix()}/{name}" in ran.err for name in files)


def test_run_bundle_and_predict_decide_alike(
    evaluations: dict[str, tuple[Path, Any]],
    exported: tuple[Path, Any],
    data: Path,
    echoquad: Callable[..., Any],
    tmp_path: Path,
) -> None:
    echoquad("predict", exported[0], data / "test", "--out", tmp_path / "decisions.csv")
    predicted = {f"test/{name}": row for name, row in rows_of(tmp_path / "decisions.csv").items()}
    bundle, run = (rows_of(evaluations[name][0] / "predictions.csv") for name in ("bundle", "run"))
    assert predicted.keys() == bundle.keys() == run.keys()
    assert len(run) == 4
    for name, row in run.items():
        assert {**predicted[name], "file": name, "true_class": name.split("/")[1]} == bundle[name]
        assert [row[column] for column in DECISIONS] == [bundle[name][column] for column in DECISIONS]
        for column in [column for column in row if column.startswith(("prob_", "p_"))]:
            assert float(row[column]) == pytest.approx(float(bundle[name][column]), abs=1.01e-4)


def test_frames_unlike_the_training_frames_are_counted(evaluations: dict[str, tuple[Path, Any]]) -> None:
    """A bundle has a typicality score, and the run that it was exported from has none."""
    found = {
        name: json.loads((folder / "metrics.json").read_text("utf-8")) for name, (folder, _) in evaluations.items()
    }
    assert "unlike_training" not in found["run"]
    rows = rows_of(evaluations["bundle"][0] / "predictions.csv").values()
    counted, flagged = found["bundle"]["unlike_training"], sum("unlike-training" in row["flags"] for row in rows)
    assert (counted["frames"], counted["share"]) == (flagged, flagged / len(rows))
    assert counted["median_typicality"] == pytest.approx(median(float(row["typicality"]) for row in rows), abs=1e-4)
    assert f"unlike training {flagged / len(rows):.4f}" in evaluations["bundle"][1].out


def test_evaluate_skips_unreadable_frames_and_exits_5(
    exported: tuple[Path, Any], data_copy: Path, warm: Callable[..., Any], tmp_path: Path
) -> None:
    (data_copy / "test" / "ASD" / "broken.png").write_text("no image")
    (ran,) = warm([["evaluate", exported[0], data_copy, "--out", tmp_path / "out"]])
    assert (ran.code, ran.error_codes) == (5, ["E_FRAME_FORMAT"])
    assert ran.errors[0].startswith("test/ASD/broken.png: ")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))["unreadable"] == 1


def test_two_models_are_compared_on_the_same_frames(
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
        assert set(metrics["calibration"]["refitted"]["temperatures"]) == {3.0}  # as the recipe states


def test_thresholds_are_chosen_on_the_validation_split(
    warm: Callable[..., Any], data: Path, exported: tuple[Path, Any], tmp_path: Path
) -> None:
    (ran,) = warm([["evaluate", exported[0], data, "--out", tmp_path / "out", "--abstain-below", "0.9"]])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))
    assert ran.code == 0 and "of validation for the thresholds" in ran.err
    assert "validation split" in metrics["chosen_on"]
    at = metrics["abstention"]["at"]
    with (tmp_path / "out" / "predictions.csv").open(newline="", encoding="utf-8") as stream:
        rows = [row["pred_image"] for row in csv.DictReader(stream)]
    assert rows.count("INDETERMINATE") == at["indeterminate"]
    assert metrics["model"]["manifest_sha256"] in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_invalid_evaluations_are_refused(
    warm: Callable[..., Any], data: Path, exported: tuple[Path, Any], tmp_path: Path
) -> None:
    bundle, out = exported[0], tmp_path / "out"
    lines = {
        ("evaluate", bundle, bundle, bundle, data, "--out", out): ("E_USAGE", "3 models"),
        ("evaluate", bundle, tmp_path / "no", data, "--out", out): ("E_RUN", "no: no such folder"),
        ("evaluate", bundle, data, "--out", out, "--at-specificity", "1.5"): ("E_CONFIG", "--at-specificity 1.5"),
        ("evaluate", bundle, data, "--out", out, "--abstain-below", "2"): ("E_CONFIG", "2"),
        ("evaluate", bundle, data, "--out", out, "--patient-regex", "("): ("E_CONFIG", "--patient-regex '('"),
        ("evaluate", bundle, data, "--out", out, "--threshold-from", tmp_path / "x"): ("E_DATASET", "x: no such"),
    }
    for ran, (code, words) in zip(warm([list(line) for line in lines]), lines.values(), strict=True):
        assert ran.code == (2 if code == "E_USAGE" else 1)
        assert ran.error_codes == [code] and words in ran.errors[0]
    assert not out.exists()


def test_predict_abstains_below_the_given_confidence(
    warm: Callable[..., Any], data: Path, exported: tuple[Path, Any], tmp_path: Path
) -> None:
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
    assert (again.code, other.code) == (0, 1)
    assert other.error[0] == "E_RESULT" and "0.5" in other.errors[0]


def test_split_in_another_spelling_without_a_class_is_evaluated(
    trained: tuple[Path, Any], data_copy: Path, warm: Callable[..., Any], tmp_path: Path
) -> None:
    for split, name in (("train", "Train"), ("validation", "val"), ("test", "Testing")):
        (data_copy / split).rename(data_copy / f"renamed-{name}")
        (data_copy / f"renamed-{name}").rename(data_copy / name)
    shutil.rmtree(data_copy / "Testing" / "ASD")
    ran, named, audited, split = warm(
        [
            ["evaluate", trained[0], data_copy, "--out", tmp_path / "out"],
            ["evaluate", trained[0], data_copy, "--split", "val", "--out", tmp_path / "val"],
            ["data", "audit", data_copy],
            ["data", "split", data_copy, "--out", tmp_path / "new", "--fractions", "50-50-0"],
        ]
    )
    assert [one.code for one in (ran, named, audited, split)] == [0] * 4
    assert "test: no frame of class ASD" in ran.err and "frames and" in ran.err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))
    assert (metrics["split"], metrics["absent_classes"], metrics["roc_auc"]) == ("test", ["ASD"], None)
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    assert {row["true_class"] for row in rows.values()} == {"NORM"}
    assert all(name.startswith("Testing/NORM/") for name in rows)
    assert json.loads((tmp_path / "val" / "metrics.json").read_text("utf-8"))["split"] == "validation"
    assert "test: no frame of class ASD" in audited.out and "is this right?" in audited.out
    assert "train/ASD" in split.out and "Train" not in split.out
