"""int8 export: order of the attempts, sensitivity scan, and refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from echoquad_export.parity.parity import GATES, BatchParity, Parity
from echoquad_export.precision import int8
from echoquad_export.precision.calibration_set import CalibrationSet
from echoquad_export.precision.int8 import build_int8
from echoquad_export.precision.quantize import layers, prepare
from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import ParityError

CONTRACT = Contract(("a", "b"), input_size=32)
CALIBRATION = CalibrationSet(
    np.random.default_rng(0).integers(0, 256, (4, 4, 32, 32), np.uint8), seed=0, sha256="0" * 64, left_out=0
)


@pytest.fixture
def single(thin_graph: Callable[[Contract], bytes]) -> bytes:
    return thin_graph(CONTRACT)


class Judge:
    """Parity that passes for the n-th graph only, and records all graphs."""

    def __init__(self, passes: int | None, distances: dict[int, float] | None = None) -> None:
        self.passes, self.distances = passes, distances or {}
        self.shown: list[bytes] = []

    def __call__(self, graph: bytes) -> Parity:
        self.shown.append(graph)
        number = len(self.shown)
        dp = 0.01 if number == self.passes else self.distances.get(number, 0.2)
        return Parity("int8", "cpu", 100, "validation split", GATES["int8"], (BatchParity(1, 1.0, dp, 3, 1, 0.1),))


def test_first_attempt_that_passes_is_returned(single: bytes) -> None:
    judge, lines = Judge(passes=1), []
    made = build_int8(single, CONTRACT, CALIBRATION, judge, lines.append)
    assert made.graph == judge.shown[0] and len(judge.shown) == 1 and lines == []
    assert made.parity.passed and made.details["float_layers"] == []
    assert made.details["calibration"] == {**CALIBRATION.to_dict(), "method": "min-max"}
    assert [attempt["passed"] for attempt in made.details["attempts"]] == [True]


def test_percentile_calibration_follows_and_each_failure_is_reported(single: bytes) -> None:
    judge, lines = Judge(passes=3), []
    made = build_int8(single, CONTRACT, CALIBRATION, judge, lines.append)
    assert made.graph == judge.shown[2] and len(set(judge.shown)) == 3
    assert made.details["calibration"]["method"] == "percentile 99.99"
    assert [attempt["passed"] for attempt in made.details["attempts"]] == [False, False, True]
    assert [line.partition(": ")[0] for line in lines] == [
        "int8 failed parity with min-max",
        "int8 failed parity with percentile 99.999",
    ]


def test_most_sensitive_layers_stay_in_float_after_all_calibrations_fail(
    single: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = layers(prepare(single, CONTRACT))
    order = [units[5], units[2], *(unit for unit in units if unit not in (units[5], units[2]))]
    monkeypatch.setattr(int8, "_by_sensitivity", lambda *_: order)
    judge = Judge(passes=6, distances={2: 0.1})  # the second calibration has the smallest excess
    made = build_int8(single, CONTRACT, CALIBRATION, judge)
    assert made.details["float_layers"] == [units[5][0], units[2][0]]
    assert made.details["calibration"]["method"] == "percentile 99.999"
    assert [len(attempt["float_layers"]) for attempt in made.details["attempts"]] == [0, 0, 0, 0, 1, 2]
    assert made.details["layers"] == len(units)


def test_parity_error_reports_the_closest_attempt(single: bytes) -> None:
    judge, lines = Judge(passes=None, distances={5: 0.07}), []
    with pytest.raises(ParityError) as refusal:
        build_int8(single, CONTRACT, CALIBRATION, judge, lines.append)
    text = str(refusal.value)
    assert "8 attempts" in text and "1 layers in float: |dp| 0.070, 1 changed decisions" in text
    assert "max_abs_dprobability 0.05, max_frame_flip_fraction 0.01" in text and "--precision" in text
    assert "100 frames of the validation split" in text and "\n" not in text
    # 13 layers: 1, 2, 4 and 6 of them in float, never more than half.
    assert len(judge.shown) == 4 + 4 and len(lines) == 8 + 1


def test_sensitivity_scan_ranks_the_damaged_layer_first(single: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepare(single, CONTRACT)
    units = layers(model)
    real = int8.quantize

    def harmful(model: Any, ranges: Any, *, errors: Any, percentile: float | None, keep_float: set[str]) -> bytes:
        """Quantize; give the fourth layer useless ranges."""
        damaged = units[3][0] not in keep_float
        return real(model, ranges, percentile=2.0 if damaged else percentile, keep_float=keep_float)

    monkeypatch.setattr(int8, "quantize", harmful)
    ranges = int8.Ranges(model, CALIBRATION.quadrants, int8.activation_tensors(model))
    ranked = int8._by_sensitivity(model, ranges, {}, None, units, CALIBRATION.quadrants)
    assert ranked[0] == units[3] and sorted(ranked) == sorted(units)


@pytest.mark.parametrize(
    ("dp", "flips", "frames", "excess"),
    [(0.05, 0, 100, 1.0), (0.2, 1, 100, 4.0), (0.02, 6, 200, 3.0), (0.01, 2, 40, 2.0), (0.01, 0, 40, 0.2)],
)
def test_excess_is_the_largest_ratio_to_a_bound(dp: float, flips: int, frames: int, excess: float) -> None:
    batch = BatchParity(1, 1.0, dp, 3, flips, 0.1)
    parity = Parity("int8", "cpu", frames, "validation split", GATES["int8"], (batch,))
    assert int8.Attempt("min-max", (), parity).excess == pytest.approx(excess)


def test_float_layers_use_the_calibration_with_the_smallest_excess(
    single: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Many changed decisions outweigh a larger difference of probabilities.
    monkeypatch.setattr(int8, "_by_sensitivity", lambda *given: given[4])

    class ChangingDecisions(Judge):
        def __call__(self, graph: bytes) -> Parity:
            parity = super().__call__(graph)
            flips = {1: 42, 2: 9, 3: 8, 4: 3}.get(len(self.shown), 1)
            return replace(parity, batches=(replace(parity.batches[0], frame_flips=flips),))

    made = build_int8(single, CONTRACT, CALIBRATION, ChangingDecisions(passes=5, distances={1: 0.06, 4: 0.12}))
    assert made.details["calibration"]["method"] == "percentile 99.9"


def test_attempt_text_and_manifest_entry() -> None:
    parity = Judge(passes=1)(b"")
    attempt = int8.Attempt("min-max", ("first_conv", "layer1.0.conv1"), parity)
    assert str(attempt) == "min-max, 2 layers in float: |dp| 0.010, 1 changed decisions"
    assert attempt.to_dict() == {
        "method": "min-max",
        "float_layers": ["first_conv", "layer1.0.conv1"],
        "max_abs_dprobability": 0.01,
        "frame_flips": 1,
        "passed": True,
    }
    failed = replace(parity, batches=(BatchParity(1, 1.0, 0.3, 3, 2, 0.1),))
    assert int8.Attempt("min-max", (), failed).to_dict()["passed"] is False
