"""The history of a run: the figures of each epoch, the epoch of the model, early stopping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from echoquad_train.recipe import Recipe

__all__ = ["Epoch", "model_epoch", "should_stop_early"]


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
        """Return the figures as plain values."""
        return asdict(self)


def model_epoch(history: Sequence[Epoch], recipe: Recipe) -> Epoch:
    """Return the epoch whose weights are the run's model, by the recipe's `model_epoch`: the best, or the last."""
    if recipe.model_epoch == "last":
        return max(history, key=lambda epoch: epoch.epoch)
    return _best_epoch(history)


def _best_epoch(history: Sequence[Epoch]) -> Epoch:
    """Return the epoch with the highest validation frame accuracy.

    Ties go to the lowest validation loss, then to the first epoch: with a hundred validation frames, equal accuracies
    are common, and the loss still tells the epochs apart.
    """
    return min(history, key=lambda epoch: (-epoch.validation_frame_accuracy, epoch.validation_loss, epoch.epoch))


def should_stop_early(history: Sequence[Epoch], recipe: Recipe) -> bool:
    """Return whether the last `early_stopping_patience` epochs after the warm-up brought no improvement."""
    if not recipe.early_stopping_patience or not history:
        return False
    since = max(_best_epoch(history).epoch, min(recipe.warmup_epochs, recipe.epochs))
    return history[-1].epoch - since >= recipe.early_stopping_patience
