"""Cross-validation: splitting by patient, the runs of the folds, out-of-fold figures, resume."""

from __future__ import annotations

import csv
import json
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from echoquad_runtime.errors import ConfigError, DatasetError, RunError
from echoquad_train.data.dataset import LabelledFrame, Split
from echoquad_train.data.patients import patients_of
from echoquad_train.fitting.cross_validation import fit_folds
from echoquad_train.fitting.fold_splits import FoldSettings, split_folds
from echoquad_train.recipe import Recipe
from echoquad_train.runs.checkpoint import load_last, load_run, save_last
from echoquad_train.runs.ensemble_folder import Ensemble, load_trained


def pool(patients: int, frames: int) -> list[Split]:
    """List frames without files: each patient has frames of both classes, in one split."""

    def of(name: str, numbers: range) -> Split:
        names = [
            (f"{name}/{kind}/patient{number:03d}_{frame}.png", label)
            for label, kind in enumerate(("a", "b"))
            for number in numbers
            for frame in range(1 + (number + frame_count) % frames)
        ]
        return Split(name, ("a", "b"), tuple(LabelledFrame(Path(path), path, label) for path, label in names))

    frame_count, border = frames, 2 * patients // 3
    return [of("train", range(border)), of("validation", range(border, patients))]


@given(patients=st.integers(6, 25), frames=st.integers(1, 4), folds=st.integers(2, 5), seed=st.integers(0, 2**63 - 1))
def test_folds_split_by_patient_and_hold_each_frame_out_once(patients: int, frames: int, folds: int, seed: int) -> None:
    splits, settings = pool(patients, frames), FoldSettings(folds)
    parts = split_folds(splits, settings, seed)
    every = [frame for split in splits for frame in split.frames]
    held_out = [frame for part in parts for frame in part.held_out.frames]
    assert sorted(held_out, key=lambda frame: frame.name) == sorted(every, key=lambda frame: frame.name)
    for number, part in enumerate(parts, 1):
        found = (part.train, part.validation, part.held_out)
        assert part.number == number and [split.name for split in found] == ["train", "validation", "held-out"]
        assert all(min(split.counts.values()) > 0 for split in found)
        assert sorted(frame.name for split in found for frame in split.frames) == sorted(frame.name for frame in every)
        owners = [set(patients_of(split.frames)) for split in found]
        assert sum(map(len, owners)) == patients == len(set.union(*owners))
        assert len(owners[1]) <= math.ceil(2 * (patients - len(owners[2])) / 10)  # a tenth, or one patient of few
    assert split_folds(splits, settings, seed) == parts


def test_validation_is_a_tenth_of_the_other_patients_with_every_class() -> None:
    """Of 100 patients, half of them of one class each, each fold validates on 8 of the other 80."""
    rng, frames = np.random.default_rng(0), []
    for number in range(100):
        for label in (0, 1) if number < 50 else (number % 2,):
            for frame in range(rng.integers(1, 4)):
                name = f"train/{'ab'[label]}/patient{number:03d}_{frame}.png"
                frames.append(LabelledFrame(Path(name), name, label))
    for part in split_folds([Split("train", ("a", "b"), tuple(frames))], FoldSettings(5), 0):
        sizes = [len(set(patients_of(split.frames))) for split in (part.train, part.validation, part.held_out)]
        assert sizes[1] == pytest.approx(8, abs=2) and sizes[2] == pytest.approx(20, abs=3)
        share = part.validation.counts["a"] / len(part.validation.frames)
        assert share == pytest.approx(part.train.counts["a"] / len(part.train.frames), abs=0.1)


def test_seed_changes_folds() -> None:
    assert split_folds(pool(20, 2), FoldSettings(4), 0) != split_folds(pool(20, 2), FoldSettings(4), 1)


