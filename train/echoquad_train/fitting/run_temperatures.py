"""Temperature scaling of a run's model after training, and of an ensemble."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import ConfigError
from echoquad_runtime.frames.formats import ReadOptions
from echoquad_runtime.storage.atomic import write_json
from echoquad_train.data.dataset import Split, Store, load_quadrants, read_split
from echoquad_train.data.patients import patient_pattern, patients_of
from echoquad_train.evaluation.temperature_scaling import Temperatures, calibration_facts
from echoquad_train.networks.classifier import QuadrantClassifier
from echoquad_train.networks.ensemble_classifier import EnsembleClassifier
from echoquad_train.networks.torch_engine import TorchEngine
from echoquad_train.recipe import Recipe
from echoquad_train.runs import checkpoint
from echoquad_train.runs.ensemble_folder import Ensemble
from echoquad_train.training.validation import VALIDATION_BATCH

__all__ = ["fit_ensemble_temperatures", "fit_run_temperatures"]


def fit_run_temperatures(
    folder: Path, metadata: Mapping[str, Any], recipe: Recipe, split: Split, store: Store, device: torch.device
) -> dict[str, Any]:
    """Fit the temperatures of a run's model and write ``best.safetensors`` with the new contract.

    Only the first rank calls it, and then writes ``run.json`` from the returned metadata. If it is killed in between,
    `load_run` refuses the run and ``--resume`` completes it.

    Parameters
    ----------
    folder
        The run folder, with ``best.safetensors``.
    metadata
        The run metadata up to now; its ``patient_regex`` groups frames by patient.
    recipe
        The recipe of the run; with ``temperature_scaling = false`` nothing is fitted.
    split, store
        The validation frames and their quadrants.
    device
        The device to compute on.

    Returns
    -------
    dict
        `metadata` with the new contract and ``calibration``.

    Raises
    ------
    RunError
        If ``best.safetensors`` cannot be read.
    OutputError
        If a file cannot be written.
    """
    if not recipe.temperature_scaling:
        return dict(metadata)
    best = checkpoint.load_best(folder, recipe)
    regex, fixed = metadata.get("patient_regex"), recipe.temperature or None
    contract, changed = _fit_temperatures(best.model, best.contract, split, store, device, regex, fixed)
    checkpoint.save_best(folder, best.model.state_dict(), recipe, contract, best.epoch)
    return {**metadata, **changed}


def fit_ensemble_temperatures(ensemble: Ensemble, data: Path, patient_regex: str | None = None) -> Ensemble:
    """Fit the temperatures of an ensemble on validation frames and write its ``run.json`` with the new contract.

    Parameters
    ----------
    ensemble
        From `echoquad_train.runs.ensemble_folder.write_ensemble`.
    data
        The data folder, read with the same options as for the members.
    patient_regex
        Extracts the patient from a frame's name, for cross-fitting; see `echoquad_train.data.patients.read_patient`.

    Raises
    ------
    ConfigError
        If the members are runs of folds: each was trained on frames that another holds out or validates on.
    DatasetError
        If the frames cannot be read.
    OutputError
        If ``run.json`` cannot be written.
    """
    if ensemble.trained_in_folds:
        raise ConfigError(
            f"{ensemble.folder.as_posix()}: its members are runs of folds, trained on each other's held-out frames; "
            "expected runs that share one split; omit --calibrate"
        )
    contract = ensemble.contract
    reading = ReadOptions.from_record(ensemble.info.get("data"))
    split = read_split(data, "validation", contract.classes, reading)
    store = load_quadrants(split, contract)
    contract, changed = _fit_temperatures(ensemble.model, contract, split, store, torch.device("cpu"), patient_regex)
    metadata = {**ensemble.info, **changed}
    write_json(ensemble.folder / checkpoint.RUN, metadata)
    return replace(ensemble, info=metadata, contract=contract)


def _fit_temperatures(
    model: QuadrantClassifier | EnsembleClassifier,
    contract: Contract,
    split: Split,
    store: Store,
    device: torch.device,
    patient_regex: str | None,
    quadrant_temperature: float | None = None,
) -> tuple[Contract, dict[str, Any]]:
    """Fit a model's temperatures; return the contract with them, and the changed keys of ``run.json``."""
    plain = Temperatures().of(contract)
    engine = TorchEngine(model, plain, device)
    indices = np.arange(4 * len(store.labels))
    batches = [indices[start : start + VALIDATION_BATCH] for start in range(0, len(indices), VALIDATION_BATCH)]
    logits = np.concatenate([engine.infer(quadrants)[0] for quadrants in store.feed(batches)])
    readable = set(store.names)
    frames = (frame for frame in split.frames if frame.name in readable)
    patients = patients_of(frames, patient_pattern(patient_regex))
    scores = logits.reshape(len(store.labels), 4, -1)
    fitted, found = calibration_facts(scores, store.labels, patients, plain, quadrant_temperature)
    contract = fitted.of(plain)
    return contract, {
        "contract": contract.to_dict(),
        "contract_sha256": contract.sha256,
        "calibration": {"split": split.name, **found},
    }
