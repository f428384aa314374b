"""Training loop: what a run writes, learning, determinism, phases, sampling, refusals, mixed precision."""

from __future__ import annotations

import csv
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from echoquad_runtime.errors import ConfigError, ContractError, DatasetError, DeviceUnavailableError, RunError
from echoquad_runtime.predict.predictor import Predictor
from echoquad_train.data import dataset
from echoquad_train.data.dataset import QuadrantStore, read_classes, read_split
from echoquad_train.evaluation.evaluate import evaluate
from echoquad_train.fitting import loop as fitting
from echoquad_train.fitting.loop import fit
from echoquad_train.networks import device as devices
from echoquad_train.networks.classifier import QuadrantClassifier
from echoquad_train.networks.device import mixed_dtype
from echoquad_train.networks.torch_engine import TorchEngine
from echoquad_train.recipe import Recipe
from echoquad_train.runs import checkpoint
from echoquad_train.runs import run_metadata as record
from echoquad_train.runs.checkpoint import load_run
from echoquad_train.runs.history import model_epoch
from echoquad_train.runs.run_metadata import versions
from echoquad_train.runs.training_curves import training_curves
from echoquad_train.training import optimizer_schedule as schedule
from echoquad_train.training import sampling
from echoquad_train.training.sampling import class_weights, draw_batches
from echoquad_train.training.validation import ValidationMetrics

MakeData = Callable[..., Path]


def train(data: Path, folder: Path, recipe: Recipe, reporter: Any, **options: Any) -> Any:
    return fit(data, folder, recipe, **{"device": "cpu", "resume": False, "reporter": reporter, **options})


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# Run folder


