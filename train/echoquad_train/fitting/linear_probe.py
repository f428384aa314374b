"""Linear classifiers on frozen features: scikit-learn's fit, as the head of a network like any other.

The backbone stays as it is. What it gives for each training quadrant, unaugmented and in evaluation mode, is computed
once; a linear support vector machine or a logistic regression is fitted to it; and standardisation and coefficients
together are one linear layer, which becomes the head. So the run evaluates and exports as any other run does.
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
from echoquad_runtime.storage.atomic import make_folder, write_bytes
from echoquad_train.curation.leaks import leaks_of_stores
from echoquad_train.data.dataset import LabelledFrame, QuadrantStore, Split, load_quadrants, read_classes, read_split
from echoquad_train.data.patients import patient_pattern, patients_of
from echoquad_train.fitting.loop import Fitted, Reporter
from echoquad_train.fitting.resume import abandoned_on_failure, open_folder
from echoquad_train.networks.classifier import QuadrantClassifier, build_model
from echoquad_train.networks.device import Device, choose_device, make_deterministic
from echoquad_train.recipe import Recipe
from echoquad_train.runs import checkpoint
from echoquad_train.runs import run_metadata as record
from echoquad_train.runs.history import Epoch
from echoquad_train.training.batches import DeviceFeed
from echoquad_train.training.run_calibration import calibrate_run
from echoquad_train.training.validation import validate

__all__ = ["KINDS", "REGULARISATIONS", "Chosen", "Kind", "fit_linear", "fold_into", "quadrant_features"]

Kind = Literal["linear-svm", "logistic"]
KINDS: Final[tuple[Kind, ...]] = ("linear-svm", "logistic")

REGULARISATIONS: Final = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Values of C that are tried; among equals the smallest, which regularises most, is taken."""

FOLDS: Final = 5  # or as many as the class with the fewest patients has
BATCH: Final = 32  # quadrants; of no influence on the result
MOST_ITERATIONS: Final = 5000

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Chosen:
    """A fitted classifier.

    Attributes
    ----------
    pipeline
        scikit-learn's, of a scaler and a classifier.
    scale
        What its decisions are multiplied by to be logits; 1 for a logistic regression.
    facts
        What ``run.json`` says of it.
    """

    pipeline: Pipeline
    scale: float
    facts: dict[str, Any]


def fit_linear(
    data: Path,
    folder: Path,
    recipe: Recipe,
    kind: Kind,
    *,
    device: Device = "auto",
    reporter: Reporter,
    reading: ReadOptions = DEFAULT_READ_OPTIONS,
    patient_regex: str | None = None,
) -> Fitted:
    """Train a linear classifier on a backbone as it is.

    Parameters
    ----------
    data, folder, device, reporter, reading, patient_regex
        As `echoquad_train.fitting.loop.fit` takes them.
    recipe
        Gives backbone, weights, contract, seed, and whether classes are weighted; of no effect is what concerns
        epochs, rates and augmentation.
    kind
        The classifier.

    Raises
    ------
    DatasetError, ConfigError, RunError, DeviceUnavailableError, OutputError
        If the data, the recipe, the run folder, the device or the disk stand in the way.
    """
    where = choose_device(device)
    make_deterministic(where)
    open_folder(folder, recipe, resume=False)
    pattern = patient_pattern(patient_regex)
    classes = read_classes(data)
    contract = recipe.contract(classes)
    train, validation = (read_split(data, split, classes, reading) for split in ("train", "validation"))
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, contract).to(where).eval()
    make_folder(folder)
    write_bytes(folder / checkpoint.RECIPE, recipe.to_toml().encode())
    with abandoned_on_failure(folder, unless=False):
        train_store, validation_store = (
            load_quadrants(split, contract, overflow=folder, progress=partial(reporter.decoding, split.name))
            for split in (train, validation)
        )
        groups = _patients(train, train_store, pattern)
        _require_patients(train_store.labels, groups, classes)
    failures = (*train_store.failures, *validation_store.failures)
    reporter.started(where.type, "fp32", train, validation)
    leaks = leaks_of_stores((train_store, validation_store), pattern)
    reporter.audited(leaks)
    started = time.perf_counter()
    features = quadrant_features(model, train_store, partial(reporter.batch, 1))
    labels = np.repeat(train_store.labels, 4)
    chosen = choose(kind, features, labels, np.repeat(groups, 4), balanced=recipe.class_weights, seed=recipe.seed)
    fold_into(model, chosen)
    feeds = (DeviceFeed(store, where) for store in (train_store, validation_store))
    trained, validated = (validate(model, contract, feed) for feed in feeds)
    epoch = Epoch(
        epoch=1,
        phase=kind,
        lr=0.0,
        train_loss=trained.loss,
        train_patch_accuracy=trained.patch_accuracy,
        seconds=round(time.perf_counter() - started, 2),
        validation_loss=validated.loss,
        validation_patch_accuracy=validated.patch_accuracy,
        validation_frame_accuracy=validated.frame_accuracy,
    )
    if not math.isfinite(epoch.train_loss + epoch.validation_loss):
        raise RunError(
            f"{folder.as_posix()}: the backbone's features are no finite numbers; expected weights of a trained "
            "network; give others by --weights"
        )
    facts = record.facts(data, recipe, contract, (train, validation), failures, where.type, "fp32", reading=reading)
    facts |= {"fit": chosen.facts, "patient_regex": patient_regex, "audit": leaks.counts}
    checkpoint.save_best(folder, model.state_dict(), recipe, contract, epoch.epoch)
    facts = calibrate_run(folder, facts, recipe, validation, validation_store, where)
    record.write(folder, facts, [epoch], finished=True)
    reporter.epoch(epoch, 1, True)
    return Fitted(folder, (epoch,), epoch, failures, facts.get("calibration"))


