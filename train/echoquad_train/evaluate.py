"""Evaluation: what a run or a bundle reaches on a labelled split.

A run's probabilities come from torch, a bundle's from onnxruntime; everything after them is the same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn import metrics

from echoquad_runtime.contract import QUADRANTS
from echoquad_runtime.errors import DatasetError
from echoquad_runtime.files import make_folder, write_json
from echoquad_runtime.inputs import Failure
from echoquad_runtime.predictor import Prediction, Predictor
from echoquad_runtime.writers import open_writer
from echoquad_train import figures
from echoquad_train.dataset import Split

__all__ = ["Evaluation", "evaluate", "measure", "wilson_interval", "write_evaluation"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluated split.

    Attributes
    ----------
    metrics
        What ``metrics.json`` holds.
    predictions
        A prediction a readable frame, in the split's order.
    labels
        int64 [F], the true classes of these frames.
    failures
        Frames that could not be read.
    """

    metrics: dict[str, Any]
    predictions: tuple[Prediction, ...]
    labels: npt.NDArray[np.int64]
    failures: tuple[Failure, ...]


def evaluate(predictor: Predictor, split: Split, *, progress: Callable[[int, int], None] | None = None) -> Evaluation:
    """Judge every frame of a split and hold the decisions against its labels.

    Raises
    ------
    DatasetError
        If no frame can be read.
    """
    predictions: list[Prediction] = []
    labels: list[int] = []
    failures: list[Failure] = []
    results = predictor.predict(split.files())
    for done, (frame, result) in enumerate(zip(split.frames, results, strict=True), 1):
        if isinstance(result, Failure):
            failures.append(result)
        else:
            predictions.append(result)
            labels.append(frame.label)
        if progress is not None:
            progress(done, len(split.frames))
    if not predictions:
        raise DatasetError(
            f"{split.name}: no frame can be read; the first failure: {failures[0].file}: {failures[0].error}"
        )
    true = np.array(labels, np.int64)
    measured = measure(predictions, true, predictor.contract.positive)
    head = {
        "split": split.name,
        "device": predictor.engine.device,
        "precision": predictor.engine.precision,
        "method": predictor.method,
        "contract_sha256": predictor.contract.sha256,
    }
    return Evaluation({**head, **measured, "unreadable": len(failures)}, tuple(predictions), true, tuple(failures))


def measure(predictions: Sequence[Prediction], labels: npt.NDArray[np.int64], positive: str) -> dict[str, Any]:
    """Compute the metrics of predictions against labels, int64 [F].

    ``roc_auc`` is of the positive class's mean probability for two classes, the unweighted mean of one-against-rest
    areas for more, and None where a class has no frame.
    """
    classes = predictions[0].classes
    index = {name: position for position, name in enumerate(classes)}
    decided = np.array([index[prediction.label] for prediction in predictions])
    probabilities = np.array([prediction.probabilities for prediction in predictions])
    quadrants = np.array([[index[label] for label in prediction.quadrant_labels] for prediction in predictions])
    every = list(range(len(classes)))
    right = int((decided == labels).sum())
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, decided, labels=every, zero_division=0.0
    )
    areas = [area for _, _, _, area in roc_curves(probabilities, labels, classes, positive)]
    return {
        "frames": len(labels),
        "accuracy": right / len(labels),
        "accuracy_ci95": list(wilson_interval(right, len(labels))),
        "balanced_accuracy": float(np.mean(recall[support > 0])),
        "patch_accuracy": float((quadrants == labels[:, None]).mean()),
        "roc_auc": float(np.mean(areas)) if len(np.unique(labels)) == len(classes) else None,
        "positive": positive,
        "classes": list(classes),
        "confusion": metrics.confusion_matrix(labels, decided, labels=every).tolist(),
        "per_class": {
            name: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "support": int(support[i]),
            }
            for i, name in enumerate(classes)
        },
        "per_quadrant": {name: float((quadrants[:, i] == labels).mean()) for i, name in enumerate(QUADRANTS)},
    }


def roc_curves(
    probabilities: npt.NDArray[np.float64],
    labels: npt.NDArray[np.int64],
    classes: Sequence[str],
    positive: str,
) -> list[tuple[str, npt.NDArray[np.float64], npt.NDArray[np.float64], float]]:
    """Give name, false and true positive rates and area of each ROC curve.

    One curve, of the positive class, for two classes; one a class, against the rest, for more. A class without frames,
    or with all of them, has none.
    """
    wanted = [positive] if len(classes) == 2 else list(classes)
    curves = []
    for name in wanted:
        column = classes.index(name)
        truth = labels == column
        if truth.all() or not truth.any():
            continue
        false_positive, true_positive, _ = metrics.roc_curve(truth, probabilities[:, column])
        curves.append((name, false_positive, true_positive, float(metrics.auc(false_positive, true_positive))))
    return curves


def wilson_interval(right: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Give the Wilson score interval of a proportion; at the default z it covers 95 %.

    E. B. Wilson, JASA 22 (1927) 209. Frames of one patient are not independent, so where a patient has several
    the interval is too narrow.
    """
    share = right / count
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    centre, scale = share + z * z / (2 * count), 1 + z * z / count
    # At its ends it is 0 and 1 exactly, whatever rounding says.
    return (centre - spread) / scale if right else 0.0, (centre + spread) / scale if right < count else 1.0


def write_evaluation(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write ``metrics.json``, ``predictions.csv``, ``confusion.png`` and ``roc.png``; gives their paths.

    Raises
    ------
    OutputError
        If the system refuses.
    """
    make_folder(folder)
    found = evaluation.metrics
    classes = tuple(found["classes"])
    low, high = found["accuracy_ci95"]
    paths = [folder / name for name in ("metrics.json", "predictions.csv", "confusion.png", "roc.png")]
    write_json(paths[0], found)
    with open_writer(paths[1], classes) as writer:
        for prediction in evaluation.predictions:
            writer.write(prediction)
    title = f"{found['split']}: accuracy {found['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
    figures.save(figures.confusion(np.array(found["confusion"]), classes, title), paths[2])
    probabilities = np.array([prediction.probabilities for prediction in evaluation.predictions])
    curves = roc_curves(probabilities, evaluation.labels, classes, found["positive"])
    figures.save(figures.roc(curves, f"{found['split']}: {found['frames']} frames"), paths[3])
    return paths