def test_impossible_folds_are_refused() -> None:
    with pytest.raises(ConfigError, match="--folds 1: expected 2 or more"):
        FoldSettings(1)
    with pytest.raises(DatasetError, match="class a has 6 patients; expected one or more for every fold"):
        split_folds(pool(6, 1), FoldSettings(7), 0)
    with pytest.raises(DatasetError, match="class a has 1 patients"):
        split_folds(pool(9, 2), FoldSettings(3, "(patient)"), 0)
    with pytest.raises(ConfigError, match="--patient-regex"):
        split_folds(pool(9, 2), FoldSettings(3, "("), 0)
    with pytest.raises(
        DatasetError, match=r"without fold \d, class a has 1 patient; expected two or more, one to train"
    ):
        split_folds(pool(3, 1), FoldSettings(2), 0)
    # Two patients hold all frames of class b but one, and most of class a.
    names = [("x", 0, 9), ("x", 1, 9), ("y", 0, 1), ("z", 1, 1)]
    frames = [
        LabelledFrame(Path(), f"train/{'ab'[label]}/patient{ord(who)}_{number}.png", label)
        for who, label, count in names
        for number in range(count)
    ]
    with pytest.raises(
        DatasetError, match=r"fold \d has no \w+ frame of class [ab]: its patients cannot be split evenly"
    ):
        split_folds([Split("train", ("a", "b"), tuple(frames))], FoldSettings(2), 0)


# Training


@dataclass
class Case:
    """Trained folds and their inputs."""

    data: Path
    folder: Path
    recipe: Recipe
    folded: Any
    reporter: Any