@torch.inference_mode()
def quadrant_features(
    model: QuadrantClassifier, store: QuadrantStore, progress: Callable[[int, int], object] = lambda *_: None
) -> Features:
    """Give what the head gets to see, float32 [F * 4, features], of a store's quadrants in their order."""
    flat = store.quadrants.reshape(-1, 1, *store.quadrants.shape[2:])
    where = next(model.parameters()).device
    seen: list[torch.Tensor] = []
    hook = _layer(model).register_forward_pre_hook(lambda _, given: seen.append(given[0].float().cpu()))
    try:
        for start in range(0, len(flat), BATCH):
            model.eval()(torch.from_numpy(np.ascontiguousarray(flat[start : start + BATCH])).to(where))
            progress(len(seen), math.ceil(len(flat) / BATCH))
    finally:
        hook.remove()
    return torch.cat(seen).numpy()


def choose(
    kind: Kind, features: Features, labels: Labels, groups: npt.NDArray[Any], *, balanced: bool, seed: int
) -> Chosen:
    """Fit a classifier with the regularisation that does best on patients whom it was not fitted to.

    Parameters
    ----------
    kind
        The classifier. Of more than two classes a support vector machine tells each from the rest; a logistic
        regression is multinomial.
    features
        float32 [N, features].
    labels
        int64 [N], 0 to C - 1, none of them missing.
    groups
        N patients; nobody is in two folds.
    balanced
        Whether each class weighs as much as another.
    seed
        Of the folds and of the solver.
    """
    weight = "balanced" if balanced else None
    patients = min(len(set(groups[labels == label])) for label in np.unique(labels))
    folds = list(
        StratifiedGroupKFold(min(FOLDS, patients), shuffle=True, random_state=seed).split(features, labels, groups)
    )
    # A fold may lack a class, where one patient has most of it: nothing can be learnt of the others then.
    folds = [(inner, outer) for inner, outer in folds if len(set(labels[inner])) == len(set(labels))]
    decisions: dict[float, npt.NDArray[np.float64]] = {}
    scores: dict[float, list[float]] = {}
    judged = np.concatenate([outer for _, outer in folds])
    for c in REGULARISATIONS:
        parts = [_decisions(_fitted(kind, c, weight, seed, features[i], labels[i]), features[o]) for i, o in folds]
        decisions[c] = np.concatenate(parts)
        scores[c] = [
            float(balanced_accuracy_score(labels[outer], part.argmax(axis=1)))
            for (_, outer), part in zip(folds, parts, strict=True)
        ]
    best = max(REGULARISATIONS, key=lambda c: (round(float(np.mean(scores[c])), 9), -c))
    scale = 1.0 if kind == "logistic" else fit_scale(decisions[best], labels[judged], balanced=balanced)
    facts = {
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
    return Chosen(_fitted(kind, best, weight, seed, features, labels), scale, facts)


def fit_scale(decisions: npt.NDArray[np.float64], labels: Labels, *, balanced: bool) -> float:
    """Find what decisions are multiplied by so that their softmax is a probability.

    J. Platt, "Probabilistic Outputs for Support Vector Machines" (1999): the likelihood of labels that were held out,
    with targets of (n + 1) / (n + 2) in place of 1, so that no scale is infinite where all is told apart. His second
    number, a shift, is left at 0: no decision is to change. With one scale for any number of classes this is C. Guo et
    al.'s temperature, arXiv:1706.04599.

    Parameters
    ----------
    decisions
        float64 [N, C], of a classifier that has not seen these samples.
    labels
        int64 [N], the true classes.
    balanced
        Whether each class weighs as much as another, as it did in the fit.
    """
    counts = np.bincount(labels, minlength=decisions.shape[1])
    sure = (counts[labels] + 1) / (counts[labels] + 2)
    targets = np.repeat(((1 - sure) / (decisions.shape[1] - 1))[:, None], decisions.shape[1], axis=1)
    targets[np.arange(len(labels)), labels] = sure
    weights = 1 / counts[labels] if balanced else np.ones(len(labels))

    def loss(exponent: float) -> float:
        terms = targets * log_softmax(np.exp(exponent) * decisions, axis=1)
        return -float((weights * terms.sum(axis=1)).sum() / weights.sum())

    return float(np.exp(minimize_scalar(loss, bounds=(-7, 7), method="bounded").x))


def fold_into(model: QuadrantClassifier, chosen: Chosen) -> None:
    """Make scaler and classifier the model's last layer: its logits are their decisions, times the scale."""
    scaler, classifier = (step for _, step in chosen.pipeline.steps)
    weight = classifier.coef_ / scaler.scale_
    bias = classifier.intercept_ - weight @ scaler.mean_
    if len(weight) == 1:
        weight, bias = _two(weight.T).T, _two(bias)[0]
    layer = _layer(model)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(chosen.scale * weight))
        layer.bias.copy_(torch.from_numpy(chosen.scale * bias))


