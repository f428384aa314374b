"""``echoquad data phantom`` and ``echoquad train``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from echoquad.cli.train import TrainingProgress
from echoquad_train.recipe import Recipe


def test_phantom(phantoms: tuple[Path, Any], left_in: Callable[..., Any]) -> None:
    folder, ran = phantoms
    assert ran.out == "train: ASD 2, NORM 2\nvalidation: ASD 2, NORM 2\ntest: ASD 2, NORM 2\n"
    assert ran.err == f"wrote {folder.as_posix()}/\n"
    assert len(list(folder.glob("*/*/*.png"))) == 12
    assert left_in(folder.parent) == []


def test_phantom_in_the_way(data: Path, many: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    refusals = [
        (["data", "phantom", data], "expected a new or empty folder"),
        (["data", "phantom", file], "expected a new or empty folder"),
        (["data", "phantom", file / "below"], "cannot be written"),
        (["data", "phantom", tmp_path / "new", "--patients", "5"], "expected 6 or more"),
        (["data", "phantom", tmp_path / "new", "--frames", "0"], "expected 1 or more"),
        (["data", "phantom", tmp_path / "new", "--seed", "-1"], "seed"),
    ]
    found, modules = many([line for line, _ in refusals])
    for (line, words), ran in zip(refusals, found, strict=True):
        assert (ran.code, ran.out, len(ran.err.splitlines())) == (1, "", 1), line
        assert words in ran.err, line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert "torch" not in modules


def test_train(trained: tuple[Path, Any], left_in: Callable[..., Any]) -> None:
    folder, ran = trained
    assert ran.out == ""  # nothing here is a result to be piped on
    lines = ran.err.splitlines()
    assert lines[0].startswith("train: 4 frames (ASD 2, NORM 2)")
    assert lines[1].startswith("validation: 4 frames (ASD 2, NORM 2)")
    assert lines[2].startswith("training on cpu in ")
    assert lines[3] == (
        "leaks: 0 patients, 0 exact duplicates and 0 near duplicates in more than one split (patients: train 2, "
        "validation 2)"
    )
    assert lines[4].startswith("Epoch 01/1 [all] train loss ")
    assert lines[4].endswith("| best")
    assert "validation frame accuracy" in lines[-2]
    assert lines[-1] == f"next: echoquad export {folder.as_posix()} --out BUNDLE"
    wanted = {"recipe.toml", "run.json", "metrics.csv", "curves.png", "best.safetensors", "last.pt"}
    assert wanted == {path.name for path in folder.iterdir()}
    assert json.loads((folder / "run.json").read_text("utf-8"))["status"] == "finished"
    assert "input_size = 16" in (folder / "recipe.toml").read_text("utf-8")
    assert left_in(folder.parent) == []


def test_resume_goes_on_and_a_second_training_is_refused(
    trained: tuple[Path, Any], data: Path, warm: Callable[..., Any], tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in run.glob("*.safetensors")}
    train = ["train", data, "--out", run]
    resumed, again, other = warm([[*train, "--resume"], [*train, *tiny], [*train, "--resume", "--epochs", "3"]])
    assert resumed.code == 0
    assert "best: epoch 1, " in resumed.err
    assert "Epoch 02" not in resumed.err
    assert again.code == other.code == 1
    assert "--resume, or choose another --out" in again.err
    assert "another recipe" in other.err
    assert before == {path.name: path.read_bytes() for path in run.glob("*.safetensors")}


def test_a_student(
    trained: tuple[Path, Any], data: Path, warm: Callable[..., Any], tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    run, student = trained[0], tmp_path / "student"
    train = ["train", data, "--out", student]
    options = [*tiny, "--input-size", "24", "--teacher", run]
    inert = ["train", data, "--out", tmp_path / "full", "--set", "distill_weight=0.5", *tiny]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    taught, missing, alone, resumed, vain = warm(
        [
            [*train, *options, "--set", "distill_temperature=2"],
            [*train, *tiny, "--teacher", tmp_path / "none"],
            [*train, "--resume"],
            [*train, "--resume", "--teacher", run],
            inert,
        ]
    )
    assert taught.code == 0 and "best: epoch 1, " in taught.err
    info = json.loads((student / "run.json").read_text("utf-8"))
    assert info["teacher"]["input_size"] == 16 and info["contract"]["input_size"] == 24
    recipe = (student / "recipe.toml").read_text("utf-8")
    assert "distill_temperature = 2.0\n" in recipe and "distill_weight = 0.7\n" in recipe
    assert missing.code == 2
    none = (tmp_path / "none").as_posix()
    assert missing.errors == [f"--teacher: {none} is not there; expected a folder that `echoquad train` wrote"]
    assert alone.code == 1
    assert "began with a teacher; resume it with the same --teacher RUN" in alone.errors[0]
    assert resumed.code == 0 and "best: epoch 1, " in resumed.err
    assert "without --teacher, distill_weight and distill_temperature do nothing" in vain.err
    assert "do nothing" not in taught.err


def test_a_linear_classifier_of_frozen_features(
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
    for ran, words in ((again, "--resume"), (long, "--epochs"), (taught, "--resume, --teacher")):
        assert ran.code == 2 and ran.errors[0].startswith(f"--fit linear-svm with {words}: a linear classifier is fit")
    assert unknown.code == 2 and "linear-svm" in unknown.err and "logistic" in unknown.err


def test_an_unreadable_frame_among_good_ones(
    data_copy: Path, warm: Callable[..., Any], tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    (data_copy / "train" / "ASD" / "broken.png").write_text("no image")
    (ran,) = warm([["train", data_copy, "--out", tmp_path / "run", *tiny]])
    assert (ran.code, ran.out, len(ran.errors)) == (5, "", 1)
    assert ran.errors[0].startswith("train/ASD/broken.png: ")
    assert f"wrote {(tmp_path / 'run').as_posix()}/" in ran.err
    unreadable = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["data"]["unreadable"]
    assert [failure["file"] for failure in unreadable] == ["train/ASD/broken.png"]


def test_cuda_that_is_not_there(data: Path, warm: Callable[..., Any], tmp_path: Path, tiny: tuple[str, ...]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("CUDA is there")
    (ran,) = warm([["train", data, "--out", tmp_path / "run", *tiny, "--device", "cuda"]])
    assert ran.code == 4
    assert "--device cuda: " in ran.errors[0]
    assert "use --device cpu, or run `echoquad doctor`" in ran.errors[0]
    assert not (tmp_path / "run").exists()


@pytest.fixture
def spoilt(data_copy: Path, tmp_path: Path) -> dict[str, Path]:
    """Give data sets that cannot be trained on, by what ails them."""

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


def test_refusals_come_at_once(
    spoilt: dict[str, Path], data: Path, many: Callable[..., Any], tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    (tmp_path / "recipe.toml").write_text("epochs = 'many'\n")
    (tmp_path / "no.toml").write_text("epochs =\n")
    out = ["--out", tmp_path / "run"]
    refusals = [
        (["train", spoilt["single"], *out, *tiny], "the single class 'ASD' found; expected two or more"),
        (["train", spoilt["lacking"], *out, *tiny], "class ASD is missing; expected a folder for each of ASD, NORM"),
        (["train", spoilt["unsplit"], *out, *tiny], "no validation/ folder, only test, train"),
        (["train", spoilt["unknown"], *out, *tiny], "class PFO is unknown; expected only ASD, NORM"),
        (["train", spoilt["empty"], *out, *tiny], "train/NORM: no frame found; expected .bmp"),
        (["train", spoilt["blank"], *out, *tiny], "no train/ folder, only nothing"),
        (["train", spoilt["missing"], *out, *tiny], "missing: no such folder; expected train/, validation/, test/"),
        (["train", data, *out, "--recipe", "miracle"], "recipe 'miracle': neither transfer nor scratch nor a readable"),
        (["train", data, *out, "--recipe", tmp_path / "recipe.toml"], "epochs is 'many'; expected an integer"),
        (["train", data, *out, "--recipe", tmp_path / "no.toml"], "no.toml: not TOML"),
        (["train", data, *out, "--set", "momentum=1"], "--set: unknown name momentum; expected some of backbone"),
        (["train", data, *out, "--set", "epochs"], "--set epochs: no '=' found; expected name=value"),
        (["train", data, *out, "--set", "schedule=never"], "schedule is 'never'; expected one of plateau, onecycle"),
        (["train", data, *out, "--epochs", "0"], "epochs is 0; expected at least 1"),
        (["train", data, *out, "--input-size", "1"], "input_size"),
    ]
    found, modules = many([line for line, _ in refusals])
    for (line, words), ran in zip(refusals, found, strict=True):
        assert (ran.code, ran.out, len(ran.err.splitlines())) == (1, "", 1), (line, ran)
        assert words in ran.err, line
    assert not (tmp_path / "run").exists()
    assert "torch" not in modules, "a wrong path or name waits until torch is there"


def test_what_only_torch_can_tell_is_refused_as_plainly(
    spoilt: dict[str, Path], data: Path, warm: Callable[..., Any], tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    (tmp_path / "vgg.toml").write_text('backbone = "vgg"\nweights = "none"\n')
    out = ["--out", tmp_path / "run"]
    refusals = [
        (1, ["train", spoilt["unreadable"], *out, *tiny], "no frame of class NORM can be read; the first failure"),
        (1, ["train", data, "--out", tmp_path / "full", *tiny], "not empty"),
        (1, ["train", data, "--out", tmp_path / "full", *tiny, "--resume"], "no run here"),
        (2, ["train", data, "--out", tmp_path / "new", *tiny, "--resume"], "is not there; train without --resume"),
        (1, ["train", data, "--out", tmp_path / "2", *tiny, "--weights", tmp_path / "no.pt"], "no.pt"),
        (1, ["train", data, "--out", tmp_path / "3", *tiny, "--set", "backbone=resnet1000"], "resnet1000"),
        (
            1,
            ["train", data, "--out", tmp_path / "4", "--recipe", tmp_path / "vgg.toml"],
            "did you mean vgg16? expected",
        ),
        (1, ["train", data, "--out", tmp_path / "5", *tiny, "--set", "backbone=vit_b_16", "--input-size", "40"], "48"),
    ]
    found = warm([line for _, line, _ in refusals])
    for (code, line, words), ran in zip(refusals, found, strict=True):
        assert (ran.code, ran.out, len(ran.errors)) == (code, "", 1), (line, ran)
        assert words in ran.err, line
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    assert not [name for name in "2345" if (tmp_path / name).exists()]


def test_tensorboard_has_an_extra_of_its_own(data: Path, echoquad: Callable[..., Any], tmp_path: Path) -> None:
    hidden = "sys.modules['tensorboard'] = None"
    ran = echoquad("train", data, "--out", tmp_path / "x", "--tensorboard", code=1, driver=hidden)
    assert ran.errors == ['this needs tensorboard, which is not installed; do: pip install "echoquad[tensorboard]"']
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "evaluate", "export", "demo"])
def test_without_its_extra_a_command_says_which(
    command: str, data: Path, many: Callable[..., Any], echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    lines = {
        "train": (["train", data, "--out", tmp_path / "x"], "torch", "train"),
        "evaluate": (["evaluate", data, data, "--out", tmp_path / "x"], "matplotlib", "train"),
        "export": (["export", tmp_path, "--out", tmp_path / "x"], "onnx", "export"),
        "demo": (["demo", "--out", tmp_path / "x"], "onnx", "export"),
    }
    line, package, extra = lines[command]
    hidden = "sys.modules |= dict.fromkeys(['torch', 'torchvision', 'onnx', 'onnxscript', 'sklearn', 'matplotlib'])"
    ran = echoquad(*line, code=1, driver=hidden)
    assert ran.errors == [f'this needs {package}, which is not installed; do: pip install "echoquad[{extra}]"']
    assert list(tmp_path.iterdir()) == []


def test_it_says_which_epochs_see_smaller_quadrants(capsys: pytest.CaptureFixture[str]) -> None:
    split = SimpleNamespace(name="train", counts={"ED": 2, "ES": 1}, frames=range(3))
    TrainingProgress(Recipe.load("scratch")).started("cpu", "bf16", split, split)
    TrainingProgress(Recipe.load("transfer")).started("cpu", "bf16", split, split)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 3 frames (ED 2, ES 1)" and lines[5] == "training on cpu in bf16"
    assert lines[2] == "training on cpu in bf16; the first 16 epochs on smaller quadrants, validated at full size"
