"""Validation: batch sizes, which do not influence the metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from echoquad_train.data.dataset import load_quadrants, read_split
from echoquad_train.parallel.ranks import ALONE, Ranks
from echoquad_train.runs.checkpoint import load_run
from echoquad_train.training import validation
from echoquad_train.training.batches import DeviceFeed
from echoquad_train.training.validation import ValidationMetrics, batch_size, validate

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def judged(folder: Path, data: Path, where: torch.device) -> ValidationMetrics:
    run = load_run(folder)
    store = load_quadrants(read_split(data, "validation", run.contract.classes), run.contract)
    return validate(run.model, run.contract, DeviceFeed(store, where))


def test_batches_are_large_only_on_cuda() -> None:
    assert batch_size(10_000, 112, CPU) == batch_size(10_000, 224, CPU) == 64
    assert batch_size(10_000, 112, CUDA, ALONE) == 512 and batch_size(10_000, 224, CUDA) == 128
    assert batch_size(10_000, 4096, CUDA) == 1
    assert batch_size(400, 112, CUDA) == 400
    assert batch_size(401, 112, CUDA, Ranks(0, 4)) == 101  # each rank has a batch


@pytest.mark.parametrize("size", [1, 7, 32, 1000])
def test_batch_size_does_not_change_metrics(
    trained: Any, thin: None, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(validation, "VALIDATION_BATCH", size)
    found, best = judged(trained.folder, trained.data, CPU), trained.fitted.best
    assert (found.quadrant_accuracy, found.frame_accuracy) == (
        best.validation_patch_accuracy,
        best.validation_frame_accuracy,
    )
    assert found.loss == pytest.approx(best.validation_loss, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_validation_on_cuda_equals_cpu(trained: Any, thin: None) -> None:
    found, expected = (judged(trained.folder, trained.data, where) for where in (CUDA, CPU))
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    assert found.quadrant_accuracies == expected.quadrant_accuracies and found.frame_accuracy == expected.frame_accuracy
