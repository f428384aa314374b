"""Checkpoints: the files of a run folder, written and read.

=====================  =============================================================================
``recipe.toml``        every field of the recipe that ran
``run.json``           contract, data counts, versions, git commit, seed, status; ``best``: the epoch of the model
``metrics.csv``        one row for each epoch
``curves.png``         loss and accuracy by epoch
``best.safetensors``   the model: weights of the epoch that the recipe's `model_epoch` chooses (the best, or the
                       last), with the contract as metadata
``last.pt``            the state that ``--resume`` needs; only tensors and plain values
=====================  =============================================================================
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Final, cast

import safetensors.torch
import torch
from torch import Tensor

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import EchoQuadError, RunError
from echoquad_runtime.storage.atomic import write_atomically, write_bytes
from echoquad_runtime.storage.regular_file import read_regular
from echoquad_train.networks.classifier import QuadrantClassifier
from echoquad_train.networks.weight_files import TensorFileError, first_line, read_archive, read_safetensors
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
_MAX_TEXT: Final = 1 << 26  # bytes of run.json and recipe.toml; run.json lists the unreadable frames
_STATE: Final = {"recipe", "data", "history", "model", "optimizer_schedule", "scaler"}
_RENAMED: Final = {"course": "optimizer_schedule", "average": "ema"}  # former keys of the saved state


@dataclass(frozen=True, slots=True)
class Run:
    """A trained run: its folder, its ``run.json``, and the model in evaluation mode, float32, on the CPU."""

    folder: Path
    info: dict[str, Any]
    recipe: Recipe
    contract: Contract
    model: QuadrantClassifier


@dataclass(frozen=True, slots=True)
class BestWeights:
    """Content of ``best.safetensors``.

    Attributes
    ----------
    model
        The model in float32.
    contract, epoch
        Its contract and its epoch, 0 if that is not recorded.
    sha256
        Hash of the weights, without the metadata; ``best_sha256`` in ``run.json``.
    """

    model: QuadrantClassifier
    contract: Contract
    epoch: int
    sha256: str


def save_best(folder: Path, weights: Mapping[str, Tensor], recipe: Recipe, contract: Contract, epoch: int) -> str:
    """Write a model's state as ``best.safetensors``, atomically; return the hash of the weights."""
    state = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    metadata = {_CONTRACT: contract.to_json(), _BACKBONE: recipe.backbone, _EPOCH: str(epoch)}
    data = _sort_metadata(safetensors.torch.save(state, metadata))
    write_bytes(folder / BEST, data)
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


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
        recipe = Recipe.from_toml(_read_text(folder / RECIPE), f"{label}/{RECIPE}")
    except FileNotFoundError as error:
        raise RunError(f"{label}: {RECIPE} is missing; let `echoquad train` finish an epoch first") from error
    except (OSError, ValueError) as error:
        if isinstance(error, EchoQuadError):
            raise
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
    if info.get("best_sha256", found.sha256) != found.sha256:
        raise RunError(
            f"{label}: {BEST} was damaged or changed: its SHA-256 is {found.sha256[:12]}..., which is not that of "
            f"{RUN}; restore the file, or train again"
        )
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
        file = read_safetensors(folder / BEST)
        contract = Contract.from_json(file.metadata[_CONTRACT])
        model = QuadrantClassifier(file.metadata[_BACKBONE], contract, recipe.dropout)
        model.load_state_dict(file.tensors)
        return BestWeights(model.eval(), contract, int(file.metadata.get(_EPOCH, 0)), file.sha256)
    except FileNotFoundError as error:
        raise RunError(f"{label}: {BEST} is missing; let `echoquad train` finish an epoch first") from error
    except (KeyError, RuntimeError, ValueError, NotImplementedError) as error:
        raise RunError(f"{label}: {BEST} cannot be read ({first_line(error)}); train again") from error


def read_info(folder: Path) -> dict[str, Any]:
    """Read ``run.json``.

    Raises
    ------
    RunError
        If it is missing or not a JSON object.
    """
    try:
        info = json.loads(_read_text(folder / RUN), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise RunError(
            f"{folder.as_posix()}: no run here ({RUN} is missing); expected a folder that `echoquad train` wrote"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{folder.as_posix()}: {RUN} cannot be read ({first_line(error)}); train again") from error
    if not isinstance(info, dict):
        raise RunError(f"{folder.as_posix()}: {RUN} is not a JSON object; train again")
    return info


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no JSON")


def _read_text(path: Path) -> str:
    """Read a UTF-8 text.

    Raises
    ------
    OSError, ValueError
        If it cannot be read, is not UTF-8, or is larger than any that a run has.
    """
    data = read_regular(path, _MAX_TEXT)
    if len(data) > _MAX_TEXT:
        raise ValueError(f"more than {_MAX_TEXT} bytes")
    return data.decode("utf-8")


def save_last(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a run atomically: a kill at any moment leaves the old file or the new one.

    Raises
    ------
    OutputError
        If the system refuses.
    """
    with write_atomically(folder / LAST) as stream:
        kept = _ErrorKeepingStream(stream)
        torch.save(dict(state), cast("IO[bytes]", kept))
        if kept.error is not None:
            raise kept.error


class _ErrorKeepingStream(io.RawIOBase):
    """A stream that keeps the first error of the system for its user: torch would replace it by one without a cause."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Any) -> int:
        """Write all of `data`, unless an earlier call failed."""
        try:
            if self.error is None:
                self._stream.write(data)
        except OSError as error:
            self.error = error
        return len(data)


def load_last(folder: Path) -> dict[str, Any]:
    """Read the state that `save_last` wrote.

    Raises
    ------
    RunError
        If it is missing or damaged.
    """
    label = folder.as_posix()
    try:
        state: dict[str, Any] = read_archive(folder / LAST)
    except FileNotFoundError:
        raise RunError(f"{label}: {LAST} is missing, so there is nothing to resume; train without --resume") from None
    except TensorFileError as error:
        raise RunError(f"{label}: {LAST} is damaged ({error}); train again into another folder") from error
    if isinstance(state, dict):
        state = {_RENAMED.get(name, name): value for name, value in state.items() if isinstance(name, str)}
    if not isinstance(state, dict) or not set(state) >= _STATE:
        raise RunError(f"{label}: {LAST} is not the state of a run; train again into another folder")
    return state
