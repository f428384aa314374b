"""Run folders: one process at a time, half-made ones, leftovers of killed runs, damaged files, full disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from echoquad_runtime.errors import OutputError, RunError
from echoquad_runtime.storage import file_lock
from echoquad_runtime.storage.file_lock import FileLock
from echoquad_train.fitting import linear_probe
from echoquad_train.fitting.cross_validation import fit_folds
from echoquad_train.fitting.fold_splits import FoldSettings
from echoquad_train.fitting.linear_probe import fit_linear
from echoquad_train.fitting.loop import fit
from echoquad_train.fitting.resume import LOCK
from echoquad_train.recipe import Recipe
from echoquad_train.runs import checkpoint, run_metadata
from echoquad_train.runs.checkpoint import load_run


@pytest.fixture
def run(trained: Any, tmp_path: Path) -> Path:
    """Return a copy of a finished run, which a test may damage."""
    return Path(shutil.copytree(trained.folder, tmp_path / "run"))


def interrupted(trained: Any, folder: Path, quiet: Any, batch: tuple[int, int] = (3, 1)) -> Path:
    """Train into a folder up to a batch of an epoch."""

    def at_batch(epoch: int, done: int) -> None:
        if (epoch, done) == batch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(trained.data, folder, trained.recipe, device="cpu", resume=False, reporter=quiet(at_batch=at_batch))
    return folder


def refused(call: Callable[[], object], error: type[Exception] = RunError) -> str:
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def resume(trained: Any, folder: Path, quiet: Any, recipe: Recipe | None = None) -> Any:
    return fit(trained.data, folder, recipe or trained.recipe, device="cpu", resume=True, reporter=quiet())


@pytest.mark.parametrize("again", ["train", "resume", "folds", "linear"])
def test_second_process_is_refused(again: str, trained: Any, run: Path, quiet: Any, thin: None) -> None:
    folder = run if again == "resume" else run.with_name("new")
    folder.mkdir(exist_ok=True)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    held = FileLock(folder / LOCK)
    folds = FoldSettings(2)
    calls = {
        "train": lambda: fit(trained.data, folder, trained.recipe, device="cpu", resume=False, reporter=quiet()),
        "resume": lambda: resume(trained, folder, quiet),
        "folds": lambda: fit_folds(trained.data, folder, trained.recipe, folds, resume=False, reporter=quiet()),
        "linear": lambda: fit_linear(trained.data, folder, trained.recipe, "logistic", reporter=quiet()),
    }
    assert "another process is training this run" in refused(calls[again])
    held.release(remove=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_lock_of_a_dead_process_is_taken(trained: Any, run: Path, quiet: Any, thin: None) -> None:
    (run / LOCK).write_bytes(b"")
    resume(trained, run, quiet)
    assert not (run / LOCK).exists()


def test_file_system_without_locks_is_told(
    trained: Any, run: Path, quiet: Any, thin: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(file_lock, "_lock", refuse)
    resume(trained, run, quiet)
    assert "has no locks" in caplog.text


def test_leftovers_of_a_killed_run_are_removed_and_do_not_occupy_a_folder(
    trained: Any, tmp_path: Path, quiet: Any, thin: None
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    left = [LOCK, ".recipe.toml.0123456789ab.partial", ".last.pt.1234-0.partial"]
    for name in left:
        (folder / name).write_bytes(b"half")
    assert "nothing to resume" in refused(lambda: resume(trained, folder, quiet))
    (folder / left[1]).write_bytes(b"half")
    fit(trained.data, folder, trained.recipe, device="cpu", resume=False, reporter=quiet())
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_planted_lock_is_not_followed(trained: Any, tmp_path: Path, quiet: Any) -> None:
    folder, victim = tmp_path / "run", tmp_path / "victim"
    folder.mkdir()
    (folder / LOCK).symlink_to(victim)
    call = lambda: fit(trained.data, folder, trained.recipe, device="cpu", resume=False, reporter=quiet())  # noqa: E731
    assert "is a symbolic link" in refused(call, OutputError)
    assert not victim.exists()


def test_finished_run_without_its_state_is_not_trained_again(trained: Any, run: Path, quiet: Any, thin: None) -> None:
    (run / checkpoint.LAST).unlink()
    best = (run / checkpoint.BEST).read_bytes()
    assert "last.pt is missing" in refused(lambda: resume(trained, run, quiet))
    assert (run / checkpoint.BEST).read_bytes() == best


def test_run_without_recipe_says_how_to_go_on(trained: Any, run: Path, quiet: Any) -> None:
    (run / checkpoint.LAST).unlink()
    (run / checkpoint.RECIPE).unlink()
    assert "remove the folder" in refused(lambda: resume(trained, run, quiet))


def test_linear_classifier_is_neither_resumed_nor_replaced_by_a_network(
    trained: Any, tmp_path: Path, quiet: Any, thin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(linear_probe.checkpoint, "save_best", killed)
        fit_linear(trained.data, folder, trained.recipe, "logistic", device="cpu", reporter=quiet())
    for call in (
        lambda: resume(trained, folder, quiet),
        lambda: fit_linear(trained.data, folder, trained.recipe, "logistic", device="cpu", reporter=quiet()),
    ):
        message = refused(call)
        assert "linear classifier" in message and "remove the folder" in message
    shutil.rmtree(folder)
    fit_linear(trained.data, folder, trained.recipe, "logistic", device="cpu", reporter=quiet())
    assert "linear classifier" in refused(lambda: resume(trained, folder, quiet))
    assert load_run(folder).info["status"] == "finished"


def test_folds_killed_before_their_recipe_say_how_to_go_on(trained: Any, tmp_path: Path, quiet: Any) -> None:
    folder = tmp_path / "folds"
    folder.mkdir()
    info = {"kind": "ensemble", "status": "running", "folds": asdict(FoldSettings(2))}
    (folder / checkpoint.RUN).write_text(json.dumps(info))
    call = lambda: fit_folds(  # noqa: E731
        trained.data, folder, trained.recipe, FoldSettings(2), resume=True, reporter=quiet()
    )
    assert "remove the folder" in refused(call)


def damage(path: Path, how: str, trained: Any) -> None:
    data = bytearray(path.read_bytes())
    if how == "bit":
        data[-5] ^= 1
    elif how == "foreign":  # of the same network and epoch, with other weights
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        state = {name: value + 1e-3 for name, value in safetensors.torch.load(bytes(data)).items()}
        data = bytearray(checkpoint._sort_metadata(safetensors.torch.save(state, header["__metadata__"])))
    else:
        del data[len(data) // 2 :]
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["bit", "foreign", "cut"])
def test_damaged_or_foreign_best_weights_are_refused(
    how: str, trained: Any, run: Path, tmp_path: Path, quiet: Any, thin: None
) -> None:
    load_run(run)
    damage(run / checkpoint.BEST, how, trained)
    assert "best.safetensors" in refused(lambda: load_run(run))
    assert "best.safetensors" in refused(lambda: resume(trained, run, quiet))
    other = interrupted(trained, tmp_path / "other", quiet)
    damage(other / checkpoint.BEST, how, trained)
    assert "best.safetensors" in refused(lambda: resume(trained, other, quiet))


def test_run_of_an_earlier_release_has_no_hash_and_is_read(trained: Any, run: Path, quiet: Any, thin: None) -> None:
    info = json.loads((run / checkpoint.RUN).read_text("utf-8"))
    assert info.pop("best_sha256") == load_run(run).info["best_sha256"]
    (run / checkpoint.RUN).write_text(json.dumps(info))
    assert load_run(run).contract == load_run(trained.folder).contract
    state = torch.load(run / checkpoint.LAST, weights_only=True)
    del state["best_sha256"]
    torch.save(state, run / checkpoint.LAST)
    resume(trained, run, quiet)
    load_run(run)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])
@pytest.mark.parametrize("file", [checkpoint.BEST, checkpoint.LAST, checkpoint.METRICS])
def test_full_disk_is_told_with_what_was_kept(
    number: int, file: str, trained: Any, tmp_path: Path, quiet: Any, thin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = tmp_path / "run", os.replace
    full = False

    def fill(epoch: Any, epochs: int, best: bool) -> None:
        nonlocal full
        full = epoch.epoch == 1

    class Full(checkpoint._ErrorKeepingStream):
        def write(self, data: Any) -> int:
            if full:
                self.error = self.error or OSError(number, os.strerror(number))
            return super().write(data)

    def replace(source: Path, target: Path) -> None:
        if full and Path(target).name == file:
            raise OSError(number, os.strerror(number))
        real(source, target)

    monkeypatch.setattr(checkpoint, "_ErrorKeepingStream", Full) if file == checkpoint.LAST else None
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(run_metadata, "model_epoch", lambda history, recipe: history[-1])
    monkeypatch.setattr("echoquad_train.fitting.loop.model_epoch", lambda history, recipe: history[-1])
    reporter = quiet()
    reporter.epoch = fill
    call = lambda: fit(trained.data, folder, trained.recipe, device="cpu", resume=False, reporter=reporter)  # noqa: E731
    message = refused(call, OutputError)
    saved = 2 if file == checkpoint.METRICS else 1
    assert os.strerror(number) in message and f"{saved} of 3 epochs are saved" in message and file in message


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_told(trained: Any, tmp_path: Path, quiet: Any) -> None:
    (tmp_path / "parent").mkdir(mode=0o555)
    folder = tmp_path / "parent" / "run"
    call = lambda: fit(trained.data, folder, trained.recipe, device="cpu", resume=False, reporter=quiet())  # noqa: E731
    assert "cannot be written" in refused(call, OutputError)
