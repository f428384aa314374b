"""``echoquad train --folds`` and ``echoquad ensemble``, and what the other commands make of an ensemble."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def folds(
    data: Path, warm: Callable[..., Any], tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """Give an ensemble of two folds and what ``train`` printed. Shared: a test must not change it."""
    folder = tmp_path_factory.mktemp("folds") / "run"
    (ran,) = warm([["train", data, "--out", folder, "--folds", "2", *tiny]])
    return folder, ran


def test_folds(folds: tuple[Path, Any], left_in: Callable[..., Any]) -> None:
    folder, ran = folds
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0].split("  ")[0] == "out of fold"
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "fold 1",
        "fold 2",
        "pooled",
        "mean of folds",
        "standard deviation",
    ]
    assert "fold 1 of 2\n" in ran.err and "each fold's epoch was chosen on the frames that it is measured on" in ran.err
    assert ran.err.splitlines()[-1] == f"next: echoquad export {folder.as_posix()} --out BUNDLE"
    names = {"fold-1", "fold-2", "run.json", "recipe.toml", "out_of_fold.csv"}
    assert {path.name for path in folder.iterdir()} == names and left_in(folder) == []
    with (folder / "out_of_fold.csv").open(encoding="utf-8", newline="") as stream:
        files = [row["file"] for row in csv.DictReader(stream)]
    assert len(files) == len(set(files)) == 8 and not [file for file in files if file.startswith("test/")]


def test_resume_needs_nothing_said_again(
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
    assert "was begun with --folds 2" in other.errors[0] and "is there and not empty" in over.errors[0]


def test_from_an_ensemble_to_decisions(
    folds: tuple[Path, Any], trained: tuple[Path, Any], data: Path, warm: Callable[..., Any], tmp_path: Path
) -> None:
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
    assert "every quadrant passes 6 times through a network: latency is the sum of these" in joined.err
    assert "members of folds have learned from each other's validation frames" in joined.err
    assert measured.code == 0 and "so figures on them flatter" in measured.err
    assert (exported.code, verified.code, predicted.code) == (0, 0, 0), exported
    with (tmp_path / "decisions.csv").open(encoding="utf-8", newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 4
    assert mapped.code == 1 and len(mapped.errors) == 1
    assert "gives no class activation maps" in mapped.errors[0]


def test_an_ensemble_is_calibrated_as_asked(
    folds: tuple[Path, Any], trained: tuple[Path, Any], data: Path, warm: Callable[..., Any], tmp_path: Path
) -> None:
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
    assert (refused.code, len(refused.errors)) == (1, 1) and "leave --calibrate out" in refused.errors[0]
    assert not (tmp_path / "none").exists()
    assert (exported.code, measured.code) == (0, 0), (exported, measured)
    manifest = json.loads((tmp_path / "bundle" / "bundle.json").read_text("utf-8"))
    assert manifest["contract"] == info["contract"]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))
    assert metrics["accuracy"] == pytest.approx(fitted["after"]["frame_accuracy"])


def test_refusals(trained: tuple[Path, Any], data: Path, many: Callable[..., Any], tmp_path: Path) -> None:
    out = ["--out", tmp_path / "new"]
    refusals = [
        (2, ["train", data, *out, "--folds", "1"], "'--folds'"),
        (2, ["train", data, *out, "--folds", "2", "--teacher", trained[0]], "--folds with --teacher: the teacher has"),
        (
            1,
            ["train", data, *out, "--folds", "2", "--patient-regex", "("],
            "--patient-regex '(': invalid regular expression",
        ),
        (1, ["ensemble", tmp_path / "none", *out], "none: no such folder; expected a run"),
        (2, ["ensemble", trained[0], *out, "--vote", "loud"], "'soft', 'hard'"),
        (2, ["ensemble", *out], "Missing argument 'RUN'"),
    ]
    found, modules = many([line for _, line, _ in refusals])
    for (code, line, words), ran in zip(refusals, found, strict=True):
        assert (ran.code, ran.out, len(ran.errors)) == (code, "", 1), (line, ran)
        assert words in ran.errors[0], line
    assert "torch" not in modules
    assert list(tmp_path.iterdir()) == []


def test_more_folds_than_patients(data: Path, warm: Callable[..., Any], tmp_path: Path, tiny: tuple[str, ...]) -> None:
    (ran,) = warm([["train", data, "--out", tmp_path / "run", "--folds", "5", *tiny]])
    assert (ran.code, len(ran.errors)) == (1, 1)
    assert ran.errors[0].startswith("--folds 5: class ASD has 2 patients; expected one or more for every fold")
    assert not (tmp_path / "run").exists()
