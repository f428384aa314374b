"""``echoquad train --folds`` and ``echoquad ensemble``, and other commands on an ensemble."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

EACH_FRAME = ("--patient-regex", r"(\w+-\d+)\.png")
"""Takes each of the eight frames as a patient: there are too few patients for folds with validation splits."""


@pytest.fixture(scope="module")
def folds(
    data: Path, warm: Callable[..., Any], tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """Return an ensemble of two folds and the output of ``train``. Shared: tests must not change it."""
    folder = tmp_path_factory.mktemp("folds") / "run"
    (ran,) = warm([["train", data, "--out", folder, "--folds", "2", *EACH_FRAME, *tiny]])
    return folder, ran


def test_folds_write_an_ensemble_with_out_of_fold_figures(folds: tuple[Path, Any], left_in: Callable[..., Any]) -> None:
    folder, ran = folds
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0].split("  ")[0] == "out of fold"
    labels = ["fold 1", "fold 2", "pooled", "mean of folds", "standard deviation"]
    assert [line.split("  ")[0] for line in lines[2:]] == labels
    assert "fold 1 of 2\n" in ran.err and "no fold chose anything" in ran.err
    (line,) = [line for line in ran.err.splitlines() if line.startswith("out of fold: accuracy 0.")]
    assert line.endswith("; 95 % intervals by patient, 8 frames of 8 patients") and ", ROC AUC " in line
    assert ran.err.splitlines()[-1] == f"next: echoquad export {folder.as_posix()} --out BUNDLE"
    names = {"fold-1", "fold-2", "run.json", "recipe.toml", "out_of_fold.csv"}
    assert {path.name for path in folder.iterdir()} == names and left_in(folder) == []
    with (folder / "out_of_fold.csv").open(encoding="utf-8", newline="") as stream:
        files = [row["file"] for row in csv.DictReader(stream)]
    assert len(files) == len(set(files)) == 8 and not [file for file in files if file.startswith("test/")]


def test_resumed_folds_keep_their_settings(
    folds: tuple[Path, Any], data: Path, warm: Callable[..., Any], tiny: tuple[str, ...]
) -> None:
    folder = folds[0]
    before = (folder / "run.json").read_bytes()
    again, other, over = warm(
        [
            ["train", data, "--out", folder, "--resume"],
            ["train", data, "--out", folder, "--resume", "--folds", "3"],
            ["train", data, "--out", folder, "--folds", "2", *tiny],
        ]
    )
    assert again.code == 0 and again.out == folds[1].out and "fold 2 of 2: finished before" in again.err
    found, expected = json.loads((folder / "run.json").read_text("utf-8")), json.loads(before)
    assert {**found, "git_commit": ""} == {**expected, "git_commit": ""}
    assert other.code == over.code == 1
    assert "--folds 2" in other.errors[0] and over.errors[0].startswith(f"{folder.as_posix()}: ")


def test_ensemble_evaluates_exports_verifies_and_predicts(
    folds: tuple[Path, Any], trained: tuple[Path, Any], data: Path, warm: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    ensemble, bundle, out = tmp_path / "ensemble", tmp_path / "bundle", tmp_path / "out"
    joined, measured, exported, verified, predicted, mapped = warm(
        [
            ["ensemble", folds[0], trained[0], "--out", ensemble, "--vote", "hard", "--flip"],
            ["evaluate", ensemble, data, "--split", "validation", "--out", out],
            ["export", ensemble, "--out", bundle],
            ["verify", bundle],
            ["predict", bundle, data / "test", "--out", tmp_path / "decisions.csv"],
            ["predict", bundle, data / "test", "--overlay", tmp_path / "pictures", "--cam"],
        ]
    )
    assert joined.code == 0
    assert [line.split()[0] for line in joined.out.splitlines()[2:]] == ["members/1", "members/2", "members/3"]
    assert "each quadrant passes through a network 6 times" in joined.err
    assert "members from folds were trained on each other's held-out frames" in joined.err
    assert measured.code == 0 and "figures on them are optimistic" in measured.err
    assert (exported.code, verified.code, predicted.code) == (0, 0, 0), exported
    with (tmp_path / "decisions.csv").open(encoding="utf-8", newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 4
    assert mapped.code == 1 and "class activation maps" in mapped.errors[0]


def test_calibrate_fits_the_temperatures_of_the_ensemble(
    folds: tuple[Path, Any], trained: tuple[Path, Any], data: Path, warm: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    ensemble = tmp_path / "ensemble"
    made, refused, exported, measured = warm(
        [
            ["ensemble", trained[0], "--out", ensemble, "--flip", "--calibrate", data],
            ["ensemble", folds[0], "--out", tmp_path / "none", "--calibrate", data],
            ["export", ensemble, "--out", tmp_path / "bundle"],
            ["evaluate", tmp_path / "bundle", data, "--split", "validation", "--out", tmp_path / "out"],
        ]
    )
    assert made.code == 0 and "calibration: temperatures " in made.err
    info = json.loads((ensemble / "run.json").read_text("utf-8"))
    fitted = info["calibration"]
    assert fitted["split"] == "validation" and fitted["frames"] == 4
    assert info["contract"]["temperature"] == fitted["temperature"]
    assert (refused.code, len(refused.errors)) == (1, 1) and "--calibrate" in refused.errors[0]
    assert not (tmp_path / "none").exists()
    assert (exported.code, measured.code) == (0, 0), (exported, measured)
    manifest = json.loads((tmp_path / "bundle" / "bundle.json").read_text("utf-8"))
    assert manifest["contract"] == info["contract"]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))
    assert metrics["accuracy"] == pytest.approx(fitted["after"]["frame_accuracy"])


def test_invalid_folds_and_ensembles_are_refused_without_torch(
    trained: tuple[Path, Any], data: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    out = ["--out", tmp_path / "new"]
    refusals = [
        (2, ["train", data, *out, "--folds", "1"], "'--folds'"),
        (2, ["train", data, *out, "--folds", "2", "--teacher", trained[0]], "--folds with --teacher"),
        (2, ["train", data, *out, "--folds", "2", "--fit", "logistic"], "--folds with --fit logistic"),
        (1, ["train", data, *out, "--folds", "2", "--patient-regex", "("], "--patient-regex '('"),
        (1, ["ensemble", tmp_path / "none", *out], "none: no such folder"),
        (2, ["ensemble", trained[0], *out, "--vote", "loud"], "'soft', 'hard'"),
        (2, ["ensemble", *out], "Missing argument 'RUN'"),
    ]
    found, modules = many([line for _, line, _ in refusals])
    for (code, line, words), ran in zip(refusals, found, strict=True):
        assert (ran.code, ran.out, len(ran.errors)) == (code, "", 1), (line, ran)
        assert words in ran.errors[0], line
    assert "torch" not in modules
    assert list(tmp_path.iterdir()) == []


def test_more_folds_than_patients_are_refused(
    data: Path, warm: Callable[..., Any], tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    (ran,) = warm([["train", data, "--out", tmp_path / "run", "--folds", "5", *tiny]])
    assert (ran.code, len(ran.errors)) == (1, 1)
    assert ran.errors[0].startswith("--folds 5: ") and "2 patients" in ran.errors[0]
    assert not (tmp_path / "run").exists()
