"""Comparison: two models on the same frames, frame by frame, so that what both get wrong does not blur what differs.

McNemar's exact test: of the frames that one model alone judges rightly, is it one model's more often than a coin would
say? (Q. McNemar, Psychometrika 12 (1947) 153; as the binomial test of the discordant pairs.) It takes frames as
independent; the differences' intervals come from a bootstrap over patients, the same resamples for both models.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

from echoquad_runtime.bundle.manifest import INTENDED_USE
from echoquad_runtime.errors import ConfigError, DatasetError
from echoquad_runtime.storage.atomic import make_folder, write_bytes, write_json
from echoquad_train import plot_style as figures
from echoquad_train.evaluation.evaluate import Evaluation
from echoquad_train.evaluation.intervals import Bootstrap, estimate, weighted_auc
from echoquad_train.evaluation.metrics import Settings, roc_curves
from echoquad_train.evaluation.scored_frames import ScoredFrames
from echoquad_train.reporting import score_figures as figures_scores
from echoquad_train.reporting.evaluation_folder import write_evaluation
from echoquad_train.reporting.html import figure, page, paragraph, section, table
from echoquad_train.reporting.html import figures as side_by_side
from echoquad_train.reporting.report import PRIVACY, figure_row, number

__all__ = ["LETTERS", "compare", "compare_report", "mcnemar", "write_comparison"]

LETTERS: Final = ("a", "b")
"""What the two models' folders are called."""


def mcnemar(first_only: int, second_only: int) -> float:
    """Give the two-sided p-value of McNemar's exact test; 1 where the models differ on no frame.

    Parameters
    ----------
    first_only, second_only
        How many frames the first, or the second, model alone judges rightly.
    """
    differing = first_only + second_only
    return float(binomtest(first_only, differing, 0.5).pvalue) if differing else 1.0


def compare(first: Evaluation, second: Evaluation, settings: Settings | None = None) -> dict[str, Any]:
    """Hold two evaluations of the same split against each other, on the frames that both models read.

    Returns
    -------
    dict
        What ``compare.json`` holds: ``both_right``, ``first_only``, ``second_only``, ``both_wrong``, ``mcnemar_p``;
        ``decisions``, the first model's classes in rows and the second's in columns, ``agreement`` and Cohen's
        ``kappa``; and ``difference``, first less second, of ``accuracy`` and ``roc_auc`` with intervals.

    Raises
    ------
    ConfigError
        If the models know other classes, or another positive one.
    DatasetError
        If there is no frame that both could read.
    """
    settings = settings or Settings()
    for name, found, other in (
        ("classes", ", ".join(first.judged.classes), ", ".join(second.judged.classes)),
        ("positive class", first.judged.positive, second.judged.positive),
    ):
        if found != other:
            raise ConfigError(f"evaluate A B: A's {name} is {found}, B's is {other}; compare models of the same")
    shared = set(first.judged.names) & set(second.judged.names)
    if not shared:
        raise DatasetError("evaluate A B: there is no frame that both models could read; see the failures")
    a, b = (_only(evaluation.judged, shared) for evaluation in (first, second))
    sampler = Bootstrap(a.patient_index, settings.resamples, settings.seed)
    first_only, second_only = int((a.right & ~b.right).sum()), int((~a.right & b.right).sum())
    every = range(len(a.classes))
    decisions = [[int(((a.decided == i) & (b.decided == j)).sum()) for j in every] for i in every]
    both = len(np.unique(np.concatenate([a.decided, b.decided]))) > 1
    return {
        "models": [evaluation.metrics.get("model", {}) for evaluation in (first, second)],
        "split": first.metrics["split"],
        "frames": len(a),
        "patients": sampler.count,
        "classes": list(a.classes),
        "positive": a.positive,
        "both_right": int((a.right & b.right).sum()),
        "first_only": first_only,
        "second_only": second_only,
        "both_wrong": int((~a.right & ~b.right).sum()),
        "mcnemar_p": mcnemar(first_only, second_only),
        "decisions": decisions,
        "agreement": float((a.decided == b.decided).mean()),
        "kappa": float(cohen_kappa_score(a.decided, b.decided)) if both else None,
        "difference": {
            "accuracy": estimate(
                float(a.right.mean() - b.right.mean()), sampler.mean(a.right.astype(float) - b.right.astype(float))
            ),
            "roc_auc": _auc_difference(a, b, sampler),
        },
        "resamples": settings.resamples,
        "seed": settings.seed,
    }


def _only(judged: ScoredFrames, names: set[str]) -> ScoredFrames:
    kept = judged.only([index for index, name in enumerate(judged.names) if name in names])
    assert kept is not None
    return kept


def _auc_difference(a: ScoredFrames, b: ScoredFrames, sampler: Bootstrap) -> dict[str, Any]:
    curves = [roc_curves(of.probabilities, of.labels, of.classes, of.positive) for of in (a, b)]
    if len(np.unique(a.labels)) < len(a.classes):
        return estimate(None, np.empty(0))
    means = [float(np.mean([area for *_, area in found])) for found in curves]
    columns = [a.classes.index(name) for name, *_ in curves[0]]
    draws = [
        np.mean([weighted_auc(sampler, of.probabilities[:, at], of.labels == at) for at in columns], axis=0)
        for of in (a, b)
    ]
    return estimate(means[0] - means[1], draws[0] - draws[1])


