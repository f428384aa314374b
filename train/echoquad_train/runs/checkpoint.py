"""Run folders: what training leaves behind, and how it is read again.

=====================  =============================================================================
``recipe.toml``        every field of the recipe that ran
``run.json``           contract, data counts, versions, git commit, seed, best metrics, status
``metrics.csv``        an epoch a row
``curves.png``         loss and accuracy by epoch
``best.safetensors``   the weights with the best validation frame accuracy, the contract in its metadata
``last.pt``            what ``--resume`` needs; tensors and plain values alone
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
    "Best",
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
_STATE: Final = {"recipe", "data", "history", "model", "course", "scaler"}


@dataclass(frozen=True, slots=True)
class Run:
    """A trained run: its folder, what ``run.json`` says, and the best model in evaluation mode, float32, on the CPU."""

    folder: Path
    info: dict[str, Any]
    recipe: Recipe
    contract: Contract
    model: QuadrantClassifier


@dataclass(frozen=True, slots=True)
class Best:
    """What ``best.safetensors`` holds: the model in float32, its contract, its epoch; 0 where none is named."""

    model: QuadrantClassifier
    contract: Contract
    epoch: int


def save_best(folder: Path, weights: Mapping[str, Tensor], recipe: Recipe, contract: Contract, epoch: int) -> None:
    """Write a model's state as ``best.safetensors``, atomically."""
    state = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    metadata = {_CONTRACT: contract.to_json(), _BACKBONE: recipe.backbone, _EPOCH: str(epoch)}
    write_bytes(folder / BEST, _in_order(safetensors.torch.save(state, metadata)))


def _in_order(data: bytes) -> bytes:
    """Sort the metadata in a safetensors file, which are in random order: so equal weights are equal bytes."""
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
        If the folder holds no run, no checkpoint yet, or one that is damaged, was trained under another contract, or
        is of another epoch than ``run.json`` says.
    """
    label = folder.as_posix()
    info = read_info(folder)
    if info.get("kind") == "ensemble":  # where one will do, `echoquad_train.runs.ensemble_folder.load_trained` reads it
        raise RunError(f"{label}: an ensemble is here; expected a single run, such as one of the folders in it")
    try:
        recipe = Recipe.from_toml((folder / RECIPE).read_text("utf-8"), f"{label}/{RECIPE}")
    except FileNotFoundError as error:
        raise RunError(f"{label}: {RECIPE} is missing; let `echoquad train` finish an epoch first") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{label}: {RECIPE} cannot be used ({first_line(error)}); train again") from error
    found = load_best(folder, recipe)
    cut = "the run was cut off in between; go on with it by `echoquad train --resume`"
    if info.get("contract_sha256") != found.contract.sha256:
        if info.get("contract_sha256") == replace(found.contract, temperature=1.0, frame_temperature=1.0).sha256:
            raise RunError(f"{label}: {BEST} is calibrated, {RUN} does not say so yet: {cut}")
        raise RunError(f"{label}: {BEST} and {RUN} have different contracts; they are of two runs; train again")
    best = info.get("best")
    epoch = best.get("epoch") if isinstance(best, dict) else "none"
    if found.epoch not in (0, epoch):
        raise RunError(f"{label}: {BEST} is of epoch {found.epoch}, the best epoch of {RUN} is {epoch}: {cut}")
    return Run(folder, info, recipe, found.contract, found.model)


def load_best(folder: Path, recipe: Recipe) -> Best:
    """Read ``best.safetensors`` alone, whatever ``run.json`` says; the model is in evaluation mode.

    Raises
    ------
    RunError
        If it is missing or damaged.
    """
    label = folder.as_posix()
    try:
        with safetensors.safe_open(folder / BEST, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping, it has only keys()
        contract = Contract.from_json(metadata[_CONTRACT])
        model = QuadrantClassifier(metadata[_BACKBONE], contract, recipe.dropout)
        model.load_state_dict(state)
        return Best(model.eval(), contract, int(metadata.get(_EPOCH, 0)))
    except FileNotFoundError as error:
        raise RunError(f"{label}: {BEST} is missing; let `echoquad train` finish an epoch first") from error
    except (KeyError, OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        raise RunError(f"{label}: {BEST} cannot be used ({first_line(error)}); train again") from error


def read_info(folder: Path) -> dict[str, Any]:
    """Read ``run.json``.

    Raises
    ------
    RunError
        If it is missing or cannot be understood.
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
        raise RunError(f"{folder.as_posix()}: {RUN} holds no JSON object; train again")
    return info


def save_last(folder: Path, state: Mapping[str, Any]) -> None:
    """Write what a resumed run needs, atomically: a kill at any moment leaves the old file or the new."""
    with write_atomically(folder / LAST) as stream:
        torch.save(dict(state), stream)


def load_last(folder: Path) -> dict[str, Any]:
    """Read what `save_last` wrote.

    Raises
    ------
    RunError
        If it is missing or damaged.
    """
    try:
        with zipfile.ZipFile(folder / LAST) as file:  # torch reads on over a flipped bit
            if (damaged := file.testzip()) is not None:
                raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
        state: dict[str, Any] = torch.load(folder / LAST, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(
            f"{folder.as_posix()}: {LAST} is missing, so there is nothing to resume; train without --resume"
        ) from None
    except Exception as error:  # torch has no common class for what damage can lead to
        raise RunError(
            f"{folder.as_posix()}: {LAST} is damaged ({first_line(error)}); train again into another folder"
        ) from error
    if not isinstance(state, dict) or not set(state) >= _STATE:
        raise RunError(f"{folder.as_posix()}: {LAST} is no state of a run; train again into another folder")
    return state
