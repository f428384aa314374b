"""Comparison: two models on the same frames, paired frame by frame, so that errors of both cancel.

McNemar's exact test asks whether the frames on which only one model is right favour one of them (Q. McNemar,
Psychometrika 12 (1947) 153; as the binomial test of the discordant pairs). It takes frames as independent. The
differences have bootstrap intervals by patient, with the same resamples for both models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from echoquad_runtime.errors import ConfigError, DatasetError
from echoquad_runtime.storage.atomic import make_folder, write_json
from echoquad_train.evaluation.evaluate import Evaluation
from echoquad_train.evaluation.frame_metrics import roc_curves
from echoquad_train.evaluation.intervals import Bootstrap, Estimate, weighted_auc
from echoquad_train.evaluation.metrics import EvaluationOptions
from echoquad_train.evaluation.metrics_record import MetricsRecord
from echoquad_train.evaluation.scored_frames import ScoredFrames
from echoquad_train.plot_style import save, short
from echoquad_train.reporting.evaluation_folder import write_evaluation
from echoquad_train.reporting.report import write_report
from echoquad_train.reporting.score_figures import roc

__all__ = ["LETTERS", "Comparison", "compare", "mcnemar", "write_comparison"]

LETTERS: Final = ("a", "b")
"""Names of the two models' folders."""


@dataclass(frozen=True)
class Comparison(MetricsRecord):
    """The contents of ``compare.json``.

    Attributes
    ----------
    models
        See `echoquad_train.evaluation.evaluate.model_facts`.
    split, frames, patients, classes, positive
        The frames that both models read.
    both_right, first_only, second_only, both_wrong
        Numbers of frames by which models are right.
    mcnemar_p
        See `mcnemar`.
    decisions
        Numbers of frames, decisions of the first model in rows and of the second in columns.
    agreement, kappa
        Fraction of equal decisions, and Cohen's kappa; kappa is None if all decisions are one class.
    difference
        First minus second, of ``accuracy`` and ``roc_auc``.
    resamples, seed
        Of the bootstrap.
    """

    models: tuple[dict[str, str], dict[str, str]]
    split: str
    frames: int
    patients: int
    classes: tuple[str, ...]
    positive: str
    both_right: int
    first_only: int
    second_only: int
    both_wrong: int
    mcnemar_p: float
    decisions: list[list[int]]
    agreement: float
    kappa: float | None
    difference: dict[str, Estimate]
    resamples: int
    seed: int


def mcnemar(first_only: int, second_only: int) -> float:
    """Return the two-sided p-value of McNemar's exact test, by the numbers of frames on which only one model is right.

    It is 1 if there is no such frame.
    """
    differing = first_only + second_only
    return float(binomtest(first_only, differing, 0.5).pvalue) if differing else 1.0


def compare(first: Evaluation, second: Evaluation, options: EvaluationOptions | None = None) -> Comparison:
    """Compare two evaluations of one split on the frames that both models read.

    Raises
    ------
    ConfigError
        If the models differ in classes or positive class.
    DatasetError
        If no frame was read by both.
    """
    options = options or EvaluationOptions()
    for what, ours, theirs in (
        ("classes", ", ".join(first.scored.classes), ", ".join(second.scored.classes)),
        ("positive class", first.scored.positive, second.scored.positive),
    ):
        if ours != theirs:
            raise ConfigError(f"evaluate A B: {what} {ours} in A, {theirs} in B; expected equal ones")
    shared = set(first.scored.names) & set(second.scored.names)
    a, b = (
        evaluation.scored.subset([i for i, name in enumerate(evaluation.scored.names) if name in shared])
        for evaluation in (first, second)
    )
    if a is None or b is None:
        raise DatasetError("evaluate A B: no frame could be read by both models; see the failures")
    sampler = Bootstrap(a.patient_index, options.resamples, options.seed)
    first_only, second_only = int((a.correct & ~b.correct).sum()), int((~a.correct & b.correct).sum())
    accuracy_gain = a.correct.astype(float) - b.correct.astype(float)
    one_class = len(np.unique([a.decided, b.decided])) == 1
    return Comparison(
        models=(first.metrics.model or {}, second.metrics.model or {}),
        split=first.metrics.split,
        frames=len(a),
        patients=sampler.count,
        classes=a.classes,
        positive=a.positive,
        both_right=int((a.correct & b.correct).sum()),
        first_only=first_only,
        second_only=second_only,
        both_wrong=int((~a.correct & ~b.correct).sum()),
        mcnemar_p=mcnemar(first_only, second_only),
        decisions=confusion_matrix(a.decided, b.decided, labels=range(len(a.classes))).tolist(),
        agreement=float((a.decided == b.decided).mean()),
        kappa=None if one_class else float(cohen_kappa_score(a.decided, b.decided)),
        difference={
            "accuracy": Estimate.bootstrap(float(a.correct.mean() - b.correct.mean()), sampler.mean(accuracy_gain)),
            "roc_auc": _auc_difference(a, b, sampler),
        },
        resamples=options.resamples,
        seed=options.seed,
    )


def _auc_difference(a: ScoredFrames, b: ScoredFrames, sampler: Bootstrap) -> Estimate:
    if not a.complete:
        return Estimate(None)
    curves = [roc_curves(scored) for scored in (a, b)]
    means = [float(np.mean([curve.area for curve in found])) for found in curves]
    columns = [a.classes.index(curve.name) for curve in curves[0]]
    resampled = [
        np.mean([weighted_auc(sampler, scored.probabilities[:, c], scored.labels == c) for c in columns], axis=0)
        for scored in (a, b)
    ]
    return Estimate.bootstrap(means[0] - means[1], resampled[0] - resampled[1])


def write_comparison(
    first: Evaluation, second: Evaluation, comparison: Comparison, folder: Path, *, gallery: int = 0
) -> list[Path]:
    """Write the evaluations to ``a`` and ``b`` below `folder`, and ``compare.json`` and ``report.html`` beside them.

    Raises
    ------
    OutputError
        If a file cannot be written.
    """
    make_folder(folder)
    paths = []
    for letter, evaluation in zip(LETTERS, (first, second), strict=True):
        paths += write_evaluation(evaluation, folder / letter, gallery=gallery)
    record, picture, report = folder / "compare.json", folder / "roc.png", folder / "report.html"
    curves = [
        curve._replace(name=f"{letter.upper()}: {short(curve.name, 20)}")
        for letter, evaluation in zip(LETTERS, (first, second), strict=True)
        for curve in roc_curves(evaluation.scored)
    ]
    save(roc(curves, f"{comparison.split}: {comparison.frames} frames, A against B"), picture)
    write_json(record, comparison.to_dict())
    write_report(report, "comparison", comparison=comparison, metrics=(first.metrics, second.metrics), picture=picture)
    return [*paths, record, picture, report]
