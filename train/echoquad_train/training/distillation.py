"""Knowledge distillation: a smaller model learns from the labels and from the outputs of a finished run.

G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
The teacher sees the same augmented view as the student, at its own input size. Its outputs can therefore not be
computed in advance: every batch costs a forward pass of the teacher.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from echoquad_runtime.contract import Contract, canonical_json
from echoquad_runtime.errors import ConfigError, DatasetError, RunError
from echoquad_train.data.dataset import Split, Store
from echoquad_train.data.stream import Storage
from echoquad_train.networks.classifier import QuadrantClassifier
from echoquad_train.networks.ensemble_classifier import EnsembleClassifier
from echoquad_train.runs.checkpoint import BEST, RUN, Run
from echoquad_train.runs.ensemble_folder import Ensemble, load_trained

__all__ = ["Teacher", "distillation_loss", "load_teacher", "open_teacher_store"]


@dataclass(frozen=True, slots=True)
class Teacher:
    """The model of a finished run or ensemble, frozen and in evaluation mode; its contract; its metadata."""

    model: QuadrantClassifier | EnsembleClassifier
    contract: Contract
    metadata: dict[str, Any]

    def __call__(self, view: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Return logits, float32 [N, C], for grey levels 0 to 255, float [N, 1, S, S], S the teacher's input size.

        A `dtype` other than None enables mixed precision.
        """
        with torch.no_grad(), torch.autocast(view.device.type, dtype, enabled=dtype is not None):
            logits: Tensor = self.model(view)
        return logits.float()


def load_teacher(folder: Path, contract: Contract, device: torch.device) -> Teacher:
    """Load a run or an ensemble onto a device, as the teacher of a student with the given contract.

    Raises
    ------
    RunError
        If the folder holds no run or a damaged one.
    ConfigError
        If the run is not finished, or has other classes, another centre crop or another quadrant layout.
    """
    run = load_trained(folder)
    label = f"--teacher {folder.as_posix()}"
    if run.info.get("status") != "finished":
        raise ConfigError(f"{label}: the run is not finished; continue it with `echoquad train --resume` first")
    for name, found, expected in (
        ("classes", ", ".join(run.contract.classes), ", ".join(contract.classes)),
        ("center_crop", run.contract.keep, contract.keep),
        ("quadrant_layout", run.contract.quadrant_layout, contract.quadrant_layout),
    ):
        if found != expected:
            raise ConfigError(f"{label}: its {name} is {found}; expected the student's, {expected}")
    metadata = {
        "backbone": run.info["backbone"] if isinstance(run, Ensemble) else run.model.name,
        "input_size": run.contract.input_size,
        "contract_sha256": run.contract.sha256,
        **(_ensemble_metadata(run) if isinstance(run, Ensemble) else _run_metadata(run)),
    }
    model = run.model.requires_grad_(False).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Teacher(model, run.contract, metadata)


def _run_metadata(run: Run) -> dict[str, Any]:
    try:
        accuracy = run.info["best"]["validation_frame_accuracy"]
    except (KeyError, TypeError) as error:
        raise RunError(f"{run.folder.as_posix()}: {RUN} lacks {error}; train again") from error
    digest = hashlib.sha256((run.folder / BEST).read_bytes()).hexdigest()
    return {"weights_sha256": digest, "validation_frame_accuracy": accuracy}


def _ensemble_metadata(ensemble: Ensemble) -> dict[str, Any]:
    """Identify an ensemble by the weights of its members, their vote and views; it has no validation figures."""
    settings = {"vote": ensemble.info["vote"], "views": ensemble.info["views"]}
    hashes = [member["weights_sha256"] for member in ensemble.info["members"]]
    digest = hashlib.sha256(canonical_json({**settings, "members": hashes}).encode("ascii")).hexdigest()
    return {"weights_sha256": digest, **settings, "members": hashes, "trained_in_folds": ensemble.trained_in_folds}


def open_teacher_store(
    teacher: Teacher,
    split: Split,
    store: Store,
    storage: Storage,
    progress: Callable[[int, int], None] | None = None,
) -> Store:
    """Return the student's frames at the teacher's input size; `store` itself if the sizes are equal.

    Raises
    ------
    DatasetError
        If the readable frames are not the same as for the student.
    OutputError
        If the disk of the overflow folder is full or read-only.
    """
    if teacher.contract.input_size == store.size:
        return store
    teacher_store = storage.open(split, teacher.contract, progress)
    if teacher_store.names != store.names:
        changed = sorted(set(teacher_store.names) ^ set(store.names))
        raise DatasetError(f"{split.name}: {changed[0]} changed while the frames were read; train again")
    return teacher_store


def distillation_loss(
    label_loss: Tensor, student: Tensor, teacher: Tensor, weight: float, temperature: float, rows: float | None = None
) -> Tensor:
    """Return the weighted sum of the labels' loss and the teacher's.

    Parameters
    ----------
    label_loss
        The loss against the labels, a scalar.
    student, teacher
        Logits, float [N, C].
    weight
        Of the teacher's loss, 0 to 1.
    temperature
        T, which divides both logits.
    rows
        Divisor of the teacher's loss; None is N. A rank divides by the mean number of rows of all ranks.

    Returns
    -------
    Tensor
        (1 - weight) * label_loss + weight * T^2 * KL(teacher, student), the mean over the batch. The gradients shrink
        with 1 / T^2, which T^2 compensates.
    """
    teacher_loss = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="sum",
        log_target=True,
    ) / (rows or len(student))
    return (1 - weight) * label_loss + weight * temperature**2 * teacher_loss
