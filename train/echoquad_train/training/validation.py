"""Validation: loss and accuracies on the validation frames."""

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

__all__ = ["ValidationMetrics", "validate"]

VALIDATION_BATCH: Final = 64
"""Quadrants in a batch on the CPU; the result does not depend on it."""

CUDA_PIXELS: Final = 512 * 112**2
"""Pixels in a batch on CUDA: large batches keep it busy, and resnet50 takes about 3 GB for a batch of this size."""


@dataclass(frozen=True, slots=True)
class ValidationMetrics:
    """Loss in nats per quadrant; accuracies of all quadrants, of frames, and of each of LA RA LV RV."""

    loss: float
    quadrant_accuracy: float
    frame_accuracy: float
    quadrant_accuracies: tuple[float, ...]


def validate(
    model: QuadrantClassifier, contract: Contract, feed: DeviceFeed, ranks: Ranks = ALONE
) -> ValidationMetrics:
    """Classify the validation frames in float32, as the exported model does, and vote by the contract's rule.

    Each rank classifies its share of the batches; all ranks return the same metrics.
    """
    store, device = feed.store, feed.device
    engine = TorchEngine(model, contract, device)
    indices = np.arange(4 * len(store.labels))
    size = batch_size(len(indices), contract.input_size, device, ranks)
    batches = [indices[start : start + size] for start in range(0, len(indices), size)]
    own = [engine.infer_on_device(quadrants)[1] for quadrants in feed.feed(batches[ranks.share(len(batches)).rows])]
    copied = [part.cpu().numpy() for part in own]  # after the last batch has been launched
    probabilities = np.concatenate([part for parts in ranks.gather(copied) for part in parts])
    labels = np.repeat(store.labels, 4)
    decision = aggregate_votes(
        probabilities.reshape(-1, 4, len(contract.classes)), contract.vote, contract.vote_weights
    )
    true = np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1)
    correct = probabilities.argmax(axis=1) == labels
    return ValidationMetrics(
        loss=float(-np.log(true).mean()),
        quadrant_accuracy=float(correct.mean()),
        frame_accuracy=float((decision.labels == store.labels).mean()),
        quadrant_accuracies=tuple(correct.reshape(-1, 4).mean(axis=0).tolist()),
    )


def batch_size(quadrants: int, side: int, device: torch.device, ranks: Ranks = ALONE) -> int:
    """Return the number of quadrants of `side` pixels in a validation batch."""
    if device.type != "cuda":
        return VALIDATION_BATCH
    return max(1, min(CUDA_PIXELS // side**2, -(-quadrants // ranks.world_size)))