def test_run_folder_contains_documented_files(trained: Any) -> None:
    assert {path.name for path in trained.folder.iterdir()} == {
        "recipe.toml",
        "run.json",
        "metrics.csv",
        "curves.png",
        "best.safetensors",
        "last.pt",
    }
    assert Recipe.load(str(trained.folder / "recipe.toml")) == trained.recipe
    assert (trained.folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_run_json_records_run(trained: Any) -> None:
    info = trained.info
    assert (info["status"], info["epochs"], info["seed"], info["backbone"]) == ("finished", 3, 0, "resnet18")
    assert (
        (info["device"], info["precision"]) == ("cpu", "fp32") == (trained.reporter.device, trained.reporter.precision)
    )
    assert (
        info["best"] == trained.fitted.best.to_dict() == model_epoch(trained.fitted.history, trained.recipe).to_dict()
    )
    assert info["contract"]["classes"] == ["bright", "dark"]
    assert info["contract_sha256"] == trained.recipe.contract(("bright", "dark")).sha256
    assert info["data"] == {
        "folder": trained.data.resolve().as_posix(),
        "frames": {"train": {"bright": 4, "dark": 4}, "validation": {"bright": 4, "dark": 4}},
        "unreadable": [],
    }
    assert info["versions"] == versions()
    assert {"python", "echoquad", "torch", "numpy", "onnxruntime"} <= info["versions"].keys()
    assert info["created"].endswith("+00:00")
    assert info["git_commit"] is None or len(info["git_commit"].removesuffix("-dirty")) == 40


def test_metrics_csv_equals_history(trained: Any) -> None:
    history = trained.fitted.history
    assert [row["epoch"] for row in rows(trained.folder)] == ["1", "2", "3"]
    for row, epoch in zip(rows(trained.folder), history, strict=True):
        assert row == {name: str(value) for name, value in epoch.to_dict().items()}
    assert [epoch for epoch, _ in trained.reporter.epochs] == list(history)


def test_reporter_receives_all_events(trained: Any) -> None:
    reporter = trained.reporter
    assert reporter.decoded == [(split, done, 8) for split in ("train", "validation") for done in range(1, 9)]
    assert reporter.batches == [(epoch, done, 4) for epoch in (1, 2, 3) for done in range(1, 5)]
    bests, so_far = [], []
    for epoch, best in reporter.epochs:
        so_far.append(epoch)
        assert best == (model_epoch(so_far, trained.recipe) is epoch)
        bests += [epoch] if best else []
    assert bests[-1] == trained.fitted.best


def test_best_weights_reproduce_recorded_accuracies(trained: Any, thin: None) -> None:
    run = load_run(trained.folder)
    split = read_split(trained.data, "validation", run.contract.classes)
    found = evaluate(Predictor(TorchEngine(run.model, run.contract)), split).metrics.to_dict()
    assert found["accuracy"] == trained.fitted.best.validation_frame_accuracy
    assert found["patch_accuracy"] == trained.fitted.best.validation_patch_accuracy


def test_best_weights_are_those_of_best_epoch(
    tmp_path: Path, flat_data: Path, tiny: Recipe, quiet: Any, thin: None
) -> None:
    kept = {}
    accuracies = iter([0.5, 0.75, 0.75, 0.6])
    validate, save = fitting.validate, checkpoint.save_last

    def scripted(*arguments: Any) -> ValidationMetrics:
        return replace(validate(*arguments), frame_accuracy=next(accuracies), loss=0.5)

    def keep(folder: Path, state: Any) -> None:
        kept[len(state["history"])] = {name: value.clone() for name, value in state["model"].items()}
        save(folder, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "validate", scripted)
        patch.setattr(checkpoint, "save_last", keep)
        fitted = train(flat_data, tmp_path / "run", tiny.replace(epochs=4), quiet())
    assert fitted.best.epoch == 2
    best = safetensors.torch.load_file(tmp_path / "run" / "best.safetensors")
    assert all(torch.equal(best[name], value) for name, value in kept[2].items())
    assert not all(torch.equal(best[name], value) for name, value in kept[3].items())
    assert load_run(tmp_path / "run").info["best"]["epoch"] == 2


def test_last_epoch_is_the_model_whatever_the_validation_frames_say(
    tmp_path: Path, flat_data: Path, tiny: Recipe, quiet: Any, thin: None
) -> None:
    recipe = tiny.replace(model_epoch="last", schedule="onecycle", ema_decay=0.5)
    classes = read_classes(flat_data)
    right, validation = (read_split(flat_data, split, classes) for split in ("train", "validation"))
    wrong = replace(
        validation, frames=tuple(replace(frame, label=1 - frame.label) for frame in validation.frames[::-1])
    )
    weights, accuracies = [], []
    for name, split in (("right", validation), ("wrong", wrong)):
        fitted = train(flat_data, tmp_path / name, recipe, quiet(), splits=(right, split))
        assert fitted.best == fitted.history[-1] and load_run(tmp_path / name).info["best"]["epoch"] == 3
        weights.append(safetensors.torch.load_file(tmp_path / name / "best.safetensors"))
        accuracies.append([epoch.validation_frame_accuracy for epoch in fitted.history])
    assert accuracies[0] == pytest.approx([1 - accuracy for accuracy in accuracies[1]]) and accuracies[0][-1] != 0.5
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    average = checkpoint.load_last(tmp_path / "right")["ema"]
    assert all(torch.equal(value, average[f"module.{name}"]) for name, value in weights[0].items())


# Learning


def test_training_learns_separable_classes(tmp_path: Path, make_data: MakeData, quiet: Any, thin: None) -> None:
    data = make_data(tmp_path / "data", ("ASD", "NORM"), frames=6)
    recipe = Recipe.load("scratch").replace(
        input_size=16, epochs=5, batch_size=8, lr=5e-3, schedule="constant", mixed_precision=False
    )
    fitted = train(data, tmp_path / "run", recipe, quiet())
    # All of 12 seeds reached accuracies of 1.0, with losses from 0.17 to 0.38; chance is 0.69.
    assert fitted.best.validation_frame_accuracy > 0.9 and fitted.best.validation_patch_accuracy > 0.9
    assert fitted.best.validation_loss < 0.6


def test_training_accepts_three_classes_with_special_characters(
    tmp_path: Path, make_data: MakeData, quiet: Any, thin: None, tiny: Recipe
) -> None:
    classes = ("A$x_{$B", "心房 中隔", "ÄSD")
    data = make_data(tmp_path / "data", classes, frames=2)
    recipe = tiny.replace(epochs=1, positive="ÄSD", vote="weighted")
    train(data, tmp_path / "run", recipe, quiet())
    run = load_run(tmp_path / "run")
    assert run.contract.classes == tuple(sorted(classes)) and run.contract.positive == "ÄSD"
    assert run.model.head[1].out_features == 3 and run.info["data"]["frames"]["train"]["心房 中隔"] == 2


# Determinism


def test_equal_seeds_give_equal_runs(tmp_path: Path, trained: Any, quiet: Any, thin: None) -> None:
    torch.manual_seed(1234)
    np.random.seed(1)
    again = train(trained.data, tmp_path / "again", trained.recipe, quiet())
    assert (tmp_path / "again" / "best.safetensors").read_bytes() == (trained.folder / "best.safetensors").read_bytes()
    for a, b in zip(again.history, trained.fitted.history, strict=True):
        assert {**a.to_dict(), "seconds": 0} == {**b.to_dict(), "seconds": 0}
    other = train(trained.data, tmp_path / "other", trained.recipe.replace(seed=1, epochs=1), quiet())
    assert other.history[0].train_loss != trained.fitted.history[0].train_loss
    assert (tmp_path / "other" / "best.safetensors").read_bytes() != (trained.folder / "best.safetensors").read_bytes()


def test_quadrants_on_disk_give_equal_run(tmp_path: Path, trained: Any, quiet: Any, thin: None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "MEMORY_BYTES", 0)
        train(trained.data, tmp_path / "run", trained.recipe, quiet())
    assert (tmp_path / "run" / "best.safetensors").read_bytes() == (trained.folder / "best.safetensors").read_bytes()
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in trained.folder.iterdir()}


