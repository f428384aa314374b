"""The benchmark of out-of-fold figures, on tiny data and on made-up numbers."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

import out_of_fold
import torch
import torchvision
from torch import nn
from workers import fold as worker

from echoquad_runtime.errors import DatasetError
from echoquad_train.data.dataset import LabelledFrame, Split
from echoquad_train.data.patients import patients_of
from echoquad_train.fitting.cross_validation import fit_folds
from echoquad_train.fitting.fold_splits import FoldSettings, split_folds
from echoquad_train.fitting.out_of_fold import ResampledFigures
from echoquad_train.plot_style import save
from echoquad_train.recipe import Recipe
from echoquad_train.runs.checkpoint import load_run
from echoquad_train.runs.ensemble_folder import Ensemble, load_trained

torch.set_num_threads(1)

TINY = "tiny=scratch:input_size=16,epochs=2,batch_size=8,lr=5e-3,mixed_precision=false,progressive_fraction=0"


def test_recipe_has_label_members_teacher_and_settings() -> None:
    found = out_of_fold.parse_recipe("small=scratch:backbone=timm:efficientnet_lite0,zoom=[0.9, 1.1],epochs=3")
    assert (found.label, found.members, found.teacher) == ("small", 0, None)
    assert (found.recipe.backbone, found.recipe.zoom, found.recipe.epochs) == ("timm:efficientnet_lite0", (0.9, 1.1), 3)
    assert out_of_fold.parse_recipe("transfer") == out_of_fold.Entry("transfer", Recipe.load("transfer"))
    assert out_of_fold.parse_recipe("scratch:epochs=3").label == "scratch:epochs=3"
    five = out_of_fold.parse_recipe("five=lite*5:epochs=3")
    assert (five.label, five.members, five.recipe.epochs) == ("five", 5, 3)
    assert out_of_fold.parse_recipe("student=lite@five").teacher == "five"


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        (["a=lite*b"], r"--recipe a=lite\*b: expected \[LABEL=\]RECIPE"),
        (["lite", "lite"], "two have the same label"),
        (["lite@none"], "found teacher none; expected"),
        (["a=lite", "b=lite@a", "c=lite@b"], "--recipe c: found teacher b"),
        (["a=lite", "b=lite*5@a"], "--recipe b: found teacher a; expected a single run"),
    ],
)
def test_unsuitable_labels_and_teachers_are_refused(recipes: list[str], message: str) -> None:
    line = ["data", "--out", "figures.json", *(part for recipe in recipes for part in ("--recipe", recipe))]
    with pytest.raises(SystemExit, match=message):
        out_of_fold.entries_of(out_of_fold.parse(line))


# Patients


def pool(both: int, one: int) -> Split:
    """List frames of `both` patients with both classes, and `one` with a single class, alternately."""
    owners = [(number, label) for number in range(both) for label in (0, 1)]
    owners += [(both + number, number % 2) for number in range(one)]
    names = [f"train/{'ab'[label]}/patient{number:04d}_4CH.png" for number, label in owners]
    frames = (LabelledFrame(Path(name), name, label) for name, (_, label) in zip(names, owners, strict=True))
    return Split("train", ("a", "b"), tuple(frames))


def test_fewer_patients_are_among_more_and_have_the_classes_in_proportion() -> None:
    settings, wholes = FoldSettings(5), split_folds([pool(60, 60)], FoldSettings(5), 3)
    for whole in wholes:
        smaller: dict[str, set[str]] = {"train": set(), "validation": set()}
        for count in (10, 25, 50, 96, None):
            fold = worker.limit_patients(whole, count, settings, 3)
            assert fold.held_out == whole.held_out
            assert worker.count_patients(fold, settings) == (count or worker.count_patients(whole, settings))
            for split in (fold.train, fold.validation):
                patients = set(patients_of(split.frames))
                assert smaller[split.name] <= patients
                smaller[split.name] = patients
                assert split.counts["a"] == pytest.approx(split.counts["b"], abs=2)
            held = [frame for frame in whole.train.frames if frame in set(fold.train.frames)]
            assert held == list(fold.train.frames)  # every frame of a patient, in the same order
            single = sum(1 for name in smaller["train"] if int(name.removeprefix("patient")) >= 60)
            assert single == pytest.approx(len(smaller["train"]) / 2, abs=0.06 * len(smaller["train"]) + 1)
        assert worker.limit_patients(whole, 1000, settings, 3) == whole
    assert worker.patient_order(whole.train, settings, 3) != worker.patient_order(whole.train, settings, 4)


def test_too_few_patients_are_refused() -> None:
    settings = FoldSettings(5)
    with pytest.raises(DatasetError, match="--patients 2: train has no frame of a class"):
        worker.limit_patients(split_folds([pool(0, 60)], settings, 0)[0], 2, settings, 0)


# Training


class ThinResNet(torchvision.models.ResNet):
    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        return super()._make_layer(block, planes // 8, blocks, stride, dilate)


def thin_backbone(name: str, weights: object = None) -> nn.Module:
    body = ThinResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    body.fc = nn.Linear(64, 1000)
    return body


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write frames of twelve patients, a brighter and a darker one of each, with so much noise that some are wrong."""
    rng = np.random.default_rng(4)
    for number in range(12):
        for name, level in (("bright", 150), ("dark", 106)):
            path = tmp_path / "data" / ("train" if number < 9 else "validation") / name / f"patient{number:04d}_4CH.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = level + rng.normal(0, 20) + rng.normal(0, 30, (40, 44))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
    return tmp_path / "data"


