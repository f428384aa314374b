"""Background writer: files are written in order, errors are raised, the run does not change."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from echoquad_runtime.errors import OutputError
from echoquad_train.fitting import loop as fitting
from echoquad_train.fitting.loop import fit
from echoquad_train.runs import checkpoint
from echoquad_train.runs.background_writer import BackgroundWriter


def test_functions_run_in_order_in_thread() -> None:
    done: list[tuple[int, int]] = []

    def write(number: int) -> None:
        done.append((number, threading.get_ident()))

    for background in (False, True):
        done.clear()
        with BackgroundWriter(background=background) as writer:
            for number in range(5):
                writer.write(partial(write, number))
        assert [number for number, _ in done] == [0, 1, 2, 3, 4]
        assert all((thread != threading.get_ident()) == background for _, thread in done)


def test_write_waits_only_for_earlier_function() -> None:
    go_on, second = threading.Event(), threading.Event()
    with BackgroundWriter(background=True) as writer:
        writer.write(lambda: [go_on.wait(60), None][1])
        assert not go_on.is_set()
        go_on.set()
        writer.write(second.set)
        writer.wait()
        assert second.is_set()


@pytest.mark.parametrize("background", [False, True])
def test_errors_are_raised(background: bool) -> None:
    def fail() -> None:
        raise OutputError("disk full")

    with BackgroundWriter(background=background) as writer:
        with pytest.raises(OutputError, match="disk full"):
            writer.write(fail)
            writer.write(lambda: None)
        writer.write(lambda: None)
    with pytest.raises(OutputError, match="disk full"), BackgroundWriter(background=background) as writer:
        writer.write(fail)
    with pytest.raises(KeyboardInterrupt), BackgroundWriter(background=True) as writer:  # the first exception counts
        writer.write(fail)
        raise KeyboardInterrupt


def test_snapshot_does_not_change() -> None:
    value = torch.zeros(3)
    values = {"a": value, "b": {"c": [value, 1]}, "d": "text"}
    with BackgroundWriter(background=True) as writer:
        kept = writer.snapshot(values)
        value += 1
        assert not kept["a"].any() and not kept["b"]["c"][0].any() and kept["b"]["c"][1:] == [1]
    with BackgroundWriter(background=False) as writer:
        assert writer.snapshot(values)["a"] is value


@pytest.fixture
def in_background(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that makes runs on the CPU write in the background, as on CUDA."""
    return lambda: monkeypatch.setattr(
        fitting, "BackgroundWriter", lambda background: BackgroundWriter(background=True)
    )


def test_run_written_in_background_equals_run(
    tmp_path: Path, trained: Any, quiet: Any, thin: None, in_background: Callable[[], None]
) -> None:
    recipe = trained.recipe.replace(ema_decay=0.5)
    whole, folder = tmp_path / "whole", tmp_path / "run"
    fit(trained.data, whole, recipe, device="cpu", resume=False, reporter=quiet())
    in_background()

    def at_batch(epoch: int, done: int) -> None:
        if (epoch, done) == (3, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(trained.data, folder, recipe, device="cpu", resume=False, reporter=quiet(at_batch=at_batch))
    assert len(checkpoint.load_last(folder)["history"]) == 2  # the finished epoch is not lost
    fit(trained.data, folder, recipe, device="cpu", resume=True, reporter=quiet())
    assert (folder / "best.safetensors").read_bytes() == (whole / "best.safetensors").read_bytes()
    found, expected = (checkpoint.load_last(path) for path in (folder, whole))
    assert all(torch.equal(found["model"][name], value) for name, value in expected["model"].items())
    assert all(torch.equal(found["ema"][name], value) for name, value in expected["ema"].items())
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


def test_full_disk_ends_run(
    tmp_path: Path,
    trained: Any,
    quiet: Any,
    thin: None,
    in_background: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_background()

    def full(folder: Path, state: Any) -> None:
        raise OutputError("no space left")

    monkeypatch.setattr(checkpoint, "save_last", full)
    reporter = quiet()
    with pytest.raises(OutputError, match="no space left"):
        fit(trained.data, tmp_path / "run", trained.recipe, device="cpu", resume=False, reporter=reporter)
    assert len(reporter.epochs) == 1
