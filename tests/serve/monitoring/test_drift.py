"""The drift monitor: simulated decisions with and without a drift, and what a row may lack."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from echoquad_runtime.bundle.validation_figures import STEPS, Distribution, ValidationFigures
from echoquad_runtime.contract import INDETERMINATE, QUADRANTS
from echoquad_serve.monitoring.drift import (
    MIN_PSI,
    MIN_SHARE,
    DriftMonitor,
    chi_square_quantile,
    stability_index,
)
from echoquad_serve.monitoring.metrics import ServiceMetrics

BUNDLE = "ab" * 32
Row = dict[str, Any]


def make_row(
    confidence: float = 0.9,
    typicality: float | None = 1.0,
    agreement: int = 4,
    flags: Sequence[str] = (),
    **changes: Any,
) -> Row:
    votes = ["ASD"] * agreement + ["NORM"] * (4 - agreement)
    return {
        "file": "a",
        "method": "majority",
        "pred_image": "ASD",
        "predicted_class": "ASD",
        **{f"pred_{quadrant}": vote for quadrant, vote in zip(QUADRANTS, votes, strict=True)},
        "flags": list(flags),
        "confidence": confidence,
        "typicality": typicality,
        "bundle_sha256": BUNDLE,
        **changes,
    }


class Population:
    """Draws rows: of patients with several results each, which are alike."""

    def __init__(self, seed: int, of_patient: int = 1) -> None:
        self._rng, self._of_patient, self._count = np.random.default_rng(seed), of_patient, 0
        self._patient = 0.0

    def row(self, shift: float = 0.0, typicality: float = 0.0, flagged: float = 0.02, below: float = 0.0) -> Row:
        if self._count % self._of_patient == 0:
            self._patient = self._rng.standard_normal() * (0.7 if self._of_patient > 1 else 0.0)
        self._count += 1
        spread = (1 - 0.7**2) ** 0.5 if self._of_patient > 1 else 1.0
        difficulty = self._patient + spread * self._rng.standard_normal()
        confidence = round(min(1 / (1 + np.exp(difficulty - 1.5 + shift)), 1.0), 6)
        flags = [name for name, share in (("blank", 0.0), ("uncropped", 0.5)) if self._rng.random() < share]
        flags += ["tie"] if self._rng.random() < flagged else []
        agreement = int(np.clip(round(3.4 - 0.7 * difficulty - 0.7 * shift), 2, 4))
        label = INDETERMINATE if confidence < below else "ASD"
        score = float(np.exp(0.3 * (self._patient + spread * self._rng.standard_normal()) + typicality))
        return make_row(confidence, score, agreement, flags, pred_image=label)


def figures_of(rows: Sequence[Row]) -> ValidationFigures:
    """Return the figures of rows, as export measures them."""

    def histogram(values: Sequence[float]) -> Distribution:
        edges = np.unique(np.quantile(values, np.arange(1, 10) / 10, method="closest_observation"))
        return Distribution(
            tuple(edges.tolist()),
            tuple(np.bincount(np.searchsorted(edges, values, "right"), minlength=len(edges) + 1).tolist()),
        )

    confidence = np.array([row["confidence"] for row in rows])
    votes = [sum(row[f"pred_{quadrant}"] == "ASD" for quadrant in QUADRANTS) for row in rows]
    below = tuple((confidence[:, None] < np.arange(STEPS + 1) / STEPS).sum(axis=0).tolist())
    names = sorted({flag for row in rows for flag in row["flags"]})
    return ValidationFigures(
        frames=len(rows),
        effective_frames=float(len(rows)),
        confidence=histogram(confidence.tolist()),
        typicality=histogram([row["typicality"] for row in rows]),
        agreement=tuple(np.bincount(votes, minlength=5).tolist()),
        flags={name: sum(name in row["flags"] for row in rows) for name in names},
        undecided=below,
        undecided_or_unlike=below,
    )


FIGURES = figures_of(
    [Population(1).row() for _ in range(1)] + [one.row() for one in [Population(2)] for _ in range(399)]
)


def make_monitor(figures: ValidationFigures | None = FIGURES, **options: Any) -> DriftMonitor:
    return DriftMonitor(figures, **{"vote": "majority", "window": 300, "minimum": 100, **options})


def feed(monitor: DriftMonitor, draw: Callable[[], Row], count: int = 300) -> dict[str, Any]:
    for _ in range(count):
        monitor.observe_result([draw()])
    state = monitor.state()
    assert state is not None
    return state


def exceeded(state: dict[str, Any]) -> set[str]:
    return {name for name, one in state["quantities"].items() if one["index"] and one["index"] >= one["threshold"]}


def test_no_window_of_the_validation_distribution_raises_the_alert() -> None:
    monitor = make_monitor(abstain_below=0.6)
    population = Population(3)
    for _ in range(200):
        state = feed(monitor, lambda: population.row(below=0.6))
        assert not state["alert"], state
    assert {"confidence", "typicality", "agreement", "indeterminate", "flag:tie"} < state["quantities"].keys()


def test_results_of_one_patient_are_no_drift_if_the_window_has_several() -> None:
    monitor = make_monitor(window=1000)
    population = Population(4, of_patient=20)
    alerts = sum(feed(monitor, population.row, 1000)["alert"] for _ in range(30))
    assert alerts <= 1


@pytest.mark.parametrize(
    ("change", "quantity"),
    [
        ({"shift": 1.5}, "confidence"),
        ({"shift": 1.5}, "agreement"),
        ({"shift": 1.5}, "indeterminate"),
        ({"typicality": -0.5}, "typicality"),
        ({"flagged": 0.2}, "flag:tie"),
    ],
)
def test_drift_is_found_within_a_window(change: dict[str, float], quantity: str) -> None:
    monitor, population = make_monitor(abstain_below=0.6), Population(5)
    assert not feed(monitor, lambda: population.row(below=0.6))["alert"]
    state = feed(monitor, lambda: population.row(below=0.6, **change))
    assert state["alert"] and quantity in exceeded(state)
    assert not feed(monitor, lambda: population.row(below=0.6))["alert"]


def test_flag_that_no_validation_frame_has_is_found() -> None:
    monitor, population = make_monitor(), Population(6)
    assert "flag:screen" not in feed(monitor, population.row)["quantities"]
    state = feed(monitor, lambda: population.row() | {"flags": ["screen"]})
    assert "flag:screen" in exceeded(state) and state["quantities"]["flag:screen"]["index"] == 1
    assert "flag:uncropped" in exceeded(state)  # half of the validation frames have it, and none of these


def test_no_alert_before_the_minimum_number_of_objects() -> None:
    monitor = make_monitor()
    state = feed(monitor, lambda: make_row(0.1, 0.01, 2, ["blank"]), 99)
    assert exceeded(state) and not state["alert"] and state["frames"] == 99
    assert feed(monitor, lambda: make_row(0.1, 0.01, 2, ["blank"]), 1)["alert"]


def test_result_counts_once_whatever_its_number_of_frames() -> None:
    one, many, population = make_monitor(), make_monitor(), Population(7)
    for _ in range(150):
        row = population.row()
        one.observe_result([row])
        many.observe_result([row] * 50)
    assert one.state() == many.state()
    many.observe_result([make_row(0.1)] * 10000)
    assert many.state()["frames"] == 151 and not many.state()["alert"]  # type: ignore[index]


def test_one_live_frame_a_minute_counts() -> None:
    now = 100.0
    monitor = make_monitor(clock=lambda: now)
    for _ in range(30 * 60 * 3):
        monitor.observe_live(make_row())
        now += 1 / 30
    for change in ({"state": "frozen"}, {"flags": ["blank"]}):
        now += 60
        monitor.observe_live(make_row(state="ok") | change)
    state = monitor.state()
    assert state is not None and state["frames"] == 3


def test_window_and_memory_are_bounded() -> None:
    monitor = make_monitor(window=50)
    size = monitor._table.nbytes
    state = feed(monitor, make_row, 500)
    assert state["frames"] == 50 and monitor._table.nbytes == size < 50 * 1000
    before = feed(monitor, lambda: make_row(0.2), 25)["quantities"]["confidence"]["index"]
    after = feed(monitor, lambda: make_row(0.2), 25)["quantities"]["confidence"]["index"]
    assert before < after == feed(monitor, lambda: make_row(0.2), 25)["quantities"]["confidence"]["index"]


def test_smoothed_rows_and_other_votes_count_only_where_they_are_comparable() -> None:
    for change in ({"smoothed_over": 8}, {"method": "average"}):
        state = feed(make_monitor(abstain_below=0.5), lambda change=change: make_row(flags=["blank"], **change))  # type: ignore[misc]
        found = state["quantities"]
        assert [found[name]["index"] for name in ("confidence", "agreement", "indeterminate", "flag:tie")] == [None] * 4
        assert found["typicality"]["index"] is not None and found["flag:blank"]["index"] == 1


def test_rows_of_another_bundle_are_ignored() -> None:
    monitor = make_monitor(bundle_sha256=BUNDLE)
    monitor.observe_result([make_row(bundle_sha256="cd" * 32)])
    monitor.observe_result([make_row()])
    state = monitor.state()
    assert state is not None and state["frames"] == 1


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.none()), st.just([[], {}])
)


@given(row=st.dictionaries(st.sampled_from(sorted(make_row())), ODD))
def test_odd_rows_raise_nothing_and_leave_their_quantities_out(row: Row) -> None:
    monitor = make_monitor(abstain_below=0.5, minimum=1)
    monitor.observe_result([row])
    monitor.observe_result([make_row(), make_row() | row])
    monitor.observe_result([{}])
    monitor.observe_result([])
    monitor.observe_live(row)
    state = monitor.state()
    assert state is not None and 1 <= state["frames"] <= 3
    for one in state["quantities"].values():
        assert one["index"] is None or (np.isfinite(one["index"]) and np.isfinite(one["threshold"]))


def test_bundle_without_figures_says_so_once_and_has_no_metric(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "echoquad_serve"):
        monitor = make_monitor(None)
        monitor.observe_result([make_row()])
        monitor.observe_live(make_row())
        assert monitor.state() is None and monitor.state() is None
    assert [record.message for record in caplog.records if "validation figures" in record.message] != []
    assert len(caplog.records) == 1
    metrics = ServiceMetrics()
    metrics.watch_drift(monitor.state)
    assert b"echoquad_drift" not in metrics.render()
    assert len(caplog.records) == 1  # no fault of the metric


def test_figures_without_typicality_compare_the_rest() -> None:
    monitor = make_monitor(replace(FIGURES, typicality=None))
    state = feed(monitor, lambda: make_row(typicality=None))
    assert "typicality" not in state["quantities"] and state["quantities"]["confidence"]["index"] is not None


def test_few_independent_validation_frames_raise_the_thresholds() -> None:
    thresholds = []
    for effective in (400.0, 40.0):
        monitor, population = make_monitor(replace(FIGURES, effective_frames=effective)), Population(8)
        state = feed(monitor, population.row)
        thresholds.append(
            (state["quantities"]["confidence"]["threshold"], state["quantities"]["flag:tie"]["threshold"])
        )
    assert thresholds[0][0] < thresholds[1][0] and thresholds[0][1] < thresholds[1][1]
    assert thresholds[0][0] >= MIN_PSI and thresholds[0][1] >= MIN_SHARE


def test_metrics_show_alert_index_and_threshold_of_each_quantity() -> None:
    monitor, population, metrics = make_monitor(abstain_below=0.6), Population(9), ServiceMetrics()
    metrics.watch_drift(monitor.state)

    def samples() -> dict[tuple[str, ...], float]:
        families = text_string_to_metric_families(metrics.render().decode())
        return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}

    assert samples()["echoquad_drift_frames",] == 0
    state = feed(monitor, lambda: population.row(shift=2.0))
    found = samples()
    assert (found["echoquad_drift_alert",], found["echoquad_drift_frames",]) == (1, 300)
    for name, one in state["quantities"].items():
        assert found["echoquad_drift_index", name] == one["index"]
        assert found["echoquad_drift_threshold", name] == one["threshold"]


def test_observing_and_reading_at_once() -> None:
    monitor = make_monitor(window=40)
    faults: list[BaseException] = []

    def observe(seed: int) -> None:
        population = Population(seed)
        try:
            for _ in range(200):
                monitor.observe_result([population.row()])
                monitor.observe_live(population.row())
                monitor.state()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=observe, args=(seed,), name=f"echoquad-test-{seed}") for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = monitor.state()
    assert faults == [] and state is not None and state["frames"] == 40


def test_quantiles_are_those_of_chi_square() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom, error in ((1, 0.08), (2, 0.05), (4, 0.03), (9, 0.02), (50, 0.005)):
        for probability in (0.99, 0.999, 0.9999):
            exact = stats.chi2.ppf(probability, freedom)
            assert chi_square_quantile(probability, freedom) == pytest.approx(exact, rel=error)


def test_stability_index_by_hand() -> None:
    # Shares of 10 frames with half a frame more in each bin: 2/11 and 9/11, against 5.5/11 twice.
    by_hand = (2 / 11 - 1 / 2) * np.log(4 / 11) + (9 / 11 - 1 / 2) * np.log(18 / 11)
    assert stability_index([1.5, 8.5], [5, 5]) == pytest.approx(by_hand)
    assert stability_index([7, 7], [30, 30]) == 0
