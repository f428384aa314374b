"""Validation: what the model reaches on the frames that it is not trained on."""

from __future__ import annotations

import numpy as np
import torch

from echoquad_runtime.contract import Contract
from echoquad_runtime.vote import decide
from echoquad_train.dataset import QuadrantStore
from echoquad_train.engine import TorchEngine
from echoquad_train.model import QuadrantClassifier

__all__ = ["validate"]

VALIDATION_BATCH = 64  # quadrants; of no influence on the result


def validate(
    model: QuadrantClassifier, contract: Contract, store: QuadrantStore, where: torch.device
) -> dict[str, float]:
    """Judge the validation frames in float32, as the export will, and vote as the contract says."""
    engine = TorchEngine(model, contract, where)
    flat = store.quadrants.reshape(-1, 1, *store.quadrants.shape[2:])
    parts = [
        engine.infer(np.ascontiguousarray(flat[i : i + VALIDATION_BATCH]))
        for i in range(0, len(flat), VALIDATION_BATCH)
    ]
    probabilities = np.concatenate([part[1] for part in parts])
    labels = np.repeat(store.labels, 4)
    decision = decide(probabilities.reshape(-1, 4, len(contract.classes)), contract.vote, contract.vote_weights)
    true = np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1)
    return {
        "validation_loss": float(-np.log(true).mean()),
        "validation_patch_accuracy": float((probabilities.argmax(axis=1) == labels).mean()),
        "validation_frame_accuracy": float((decision.labels == store.labels).mean()),
    }
