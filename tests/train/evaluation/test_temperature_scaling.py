"""Temperature scaling and calibration errors: planted temperatures, cross-fitting, and a calibrated run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from sklearn.metrics import brier_score_loss, log_loss

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import RunError
from echoquad_runtime.voting import aggregate_votes, apply_temperature
from echoquad_train.evaluation.reliability import equal_width_bins, log_losses, reliability, squared_errors, sweep_bins
from echoquad_train.evaluation.temperature_scaling import (
    Temperatures,
    calibrated_probabilities,
    calibration_facts,
    cross_fit,
    fit_temperature,
    fit_temperatures,
    log_probabilities,
    patient_folds,
)
from echoquad_train.fitting import run_temperatures
from echoquad_train.fitting.loop import fit
from echoquad_train.runs import checkpoint

TWO = Contract(("ASD", "NORM"))


def random_logits(frames: int, quadrants: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw logits, [F, Q, C], and labels that follow the softmax of the first quadrant exactly."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (frames, quadrants, classes))
    chance = softmax(logits[:, 0], axis=1).cumsum(axis=1)
    return logits, (rng.random((frames, 1)) > chance).sum(axis=1)


# Temperatures


@pytest.mark.parametrize("planted", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("classes", [2, 4])
def test_planted_temperature_is_recovered(planted: float, classes: int) -> None:
    logits, labels = random_logits(6000, 1, classes)
    assert fit_temperature(planted * logits[:, 0], labels) == pytest.approx(planted, rel=0.06)
    # Log probabilities are logits up to a constant.
    assert fit_temperature(log_softmax(planted * logits[:, 0], axis=1), labels) == pytest.approx(planted, rel=0.06)


def test_fitted_temperature_minimises_the_log_loss() -> None:
    logits, labels = random_logits(300, 1, 3)
    found = fit_temperature(logits[:, 0], labels)
    assert found is not None
    losses = {t: log_loss(labels, softmax(logits[:, 0] / t, axis=1)) for t in (found, 0.97 * found, 1.03 * found)}
    assert min(losses, key=lambda t: losses[t]) == found


def test_temperature_without_optimum_stays_one() -> None:
    labels = np.arange(20) % 2
    certain = np.eye(2)[labels] * 3
    assert fit_temperature(certain, labels) is None  # the likelihood grows without bound as the temperature falls
    assert fit_temperature(-certain, labels) is None
    found = fit_temperatures(np.repeat(certain[:, None], 4, axis=1), labels)
    assert (found.quadrants, found.frames) == (1.0, 1.0) and "0.2 to 5" in found.note and "0.05 to 5" in found.note
    assert found.of(TWO) == TWO


def test_mean_of_calibrated_quadrants_is_underconfident_until_refitted() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 4000)
    # Quadrants independent given the class, each with exact probabilities: log odds of N(+-m, 2 m).
    odds = np.where(labels[:, None] == 0, 0.8, -0.8) + rng.normal(0, np.sqrt(1.6), (4000, 4))
    scores = np.stack([odds / 2, -odds / 2], axis=2)
    found = fit_temperatures(scores, labels)
    assert found.quadrants == pytest.approx(1, abs=0.08) and found.frames < 0.6
    before, after = (calibrated_probabilities(t, scores, TWO) for t in (Temperatures(), found))
    assert np.array_equal(before[1], after[1]) or found.quadrants != 1
    errors = [reliability(p, labels, decided, resample=False).ece for p, decided in (before, after)]
    assert errors[0] > 0.1 and errors[1] < 0.03


@given(st.integers(2, 5), st.floats(0.05, 5), st.integers(0, 2**32 - 1))
def test_temperature_keeps_the_order_and_is_inverted_by_its_reciprocal(classes: int, t: float, seed: int) -> None:
    p = np.random.default_rng(seed).dirichlet(np.ones(classes), (6, 4)) * 0.98 + 0.02 / classes
    changed = apply_temperature(p, t)
    assert changed.sum(axis=-1) == pytest.approx(np.ones((6, 4)))
    assert np.array_equal(changed.argmax(axis=-1), p.argmax(axis=-1))
    assert apply_temperature(p, 1.0) is p  # bit for bit
    if t > 0.3:  # below, unlikely classes underflow float32
        assert apply_temperature(changed, 1 / t) == pytest.approx(p, abs=1e-6)
    logits = np.log(p)
    assert softmax(logits / t, axis=-1) == pytest.approx(changed, abs=1e-9)


def test_log_probabilities_replace_logits() -> None:
    logits, _ = random_logits(50, 4, 3)
    assert softmax(log_probabilities(softmax(logits, axis=2)) / 1.7, axis=2) == pytest.approx(
        softmax(logits / 1.7, axis=2)
    )


# Folds


def test_frames_of_a_patient_share_a_fold() -> None:
    patients = [f"p{index % 7}" for index in range(40)]
    folds = patient_folds(patients)
    assert folds is not None and set(folds) == set(range(5))
    assert len(set(zip(patients, folds, strict=True))) == 7
    assert patient_folds(["one"] * 9) is None
    few = patient_folds(["a", "b", "b"])
    assert few is not None and sorted(set(few)) == [0, 1]


def test_cross_fitted_temperature_does_not_depend_on_its_fold() -> None:
    logits, labels = random_logits(200, 4, 2)
    folds = np.arange(200) % 5
    refit = cross_fit(logits, labels, folds, TWO)
    assert refit.temperatures[2] == fit_temperatures(logits[folds != 2], labels[folds != 2])
    flipped = labels.copy()
    flipped[folds == 2] ^= 1
    other = cross_fit(logits, flipped, folds, TWO)
    assert other.temperatures[2] == refit.temperatures[2] and other.temperatures[1] != refit.temperatures[1]
    assert other.reliability.nll != refit.reliability.nll


def test_calibration_facts_record_the_fit_and_its_effect() -> None:
    logits, labels = random_logits(120, 4, 2)
    patients = [f"p{index // 2}" for index in range(120)]
    fitted, facts = calibration_facts(logits, labels, patients, TWO)
    assert (facts["temperature"], facts["frame_temperature"]) == (fitted.quadrants, fitted.frames)
    assert (facts["frames"], facts["patients"], facts["cross_fitted"]["folds"]) == (120, 60, 5)
    decision = aggregate_votes(softmax(logits, axis=2), "majority")
    assert facts["before"]["frame_accuracy"] == (decision.labels == labels).mean()
    assert facts["after"]["nll"] < facts["before"]["nll"]
    assert facts["quadrants"]["after"]["nll"] <= facts["quadrants"]["before"]["nll"]
    json.dumps(facts, allow_nan=False)
    assert calibration_facts(logits, labels, ["one"] * 120, TWO)[1]["cross_fitted"] is None


# Reliability


def test_calibration_error_of_a_small_example() -> None:
    confidence, correct = np.array([0.55, 0.65, 0.95, 0.95]), np.array([False, True, True, True])
    assert equal_width_bins(confidence, correct, 10).error == pytest.approx((0.55 + 0.35 + 0.05 + 0.05) / 4)
    assert equal_width_bins(confidence, correct, 1).error == pytest.approx(0.775 - 0.75)
    found = sweep_bins(confidence, correct)  # the accuracy rises in two bins, 0.5 and 1, and in four, 0, 1, 1 and 1
    assert found.counts.tolist() == [1, 1, 1, 1]
    assert found.error == pytest.approx((0.55 + 0.35 + 0.05 + 0.05) / 4)
    falls = sweep_bins(confidence, ~correct)
    assert falls.counts.tolist() == [4] and falls.error == pytest.approx(0.775 - 0.25)


def test_nll_and_brier_score_equal_sklearn() -> None:
    rng = np.random.default_rng(0)
    p, labels = rng.dirichlet(np.ones(3), 80), rng.integers(0, 3, 80)
    assert log_losses(p, labels).mean() == pytest.approx(log_loss(labels, p))
    two, truth = p[:, :2] / p[:, :2].sum(axis=1, keepdims=True), labels > 0
    assert squared_errors(two, truth.astype(int)).mean() == pytest.approx(2 * brier_score_loss(truth, two[:, 1]))
    assert np.isfinite(
        log_losses(np.eye(3)[(labels + 1) % 3], labels)
    ).all()  # a class with probability 0 has a finite loss


def test_ece_of_perfect_probabilities_tends_to_zero() -> None:
    errors = []
    for frames in (100, 1000, 20000):
        logits, labels = random_logits(frames, 1, 2, seed=frames)
        p = softmax(logits[:, 0], axis=1)
        found = reliability(p, labels, p.argmax(axis=1))
        errors.append(found.ece)
        assert found.ece_if_calibrated is not None and found.ece <= found.ece_if_calibrated["q95"]
        assert found.confidence == pytest.approx(p.max(axis=1).mean())
    assert errors[-1] < 0.012 and errors[0] > errors[-1]


@given(st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_each_frame_is_in_one_bin_and_swept_accuracy_rises(frames: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    confidence, correct = rng.random(frames).round(1), rng.random(frames) < 0.7
    for bins in (sweep_bins(confidence, correct), equal_width_bins(confidence, correct)):
        assert bins.counts.sum() == frames and bins.counts.min() > 0
        assert np.array_equal(np.bincount(bins.index), bins.counts)
        assert np.average(bins.accuracy, weights=bins.counts) == pytest.approx(correct.mean())
        assert 0 <= bins.error <= 1
    assert (np.diff(sweep_bins(confidence, correct).accuracy) >= 0).all()


# A run


@pytest.fixture
def run(trained: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained.folder, tmp_path / "run"))


def test_finished_run_is_calibrated(trained: Any, thin: None) -> None:
    found, loaded = trained.info["calibration"], checkpoint.load_run(trained.folder)
    assert trained.info["contract_sha256"] == loaded.contract.sha256
    assert loaded.contract.temperature == found["temperature"] == trained.fitted.calibration["temperature"]
    assert loaded.contract.frame_temperature == found["frame_temperature"]
    assert found["split"] == "validation" and found["frames"] == 8


def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the fit, which finds no temperature for eight flat frames."""
    fitted = Temperatures(1.25, 0.5)
    facts = {"temperature": 1.25, "frame_temperature": 0.5}
    monkeypatch.setattr(run_temperatures, "calibration_facts", lambda *_: (fitted, dict(facts)))


