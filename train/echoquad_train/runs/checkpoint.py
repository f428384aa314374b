"""Checkpoints: the files of a run folder, written and read.

=====================  =============================================================================
``recipe.toml``        every field of the recipe that ran
``run.json``           contract, data counts, versions, git commit, seed, best metrics, status
``metrics.csv``        one row for each epoch
``curves.png``         loss and accuracy by epoch
``best.safetensors``   the weights with the best validation frame accuracy, with the contract as metadata
``last.pt``            the state that ``--resume`` needs; only tensors and plain values
=====================  =============================================================================
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import RunError
from echoquad_runtime.storage.atomic import write_atomically, write_bytes
from echoquad_train.networks.classifier import QuadrantClassifier, first_line
from echoquad_train.recipe import Recipe

__all__ = [
    "BEST",
    "CURVES",
    "LAST",
    "METRICS",
    "RECIPE",
    "RUN",
    "BestWeights",
    "Run",
    "load_best",
    "load_last",
    "load_run",
    "save_best",
    "save_last",
]

RECIPE: Final = "recipe.toml"
RUN: Final = "run.json"
METRICS: Final = "metrics.csv"
CURVES: Final = "curves.png"
BEST: Final = "best.safetensors"
LAST: Final = "last.pt"

_CONTRACT: Final = "echoquad.contract"
_BACKBONE: Final = "echoquad.backbone"
_EPOCH: Final = "echoquad.epoch"
_STATE: Final = {"recipe", "data", "history", "model", "optimizer_schedule", "scaler"}
_RENAMED: Final = {"course": "optimizer_schedule", "average": "ema"}  # former keys of the saved state


@dataclass(frozen=True, slots=True)
class Run:
    """A trained run: its folder, its ``run.json``, and the best model in evaluation mode, float32, on the CPU."""

    folder: Path
    info: dict[str, Any]
    recipe: Recipe
    contract: Contract
    model: QuadrantClassifier


@dataclass(frozen=True, slots=True)
class BestWeights:
    """Content of ``best.safetensors``: the model in float32, its contract, its epoch (0 if it is not recorded)."""

    model: QuadrantClassifier
    contract: Contract
    epoch: int


def save_best(folder: Path, weights: Mapping[str, Tensor], recipe: Recipe, contract: Contract, epoch: int) -> None:
    """Write a model's state as ``best.safetensors``, atomically."""
    state = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    metadata = {_CONTRACT: contract.to_json(), _BACKBONE: recipe.backbone, _EPOCH: str(epoch)}
    write_bytes(folder / BEST, _sort_metadata(safetensors.torch.save(state, metadata)))


def _sort_metadata(data: bytes) -> bytes:
    """Sort the metadata of a safetensors file, whose order is random, so that equal weights give equal bytes."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def load_run(folder: Path) -> Run:
    """Read a run.

    Raises
    ------
    RunError
        If the folder holds no run or no checkpoint, or the checkpoint is damaged or does not match ``run.json``.
    """
    label = folder.as_posix()
    info = read_info(folder)
    if info.get("kind") == "ensemble":  # `echoquad_train.runs.ensemble_folder.load_trained` reads both
        raise RunError(f"{label}: this is an ensemble; expected a single run, such as one of the folders in it")
    try:
        recipe = Recipe.from_toml((folder / RECIPE).read_text("utf-8"), f"{label}/{RECIPE}")
    except FileNotFoundError as error:
        raise RunError(f"{label}: {RECIPE} is missing; let `echoquad train` finish an epoch first") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{label}: {RECIPE} cannot be read ({first_line(error)}); train again") from error
    found = load_best(folder, recipe)
    interrupted = "the run was interrupted in between; continue it with `echoquad train --resume`"
    if info.get("contract_sha256") != found.contract.sha256:
        if info.get("contract_sha256") == replace(found.contract, temperature=1.0, frame_temperature=1.0).sha256:
            raise RunError(f"{label}: {BEST} has fitted temperatures, {RUN} has none yet: {interrupted}")
        raise RunError(f"{label}: {BEST} and {RUN} have different contracts, so they belong to two runs; train again")
    best = info.get("best")
    epoch = best.get("epoch") if isinstance(best, dict) else "none"
    if found.epoch not in (0, epoch):
        raise RunError(f"{label}: {BEST} is of epoch {found.epoch}, {RUN} names epoch {epoch}: {interrupted}")
    return Run(folder, info, recipe, found.contract, found.model)


def load_best(folder: Path, recipe: Recipe) -> BestWeights:
    """Read ``best.safetensors`` without comparing it to ``run.json``; the model is in evaluation mode.

    Raises
    ------
    RunError
        If it is missing or damaged.
    """
    label = folder.as_posix()
    try:
        with safetensors.safe_open(folder / BEST, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping: it has only keys()
        contract = Contract.from_json(metadata[_CONTRACT])
        model = QuadrantClassifier(metadata[_BACKBONE], contract, recipe.dropout)
        model.load_state_dict(state)
        return BestWeights(model.eval(), contract, int(metadata.get(_EPOCH, 0)))
    except FileNotFoundError as error:
        raise RunError(f"{label}: {BEST} is missing; let `echoquad train` finish an epoch first") from error
    except (KeyError, OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        raise RunError(f"{label}: {BEST} cannot be read ({first_line(error)}); train again") from error


def read_info(folder: Path) -> dict[str, Any]:
    """Read ``run.json``.

    Raises
    ------
    RunError
        If it is missing or not a JSON object.
    """
    try:
        info = json.loads((folder / RUN).read_text("utf-8"))
    except FileNotFoundError:
        raise RunError(
            f"{folder.as_posix()}: no run here ({RUN} is missing); expected a folder that `echoquad train` wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise RunError(f"{folder.as_posix()}: {RUN} cannot be read ({error}); train again") from error
    if not isinstance(info, dict):
        raise RunError(f"{folder.as_posix()}: {RUN} is not a JSON object; train again")
    return info


def save_last(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a run atomically: a kill at any moment leaves the old file or the new one."""
    with write_atomically(folder / LAST) as stream:
        torch.save(dict(state), stream)


def load_last(folder: Path) -> dict[str, Any]:
    """Read the state that `save_last` wrote.

    Raises
    ------
    RunError
        If it is missing or damaged.
    """
    try:
        with zipfile.ZipFile(folder / LAST) as file:  # torch does not check the checksums
            if (damaged := file.testzip()) is not None:
                raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
        state: dict[str, Any] = torch.load(folder / LAST, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(
            f"{folder.as_posix()}: {LAST} is missing, so there is nothing to resume; train without --resume"
        ) from None
    except Exception as error:  # torch raises many classes for damaged files
        raise RunError(
            f"{folder.as_posix()}: {LAST} is damaged ({first_line(error)}); train again into another folder"
        ) from error
    if isinstance(state, dict):
        state = {_RENAMED.get(name, name): value for name, value in state.items()}
    if not isinstance(state, dict) or not set(state) >= _STATE:
        raise RunError(f"{folder.as_posix()}: {LAST} is not the state of a run; train again into another folder")
    return state