def write_comparison(
    first: Evaluation, second: Evaluation, found: Mapping[str, Any], folder: Path, *, gallery: int = 0
) -> list[Path]:
    """Write each evaluation into ``a`` and ``b`` below `folder`, and ``compare.json`` and ``report.html`` beside them.

    Raises
    ------
    OutputError
        If the system refuses.
    """
    make_folder(folder)
    paths = []
    for letter, evaluation in zip(LETTERS, (first, second), strict=True):
        paths += write_evaluation(evaluation, folder / letter, gallery=gallery)
    picture = folder / "roc.png"
    curves: list[figures_scores.Curve] = []
    for letter, evaluation in zip("AB", (first, second), strict=True):
        judged = evaluation.judged
        for name, false_positive, true_positive, area in roc_curves(
            judged.probabilities, judged.labels, judged.classes, judged.positive
        ):
            curves.append((f"{letter}: {figures.short(name, 20)}", false_positive, true_positive, area))
    figures.save(figures_scores.roc(curves, f"{found['split']}: {found['frames']} frames, A against B"), picture)
    report = folder / "report.html"
    write_json(folder / "compare.json", found)
    text = compare_report((first.metrics, second.metrics), found, picture)
    write_bytes(report, text.encode("utf-8", "backslashreplace"))
    return [*paths, folder / "compare.json", picture, report]


def compare_report(
    metrics: tuple[Mapping[str, Any], Mapping[str, Any]], found: Mapping[str, Any], picture: Path
) -> str:
    """Give the page of a comparison; each model has a page of its own."""
    a, b = (of["intervals"] for of in metrics)
    names = [
        f"{letter}: {model.get('name', '')} ({model.get('kind', 'model')})"
        for letter, model in zip("AB", found["models"], strict=True)
    ]
    hashes = [
        [
            name,
            next((model[key] for key in ("manifest_sha256", "weights_sha256") if key in model), "–"),
            of["contract_sha256"],
        ]
        for name, model, of in zip(names, found["models"], metrics, strict=True)
    ]
    rows = [
        [words, *figure_row("", a[key])[1:], *figure_row("", b[key])[1:]]
        for key, words in (
            ("accuracy", "accuracy, frames"),
            ("balanced_accuracy", "balanced accuracy"),
            ("roc_auc", "area under the ROC curve"),
            ("sensitivity", f"sensitivity for {found['positive']}"),
            ("specificity", f"specificity for {found['positive']}"),
            ("ece", "expected calibration error"),
        )
    ]
    differing = found["first_only"] + found["second_only"]
    verdict = (
        f"The models differ in {differing} of {found['frames']} frames in being right: A alone is right on "
        f"{found['first_only']}, B alone on {found['second_only']}. McNemar's exact test, which takes frames as "
        f"independent: p = {found['mcnemar_p']:.3g}. A difference whose interval holds 0 is "
        "none that these frames show."
    )
    pairs = [
        ["A right", str(found["both_right"]), str(found["first_only"])],
        ["A wrong", str(found["second_only"]), str(found["both_wrong"])],
    ]
    classes = found["classes"]
    kappa = (
        f"Cohen's kappa {number(found['kappa'])}" if found["kappa"] is not None else "no kappa: both decide one class"
    )
    parts = [
        paragraph(INTENDED_USE, strong=True),
        paragraph(PRIVACY),
        section("Models", [table(("model", "SHA-256", "contract"), hashes, words=True)]),
        section(
            "Difference, A less B",
            [
                table(
                    ("figure", "difference", "95 % interval"),
                    [
                        figure_row("accuracy, frames", found["difference"]["accuracy"]),
                        figure_row("area under the ROC curve", found["difference"]["roc_auc"]),
                    ],
                ),
                paragraph(
                    f"Intervals: bootstrap over {found['patients']} patients, {found['resamples']} resamples, the same "
                    f"for both models, seed {found['seed']}."
                ),
                table(("frames", "B right", "B wrong"), pairs),
                paragraph(verdict),
            ],
        ),
        section(
            "Side by side",
            [
                table(("figure", "A", "95 % interval", "B", "95 % interval"), rows),
                side_by_side([figure(picture, "ROC", "Both models on the same frames.")]),
            ],
        ),
        section(
            "Agreement of the decisions",
            [
                table(
                    ("A decides", *(f"B {name}" for name in classes)),
                    [[name, *map(str, row)] for name, row in zip(classes, found["decisions"], strict=True)],
                ),
                paragraph(f"They agree on {found['agreement']:.1%} of the frames; {kappa}."),
            ],
        ),
        paragraph("Each model's own report lies beside this one, in a/report.html and b/report.html."),
    ]
    return page(f"Comparison on {found['split']}: {names[0]}; {names[1]}", parts)
