"""The last step of training: the best weights get their temperature, in the checkpoint and in the record alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from echoquad_train import checkpoint
from echoquad_train.calibration import Temperatures, calibration_facts
from echoquad_train.dataset import Split, Store
from echoquad_train.engine import TorchEngine
from echoquad_train.patients import patient_pattern, patients_of
from echoquad_train.recipe import Recipe
from echoquad_train.validate import VALIDATION_BATCH

__all__ = ["calibrate_run"]


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
        How it was trained; with ``calibrate = false`` nothing is done.
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
    if not recipe.calibrate:
        return dict(facts)
    best = checkpoint.load_best(folder, recipe)
    plain = Temperatures().of(best.contract)
    engine = TorchEngine(best.model, plain, where)
    every = np.arange(4 * len(store.labels))
    batches = [every[start : start + VALIDATION_BATCH] for start in range(0, len(every), VALIDATION_BATCH)]
    logits = np.concatenate([engine.infer(quadrants)[0] for quadrants in store.feed(batches)])
    read = set(store.names)
    pattern = patient_pattern(facts.get("patient_regex"))
    patients = patients_of((frame for frame in split.frames if frame.name in read), pattern)
    fitted, found = calibration_facts(logits.reshape(len(store.labels), 4, -1), store.labels, patients, plain)
    contract = fitted.of(plain)
    checkpoint.save_best(folder, best.model, recipe, contract, best.epoch)
    return {
        **facts,
        "contract": contract.to_dict(),
        "contract_sha256": contract.sha256,
        "calibration": {"split": split.name, **found},
    }