def resume(trained: Any, folder: Path, quiet: Any, thin: Callable[[], AbstractContextManager[None]]) -> None:
    with thin():
        fit(trained.data, folder, trained.recipe, device="cpu", resume=True, reporter=quiet())


def test_resume_completes_calibration_killed_before_run_json(
    trained: Any, run: Path, quiet: Any, thin_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch)
    before = (run / "run.json").read_text("utf-8")
    resume(trained, run, quiet, thin_session)
    with thin_session():
        whole = checkpoint.load_run(run)
    weights, record = (run / "best.safetensors").read_bytes(), json.loads((run / "run.json").read_text("utf-8"))
    assert (whole.contract.temperature, whole.contract.frame_temperature) == (1.25, 0.5)
    assert record["contract"]["frame_temperature"] == 0.5 and record["calibration"]["split"] == "validation"

    (run / "run.json").write_text(before, "utf-8")  # as after a kill between the two writes
    with thin_session(), pytest.raises(RunError, match="--resume"):
        checkpoint.load_run(run)
    resume(trained, run, quiet, thin_session)
    with thin_session():
        assert checkpoint.load_run(run).contract == whole.contract
    assert (run / "best.safetensors").read_bytes() == weights


def test_run_without_calibrate_stays_uncalibrated(
    trained: Any, tmp_path: Path, quiet: Any, thin_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch)
    recipe = trained.recipe.replace(temperature_scaling=False, epochs=1)
    with thin_session():
        found = fit(trained.data, tmp_path / "run", recipe, device="cpu", resume=False, reporter=quiet())
        assert checkpoint.load_run(tmp_path / "run").contract == recipe.contract(("bright", "dark"))
    assert found.calibration is None
    assert "calibration" not in json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))


