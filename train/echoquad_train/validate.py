"""Validation: what the model reaches on the frames that it is not trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from echoquad_runtime.contract import Contract
from echoquad_runtime.vote import decide
from echoquad_train.data.dataset import Store
from echoquad_train.networks.engine import TorchEngine
from echoquad_train.networks.model import QuadrantClassifier
from echoquad_train.parallel.ranks import ALONE, Ranks

__all__ = ["Validated", "validate"]

VALIDATION_BATCH = 64  # quadrants; of no influence on the result


@dataclass(frozen=True, slots=True)
class Validated:
    """Loss in nats a quadrant; what share is judged right of quadrants, of frames, and of each of LA RA LV RV."""

    loss: float
    patch_accuracy: float
    frame_accuracy: float
    quadrants: tuple[float, ...]


def validate(
    model: QuadrantClassifier, contract: Contract, store: Store, where: torch.device, ranks: Ranks = ALONE
) -> Validated:
    """Judge the validation frames in float32, as the export will, and vote as the contract says.

    Each rank judges its share of the batches, and all of them get the same figures.
    """
    engine = TorchEngine(model, contract, where)
    every = np.arange(4 * len(store.labels))
    batches = [every[start : start + VALIDATION_BATCH] for start in range(0, len(every), VALIDATION_BATCH)]
    own = [engine.infer(quadrants)[1] for quadrants in store.feed(batches[ranks.share(len(batches)).rows])]
    probabilities = np.concatenate([part for parts in ranks.gather(own) for part in parts])
    labels = np.repeat(store.labels, 4)
    decision = decide(probabilities.reshape(-1, 4, len(contract.classes)), contract.vote, contract.vote_weights)
    true = np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1)
    right = probabilities.argmax(axis=1) == labels
    return Validated(
        loss=float(-np.log(true).mean()),
        patch_accuracy=float(right.mean()),
        frame_accuracy=float((decision.labels == store.labels).mean()),
        quadrants=tuple(right.reshape(-1, 4).mean(axis=0).tolist()),
    )
