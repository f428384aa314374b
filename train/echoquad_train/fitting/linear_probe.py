"""Linear probes: a linear classifier on the frozen features of a backbone, fitted by scikit-learn.

The features of each training quadrant, without augmentation and in evaluation mode, are computed once. A linear support
vector machine or a logistic regression is fitted to them. Standardisation and coefficients form one linear layer, which
becomes the head, so the run evaluates and exports like any other.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import nn

from echoquad_runtime.errors import DatasetError, RunError
from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS, ReadOptions
from echoquad_runtime.storage.atomic import write_bytes
from echoquad_train.curation.leaks import leaks_of_stores
from echoquad_train.data.dataset import LabelledFrame, QuadrantStore, Split, load_quadrants, read_classes, read_split
from echoquad_train.data.patients import patient_pattern, patients_of
from echoquad_train.fitting.loop import FitResult, Reporter, make_epoch
from echoquad_train.fitting.resume import locked_run_folder, open_run_folder
from echoquad_train.fitting.run_temperatures import fit_run_temperatures
from echoquad_train.networks.classifier import QuadrantClassifier, build_model
from echoquad_train.networks.device import Device, choose_device, make_deterministic
from echoquad_train.recipe import Recipe
from echoquad_train.runs import checkpoint, run_metadata
from echoquad_train.training.batches import DeviceFeed
from echoquad_train.training.validation import validate

__all__ = ["REGULARISATIONS", "LinearKind", "LinearProbe", "fit_linear", "quadrant_features", "set_head"]

LinearKind = Literal["linear-svm", "logistic"]

REGULARISATIONS: Final = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for C; ties go to the smallest, which regularises most."""

FOLDS: Final = 5  # or the number of patients of the smallest class
BATCH: Final = 32  # quadrants; the result does not depend on it
MAX_ITERATIONS: Final = 5000

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LinearProbe:
    """A fitted linear classifier.

    Attributes
    ----------
    pipeline
        scikit-learn's pipeline of a scaler and a classifier.
    scale
        Factor from decision values to logits; 1 for a logistic regression.
    metadata
        The key ``fit`` of ``run.json``.
    """

    pipeline: Pipeline
    scale: float
    metadata: dict[str, Any]


def fit_linear(
    data: Path,
    folder: Path,
    recipe: Recipe,
    kind: LinearKind,
    *,
    device: Device = "auto",
    reporter: Reporter,
    reading: ReadOptions = DEFAULT_READ_OPTIONS,
    patient_regex: str | None = None,
) -> FitResult:
    """Train a linear classifier on a frozen backbone.

    Parameters
    ----------
    data, folder, device, reporter, reading, patient_regex
        As in `echoquad_train.fitting.loop.fit`.
    recipe
        Defines backbone, weights, contract, seed and class weighting. Epochs, learning rates and augmentation have no
        effect.
    kind
        The classifier.

    Raises
    ------
    DatasetError, ConfigError, RunError, DeviceUnavailableError, OutputError
        If the data, the recipe, the run folder, the device or the disk cannot be used.
    """
    torch_device = choose_device(device)
    make_deterministic(torch_device)
    with locked_run_folder(folder):
        open_run_folder(folder, recipe, resume=False)
        pattern = patient_pattern(patient_regex)
        classes = read_classes(data)
        contract = recipe.contract(classes)
        train, validation = (read_split(data, split, classes, reading) for split in ("train", "validation"))
        torch.manual_seed(recipe.seed)
        model = build_model(recipe, contract).to(torch_device).eval()
        train_store, validation_store = (
            load_quadrants(split, contract, overflow=folder, progress=partial(reporter.decoding, split.name))
            for split in (train, validation)
        )
        groups = _patients_of_store(train, train_store, pattern)
        _require_patients(train_store.labels, groups, classes)
        failures = (*train_store.failures, *validation_store.failures)
        reporter.started(torch_device.type, "fp32", train, validation)
        leaks = leaks_of_stores(
            {train.name: train_store, validation.name: validation_store}, pattern, contract.quadrants
        )
        reporter.audited(leaks)
        started = time.perf_counter()
        features = quadrant_features(model, train_store, partial(reporter.batch, 1))
        labels = np.repeat(train_store.labels, 4)
        probe = select_probe(
            kind, features, labels, np.repeat(groups, 4), balanced=recipe.class_weights, seed=recipe.seed
        )
        set_head(model, probe)
        feeds = (DeviceFeed(store, torch_device) for store in (train_store, validation_store))
        trained, validated = (validate(model, contract, feed) for feed in feeds)
        epoch = make_epoch(1, kind, trained, validated, started)
        if not math.isfinite(epoch.train_loss + epoch.validation_loss):
            raise RunError(
                f"{folder.as_posix()}: the backbone's features are not finite; expected weights of a trained network; "
                "use others with --weights"
            )
        metadata = run_metadata.collect_metadata(
            data, recipe, contract, (train, validation), failures, torch_device.type, "fp32", reading=reading
        )
        metadata |= {"fit": probe.metadata, "patient_regex": patient_regex, "audit": leaks.counts}
        if model.pretrained:
            metadata["pretrained"] = model.pretrained.to_dict()
        # Before the recipe: with a recipe alone, --resume would train a network.
        run_metadata.write_run(folder, metadata, [], recipe, finished=False)
        write_bytes(folder / checkpoint.RECIPE, recipe.to_toml().encode())
        metadata["best_sha256"] = checkpoint.save_best(folder, model.state_dict(), recipe, contract, epoch.epoch)
        metadata = fit_run_temperatures(folder, metadata, recipe, validation, validation_store, torch_device)
        run_metadata.write_run(folder, metadata, [epoch], recipe, finished=True)
        reporter.epoch(epoch, 1, True)
        return FitResult(folder, (epoch,), epoch, failures, metadata.get("calibration"))


