"""Resume: a run that is killed at any moment and resumed equals an uninterrupted run, bit for bit."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from echoquad_runtime.errors import RunError
from echoquad_train.fitting.loop import fit
from echoquad_train.networks import device as devices
from echoquad_train.recipe import Recipe
from echoquad_train.runs import checkpoint
from echoquad_train.runs import run_metadata as record

PHASES = Recipe.load("transfer").replace(
    weights="none", input_size=24, epochs=4, warmup_epochs=1, layer3_epoch=3, batch_size=8, plateau_patience=0
)
CYCLE = Recipe.load("scratch").replace(
    input_size=24, epochs=4, batch_size=8, optimizer="momentum", lr=1e-2, ema_decay=0.0
)
RECIPES = {
    "phases": PHASES,
    "cycle": CYCLE,
    "float16": CYCLE.replace(mixed_precision=True, optimizer="adamw"),
    "average": CYCLE.replace(ema_decay=0.5),
}


@dataclass(frozen=True)
class Result:
    """The files of a run that must not depend on when it was killed."""

    best: bytes
    metrics: list[dict[str, str]]
    info: dict[str, Any]
    state: dict[str, Any]


def result(folder: Path) -> Result:
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [{**row, "seconds": ""} for row in csv.DictReader(file)]
    info = json.loads((folder / "run.json").read_text("utf-8"))
    info["best"]["seconds"] = info["created"] = ""
    state = checkpoint.load_last(folder)
    for epoch in state["history"]:
        epoch["seconds"] = 0
    return Result((folder / "best.safetensors").read_bytes(), rows, info, state)


def difference(a: Any, b: Any, path: str = "state") -> str | None:
    """Return the first key at which two states differ; None if they are equal."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else path
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        found = (difference(a[key], b[key], f"{path}.{key}") for key in a)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        found = (difference(x, y, f"{path}.{index}") for index, (x, y) in enumerate(zip(a, b, strict=True)))
    else:
        return None if a == b else f"{path}: {a} != {b}"
    return next((place for place in found if place), None)


def assert_same(found: Result, expected: Result) -> None:
    assert found.metrics == expected.metrics and found.info == expected.info
    assert difference(found.state, expected.state) is None
    assert found.best == expected.best


def half(where: torch.device) -> torch.dtype:
    return torch.float16


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory,
    flat_data: Path,
    quiet: Any,
    thin_session: Callable[[], AbstractContextManager[None]],
) -> Callable[[str], Result]:
    """Return the result of an uninterrupted run of a recipe."""
    known: dict[str, Result] = {}

    def of(name: str) -> Result:
        if name not in known:
            folder = tmp_path_factory.mktemp("whole") / "run"
            with thin_session():
                fit(flat_data, folder, RECIPES[name], device="cpu", resume=False, reporter=quiet())
            known[name] = result(folder)
        return known[name]

    return of


