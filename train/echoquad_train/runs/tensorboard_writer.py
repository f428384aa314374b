"""TensorBoard: a run's figures as event files in ``RUN/tensorboard``, for those who watch several runs at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch
from torch import Tensor
from torchvision.utils import make_grid

from echoquad_runtime.contract import QUADRANTS
from echoquad_runtime.storage.atomic import output_errors
from echoquad_train.runs.history import Epoch

__all__ = ["BOARD", "TensorboardWriter"]

BOARD: Final = "tensorboard"

_SHOWN: Final = 64  # quadrants in the picture of a batch


class TensorboardWriter:
    """Writes the event files.

    Parameters
    ----------
    folder
        The run folder.
    done
        Epochs that a resumed run has behind it: what was written of later ones, before a kill, is taken back.

    Raises
    ------
    OutputError
        If the system refuses.
    """

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._folder = folder / BOARD
        with output_errors(self._folder):
            self._writer = SummaryWriter(str(self._folder), purge_step=done + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def batch(self, images: Tensor) -> None:
        """Show the first augmented quadrants, float [B, 1, S, S], grey levels 0 to 255, as the network sees them."""
        grid = make_grid(images[:_SHOWN].clamp(0, 255).to(torch.uint8), nrow=8, pad_value=255)
        self._writer.add_image("augmented quadrants", grid, 1)

    def epoch(self, epoch: Epoch, quadrants: Sequence[float]) -> None:
        """Write an epoch's figures, and the shares of LA RA LV RV judged right.

        Raises
        ------
        OutputError
            If the system refuses.
        """
        figures = {
            "loss/train": epoch.train_loss,
            "loss/validation": epoch.validation_loss,
            "accuracy/train quadrants": epoch.train_patch_accuracy,
            "accuracy/validation quadrants": epoch.validation_patch_accuracy,
            "accuracy/validation frames": epoch.validation_frame_accuracy,
            "learning rate": epoch.lr,
            "seconds": epoch.seconds,
            **{f"quadrant/{name}": share for name, share in zip(QUADRANTS, quadrants, strict=True)},
        }
        with output_errors(self._folder):
            for name, value in figures.items():
                self._writer.add_scalar(name, value, epoch.epoch)
            self._writer.flush()