@pytest.fixture(scope="session")
def patients_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write frames of six patients with both classes in train and validation, and a test split that is never read."""
    data, rng = tmp_path_factory.mktemp("patients") / "data", np.random.default_rng(2)
    for split, numbers in (("train", range(4)), ("validation", range(4, 6)), ("test", range(6, 7))):
        for level, name in ((220, "bright"), (40, "dark")):
            for number in numbers:
                path = data / split / name / f"patient{number:04d}_4CH.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.clip(level + rng.normal(0, 30, (40, 44)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(path)
    return data


def reporter_of(quiet: Any) -> Any:
    @dataclass
    class FoldQuiet(quiet):  # type: ignore[misc]
        folds: Any = None

        def fold(self, number: int, folds: int, *, finished: bool) -> None:
            self.folds = [*(self.folds or []), (number, finished)]

        def judging(self, number: int, done: int, total: int) -> None: ...

    return FoldQuiet()


@pytest.fixture(scope="module")
def case(
    tmp_path_factory: pytest.TempPathFactory, patients_data: Path, tiny: Recipe, quiet: Any, thin_session: Any
) -> Case:
    folder, recipe, reporter = tmp_path_factory.mktemp("folds") / "run", replace(tiny, epochs=2), reporter_of(quiet)
    with thin_session():
        folded = fit_folds(
            patients_data, folder, recipe, FoldSettings(2), device="cpu", resume=False, reporter=reporter
        )
    return Case(patients_data, folder, recipe, folded, reporter)


def test_folds_are_runs_and_form_an_ensemble(case: Case, thin: None) -> None:
    found = load_trained(case.folder)
    assert isinstance(found, Ensemble) and found.trained_in_folds and found.info["vote"] == "soft"
    assert [member.folder.name for member in found.members] == ["fold-1", "fold-2"]
    for number in (1, 2):
        run = load_run(case.folder / f"fold-{number}")
        fold = {"number": number, "of": 2, "held_out": {"bright": 3, "dark": 3}}
        assert run.info["fold"] == fold and run.info["status"] == "finished"
        assert run.info["data"]["frames"]["train"] == {"bright": 2, "dark": 2}
        assert run.info["data"]["frames"]["validation"] == {"bright": 1, "dark": 1}
    assert found.info["data"]["frames"] == {"train and validation": {"bright": 6, "dark": 6}}
    assert case.reporter.folds == [(1, False), (2, False)]


def test_out_of_fold_figures_use_runs_that_never_saw_the_patient(case: Case, thin: None) -> None:
    with (case.folder / "out_of_fold.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0])[-3:] == ["typicality", "fold", "true_class"] and "file" in rows[0]
    split_of = ["train"] * 4 + ["validation"] * 2
    files = [f"{split_of[n]}/{name}/patient{n:04d}_4CH.png" for name in ("bright", "dark") for n in range(6)]
    assert sorted(row["file"] for row in rows) == sorted(files)
    assert all(row["true_class"] == row["file"].split("/")[1] for row in rows)
    fold_of = {row["file"].split("/")[2]: row["fold"] for row in rows}
    assert len(fold_of) == 6 and all(fold_of[row["file"].split("/")[2]] == row["fold"] for row in rows)

    figures = json.loads((case.folder / "run.json").read_text("utf-8"))["out_of_fold"]
    right = sum(row["pred_image"] == row["true_class"] for row in rows)
    assert figures["pooled"]["accuracy"] == pytest.approx(right / 12) and figures["pooled"]["frames"] == 12
    by_fold = [fold["accuracy"] for fold in figures["folds"]]
    assert by_fold == [
        statistics.fmean(row["pred_image"] == row["true_class"] for row in rows if row["fold"] == fold) for fold in "12"
    ]
    for name in ("accuracy", "balanced_accuracy", "roc_auc", "patch_accuracy"):
        found = figures["pooled"]["intervals"][name]
        low, high = found["ci95"]
        assert found["estimate"] == figures["pooled"][name] and low <= found["estimate"] <= high
    assert figures["pooled"]["intervals"]["patients"] == 6 and "caveat" not in figures
    assert figures["mean"]["accuracy"] == pytest.approx(statistics.fmean(by_fold))
    assert figures["standard_deviation"]["accuracy"] == pytest.approx(statistics.stdev(by_fold))
    assert [fold["patients"] for fold in figures["folds"]] == [3, 3]


def test_killed_folds_resume_to_equal_result(tmp_path: Path, case: Case, quiet: Any, thin: None) -> None:
    folder, reporter = tmp_path / "run", reporter_of(quiet)

    def at_batch(epoch: int, done: int) -> None:
        if reporter.folds == [(1, False), (2, False)] and epoch == 2:
            raise KeyboardInterrupt

    reporter.at_batch = at_batch
    options: dict[str, Any] = {"device": "cpu", "reporter": reporter}
    with pytest.raises(KeyboardInterrupt):
        fit_folds(case.data, folder, case.recipe, FoldSettings(2), resume=False, **options)
    with pytest.raises(RunError, match="its folds are not all trained"):
        load_trained(folder)
    with pytest.raises(RunError, match="exists and is not empty"):
        fit_folds(case.data, folder, case.recipe, FoldSettings(2), resume=False, **options)
    with pytest.raises(RunError, match="began with --folds 2"):
        fit_folds(case.data, folder, case.recipe, FoldSettings(3), resume=True, **options)
    with pytest.raises(RunError, match="began with another recipe"):
        fit_folds(case.data, folder, replace(case.recipe, lr=0.5), FoldSettings(2), resume=True, **options)
    for name in ("fold-1", "fold-2"):  # the finished one and the interrupted one, as divided by an earlier release
        kept = (folder / name / "last.pt").read_bytes()
        state = load_last(folder / name)
        save_last(folder / name, {**state, "data": state["data"][::-1]})
        with pytest.raises(RunError, match=rf"{name}: trained on other frames .* an earlier release divided it"):
            fit_folds(case.data, folder, case.recipe, FoldSettings(2), resume=True, **options)
        (folder / name / "last.pt").write_bytes(kept)
    options["reporter"] = last = reporter_of(quiet)
    fit_folds(case.data, folder, case.recipe, FoldSettings(2), resume=True, **options)
    assert last.folds == [(1, True), (2, False)] and [epoch.epoch for epoch, _ in last.epochs] == [2]
    for name in ("fold-1/best.safetensors", "fold-2/best.safetensors", "out_of_fold.csv"):
        assert (folder / name).read_bytes() == (case.folder / name).read_bytes(), name
    found, expected = (json.loads((place / "run.json").read_text("utf-8")) for place in (folder, case.folder))
    assert found["out_of_fold"] == expected["out_of_fold"]
