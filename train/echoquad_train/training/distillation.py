"""Distillation: a smaller model learns a finished run's answers beside the labels.

G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
The teacher judges the very view that the student learns from, at the teacher's own input size, so its answers cannot
be computed once and kept: every batch costs its forward pass.
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

__all__ = ["Teacher", "distillation_loss", "load_teacher", "teacher_quadrants"]


@dataclass(frozen=True, slots=True)
class Teacher:
    """A finished run's best model, or an ensemble's; its contract; what a student's record says of it.

    It is in evaluation mode and frozen.
    """

    model: QuadrantClassifier | EnsembleClassifier
    contract: Contract
    facts: dict[str, Any]

    def __call__(self, view: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Give logits, float32 [N, C], for grey levels 0 to 255, float [N, 1, S, S], S the teacher's own input size.

        They are computed in mixed precision where a `dtype` is given.
        """
        with torch.no_grad(), torch.autocast(view.device.type, dtype, enabled=dtype is not None):
            logits: Tensor = self.model(view)
        return logits.float()


def load_teacher(folder: Path, contract: Contract, where: torch.device) -> Teacher:
    """Read a run or an ensemble that is to teach, on a device, a student of the given contract.

    Raises
    ------
    RunError
        If the folder holds no run or a damaged one.
    ConfigError
        If the run is not finished, or judges other classes or another part of the frame.
    """
    run = load_trained(folder)
    label = f"--teacher {folder.as_posix()}"
    if run.info.get("status") != "finished":
        raise ConfigError(f"{label}: the run is not finished; go on with it by `echoquad train --resume` first")
    for name, found, expected in (
        ("classes", ", ".join(run.contract.classes), ", ".join(contract.classes)),
        ("keep", run.contract.keep, contract.keep),
    ):
        if found != expected:
            raise ConfigError(f"{label}: its {name} is {found}; expected the student's, {expected}")
    facts = {
        "backbone": run.info["backbone"] if isinstance(run, Ensemble) else run.model.name,
        "input_size": run.contract.input_size,
        "contract_sha256": run.contract.sha256,
        **(_ensemble_facts(run) if isinstance(run, Ensemble) else _run_facts(run)),
    }
    model = run.model.requires_grad_(False).to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Teacher(model, run.contract, facts)


def _run_facts(run: Run) -> dict[str, Any]:
    try:
        accuracy = run.info["best"]["validation_frame_accuracy"]
    except (KeyError, TypeError) as error:
        raise RunError(f"{run.folder.as_posix()}: {RUN} lacks {error}; train again") from error
    digest = hashlib.sha256((run.folder / BEST).read_bytes()).hexdigest()
    return {"weights_sha256": digest, "validation_frame_accuracy": accuracy}


def _ensemble_facts(ensemble: Ensemble) -> dict[str, Any]:
    """Identify an ensemble by its members' weights and how they judge together; it was not validated as such."""
    kept = {"vote": ensemble.info["vote"], "views": ensemble.info["views"]}
    hashes = [member["weights_sha256"] for member in ensemble.info["members"]]
    digest = hashlib.sha256(canonical_json({**kept, "members": hashes}).encode("ascii")).hexdigest()
    return {"weights_sha256": digest, **kept, "members": hashes, "trained_in_folds": ensemble.trained_in_folds}


def teacher_quadrants(
    teacher: Teacher,
    split: Split,
    store: Store,
    storage: Storage,
    progress: Callable[[int, int], None] | None = None,
) -> Store:
    """Open a student's frames at the teacher's input size; where that is the student's, `store` itself.

    Raises
    ------
    DatasetError
        If a frame that could be read for the student cannot be read any more, or the other way round.
    OutputError
        If the overflow folder's disk is full or cannot be written to.
    """
    if teacher.contract.input_size == store.size:
        return store
    own = storage.open(split, teacher.contract, progress)
    if own.names != store.names:
        changed = sorted(set(own.names) ^ set(store.names))
        raise DatasetError(f"{split.name}: {changed[0]} changed while the frames were read; train again")
    return own


def distillation_loss(
    labelled: Tensor, student: Tensor, teacher: Tensor, weight: float, temperature: float, rows: float | None = None
) -> Tensor:
    """Mix the labels' loss with the teacher's.

    Parameters
    ----------
    labelled
        The loss against the labels, a scalar.
    student, teacher
        Logits, float [N, C].
    weight
        The teacher's share, 0 to 1.
    temperature
        T, by which both logits are divided.
    rows
        What the teacher's loss is divided by; None is N. A rank that has N rows of a batch divides by its mean share.

    Returns
    -------
    Tensor
        (1 - weight) * labelled + weight * T^2 * KL(teacher, student), the mean over the batch. T^2 makes up for the
        gradients, which shrink with 1 / T^2.
    """
    taught = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="sum",
        log_target=True,
    ) / (rows or len(student))
    return (1 - weight) * labelled + weight * temperature**2 * taught
