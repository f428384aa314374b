"""Validation: what the model reaches on the frames that it is not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from echoquad_runtime.contract import Contract
from echoquad_runtime.voting import aggregate_votes
from echoquad_train.networks.classifier import QuadrantClassifier
from echoquad_train.networks.torch_engine import TorchEngine
from echoquad_train.parallel.ranks import ALONE, Ranks
from echoquad_train.training.batches import DeviceFeed

__all__ = ["Validated", "validate"]

VALIDATION_BATCH: Final = 64
"""Quadrants in a batch on the CPU; of no influence on the result."""

CUDA_PIXELS: Final = 512 * 112**2
"""Pixels in a batch on CUDA: large batches keep it busy, and resnet50 takes about 3 GB for one of this size."""


@dataclass(frozen=True, slots=True)
class Validated:
    """Loss in nats a quadrant; what share is judged right of quadrants, of frames, and of each of LA RA LV RV."""

    loss: float
    patch_accuracy: float
    frame_accuracy: float
    quadrants: tuple[float, ...]


def validate(model: QuadrantClassifier, contract: Contract, feed: DeviceFeed, ranks: Ranks = ALONE) -> Validated:
    """Judge the validation frames in float32, as the export will, and vote as the contract says.

    Each rank judges its share of the batches, and all of them get the same figures.
    """
    store, where = feed.store, feed.where
    engine = TorchEngine(model, contract, where)
    every = np.arange(4 * len(store.labels))
    size = batch_size(len(every), contract.input_size, where, ranks)
    batches = [every[start : start + size] for start in range(0, len(every), size)]
    own = [engine.infer_on_device(quadrants)[1] for quadrants in feed.feed(batches[ranks.share(len(batches)).rows])]
    judged = [part.cpu().numpy() for part in own]  # after the last has been launched
    probabilities = np.concatenate([part for parts in ranks.gather(judged) for part in parts])
    labels = np.repeat(store.labels, 4)
    decision = aggregate_votes(
        probabilities.reshape(-1, 4, len(contract.classes)), contract.vote, contract.vote_weights
    )
    true = np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1)
    right = probabilities.argmax(axis=1) == labels
    return Validated(
        loss=float(-np.log(true).mean()),
        patch_accuracy=float(right.mean()),
        frame_accuracy=float((decision.labels == store.labels).mean()),
        quadrants=tuple(right.reshape(-1, 4).mean(axis=0).tolist()),
    )


def batch_size(quadrants: int, side: int, where: torch.device, ranks: Ranks = ALONE) -> int:
    """Return how many quadrants of `side` pixels are judged at once."""
    if where.type != "cuda":
        return VALIDATION_BATCH
    return max(1, min(CUDA_PIXELS // side**2, -(-quadrants // ranks.count)))