@torch.inference_mode()
def quadrant_features(
    model: QuadrantClassifier, store: QuadrantStore, progress: Callable[[int, int], object] = lambda *_: None
) -> Features:
    """Return the inputs of the head for a store's quadrants, float32 [F * 4, features]."""
    flat = store.quadrants.reshape(-1, 1, *store.quadrants.shape[2:])
    device = next(model.parameters()).device
    features: list[torch.Tensor] = []
    hook = _head(model).register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].float().cpu()))
    try:
        for start in range(0, len(flat), BATCH):
            model.eval()(torch.from_numpy(np.ascontiguousarray(flat[start : start + BATCH])).to(device))
            progress(len(features), math.ceil(len(flat) / BATCH))
    finally:
        hook.remove()
    return torch.cat(features).numpy()


def select_probe(
    kind: LinearKind, features: Features, labels: Labels, groups: npt.NDArray[Any], *, balanced: bool, seed: int
) -> LinearProbe:
    """Fit a classifier with the regularisation that performs best on held-out patients.

    Parameters
    ----------
    kind
        The classifier. With more than two classes, a support vector machine is one-vs-rest and a logistic regression
        multinomial.
    features
        float32 [N, features].
    labels
        int64 [N], 0 to C - 1, every class present.
    groups
        The patient of each row, [N]; no patient is in two folds.
    balanced
        Whether to weight classes equally.
    seed
        Of the folds and the solver.
    """
    weight = "balanced" if balanced else None
    patients = min(len(set(groups[labels == label])) for label in np.unique(labels))
    folds = list(
        StratifiedGroupKFold(min(FOLDS, patients), shuffle=True, random_state=seed).split(features, labels, groups)
    )
    # Skip folds that lack a class, because one patient has most of it.
    folds = [(inner, outer) for inner, outer in folds if len(set(labels[inner])) == len(set(labels))]
    decisions: dict[float, npt.NDArray[np.float64]] = {}
    scores: dict[float, list[float]] = {}
    held_out = np.concatenate([outer for _, outer in folds])
    for c in REGULARISATIONS:
        parts = [_decisions(_fit(kind, c, weight, seed, features[i], labels[i]), features[o]) for i, o in folds]
        decisions[c] = np.concatenate(parts)
        scores[c] = [
            float(balanced_accuracy_score(labels[outer], part.argmax(axis=1)))
            for (_, outer), part in zip(folds, parts, strict=True)
        ]
    best = max(REGULARISATIONS, key=lambda c: (round(float(np.mean(scores[c])), 9), -c))
    scale = 1.0 if kind == "logistic" else fit_scale(decisions[best], labels[held_out], balanced=balanced)
    metadata = {
        "kind": kind,
        "c": best,
        "tried": list(REGULARISATIONS),
        "folds": len(folds),
        "cv_balanced_accuracy": float(np.mean(scores[best])),
        "cv_standard_deviation": float(np.std(scores[best])),
        "scale": scale,
        "features": features.shape[1],
        "class_weight": weight,
    }
    return LinearProbe(_fit(kind, best, weight, seed, features, labels), scale, metadata)


