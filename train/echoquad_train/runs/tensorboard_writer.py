"""TensorBoard: write a run's figures as event files in ``RUN/tensorboard``."""

from __future__ import annotations

import contextlib
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

__all__ = ["TENSORBOARD", "TensorboardWriter"]

TENSORBOARD: Final = "tensorboard"

_PREVIEW_QUADRANTS: Final = 64


class TensorboardWriter:
    """Writes the event files.

    Parameters
    ----------
    folder
        The run folder.
    done
        Finished epochs of a resumed run. Events of later epochs, written before a kill, are purged.

    Raises
    ------
    OutputError
        If the folder cannot be written to.
    """

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._folder = folder / TENSORBOARD
        with output_errors(self._folder):
            self._writer = SummaryWriter(str(self._folder), purge_step=done + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with output_errors(self._folder):
                self._writer.close()
        else:
            with contextlib.suppress(OSError):  # the first error says more, such as that the disk is full
                self._writer.close()

    def batch(self, images: Tensor) -> None:
        """Write the first augmented quadrants, float [B, 1, S, S], grey levels 0 to 255, as an image."""
        grid = make_grid(images[:_PREVIEW_QUADRANTS].clamp(0, 255).to(torch.uint8), nrow=8, pad_value=255)
        with output_errors(self._folder):
            self._writer.add_image("augmented quadrants", grid, 1)

    def epoch(self, epoch: Epoch, quadrant_accuracies: Sequence[float]) -> None:
        """Write an epoch's figures and the accuracies of LA RA LV RV.

        Raises
        ------
        OutputError
            If the event file cannot be written.
        """
        figures = {
            "loss/train": epoch.train_loss,
            "loss/validation": epoch.validation_loss,
            "accuracy/train quadrants": epoch.train_patch_accuracy,
            "accuracy/validation quadrants": epoch.validation_patch_accuracy,
            "accuracy/validation frames": epoch.validation_frame_accuracy,
            "learning rate": epoch.lr,
            "seconds": epoch.seconds,
            **{f"quadrant/{name}": value for name, value in zip(QUADRANTS, quadrant_accuracies, strict=True)},
        }
        with output_errors(self._folder):
            for name, value in figures.items():
                self._writer.add_scalar(name, value, epoch.epoch)
            self._writer.flush()