def kill_at_call(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int, *, after: bool) -> None:
    """Raise KeyboardInterrupt before or after the given call of a function."""
    real, calls = getattr(owner, name), 0

    def killed(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise KeyboardInterrupt
        given = real(*arguments, **options)
        if calls == call:
            raise KeyboardInterrupt
        return given

    patch.setattr(owner, name, killed)


# The moments of a kill: (owner, function, number of the call, after it or before it).
MOMENTS = {
    "before run.json is written": (record, "write_run", 1, False),
    "before the first epoch": (record, "write_run", 1, True),
    "before best.safetensors in epoch 1": (checkpoint, "save_best", 1, False),
    "between best.safetensors and last.pt in epoch 1": (checkpoint, "save_last", 1, False),
    "right after last.pt in epoch 1": (checkpoint, "save_last", 1, True),
    "between best.safetensors and last.pt in epoch 3": (checkpoint, "save_last", 3, False),
    "right after last.pt in epoch 3": (checkpoint, "save_last", 3, True),
    "while run.json is written in epoch 2": (record, "write_json", 3, False),
    "between run.json and metrics.csv in epoch 2": (record, "write_json", 3, True),
    "while last.pt is flushed in epoch 2": (os, "fsync", 14, False),
    "before the record says finished": (record, "write_run", 6, False),
}


@pytest.mark.parametrize("name", ["phases", "cycle"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_run_killed_at_any_write_resumes_to_equal_result(
    tmp_path: Path,
    flat_data: Path,
    uninterrupted: Callable[[str], Result],
    quiet: Any,
    thin: None,
    name: str,
    moment: str,
) -> None:
    folder, recipe = tmp_path / "run", RECIPES[name]
    owner, function, call, after = MOMENTS[moment]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at_call(patch, owner, function, call, after=after)
        fit(flat_data, folder, recipe, device="cpu", resume=False, reporter=quiet())
    torch.manual_seed(77)  # as in a new process
    fit(flat_data, folder, recipe, device="cpu", resume=True, reporter=quiet())
    assert_same(result(folder), uninterrupted(name))
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["phases", "cycle", "float16", "average"])
def test_run_killed_repeatedly_within_epochs_resumes_to_equal_result(
    tmp_path: Path,
    flat_data: Path,
    uninterrupted: Callable[[str], Result],
    quiet: Any,
    thin: None,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, recipe = tmp_path / "run", RECIPES[name]
    if name == "float16":
        monkeypatch.setattr(devices, "autocast_dtype", half)

    def at_decoding(split: str, done: int) -> None:
        if split == "validation":
            raise KeyboardInterrupt

    reporters = [quiet(at_decoding=at_decoding)]
    for killed in ((1, 1), (1, 4), (2, 2), (3, 1), (4, 3)):

        def at_batch(epoch: int, done: int, killed: tuple[int, int] = killed) -> None:
            if (epoch, done) == killed:
                raise KeyboardInterrupt

        reporters.append(quiet(at_batch=at_batch))
    for index, reporter in enumerate(reporters):
        with pytest.raises(KeyboardInterrupt):
            fit(flat_data, folder, recipe, device="cpu", resume=index > 0, reporter=reporter)
    last = quiet()
    fit(flat_data, folder, recipe, device="cpu", resume=True, reporter=last)
    assert [epoch.epoch for epoch, _ in last.epochs] == [4]  # finished epochs are not repeated
    assert_same(result(folder), uninterrupted(name))


def test_recipes_under_test_have_state_to_lose(uninterrupted: Callable[[str], Result]) -> None:
    """Phases change, rates change and the scaler has a state; otherwise the tests above would prove little."""
    phases = uninterrupted("phases")
    assert [row["phase"] for row in phases.metrics] == ["head", "layer4", "layer3", "layer3"]
    assert (
        phases.state["optimizer_schedule"]["plateau"] is not None
        and phases.state["optimizer_schedule"]["optimizer"]["state"]
    )
    cycle = uninterrupted("cycle")
    assert len({row["lr"] for row in cycle.metrics}) == 4 and cycle.state["optimizer_schedule"]["step"] == 16
    assert phases.best != cycle.best
    average = uninterrupted("average")
    assert difference(average.state["model"], cycle.state["model"]) is None  # the average does not influence training
    assert average.best != cycle.best


def test_resuming_finished_run_changes_nothing(tmp_path: Path, trained: Any, quiet: Any, thin: None) -> None:
    folder = Path(shutil.copytree(trained.folder, tmp_path / "run"))
    reporter = quiet()
    fitted = fit(trained.data, folder, trained.recipe, device="cpu", resume=True, reporter=reporter)
    assert fitted.history == trained.fitted.history and fitted.best == trained.fitted.best and not reporter.epochs
    for name in ("best.safetensors", "last.pt", "metrics.csv", "recipe.toml"):
        assert (folder / name).read_bytes() == (trained.folder / name).read_bytes()
    assert json.loads((folder / "run.json").read_text("utf-8")) == trained.info  # including the time of creation


def test_resuming_early_stopped_run_trains_no_epoch(
    tmp_path: Path, flat_data: Path, quiet: Any, thin: None, tiny: Recipe
) -> None:
    standing = tiny.replace(epochs=9, trained_layers="head", lr=1e-30, weight_decay=0, early_stopping_patience=1)
    first = fit(flat_data, tmp_path / "run", standing, device="cpu", resume=False, reporter=quiet())
    again = fit(flat_data, tmp_path / "run", standing, device="cpu", resume=True, reporter=quiet())
    assert len(first.history) == 2 and again.history == first.history


def test_resume_needs_no_initial_weights_file(
    tmp_path: Path, trained: Any, quiet: Any, thin: None, tiny: Recipe
) -> None:
    weights = Path(shutil.copy(trained.folder / "best.safetensors", tmp_path / "start.safetensors"))
    recipe = tiny.replace(weights=str(weights), epochs=2)

    def at_batch(epoch: int, done: int) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(trained.data, tmp_path / "run", recipe, device="cpu", resume=False, reporter=quiet(at_batch=at_batch))
    fit(trained.data, tmp_path / "whole", recipe, device="cpu", resume=False, reporter=quiet())
    weights.unlink()
    fit(trained.data, tmp_path / "run", recipe, device="cpu", resume=True, reporter=quiet())
    assert_same(result(tmp_path / "run"), result(tmp_path / "whole"))


def test_float32_run_may_resume_in_float16(
    tmp_path: Path, trained: Any, quiet: Any, thin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The saved scaler has no state then, as after a change of the device."""
    recipe = trained.recipe.replace(mixed_precision=True, input_size=24, epochs=2)

    def at_batch(epoch: int, done: int) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(devices, "autocast_dtype", lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        fit(trained.data, tmp_path / "run", recipe, device="cpu", resume=False, reporter=quiet(at_batch=at_batch))
    monkeypatch.setattr(devices, "autocast_dtype", half)
    fit(trained.data, tmp_path / "run", recipe, device="cpu", resume=True, reporter=quiet())
    assert result(tmp_path / "run").info["precision"] == "fp16"


def test_killed_distillation_resumes_to_equal_result(tmp_path: Path, trained: Any, quiet: Any, thin: None) -> None:
    """The student has another input size, and the teacher's folder moves."""
    recipe = trained.recipe.replace(input_size=24)
    train = partial(fit, trained.data, device="cpu")
    train(tmp_path / "whole", recipe, resume=False, reporter=quiet(), teacher=trained.folder)
    for epoch, done in ((1, 2), (2, 1), (3, 3)):

        def at_batch(*now: int, killed: tuple[int, int] = (epoch, done)) -> None:
            if now == killed:
                raise KeyboardInterrupt

        reporter = quiet(at_batch=at_batch)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", recipe, resume=epoch > 1, reporter=reporter, teacher=trained.folder)
    moved = Path(shutil.copytree(trained.folder, tmp_path / "moved"))
    train(tmp_path / "run", recipe, resume=True, reporter=quiet(), teacher=moved)
    assert_same(result(tmp_path / "run"), result(tmp_path / "whole"))


@pytest.mark.parametrize("name", ["mobilenet_v3_small", pytest.param("efficientnet_b0", marks=pytest.mark.slow)])
def test_killed_run_of_other_backbone_resumes_to_equal_result(
    tmp_path: Path, flat_data: Path, quiet: Any, tiny: Recipe, swift: None, name: str
) -> None:
    """EfficientNet's stochastic depth draws random numbers like dropout."""
    recipe = tiny.replace(backbone=name, input_size=32, epochs=2, batch_size=16)
    train = partial(fit, flat_data, device="cpu")
    train(tmp_path / "whole", recipe, resume=False, reporter=quiet())

    def at_batch(epoch: int, done: int) -> None:
        if (epoch, done) == (2, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", recipe, resume=False, reporter=quiet(at_batch=at_batch))
    torch.manual_seed(77)
    train(tmp_path / "run", recipe, resume=True, reporter=quiet())
    assert_same(result(tmp_path / "run"), result(tmp_path / "whole"))


def test_run_of_earlier_release_resumes(tmp_path: Path, trained: Any, quiet: Any, thin: None) -> None:
    folder = Path(shutil.copytree(trained.folder, tmp_path / "run"))
    state = checkpoint.load_last(folder)
    lines = state["recipe"].splitlines()
    state["recipe"] = "\n".join(line for line in lines if not line.startswith("distill_"))
    del state["teacher"]
    checkpoint.save_last(folder, state)
    fitted = fit(trained.data, folder, trained.recipe, device="cpu", resume=True, reporter=quiet())
    assert fitted.history == trained.fitted.history


# Refusals


def refused(data: Path, folder: Path, recipe: Recipe, reporter: Any, teacher: Path | None = None) -> str:
    before = {path: path.read_bytes() for path in folder.rglob("*")} if folder.is_dir() else None
    with pytest.raises(RunError) as error:
        fit(data, folder, recipe, device="cpu", resume=True, reporter=reporter, teacher=teacher)
    assert before is None or {path: path.read_bytes() for path in folder.rglob("*")} == before
    message = str(error.value)
    assert "\n" not in message and error.value.exit_code == 1 and message.startswith(f"{folder.as_posix()}: ")
    return message


def test_resume_without_run_is_refused(tmp_path: Path, trained: Any, quiet: Any) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("none", "empty"):
        assert "no run here (run.json is missing)" in refused(trained.data, tmp_path / name, trained.recipe, quiet())
    refused(trained.data, tmp_path / "file", trained.recipe, quiet())
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("change", [{"lr": 1e-3}, {"seed": 1}, {"epochs": 9}, {"quadrant_layout": "apex-up"}])
def test_resume_with_other_recipe_is_refused(tmp_path: Path, trained: Any, quiet: Any, change: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(trained.folder, tmp_path / "run"))
    message = refused(trained.data, folder, trained.recipe.replace(**change), quiet())
    assert "began with another recipe; resume it with the options" in message


@pytest.mark.parametrize("killed", [1, 2])
def test_resume_with_other_teacher_is_refused(
    tmp_path: Path, trained: Any, quiet: Any, thin: None, killed: int
) -> None:
    """Before and after the first state is saved."""
    recipe, folder = trained.recipe.replace(epochs=2), tmp_path / "run"

    def at_batch(epoch: int, done: int) -> None:
        if epoch == killed:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(
            trained.data,
            folder,
            recipe,
            device="cpu",
            resume=False,
            reporter=quiet(at_batch=at_batch),
            teacher=trained.folder,
        )
    message = refused(trained.data, folder, recipe, quiet())
    assert message.endswith("the run began with a teacher; resume it with the same --teacher RUN")
    fit(trained.data, tmp_path / "other", recipe, device="cpu", resume=False, reporter=quiet())
    message = refused(trained.data, folder, recipe, quiet(), tmp_path / "other")
    assert "the run began with another teacher; resume it with the options" in message
    message = refused(trained.data, tmp_path / "other", recipe, quiet(), trained.folder)
    assert "the run began with no teacher; resume it with the options" in message
    with pytest.raises(RunError, match=r"gone: no run here \(run\.json is missing\)"):
        fit(
            trained.data,
            folder,
            recipe,
            device="cpu",
            resume=True,
            reporter=quiet(),
            teacher=tmp_path / "gone",
        )


@pytest.mark.parametrize("split", ["train", "validation"])
def test_resume_with_changed_data_is_refused(tmp_path: Path, trained: Any, quiet: Any, thin: None, split: str) -> None:
    data = Path(shutil.copytree(trained.data, tmp_path / "data"))
    folder = Path(shutil.copytree(trained.folder, tmp_path / "run"))
    fit(data, folder, trained.recipe, device="cpu", resume=True, reporter=quiet())  # a copy is the same data
    (data / split / "dark" / f"{split}0.png").unlink()
    message = refused(data, folder, trained.recipe, quiet())
    assert "the data has changed since the run began; train into another folder" in message


def test_resume_from_damaged_state_is_refused(tmp_path: Path, trained: Any, quiet: Any) -> None:
    folder = Path(shutil.copytree(trained.folder, tmp_path / "run"))
    data = bytearray((folder / "last.pt").read_bytes())
    data[len(data) // 2] ^= 1  # one bit within a tensor
    (folder / "last.pt").write_bytes(data)
    assert "last.pt is damaged (" in refused(trained.data, folder, trained.recipe, quiet())


# Processes that end by os._exit

SCRIPT = """
import os, sys
from pathlib import Path
from echoquad_train.runs import checkpoint
from echoquad_train.fitting.loop import fit
from echoquad_train.recipe import Recipe

data, folder, moment = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

class Reporter:
    def decoding(self, *_): ...
    def started(self, *_): ...
    def audited(self, *_): ...
    def epoch(self, *_): ...
    def batch(self, epoch, done, total):
        if moment == "mid-epoch" and (epoch, done) == (2, 2):
            os._exit(9)

save_last, calls = checkpoint.save_last, 0

def dying(*arguments):
    global calls
    calls += 1
    if moment == "before last.pt" and calls == 2:
        os._exit(9)
    save_last(*arguments)
    if moment == "after last.pt" and calls == 1:
        os._exit(9)

checkpoint.save_last = dying
recipe = Recipe.load("scratch").replace(input_size=24, epochs=2, batch_size=16)
fit(data, folder, recipe, device="cpu", resume=folder.exists(), reporter=Reporter())
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["mid-epoch", "before last.pt", "after last.pt"])
def test_process_that_dies_resumes_to_equal_result(tmp_path: Path, flat_data: Path, moment: str) -> None:
    def run(folder: str, moment: str) -> int:
        command = [sys.executable, "-c", SCRIPT, str(flat_data), str(tmp_path / folder), moment]
        return subprocess.run(command, check=False, timeout=200).returncode

    assert run("killed", moment) == 9
    assert run("killed", "never") == 0
    assert run("whole", "never") == 0
    assert_same(result(tmp_path / "killed"), result(tmp_path / "whole"))