def fit_scale(decisions: npt.NDArray[np.float64], labels: Labels, *, balanced: bool) -> float:
    """Return the factor that turns decision values into logits of probabilities (Platt scaling without a shift).

    J. Platt, "Probabilistic Outputs for Support Vector Machines" (1999): maximise the likelihood of held-out labels,
    with targets of (n + 1) / (n + 2) instead of 1, which keeps the factor finite for separable data. The shift is 0, so
    that no decision changes. One factor for all classes is the temperature of C. Guo et al., arXiv:1706.04599.

    Parameters
    ----------
    decisions
        float64 [N, C], of a classifier that was not fitted to these samples.
    labels
        int64 [N], the true classes.
    balanced
        Whether to weight classes equally, as in the fit.
    """
    counts = np.bincount(labels, minlength=decisions.shape[1])
    target = (counts[labels] + 1) / (counts[labels] + 2)
    targets = np.repeat(((1 - target) / (decisions.shape[1] - 1))[:, None], decisions.shape[1], axis=1)
    targets[np.arange(len(labels)), labels] = target
    weights = 1 / counts[labels] if balanced else np.ones(len(labels))

    def loss(exponent: float) -> float:
        terms = targets * log_softmax(np.exp(exponent) * decisions, axis=1)
        return -float((weights * terms.sum(axis=1)).sum() / weights.sum())

    return float(np.exp(minimize_scalar(loss, bounds=(-7, 7), method="bounded").x))


def set_head(model: QuadrantClassifier, probe: LinearProbe) -> None:
    """Copy scaler and classifier into the model's last layer; its logits are their decision values times the scale."""
    scaler, classifier = (step for _, step in probe.pipeline.steps)
    weight = classifier.coef_ / scaler.scale_
    bias = classifier.intercept_ - weight @ scaler.mean_
    if len(weight) == 1:
        weight, bias = _two_logits(weight.T).T, _two_logits(bias)[0]
    layer = _head(model)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(probe.scale * weight))
        layer.bias.copy_(torch.from_numpy(probe.scale * bias))


def _fit(kind: LinearKind, c: float, weight: str | None, seed: int, features: Features, labels: Labels) -> Pipeline:
    classifier = (
        LinearSVC(C=c, class_weight=weight, random_state=seed, max_iter=MAX_ITERATIONS, dual="auto")
        if kind == "linear-svm"
        else LogisticRegression(C=c, class_weight=weight, max_iter=MAX_ITERATIONS)
    )
    pipeline = make_pipeline(StandardScaler(), classifier)
    with warnings.catch_warnings():  # the remaining difference does not change decisions
        warnings.simplefilter("ignore", ConvergenceWarning)
        return pipeline.fit(features.astype(np.float64), labels)


def _decisions(pipeline: Pipeline, features: Features) -> npt.NDArray[np.float64]:
    """Return decision values, float64 [N, C], whose maximum is scikit-learn's prediction."""
    values = np.asarray(pipeline.decision_function(features.astype(np.float64)), np.float64)
    return values if values.ndim == 2 else _two_logits(values)


def _two_logits(decisions: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Convert decision values for the second class, [N] or [N, 1], to logits, [N, 2], with that difference."""
    flat = decisions.reshape(-1)
    return np.stack([-flat / 2, flat / 2], axis=1)


def _head(model: QuadrantClassifier) -> nn.Linear:
    layer = model.head[-1]
    assert isinstance(layer, nn.Linear)
    return layer


def _patients_of_store(split: Split, store: QuadrantStore, pattern: re.Pattern[str] | None) -> npt.NDArray[np.str_]:
    """Return the patient of each frame of a store."""
    by_name: dict[str, LabelledFrame] = {frame.name: frame for frame in split.frames}
    return np.array(patients_of((by_name[name] for name in store.names), pattern))


def _require_patients(labels: Labels, groups: npt.NDArray[np.str_], classes: Iterable[str]) -> None:
    for index, name in enumerate(classes):
        patients = set(groups[labels == index])
        if len(patients) < 2:
            raise DatasetError(
                f"train/{name}: frames of {len(patients)} patient found; expected two or more patients, because --fit "
                "selects its regularisation on held-out patients"
            )