# The contract


def test_contract_omits_a_frame_temperature_of_one() -> None:
    assert "frame_temperature" not in TWO.to_dict()
    other = replace(TWO, frame_temperature=0.25)
    assert Contract.from_json(other.to_json()) == other and other.sha256 != TWO.sha256


def test_given_quadrant_temperature_is_kept_and_frames_are_fitted_under_it() -> None:
    generator = np.random.default_rng(5)
    labels = generator.integers(0, 2, 400)
    scores = generator.normal(0, 1.5, (400, 4, 2)) + np.eye(2)[labels][:, None] * 2
    found = fit_temperatures(scores, labels, 3.0)
    mean = softmax(scores / 3.0, axis=2).mean(axis=1)
    assert found.quadrants == 3.0
    assert (
        found.frames
        == fit_temperature(log_probabilities(mean), labels, (0.05, 5.0))
        != fit_temperatures(scores, labels).frames
    )


def test_high_temperature_pools_the_logits() -> None:
    """One confident quadrant against three hesitant ones, which decide the mean of probabilities."""
    contract = Contract(("a", "b"), vote="average")
    scores = np.array([[[6.0, 0.0], [0.0, 1.2], [0.0, 1.2], [0.0, 1.2]]])
    assert scores.sum(axis=1).argmax() == 0
    decided = [
        int(calibrated_probabilities(Temperatures(temperature), scores, contract)[1][0]) for temperature in (1.0, 50.0)
    ]
    assert decided == [1, 0]
