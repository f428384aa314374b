"""``echoquad train``: a run, its resumption, a student, a linear classifier, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from echoquad.cli.commands.train.training_progress import TrainingProgress

torch = pytest.importorskip("torch")

from echoquad_train.recipe import Recipe  # noqa: E402


def test_train_prints_its_progress_and_writes_a_run(trained: tuple[Path, Any], left_in: Callable[..., Any]) -> None:
    folder, ran = trained
    assert ran.out == ""  # status lines are on stderr
    lines = ran.err.splitlines()
    assert lines[0].startswith("train: 4 frames (ASD 2, NORM 2)")
    assert lines[1].startswith("validation: 4 frames (ASD 2, NORM 2)")
    assert lines[2].startswith("training on cpu in ")
    assert lines[3].startswith("patients: 4, 2 frames each, read from the file name, as ASD")
    assert lines[4].startswith("leaks: 0 patients, 0 exact duplicates and 0 near duplicates")
    assert lines[5].startswith("Epoch 01/1 [all] train loss ")
    assert lines[5].endswith(" s")  # the recipe takes the last epoch, so none is marked as the best
    assert "validation frame accuracy" in lines[-2] and any(line.startswith("model: epoch 1, ") for line in lines)
    assert lines[-1] == f"next: echoquad export {folder.as_posix()} --out BUNDLE"
    wanted = {"recipe.toml", "run.json", "metrics.csv", "curves.png", "best.safetensors", "last.pt"}
    assert wanted == {path.name for path in folder.iterdir()}
    assert json.loads((folder / "run.json").read_text("utf-8"))["status"] == "finished"
    assert "input_size = 16" in (folder / "recipe.toml").read_text("utf-8")
    assert left_in(folder.parent) == []


def test_quadrant_layout_is_chosen_printed_and_kept(
    data: Path, warm: Callable[..., Any], tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    train = ["train", data, "--out", run]
    made, other, bad = warm(
        [
            [*train, *tiny, "--quadrant-layout", "RV,LV,RA,LA"],
            [*train, "--resume", "--quadrant-layout", "reference"],
            ["train", data, "--out", tmp_path / "none", *tiny, "--quadrant-layout", "upside-down"],
        ]
    )
    assert made.code == 0
    assert "quadrant layout: apex-up (RV top left, LV top right, RA bottom left, LA bottom right)" in made.err
    assert json.loads((run / "run.json").read_text("utf-8"))["contract"]["quadrants"] == ["RV", "LV", "RA", "LA"]
    assert 'quadrant_layout = "apex-up"' in (run / "recipe.toml").read_text("utf-8")
    assert other.code == 1 and "recipe" in other.errors[0]
    assert (bad.code, bad.error_codes) == (1, ["E_CONFIG"]) and "apex-up" in bad.errors[0]


def test_resume_continues_and_another_recipe_is_refused(
    trained: tuple[Path, Any], data: Path, warm: Callable[..., Any], tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in run.glob("*.safetensors")}
    train = ["train", data, "--out", run]
    resumed, again, other = warm([[*train, "--resume"], [*train, *tiny], [*train, "--resume", "--epochs", "3"]])
    assert resumed.code == 0
    assert "model: epoch 1, " in resumed.err
    assert "Epoch 02" not in resumed.err
    assert (again.code, other.code) == (1, 1)
    assert "--resume" in again.errors[0] and "--out" in again.errors[0]
    assert "recipe" in other.errors[0]
    assert before == {path.name: path.read_bytes() for path in run.glob("*.safetensors")}


def test_student_is_distilled_from_a_teacher_of_another_input_size(
    trained: tuple[Path, Any], data: Path, warm: Callable[..., Any], tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    run, student = trained[0], tmp_path / "student"
    train = ["train", data, "--out", student]
    options = [*tiny, "--input-size", "24", "--teacher", run]
    without_effect = ["train", data, "--out", tmp_path / "full", "--set", "distill_weight=0.5", *tiny]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    taught, missing, alone, resumed, noted = warm(
        [
            [*train, *options, "--set", "distill_temperature=2"],
            [*train, *tiny, "--teacher", tmp_path / "none"],
            [*train, "--resume"],
            [*train, "--resume", "--teacher", run],
            without_effect,
        ]
    )
    assert taught.code == 0 and "model: epoch 1, " in taught.err
    info = json.loads((student / "run.json").read_text("utf-8"))
    assert info["teacher"]["input_size"] == 16 and info["contract"]["input_size"] == 24
    recipe = (student / "recipe.toml").read_text("utf-8")
    assert "distill_temperature = 2.0\n" in recipe and "distill_weight = 0.7\n" in recipe
    assert (missing.code, missing.error[0]) == (2, "E_USAGE")
    assert missing.errors[0].startswith(f"--teacher: {(tmp_path / 'none').as_posix()} does not exist")
    assert alone.code == 1 and "--teacher RUN" in alone.errors[0]
    assert resumed.code == 0 and "model: epoch 1, " in resumed.err
    assert "without --teacher, distill_weight and distill_temperature have no effect" in noted.err
    assert "have no effect" not in taught.err


def test_fit_trains_a_linear_classifier_on_frozen_features(
    trained: tuple[Path, Any], warm: Callable[..., Any], tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    plain = [word for word in tiny if word not in ("--epochs", "1")]
    train = ["train", tmp_path / "data", "--out", tmp_path / "svm", *plain, "--fit", "linear-svm"]
    _, fitted, again, long, taught, unknown = warm(
        [
            ["data", "phantom", tmp_path / "data", "--patients", "12", "--frames", "1"],
            train,
            [*train, "--resume"],
            [*train, "--epochs", "3"],
            [*train, "--teacher", trained[0], "--resume"],
            [*train[:-1], "forest"],
        ]
    )
    assert fitted.code == 0 and "Epoch 01/1 [linear-svm]" in fitted.err, fitted
    assert json.loads((tmp_path / "svm" / "run.json").read_text("utf-8"))["fit"]["kind"] == "linear-svm"
    for ran, options in ((again, "--resume"), (long, "--epochs"), (taught, "--resume, --teacher")):
        assert (ran.code, ran.error[0]) == (2, "E_USAGE")
        assert ran.errors[0].startswith(f"--fit linear-svm with {options}: ")
    assert unknown.code == 2 and "linear-svm" in unknown.err and "logistic" in unknown.err


def test_train_skips_unreadable_frames_and_exits_5(
    data_copy: Path, warm: Callable[..., Any], tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    (data_copy / "train" / "ASD" / "broken.png").write_text("no image")
    (ran,) = warm([["train", data_copy, "--out", tmp_path / "run", *tiny]])
    assert (ran.code, ran.out, ran.error_codes) == (5, "", ["E_FRAME_FORMAT"])
    assert ran.errors[0].startswith("train/ASD/broken.png: ")
    assert f"wrote {(tmp_path / 'run').as_posix()}/" in ran.err
    unreadable = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["data"]["unreadable"]
    assert [failure["file"] for failure in unreadable] == ["train/ASD/broken.png"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available")
def test_train_without_cuda_exits_4(
    data: Path, warm: Callable[..., Any], tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    (ran,) = warm([["train", data, "--out", tmp_path / "run", *tiny, "--device", "cuda"]])
    assert ran.code == 4
    code, message = ran.error
    assert code == "E_DEVICE_UNAVAILABLE" and message.startswith("--device cuda: ") and "--device cpu" in message
    assert not (tmp_path / "run").exists()


@pytest.fixture
def invalid(data_copy: Path, tmp_path: Path) -> dict[str, Path]:
    """Return data sets that cannot be trained on, by their fault."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(data_copy, tmp_path / name))

    shutil.rmtree(copy("single") / "train" / "NORM")
    shutil.rmtree(copy("lacking") / "validation" / "ASD")
    shutil.rmtree(copy("unsplit") / "validation")
    (copy("unknown") / "validation" / "PFO").mkdir()
    for path in (copy("empty") / "train" / "NORM").iterdir():
        path.unlink()
    for path in (copy("unreadable") / "validation" / "NORM").iterdir():
        path.write_text("no image")
    (tmp_path / "blank").mkdir()
    names = ("single", "lacking", "unsplit", "unknown", "empty", "unreadable", "blank", "missing")
    return {name: tmp_path / name for name in names}