# Phases


def test_each_phase_changes_only_its_layers(
    tmp_path: Path, flat_data: Path, quiet: Any, thin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load("transfer").replace(
        weights="none",
        input_size=32,
        epochs=5,
        warmup_epochs=2,
        layer3_epoch=4,
        batch_size=8,
        early_stopping_patience=0,
    )
    states: list[dict[str, torch.Tensor]] = []
    build, save = fitting.build_model, checkpoint.save_last

    def keep(model: torch.nn.Module) -> None:
        states.append({name: value.clone() for name, value in model.state_dict().items()})

    monkeypatch.setattr(fitting, "build_model", lambda *a: [model := build(*a), keep(model)][0])

    def saved(folder: Path, state: Any) -> None:
        states.append({name: value.clone() for name, value in state["model"].items()})
        save(folder, state)

    monkeypatch.setattr(checkpoint, "save_last", saved)
    fitted = train(flat_data, tmp_path / "run", recipe, quiet())

    def moved(a: int, b: int) -> set[str]:
        names = (name for name, value in states[a].items() if not torch.equal(value, states[b][name]))
        return {".".join(name.split(".")[:2]) if name.startswith("backbone") else "head" for name in names}

    assert moved(0, 1) == moved(1, 2) == {"head"}  # and not the backbone's batch statistics
    assert moved(2, 3) == {"head", "backbone.layer4"}
    assert moved(3, 4) == moved(4, 5) == {"head", "backbone.layer4", "backbone.layer3"}
    assert [epoch.phase for epoch in fitted.history] == ["head", "head", "layer4", "layer3", "layer3"]
    assert [epoch.lr for epoch in fitted.history] == pytest.approx([3e-4, 3e-4, 1e-4, 1e-4, 1e-4])


def test_early_stopping_after_patience_epochs(
    tmp_path: Path, flat_data: Path, quiet: Any, thin: None, tiny: Recipe
) -> None:
    standing = tiny.replace(epochs=9, trained_layers="head", lr=1e-30, weight_decay=0, early_stopping_patience=2)
    fitted = train(flat_data, tmp_path / "run", standing, quiet())
    assert [epoch.epoch for epoch in fitted.history] == [1, 2, 3] and fitted.best.epoch == 1
    info = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert (info["status"], info["epochs"]) == ("finished", 3)


# Class imbalance


def test_class_weights_have_mean_one() -> None:
    labels = np.repeat([0, 1, 2], [10, 30, 60])
    weights = class_weights(labels, 3)
    assert weights.dtype == torch.float32 and float(weights.mean()) == pytest.approx(1)
    assert weights[0] / weights[1] == pytest.approx(3) and weights[1] / weights[2] == pytest.approx(2)
    np.testing.assert_allclose(class_weights(np.repeat([0, 1], [5, 5]), 2), 1)


def store(*counts: int) -> QuadrantStore:
    labels = np.repeat(np.arange(len(counts)), counts)
    return QuadrantStore(np.zeros((len(labels), 4, 8, 8), np.uint8), labels, ("",) * len(labels), ())


@pytest.mark.parametrize("limit", [sampling.MULTINOMIAL_LIMIT, 100])
def test_balanced_sampler_draws_classes_equally(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Also with more quadrants than torch.multinomial accepts."""
    monkeypatch.setattr(sampling, "MULTINOMIAL_LIMIT", limit)
    unequal = store(20, 100, 380)
    unequal.labels[:] = unequal.labels[np.random.default_rng(1).permutation(500)]
    batches = list(draw_batches(unequal, Recipe(batch_size=32), torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in batches] == [32] * 62 + [16]
    drawn = Counter(unequal.labels[np.concatenate(batches) // 4].tolist())
    assert all(abs(drawn[label] - 2000 / 3) < 80 for label in range(3))  # about four standard deviations
    rare = np.flatnonzero(unequal.labels == 0)
    often = Counter((np.concatenate(batches) // 4).tolist())
    assert all(abs(often[frame] - 100 / 3) < 30 for frame in rare)  # about five
    positions = Counter((np.concatenate(batches) % 4).tolist())
    assert all(abs(positions[position] - 500) < 80 for position in range(4))


def test_without_balanced_sampler_every_quadrant_is_drawn_once() -> None:
    recipe = Recipe(balanced_sampler=False, batch_size=32)
    batches = list(draw_batches(store(5, 12), recipe, torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in batches] == [32, 32, 4]
    order = np.concatenate(batches).tolist()
    assert sorted(order) == list(range(68)) and order != sorted(order)


def test_last_batch_of_one_quadrant_is_skipped() -> None:
    recipe = Recipe(balanced_sampler=False, batch_size=3)
    batches = list(draw_batches(store(2, 2), recipe, torch.Generator()))
    assert [len(batch) for batch in batches] == [3] * 5  # 16 = 5 x 3 + 1


# Refusals


def test_unreadable_frames_are_skipped_and_listed(
    tmp_path: Path, make_data: MakeData, quiet: Any, thin: None, tiny: Recipe
) -> None:
    data = make_data(tmp_path / "data", frames=3)
    for name in ("train/dark/train1.png", "validation/bright/validation0.png"):
        (data / name).write_bytes(b"not an image")
    fitted = train(data, tmp_path / "run", tiny.replace(epochs=1), quiet())
    assert [failure.file for failure in fitted.failures] == [
        "train/dark/train1.png",
        "validation/bright/validation0.png",
    ]
    found = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["data"]
    assert found["frames"] == {"train": {"bright": 3, "dark": 2}, "validation": {"bright": 2, "dark": 3}}
    assert [entry["file"] for entry in found["unreadable"]] == [failure.file for failure in fitted.failures]
    assert all(entry["error"] for entry in found["unreadable"])


@pytest.mark.parametrize("held", ["a file in it", "a run", "a file"])
def test_occupied_folder_is_refused_and_unchanged(
    tmp_path: Path, trained: Any, quiet: Any, thin: None, held: str
) -> None:
    folder = tmp_path / "run"
    if held == "a run":
        shutil.copytree(trained.folder, folder)
    elif held == "a file":
        folder.write_text("mine")
    else:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    with pytest.raises(RunError) as error:
        train(trained.data, folder, trained.recipe, quiet())
    message = str(error.value)
    assert message.startswith(f"{folder.as_posix()}: ") and "not empty" in message and "--resume" in message
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


def test_empty_folder_is_accepted(tmp_path: Path, trained: Any, quiet: Any, thin: None) -> None:
    train(trained.data, tmp_path, trained.recipe.replace(epochs=1), quiet())
    assert (tmp_path / "best.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"backbone": "vgg16"}, ConfigError),
        ({"weights": "none.pt"}, ConfigError),
        ({"positive": "ASD"}, ContractError),  # the classes are bright and dark
    ],
)
def test_invalid_recipe_leaves_no_folder(
    tmp_path: Path, trained: Any, quiet: Any, changes: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error) as raised:
        train(trained.data, tmp_path / "run", trained.recipe.replace(**changes), quiet())
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()


def test_missing_split_leaves_no_folder(tmp_path: Path, make_data: MakeData, quiet: Any, tiny: Recipe) -> None:
    data = make_data(tmp_path / "data", splits=("train",))
    with pytest.raises(DatasetError, match="no validation/ folder"):
        train(data, tmp_path / "run", tiny, quiet())
    assert not (tmp_path / "run").exists()


def test_cuda_without_driver_exits_4(tmp_path: Path, trained: Any, quiet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceUnavailableError) as error:
        train(trained.data, tmp_path / "run", trained.recipe, quiet(), device="cuda")
    assert error.value.exit_code == 4 and not (tmp_path / "run").exists()


def test_diverging_loss_is_refused(tmp_path: Path, flat_data: Path, quiet: Any, thin: None, tiny: Recipe) -> None:
    wild = tiny.replace(optimizer="momentum", lr=1e20, schedule="constant")
    with pytest.raises(RunError) as error:
        train(flat_data, tmp_path / "run", wild, quiet())
    message = str(error.value)
    assert "\n" not in message and "the loss of epoch 1 is not finite" in message and "lower lr" in message
    assert not (tmp_path / "run" / "last.pt").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["status"] == "running"


# Mixed precision


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_mixed_precision_keeps_float32_weights(
    tmp_path: Path,
    flat_data: Path,
    quiet: Any,
    thin: None,
    tiny: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    dtype: Any,
    name: str,
) -> None:
    monkeypatch.setattr(devices, "autocast_dtype", lambda _: dtype)
    reporter = quiet()
    fitted = train(
        flat_data, tmp_path / "run", tiny.replace(mixed_precision=True, input_size=24, lr=5e-3, epochs=4), reporter
    )
    assert reporter.precision == name == load_run(tmp_path / "run").info["precision"]
    assert fitted.best.validation_patch_accuracy > 0.9
    state = checkpoint.load_last(tmp_path / "run")
    assert bool(state["scaler"]) == (dtype is torch.float16)
    assert all(value.dtype != dtype for value in state["model"].values())  # weights stay float32


def test_small_input_trains_in_float32(
    tmp_path: Path, flat_data: Path, quiet: Any, thin: None, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """See MIN_MIXED_SIZE: bfloat16 gradients would contain uninitialised memory."""
    monkeypatch.setattr(devices, "autocast_dtype", lambda _: torch.bfloat16)
    for size, precision in ((16, "fp32"), (17, "bf16")):
        reporter = quiet()
        recipe = tiny.replace(mixed_precision=True, input_size=size, epochs=1)
        train(flat_data, tmp_path / str(size), recipe, reporter)
        assert reporter.precision == precision


def test_depthwise_convolutions_train_in_float32_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 is slower there; see Backbone.mixed_on_cpu."""
    monkeypatch.setattr(devices, "autocast_dtype", lambda _: torch.bfloat16)
    found = {
        (name, device): mixed_dtype(Recipe(), name, 64, torch.device(device))
        for name in ("resnet18", "mobilenet_v3_small", "efficientnet_b0")
        for device in ("cpu", "cuda")
    }
    slower = {("mobilenet_v3_small", "cpu"), ("efficientnet_b0", "cpu")}
    assert found == {key: None if key in slower else torch.bfloat16 for key in found}
    never = Recipe(mixed_precision=False)
    assert mixed_dtype(never, "mobilenet_v3_small", 64, torch.device("cuda")) is None


def test_training_curves_contain_every_epoch(trained: Any) -> None:
    figure = training_curves(trained.fitted.history, trained.fitted.best)
    losses, accuracies = figure.axes
    assert [list(line.get_xdata()) for line in losses.lines] == [[1, 2, 3]] * 2
    assert list(accuracies.lines[2].get_ydata()) == [e.validation_frame_accuracy for e in trained.fitted.history]


def test_curves_are_redrawn_when_old_and_at_the_end(
    tmp_path: Path, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(record, "training_curves", lambda history, chosen, progressive_epochs: len(history))
    monkeypatch.setattr(record, "save", lambda count, path: [drawn.append(count), path.write_bytes(b"")])
    history = trained.fitted.history
    for done in (1, 2, 3):
        record.write_run(tmp_path, {}, history[:done], trained.recipe, finished=False)
    assert drawn == [1]
    os.utime(tmp_path / "curves.png", (0, time.time() - record.REDRAW_SECONDS - 1))
    record.write_run(tmp_path, {}, history[:2], trained.recipe, finished=False)
    record.write_run(tmp_path, {}, history, trained.recipe, finished=True)
    assert drawn == [1, 2, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_on_cuda_is_deterministic_and_resumes(tmp_path: Path, flat_data: Path, quiet: Any) -> None:
    """On CUDA a run learns, equal seeds give equal bits, and a resumed run equals an uninterrupted one.

    At three times this learning rate the running batch statistics lag behind the weights, and validation stays at
    chance. At this rate all of 16 runs on the CPU reached 1.0.
    """
    recipe = Recipe.load("scratch").replace(input_size=32, epochs=4, batch_size=8, lr=1e-3, schedule="constant")
    reporter = quiet()
    fitted = train(flat_data, tmp_path / "a", recipe, reporter, device="cuda")
    assert reporter.device == "cuda" and reporter.precision in ("bf16", "fp16")
    assert fitted.best.validation_patch_accuracy > 0.9
    train(flat_data, tmp_path / "b", recipe, quiet(), device="auto")

    def stop(epoch: int, done: int) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(flat_data, tmp_path / "c", recipe, quiet(at_batch=stop), device="cuda")
    train(flat_data, tmp_path / "c", recipe, quiet(), device="cuda", resume=True)
    first, second, third = ((tmp_path / name / "best.safetensors").read_bytes() for name in "abc")
    assert first == second == third


def test_unreadable_class_leaves_no_folder(tmp_path: Path, quiet: Any, tiny: Recipe) -> None:
    for split in ("train", "validation"):
        for name in ("a", "b"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            (folder / "frame.png").write_bytes(b"not an image")
    with pytest.raises(DatasetError, match="no frame of class a can be read"):
        train(tmp_path / "data", tmp_path / "run", tiny, quiet())
    assert not (tmp_path / "run").exists()


def test_progressive_resizing_trains_first_epochs_on_smaller_quadrants(
    tmp_path: Path, flat_data: Path, quiet: Any, thin: None, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, bool]] = []
    forward = QuadrantClassifier.forward

    def watched(model: QuadrantClassifier, quadrants: torch.Tensor) -> torch.Tensor:
        seen.append((quadrants.shape[-1], model.training))
        return forward(model, quadrants)

    monkeypatch.setattr(QuadrantClassifier, "forward", watched)
    monkeypatch.setattr(schedule, "_MIN_TRAINING_SIZE", 32)
    recipe = tiny.replace(input_size=64, epochs=3, progressive_fraction=0.7, progressive_scale=0.5)
    fit(flat_data, tmp_path / "run", recipe, device="cpu", resume=False, reporter=quiet())
    sides = [side for side, training in seen if training]
    assert sides == sorted(sides) and set(sides) == {32, 64} and sides.count(32) == 2 * sides.count(64)
    assert {side for side, training in seen if not training} == {64}  # validation uses the input size
    assert json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["progressive_epochs"] == 2


def test_recipe_temperature_becomes_contract_temperature(
    tmp_path: Path, flat_data: Path, quiet: Any, thin: None, tiny: Recipe
) -> None:
    recipe = tiny.replace(temperature=3.0, vote="average", epochs=1)
    fitted = fit(flat_data, tmp_path / "run", recipe, device="cpu", resume=False, reporter=quiet())
    run = load_run(tmp_path / "run")
    assert run.contract.temperature == run.info["contract"]["temperature"] == 3.0
    assert fitted.calibration is not None and fitted.calibration["temperature"] == 3.0
