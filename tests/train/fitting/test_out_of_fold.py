"""Out-of-fold estimates against the evaluation's intervals and a plain bootstrap."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from echoquad_runtime.contract import Contract
from echoquad_train.evaluation.metrics import EvaluationOptions, evaluation_metrics
from echoquad_train.evaluation.scored_frames import ScoredFrames
from echoquad_train.fitting.out_of_fold import ResampledFigures


def scored(seed: int, patients: int = 40) -> ScoredFrames:
    """Return made-up frames: two of each patient, one of each class."""
    rng, labels = np.random.default_rng(seed), np.tile([0, 1], patients)
    right = np.clip(rng.normal(0.62, 0.2, (2 * patients, 4)), 0.01, 0.99)
    quadrants = np.where(labels[:, None, None] == [[[0, 1]]], right[:, :, None], 1 - right[:, :, None])
    names = [f"patient{number:03d}" for number in np.repeat(np.arange(patients), 2)]
    return ScoredFrames(
        names=tuple(f"{name}_{label}" for name, label in zip(names, labels, strict=True)),
        classes=("a", "b"),
        positive="a",
        method="average",
        vote_weights=(1.0, 1.0, 1.0, 1.0),
        labels=labels,
        quadrants=quadrants,
        decided=quadrants.mean(axis=1).argmax(axis=1),
        patients=tuple(names),
    )


def test_estimates_of_one_repetition_are_those_of_the_evaluation() -> None:
    frames = scored(0)
    found, contract = ResampledFigures.of([frames]).estimates(), Contract(classes=("a", "b"))
    expected = evaluation_metrics(
        frames, EvaluationOptions(), split="test", device="cpu", precision="fp32", contract=contract, unreadable=0
    )
    for name in ("accuracy", "balanced_accuracy", "roc_auc"):
        assert found[name] == getattr(expected.intervals, name), name
    low, high = found["patch_accuracy"].ci95 or (1, 0)
    assert low < expected.frame.patch_accuracy == found["patch_accuracy"].estimate < high


def test_estimates_of_repetitions_equal_a_plain_bootstrap_of_patients() -> None:
    """Each resample draws patients, with all of their frames in every repetition."""
    repeats, draws = [scored(seed) for seed in (0, 1, 2)], np.random.default_rng(7).integers(0, 40, (400, 40))
    found = ResampledFigures.of(repeats).estimates()
    means = []
    for drawn in draws:
        rows = np.concatenate([[2 * patient, 2 * patient + 1] for patient in drawn])
        means.append(
            np.mean([
                (frames.correct[rows].mean(), roc_auc_score(frames.labels[rows] == 0, frames.score[rows]))
                for frames in repeats
            ], axis=0)
        )  # fmt: skip
    for column, name in enumerate(("accuracy", "roc_auc")):
        assert found[name].ci95 == pytest.approx(
            np.quantile([mean[column] for mean in means], (0.025, 0.975)), abs=0.02
        )
    assert found["accuracy"].estimate == pytest.approx(np.mean([frames.correct.mean() for frames in repeats]))


def test_repeating_the_same_predictions_does_not_narrow_the_interval() -> None:
    frames = scored(3)
    turned = replace(frames.subset(list(range(len(frames)))[::-1]) or frames)  # another order of patients
    once, thrice = ResampledFigures.of([frames]).estimates(), ResampledFigures.of([frames, turned, frames]).estimates()
    for name, one in once.items():
        assert thrice[name].estimate == pytest.approx(one.estimate)
        assert thrice[name].ci95 == pytest.approx(one.ci95)
    with pytest.raises(ValueError, match="different patients"):
        ResampledFigures.of([frames, scored(0, 39)])
    with pytest.raises(ValueError, match="different patients"):
        ResampledFigures.of([frames]).estimates(ResampledFigures.of([scored(0, 39)]))