def test_invalid_data_and_recipes_are_refused_before_torch_is_imported(
    invalid: dict[str, Path], data: Path, many: Callable[..., Any], tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    (tmp_path / "recipe.toml").write_text("epochs = 'many'\n")
    (tmp_path / "no.toml").write_text("epochs =\n")
    out = ["--out", tmp_path / "run"]
    refusals = [
        ("E_DATASET", ["train", invalid["single"], *out, *tiny], "'ASD'"),
        ("E_DATASET", ["train", invalid["lacking"], *out, *tiny], "class ASD is missing"),
        ("E_DATASET", ["train", invalid["unsplit"], *out, *tiny], "validation/"),
        ("E_DATASET", ["train", invalid["unknown"], *out, *tiny], "class PFO is unknown"),
        ("E_DATASET", ["train", invalid["empty"], *out, *tiny], "train/NORM: "),
        ("E_DATASET", ["train", invalid["blank"], *out, *tiny], "train/"),
        ("E_DATASET", ["train", invalid["missing"], *out, *tiny], "missing: no such folder"),
        ("E_CONFIG", ["train", data, *out, "--recipe", "miracle"], "'miracle'"),
        ("E_CONFIG", ["train", data, *out, "--recipe", tmp_path / "recipe.toml"], "epochs is 'many'"),
        ("E_CONFIG", ["train", data, *out, "--recipe", tmp_path / "no.toml"], "no.toml: "),
        ("E_CONFIG", ["train", data, *out, "--set", "momentum=1"], "momentum"),
        ("E_CONFIG", ["train", data, *out, "--set", "epochs"], "--set epochs: "),
        ("E_CONFIG", ["train", data, *out, "--set", "schedule=never"], "plateau, onecycle"),
        ("E_CONFIG", ["train", data, *out, "--epochs", "0"], "epochs is 0"),
        ("E_CONFIG", ["train", data, *out, "--input-size", "1"], "input_size"),
        ("E_CONFIG", ["train", data, *out, "--patient-regex", "("], "--patient-regex '('"),
    ]
    found, modules = many([line for _, line, _ in refusals])
    for (code, line, words), ran in zip(refusals, found, strict=True):
        assert (ran.code, ran.out, len(ran.err.splitlines()), ran.error_codes) == (1, "", 1, [code]), (line, ran)
        assert words in ran.errors[0], (line, ran)
    assert not (tmp_path / "run").exists()
    assert "torch" not in modules


def test_invalid_weights_networks_and_folders_are_refused(
    invalid: dict[str, Path], data: Path, warm: Callable[..., Any], tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    (tmp_path / "vgg.toml").write_text('backbone = "vgg"\nweights = "none"\n')
    out = ["--out", tmp_path / "run"]
    refusals = [
        (1, ["train", invalid["unreadable"], *out, *tiny], "NORM"),
        (1, ["train", data, "--out", tmp_path / "full", *tiny], "full: "),
        (1, ["train", data, "--out", tmp_path / "full", *tiny, "--resume"], "full: "),
        (2, ["train", data, "--out", tmp_path / "new", *tiny, "--resume"], "--resume: "),
        (1, ["train", data, "--out", tmp_path / "2", *tiny, "--weights", tmp_path / "no.pt"], "no.pt"),
        (1, ["train", data, "--out", tmp_path / "3", *tiny, "--set", "backbone=resnet1000"], "resnet1000"),
        (1, ["train", data, "--out", tmp_path / "4", "--recipe", tmp_path / "vgg.toml"], "vgg16"),
        (1, ["train", data, "--out", tmp_path / "5", *tiny, "--set", "backbone=vit_b_16", "--input-size", "40"], "48"),
    ]
    found = warm([line for _, line, _ in refusals])
    for (code, line, words), ran in zip(refusals, found, strict=True):
        assert (ran.code, ran.out, len(ran.errors)) == (code, "", 1), (line, ran)
        assert words in ran.errors[0], (line, ran)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    assert not [name for name in "2345" if (tmp_path / name).exists()]


def test_progress_announces_epochs_on_smaller_quadrants(capsys: pytest.CaptureFixture[str]) -> None:
    split = SimpleNamespace(name="train", counts={"ED": 2, "ES": 1}, frames=range(3))
    TrainingProgress(Recipe.load("scratch")).started("cpu", "bf16", split, split)
    TrainingProgress(Recipe.load("transfer")).started("cpu", "bf16", split, split)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 3 frames (ED 2, ES 1)" and lines[5] == "training on cpu in bf16"
    assert lines[2].startswith("training on cpu in bf16; the first 16 epochs on smaller quadrants")