def _fitted(kind: Kind, c: float, weight: str | None, seed: int, features: Features, labels: Labels) -> Pipeline:
    classifier = (
        LinearSVC(C=c, class_weight=weight, random_state=seed, max_iter=MOST_ITERATIONS, dual="auto")
        if kind == "linear-svm"
        else LogisticRegression(C=c, class_weight=weight, max_iter=MOST_ITERATIONS)
    )
    pipeline = make_pipeline(StandardScaler(), classifier)
    with warnings.catch_warnings():  # what little is left to converge to does not change a decision
        warnings.simplefilter("ignore", ConvergenceWarning)
        return pipeline.fit(features.astype(np.float64), labels)


def _decisions(pipeline: Pipeline, features: Features) -> npt.NDArray[np.float64]:
    """Give float64 [N, C], the highest of which is scikit-learn's own prediction."""
    found = np.asarray(pipeline.decision_function(features.astype(np.float64)), np.float64)
    return found if found.ndim == 2 else _two(found)


def _two(decisions: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Make two logits, [N, 2], of a decision for the second class, [N] or [N, 1]: their difference is the decision."""
    flat = decisions.reshape(-1)
    return np.stack([-flat / 2, flat / 2], axis=1)


def _layer(model: QuadrantClassifier) -> nn.Linear:
    layer = model.head[-1]
    assert isinstance(layer, nn.Linear)
    return layer


def _patients(split: Split, store: QuadrantStore, pattern: re.Pattern[str] | None) -> npt.NDArray[np.str_]:
    """Tell whom each frame of a store is of."""
    by_name: dict[str, LabelledFrame] = {frame.name: frame for frame in split.frames}
    return np.array(patients_of((by_name[name] for name in store.names), pattern))


def _require_patients(labels: Labels, groups: npt.NDArray[np.str_], classes: Iterable[str]) -> None:
    for index, name in enumerate(classes):
        patients = set(groups[labels == index])
        if len(patients) < 2:
            raise DatasetError(
                f"train/{name}: frames of {len(patients)} patient found; expected two or more, since --fit chooses its "
                "regularisation on patients whom it was not fitted to"
            )
