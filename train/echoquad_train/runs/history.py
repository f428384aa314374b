"""The history of a run: an epoch's figures, which epoch is the best, and when to stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from echoquad_train.recipe import Recipe

__all__ = ["Epoch", "best_of", "out_of_patience"]


@dataclass(frozen=True, slots=True)
class Epoch:
    """An epoch's figures. Losses in nats, accuracies as fractions; ``patch``: a quadrant; ``frame``: after the vote."""

    epoch: int
    phase: str
    lr: float
    train_loss: float
    train_patch_accuracy: float
    validation_loss: float
    validation_patch_accuracy: float
    validation_frame_accuracy: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Give the figures as plain values."""
        return asdict(self)


def best_of(history: Sequence[Epoch]) -> Epoch:
    """Find the epoch with the highest validation frame accuracy.

    Of equal ones that with the lowest loss, then the first: with a hundred validation frames, equal accuracies are
    common, and the loss sees what they hide.
    """
    return min(history, key=lambda epoch: (-epoch.validation_frame_accuracy, epoch.validation_loss, epoch.epoch))


def out_of_patience(history: Sequence[Epoch], recipe: Recipe) -> bool:
    """Tell whether the last `early_stopping_patience` epochs after the warm-up brought none better."""
    if not recipe.early_stopping_patience or not history:
        return False
    since = max(best_of(history).epoch, min(recipe.warmup_epochs, recipe.epochs))
    return history[-1].epoch - since >= recipe.early_stopping_patience
