"""The last step of training: a run's best weights, or an ensemble, get their temperatures."""

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

__all__ = ["calibrate_ensemble", "calibrate_run"]


def calibrate_run(
    folder: Path, facts: Mapping[str, Any], recipe: Recipe, split: Split, store: Store, where: torch.device
) -> dict[str, Any]:
    """Fit the temperature of a run's best weights, and write ``best.safetensors`` under the contract that has it.

    Of several processes the first alone does it. The record has to be written next, from what is given back: killed in
    between, the run is one that `load_run` refuses and ``--resume`` goes on with, to the same end.

    Parameters
    ----------
    folder
        The run, its best weights written.
    facts
        What the record says of it up to now; ``patient_regex`` says whom a frame is of.
    recipe
        How it was trained; with ``temperature_scaling = false`` nothing is done.
    split, store
        The validation frames, and where their quadrants are found.
    where
        What to compute on.

    Returns
    -------
    dict
        `facts` with the contract that the weights now have, and ``calibration``.

    Raises
    ------
    RunError
        If the best weights cannot be read.
    OutputError
        If the system refuses to write.
    """
    if not recipe.temperature_scaling:
        return dict(facts)
    best = checkpoint.load_best(folder, recipe)
    given = recipe.temperature or None
    contract, changed = _fitted(best.model, best.contract, split, store, where, facts.get("patient_regex"), given)
    checkpoint.save_best(folder, best.model.state_dict(), recipe, contract, best.epoch)
    return {**facts, **changed}


def calibrate_ensemble(ensemble: Ensemble, data: Path, patient_regex: str | None = None) -> Ensemble:
    """Fit an ensemble's own temperatures on validation frames, and write its record under the contract that has them.

    Parameters
    ----------
    ensemble
        As `echoquad_train.runs.ensemble_folder.write_ensemble` gives it.
    data
        The data folder; its files are read as the members' were.
    patient_regex
        Says whom a frame is of, for cross-fitting; see `echoquad_train.data.patients.patient_of`.

    Raises
    ------
    ConfigError
        If the members are of folds, and so have learned from each other's validation frames.
    DatasetError
        If the frames cannot be had.
    OutputError
        If the system refuses to write.
    """
    if ensemble.trained_in_folds:
        raise ConfigError(
            f"{ensemble.folder.as_posix()}: members of folds have learned from each other's validation frames; "
            "expected runs of one split to calibrate together; leave --calibrate out"
        )
    contract, data_facts = ensemble.contract, ensemble.info.get("data")
    reading = ReadOptions.found_in(data_facts)
    split = read_split(data, "validation", contract.classes, reading)
    store = load_quadrants(split, contract)
    contract, changed = _fitted(ensemble.model, contract, split, store, torch.device("cpu"), patient_regex)
    facts = {**ensemble.info, **changed}
    write_json(ensemble.folder / checkpoint.RUN, facts)
    return replace(ensemble, info=facts, contract=contract)


def _fitted(
    model: QuadrantClassifier | EnsembleClassifier,
    contract: Contract,
    split: Split,
    store: Store,
    where: torch.device,
    patient_regex: str | None,
    quadrants: float | None = None,
) -> tuple[Contract, dict[str, Any]]:
    """Fit a model's temperatures; gives the contract that has them, and what they change in its record."""
    plain = Temperatures().of(contract)
    engine = TorchEngine(model, plain, where)
    every = np.arange(4 * len(store.labels))
    batches = [every[start : start + VALIDATION_BATCH] for start in range(0, len(every), VALIDATION_BATCH)]
    logits = np.concatenate([engine.infer(quadrants)[0] for quadrants in store.feed(batches)])
    read = set(store.names)
    patients = patients_of((frame for frame in split.frames if frame.name in read), patient_pattern(patient_regex))
    scores = logits.reshape(len(store.labels), 4, -1)
    fitted, found = calibration_facts(scores, store.labels, patients, plain, quadrants)
    contract = fitted.of(plain)
    return contract, {
        "contract": contract.to_dict(),
        "contract_sha256": contract.sha256,
        "calibration": {"split": split.name, **found},
    }