class Quiet(worker.Log):
    epoch = worker.Log._ignore


def call(monkeypatch: pytest.MonkeyPatch, *line: object) -> None:
    monkeypatch.setattr(sys, "argv", ["out_of_fold.py", *map(str, line)])
    out_of_fold.main()


def test_killed_benchmark_goes_on_and_equals_cross_validation(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torchvision.models, "get_model", thin_backbone)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    started: list[str] = []
    most = 3

    def run_here(job: worker.Job) -> None:
        if len(started) == most:
            raise KeyboardInterrupt
        started.append(job.name)
        worker.measure(job)

    monkeypatch.setattr(out_of_fold, "run_worker", run_here)
    out, results, plot = tmp_path / "figures.json", tmp_path / "RESULTS.md", tmp_path / "curve.png"
    line = [data, "--out", out, "--recipe", TINY, "--folds", "2", "--patients", "4,5,6,100", "--device", "cpu"]
    line += ["--plot", plot, "--results", results]
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, *line)
    assert not out.exists() and len(list((tmp_path / "figures").glob("*.npz"))) == 3
    most = 6
    call(monkeypatch, *line)
    assert len(set(started)) == 6 and [name.split(".")[1] for name in started[3:]] == ["5", "all", "all"]
    record = json.loads(out.read_text("utf-8"))
    assert [(row["asked"], row["patients"], row["held_out"]) for row in record["rows"]] == [
        ("4", 4, 12), ("5", 5, 12), ("all", 6, 12)
    ]  # fmt: skip

    folder = tmp_path / "folds"
    recipe = out_of_fold.parse_recipe(TINY).recipe
    figures = fit_folds(
        data, folder, recipe, FoldSettings(2), device="cpu", resume=False, reporter=Quiet()
    ).out_of_fold["pooled"]
    row = record["rows"][-1]
    assert row["estimates"]["accuracy"] == figures["intervals"]["accuracy"]
    assert row["seeds"] == [{"seed": 0, **{name: figures[name] for name in out_of_fold.FIGURES}}]
    with (folder / "out_of_fold.csv").open(encoding="utf-8", newline="") as stream:
        decided = {line["file"]: line["pred_image"] for line in csv.DictReader(stream)}
    for run in [run for run in record["runs"] if run["patients"] == 6][-2:]:
        _, scored = worker.load_result(tmp_path / "figures" / run["predictions"])
        assert all(decided[name] == scored.classes[one] for name, one in zip(scored.names, scored.decided, strict=True))
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".npz"}  # no run folder is left

    text = results.read_text("utf-8")
    assert "## out_of_fold, learning curve" in text and "| tiny | 4 | 1 | 0." in text
    assert "paired. Trained on cpu in fp32." in text
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == record["rows"]
    assert plot.read_bytes().startswith(b"\x89PNG")


# Figures


def made_up(sizes: Sequence[int], seeds: Sequence[int] = (0,)) -> list[Any]:
    """Return rows of two recipes whose accuracy grows with the number of patients."""
    rows: list[Any] = []
    first: dict[int, ResampledFigures] = {}
    for label, start in (("scratch", 0.05), ("lite", 0.22)):
        for size in sizes:
            pooled = {}
            for seed in seeds:
                rng, labels = np.random.default_rng([size, seed]), np.tile([0, 1], 450)
                right = rng.normal(0.5 + start + 0.02 * np.log2(size / 50), 0.22, (900, 4)).clip(0.01, 0.99)
                quadrants = np.where(labels[:, None, None] == [[[0, 1]]], right[:, :, None], 1 - right[:, :, None])
                pooled[seed] = worker.ScoredFrames(
                    names=tuple(map(str, range(900))),
                    classes=("ED", "ES"),
                    positive="ED",
                    method="average",
                    vote_weights=(1.0, 1.0, 1.0, 1.0),
                    labels=labels,
                    quadrants=quadrants,
                    decided=quadrants.mean(axis=1).argmax(axis=1),
                    patients=tuple(map(str, np.repeat(range(450), 2))),
                )
            figures = ResampledFigures.of(list(pooled.values()))
            baseline = first.setdefault(size, figures)
            rows.append(out_of_fold.row_of(label, None if size == 360 else size, size, pooled, figures, baseline))
    return rows


