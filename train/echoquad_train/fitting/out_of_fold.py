"""Out-of-fold figures: every frame is measured by a run that neither trained nor chose anything on its patient."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from echoquad_train.evaluation.arrays import Float64Array
from echoquad_train.evaluation.evaluate import SplitPredictions
from echoquad_train.evaluation.frame_metrics import frame_metrics, metrics_of_frames, roc_curves
from echoquad_train.evaluation.intervals import RESAMPLES, Bootstrap, Estimate, weighted_auc, weighted_counts
from echoquad_train.evaluation.metrics import confusion_metrics
from echoquad_train.evaluation.scored_frames import ScoredFrames, score_frames

__all__ = ["FIGURES", "ResampledFigures", "out_of_fold_figures"]

FIGURES: Final = ("accuracy", "balanced_accuracy", "roc_auc", "patch_accuracy")
"""The frame metrics that are reported out of fold; `patch_accuracy` is that of quadrants."""


def out_of_fold_figures(held_out: Sequence[SplitPredictions], positive: str) -> dict[str, Any]:
    """Return the figures of each fold, those of all frames with intervals by patient, and the spread over the folds.

    The sample standard deviation (K - 1) describes the spread of the folds. It is no confidence interval of the mean,
    because the training frames of the folds overlap. The pooled ROC AUC also ranks frames of different folds.

    Parameters
    ----------
    held_out
        The predictions of each fold's run on the frames that it holds out.
    positive
        The positive class.
    """
    folds = [
        {
            "fold": number,
            "patients": len(set(found.scored.patients)),
            **frame_metrics(found.predictions, found.scored.labels, positive).to_dict(),
            "unreadable": len(found.failures),
        }
        for number, found in enumerate(held_out, 1)
    ]
    scored = score_frames(
        [prediction for found in held_out for prediction in found.predictions],
        np.concatenate([found.scored.labels for found in held_out]),
        positive,
        patients=[patient for found in held_out for patient in found.scored.patients],
    )
    columns = {name: [fold[name] for fold in folds if fold[name] is not None] for name in FIGURES}
    return {
        "folds": folds,
        "pooled": {
            **metrics_of_frames(scored).to_dict(),
            "intervals": {
                "method": "percentile bootstrap over patients",
                "resamples": RESAMPLES,
                "patients": len(set(scored.patients)),
                **{name: one.to_dict() for name, one in ResampledFigures.of([scored]).estimates().items()},
            },
        },
        "mean": {name: statistics.fmean(column) for name, column in columns.items() if column},
        "standard_deviation": {name: statistics.stdev(column) for name, column in columns.items() if len(column) > 1},
    }


@dataclass(frozen=True)
class ResampledFigures:
    """`FIGURES`, each the mean over repeated cross-validations, and the same in resamples of the patients.

    A resample of patients is the same for every repetition. The interval is thus that of the patients: further
    repetitions (seeds) make the estimate steadier, but do not pretend to be further patients.

    Attributes
    ----------
    patients
        The patients, sorted.
    figures
        Each figure, None if a repetition lacks it, and its resamples, float64 [B].
    """

    patients: tuple[str, ...]
    figures: dict[str, tuple[float | None, Float64Array]]

    @classmethod
    def of(cls, repeats: Sequence[ScoredFrames]) -> ResampledFigures:
        """Compute the figures of the pooled frames of each repetition.

        Raises
        ------
        ValueError
            If the repetitions are not of the same patients.
        """
        patients = sorted(set(repeats[0].patients))
        found: dict[str, list[tuple[float | None, Float64Array]]] = {name: [] for name in FIGURES}
        for scored in repeats:
            if sorted(set(scored.patients)) != patients:
                raise ValueError("the repetitions are of different patients")
            index = np.searchsorted(patients, scored.patients).astype(np.int64)
            measured, resampled = metrics_of_frames(scored), _resampled(scored, Bootstrap(index, RESAMPLES))
            for name in FIGURES:
                found[name].append((getattr(measured, name), resampled[name]))
        figures = {}
        for name, column in found.items():
            values = [value for value, _ in column if value is not None]
            mean = statistics.fmean(values) if len(values) == len(repeats) else None
            figures[name] = (mean, np.mean([one for _, one in column], axis=0))
        return cls(tuple(patients), figures)

    def estimates(self, baseline: ResampledFigures | None = None) -> dict[str, Estimate]:
        """Return the figures with 95 % intervals by patient, or how much higher they are than those of `baseline`.

        A difference is paired: both have the same resamples.

        Raises
        ------
        ValueError
            If the baseline is not of the same patients.
        """
        if baseline and baseline.patients != self.patients:
            raise ValueError("the repetitions are of different patients")
        estimates = {}
        for name, (value, resampled) in self.figures.items():
            other, other_resampled = baseline.figures[name] if baseline else (0.0, np.zeros(1))
            difference = None if value is None or other is None else value - other
            estimates[name] = Estimate.bootstrap(difference, resampled - other_resampled)
        return estimates


def _resampled(scored: ScoredFrames, sampler: Bootstrap) -> dict[str, Float64Array]:
    """Return `FIGURES` in each resample, float64 [B]."""
    counts = weighted_counts(sampler, scored.labels, scored.decided, len(scored.classes))
    columns = [scored.classes.index(curve.name) for curve in roc_curves(scored)]
    areas = [weighted_auc(sampler, scored.probabilities[:, c], scored.labels == c) for c in columns]
    hits = (scored.quadrant_labels == scored.labels[:, None]).mean(axis=1)
    return {
        **{name: confusion_metrics(counts, scored)[name] for name in ("accuracy", "balanced_accuracy")},
        "roc_auc": np.mean(areas, axis=0) if areas else np.empty(0),
        "patch_accuracy": sampler.mean(hits),
    }
