"""Checkpoints: round trips, missing and damaged files, no code execution, atomic writes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import OutputError, RunError
from echoquad_train.networks.classifier import QuadrantClassifier
from echoquad_train.recipe import Recipe
from echoquad_train.runs import checkpoint
from echoquad_train.runs.checkpoint import load_last, load_run, save_best, save_last


@pytest.fixture
def run(tmp_path: Path, trained: Any, thin: None) -> Path:
    """Return a copy of the trained run, which a test may damage."""
    return Path(shutil.copytree(trained.folder, tmp_path / "run"))


def refused(run: Path) -> str:
    with pytest.raises(RunError) as error:
        load_run(run)
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"{run.as_posix()}: ") and error.value.exit_code == 1
    return message


def test_run_loads_completely(run: Path, trained: Any) -> None:
    found = load_run(run)
    assert found.folder == run and found.recipe == trained.recipe and found.info == trained.info
    assert found.contract == trained.recipe.contract(("bright", "dark"))
    assert not found.model.training
    state = safetensors.torch.load_file(run / "best.safetensors")
    assert state.keys() == found.model.state_dict().keys()
    for name, value in found.model.state_dict().items():
        assert torch.equal(value, state[name])
        assert value.device.type == "cpu" and (not value.is_floating_point() or value.dtype == torch.float32)


def test_best_weights_contain_metadata(run: Path, trained: Any) -> None:
    with safetensors.safe_open(run / "best.safetensors", "pt") as file:
        metadata = file.metadata()
    contract = Contract.from_json(metadata["echoquad.contract"])
    assert contract.sha256 == trained.info["contract_sha256"]
    assert metadata["echoquad.backbone"] == "resnet18"
    assert metadata["echoquad.epoch"] == str(trained.fitted.best.epoch)


@pytest.mark.parametrize("name", ["run.json", "recipe.toml", "best.safetensors"])
def test_missing_file_is_refused(run: Path, name: str) -> None:
    (run / name).unlink()
    assert name in refused(run) and "missing" in refused(run)


def test_folder_without_run_is_refused(tmp_path: Path) -> None:
    assert "no run here (run.json is missing); expected a folder that `echoquad train` wrote" in refused(tmp_path)
    with pytest.raises(RunError, match="no run here"):
        load_run(tmp_path / "none")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'"run"', b"{\x00}"])
def test_damaged_run_json_is_refused(run: Path, content: bytes) -> None:
    (run / "run.json").write_bytes(content)
    assert "run.json" in refused(run) and "train again" in refused(run)


@pytest.mark.parametrize("where", [0, 7, 9, 100, 5000, -1])
def test_damaged_best_weights_are_refused(run: Path, where: int) -> None:
    path = run / "best.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:where])
    assert "best.safetensors cannot be read (" in refused(run)


def test_best_weights_without_contract_are_refused(run: Path) -> None:
    state = safetensors.torch.load_file(run / "best.safetensors")
    for metadata in (
        None,
        {"echoquad.contract": "{}", "echoquad.backbone": "resnet18"},
        {"echoquad.contract": Contract(("a", "b", "c")).to_json(), "echoquad.backbone": "resnet18"},
    ):
        safetensors.torch.save_file(state, run / "best.safetensors", metadata)
        assert "best.safetensors cannot be read (" in refused(run)


def test_best_weights_of_other_run_are_refused(run: Path, trained: Any) -> None:
    model = load_run(run).model
    other = trained.recipe.replace(center_crop=0.7)
    save_best(run, model.state_dict(), other, other.contract(("bright", "dark")), trained.fitted.best.epoch)
    assert "best.safetensors and run.json have different contracts, so they belong to two runs" in refused(run)


@pytest.mark.parametrize("best", [None, {"epoch": 99}])
def test_best_weights_of_other_epoch_are_refused(run: Path, trained: Any, best: object) -> None:
    """A run that was killed between the two writes must not be exported with figures of an earlier epoch."""
    (run / "run.json").write_text(json.dumps({**trained.info, "best": best}), "utf-8")
    message = refused(run)
    assert f"best.safetensors is of epoch {trained.fitted.best.epoch}, run.json names epoch" in message
    assert "echoquad train --resume" in message


# last.pt


def test_state_survives_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    state = {
        **dict.fromkeys(("recipe", "data", "course", "scaler"), "x"),
        "history": [{"epoch": 1, "train_loss": 0.1 + 0.2}],
        "model": {"w": weights, "half": torch.tensor([1 / 3], dtype=torch.float16)},
    }
    save_last(tmp_path, state)
    found = load_last(tmp_path)
    assert found["history"] == state["history"]
    assert torch.equal(found["model"]["w"], weights) and found["model"]["w"].stride() == weights.stride()
    assert found["model"]["half"].dtype == torch.float16


def test_missing_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"last\.pt is missing, so there is nothing to resume"):
        load_last(tmp_path)


def test_file_without_state_is_refused(tmp_path: Path) -> None:
    for content in ({"recipe": "x"}, [1, 2], torch.zeros(3), {}):
        torch.save(content, tmp_path / "last.pt")
        with pytest.raises(RunError, match=r"last\.pt is not the state of a run; train again into another folder"):
            load_last(tmp_path)


def test_damaged_state_is_one_line(tmp_path: Path, trained: Any) -> None:
    whole = (trained.folder / "last.pt").read_bytes()
    path, count = tmp_path / "last.pt", len(whole)
    truncated = [whole[: count * part // 20] for part in range(20)]
    flipped = []
    for part in range(40):
        at = count * part // 40
        flipped.append(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    found = 0
    for data in truncated + flipped:
        path.write_bytes(data)
        try:
            load_last(tmp_path)
        except RunError as error:
            found += 1
            assert str(error).startswith(f"{tmp_path.as_posix()}: last.pt is ") and "\n" not in str(error)
    assert found >= 20 + 36  # padding bytes have no effect


class Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_state_is_not_run(tmp_path: Path) -> None:
    torch.save({"recipe": Code(tmp_path / "code-was-run")}, tmp_path / "last.pt")
    with pytest.raises(RunError, match=r"last\.pt is damaged"):
        load_last(tmp_path)
    assert not (tmp_path / "code-was-run").exists()


# Atomic writes


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("name", ["best.safetensors", "last.pt"])
def test_interrupted_write_leaves_old_file(
    tmp_path: Path, thin: None, monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException
) -> None:
    recipe, contract = Recipe(input_size=16), Contract(("a", "b"), input_size=16)
    model = QuadrantClassifier("resnet18", contract)

    def write(epoch: int) -> None:
        if name == checkpoint.BEST:
            save_best(tmp_path, model.state_dict(), recipe, contract, epoch)
        else:
            save_last(tmp_path, {"epoch": epoch})

    write(1)
    before = (tmp_path / name).read_bytes()

    def fail(_: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        write(2)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == before