def test_figure_has_a_line_for_each_recipe(tmp_path: Path) -> None:
    rows = made_up((50, 100, 200, 360))
    figure = out_of_fold.draw(rows)
    save(figure, tmp_path / "curve.png")
    for axes in figure.axes:
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["scratch", "lite"]
        assert [text.get_text() for text in axes.get_xticklabels()] == ["50", "100", "200", "360"]
        assert axes.get_ylabel().endswith("(95 % interval by patient)")
    if target := os.environ.get("ECHOQUAD_TEST_PICTURES"):
        shutil.copy(tmp_path / "curve.png", Path(target) / "learning-curve.png")


def test_table_states_the_spread_over_seeds() -> None:
    header, one, *_ = out_of_fold.table(made_up((50,), (0, 1, 2)))
    assert header[:5] == ["recipe", "patients", "seeds", "frame accuracy", "95 % interval"]
    assert one[:3] == ["scratch", "50", "3"] and " ± 0.0" in one[3] and " to " in one[4]
    assert "±" not in out_of_fold.table(made_up((50,)))[1][3]


def test_table_states_paired_differences_from_the_first_recipe() -> None:
    rows = made_up((50, 360), (0, 1))
    header, *lines = out_of_fold.table(rows)
    assert header[-2:] == ["accuracy, difference", "95 % interval"]
    assert [line[-2:] for line in lines[:2]] == [["", ""]] * 2
    for row, line in zip(rows[2:], lines[2:], strict=True):
        found, own = row["differences"]["accuracy"], row["estimates"]["accuracy"]
        other = next(one for one in rows if one["asked"] == row["asked"])["estimates"]["accuracy"]
        assert found["estimate"] == pytest.approx(own["estimate"] - other["estimate"])
        # The same frames are hard for both, so the difference is surer than that of independent figures.
        independent = np.hypot(np.diff(own["ci95"]), np.diff(other["ci95"]))
        assert np.diff(found["ci95"]) < 0.98 * independent
        assert line[-2:] == [f"{found['estimate']:+.3f}", " to ".join(f"{bound:+.3f}" for bound in found["ci95"])]


# Ensembles


def test_student_waits_for_its_teacher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = ["data", "--out", str(tmp_path / "figures.json"), "--recipe=student=lite@teacher", "--recipe=teacher=lite"]
    splits = [pool(60, 0)]
    monkeypatch.setattr(worker, "read_splits", lambda data: splits)
    jobs = list(out_of_fold.make_jobs(out_of_fold.parse(line)))
    finished: list[str] = []

    def run_here(job: worker.Job) -> None:
        if job.label == "teacher":
            time.sleep(0.02)
        finished.append(job.name)

    monkeypatch.setattr(out_of_fold, "run_worker", run_here)
    monkeypatch.setattr(worker, "load_result", lambda result: ({}, None))
    monkeypatch.setattr(out_of_fold, "line_of", lambda facts: "")
    out_of_fold.train(jobs, 8)
    assert sorted(finished) == sorted(job.name for job in jobs)
    students = [job for job in jobs if job.teacher]
    assert len(students) == 5
    assert all(finished.index(job.teacher or "") < finished.index(job.name) for job in students)


def test_ensemble_and_its_student_never_see_the_fold_that_is_held_out(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.models, "get_model", thin_backbone)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(out_of_fold, "run_worker", worker.measure)
    out = tmp_path / "figures.json"
    settings = TINY.partition(":")[2]
    recipes = [f"student=scratch@two:{settings}", TINY, f"two=scratch*2:{settings}"]
    call(monkeypatch, data, "--out", out, *(f"--recipe={recipe}" for recipe in recipes), "--folds", "2", "--keep")
    record = json.loads(out.read_text("utf-8"))
    assert [row["recipe"] for row in record["rows"]] == ["tiny", "two", "student"]
    for number in (1, 2):
        single, ensemble, student = (tmp_path / "figures" / run["predictions"] for run in record["runs"]
                                     if run["fold"] == number)  # fmt: skip
        names = [worker.load_result(result)[1].names for result in (single, ensemble, student)]
        assert names[0] == names[1] == names[2]
        held_out = {name.rpartition("/")[2] for name in names[0]}
        folder = ensemble.with_suffix("")
        members = load_trained(folder)
        assert isinstance(members, Ensemble)
        with (folder / "out_of_fold.csv").open(encoding="utf-8", newline="") as stream:
            seen = {line["file"].rpartition("/")[2] for line in csv.DictReader(stream)}
        assert len(members.members) == 2 and len(seen) == 6 and not seen & held_out
        hashes = load_run(student.with_suffix("")).info["teacher"]["members"]
        assert hashes == [member["weights_sha256"] for member in members.info["members"]]
