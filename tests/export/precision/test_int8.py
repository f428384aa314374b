from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from echoquad_export.graph.build import build_graph
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
_BUILT: dict[str, bytes] = {}


@pytest.fixture
def single(thin_model: Callable[[Contract], Any]) -> bytes:
    if not _BUILT:
        _BUILT["graph"] = build_graph(thin_model(CONTRACT), CONTRACT)
    return _BUILT["graph"]


class Judge:
    """Passes the n-th graph that it is shown, and remembers all."""

    def __init__(self, passes: int | None, distances: dict[int, float] | None = None) -> None:
        self.passes, self.distances = passes, distances or {}
        self.shown: list[bytes] = []

    def __call__(self, graph: bytes) -> Parity:
        self.shown.append(graph)
        number = len(self.shown)
        dp = 0.01 if number == self.passes else self.distances.get(number, 0.2)
        return Parity("int8", "cpu", 100, "validation split", GATES["int8"], (BatchParity(1, 1.0, dp, 3, 1, 0.1),))


def test_the_first_that_passes_is_taken(single: bytes) -> None:
    judge, told = Judge(passes=1), []
    made = build_int8(single, CONTRACT, CALIBRATION, judge, told.append)
    assert made.graph == judge.shown[0] and len(judge.shown) == 1 and told == []
    assert made.parity.passed and made.details["float_layers"] == []
    assert made.details["calibration"] == {**CALIBRATION.to_dict(), "method": "min-max"}
    assert [attempt["passed"] for attempt in made.details["attempts"]] == [True]


def test_percentiles_come_next_and_every_miss_is_told(single: bytes) -> None:
    judge, told = Judge(passes=3), []
    made = build_int8(single, CONTRACT, CALIBRATION, judge, told.append)
    assert made.graph == judge.shown[2] and len(set(judge.shown)) == 3
    assert made.details["calibration"]["method"] == "percentile 99.99"
    assert [attempt["passed"] for attempt in made.details["attempts"]] == [False, False, True]
    assert told == [
        "int8 missed its gate by min-max: |dp| 0.200, 1 frame flips",
        "int8 missed its gate by percentile 99.999: |dp| 0.200, 1 frame flips",
    ]


def test_then_the_worst_layers_stay_in_float(single: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    units = layers(prepare(single, CONTRACT))
    order = [units[5], units[2], *(unit for unit in units if unit not in (units[5], units[2]))]
    monkeypatch.setattr(int8, "_by_sensitivity", lambda *_: order)
    judge = Judge(passes=6, distances={2: 0.1})  # the second calibration was the nearest, so it goes on with that
    made = build_int8(single, CONTRACT, CALIBRATION, judge)
    assert made.details["float_layers"] == [units[5][0], units[2][0]]
    assert made.details["calibration"]["method"] == "percentile 99.999"
    assert [len(attempt["float_layers"]) for attempt in made.details["attempts"]] == [0, 0, 0, 0, 1, 2]
    assert made.details["layers"] == len(units)


def test_where_nothing_helps_it_is_refused_and_the_closest_named(single: bytes) -> None:
    judge, told = Judge(passes=None, distances={5: 0.07}), []
    with pytest.raises(ParityError) as refusal:
        build_int8(single, CONTRACT, CALIBRATION, judge, told.append)
    text = str(refusal.value)
    assert "no int8 graph of this model" in text and "1 layers in float: |dp| 0.070, 1 frame flips" in text
    assert "allowed: max_abs_dprobability 0.05, max_frame_flip_fraction 0.01; no bundle was written" in text
    assert "on 100 frames of the validation split" in text and "leave int8 out" in text and "\n" not in text
    # 13 layers: 1, 2, 4 and 6 of them in float, but never more than half.
    assert len(judge.shown) == 4 + 4 and len(told) == 8 + 1


def test_the_scan_finds_the_layer_that_is_hurt(single: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepare(single, CONTRACT)
    units = layers(model)
    real = int8.quantize

    def harmful(model: Any, ranges: Any, *, percentile: float | None, keep_float: set[str]) -> bytes:
        """Quantise, but as if the fourth layer could not be: it gets the ranges of the outermost bins alone."""
        ours = units[3][0] not in keep_float
        return real(model, ranges, percentile=2.0 if ours else percentile, keep_float=keep_float)

    monkeypatch.setattr(int8, "quantize", harmful)
    ranges = int8.Ranges(model, CALIBRATION.quadrants, int8.float_tensors(model))
    ranked = int8._by_sensitivity(model, ranges, None, units, CALIBRATION.quadrants)
    assert ranked[0] == units[3] and sorted(ranked) == sorted(units)


@pytest.mark.parametrize(
    ("dp", "flips", "frames", "excess"),
    [(0.05, 0, 100, 1.0), (0.2, 1, 100, 4.0), (0.02, 6, 200, 3.0), (0.01, 2, 40, 2.0), (0.01, 0, 40, 0.2)],
)
def test_how_far_from_the_gate(dp: float, flips: int, frames: int, excess: float) -> None:
    batch = BatchParity(1, 1.0, dp, 3, flips, 0.1)
    parity = Parity("int8", "cpu", frames, "validation split", GATES["int8"], (batch,))
    assert int8.Attempt("min-max", (), parity).excess == pytest.approx(excess)


def test_it_goes_on_with_the_calibration_that_is_nearest_in_all(single: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    # A small worst difference with many flips is further away than a larger one with few.
    monkeypatch.setattr(int8, "_by_sensitivity", lambda *given: given[3])

    class Flipping(Judge):
        def __call__(self, graph: bytes) -> Parity:
            parity = super().__call__(graph)
            flips = {1: 42, 2: 9, 3: 8, 4: 3}.get(len(self.shown), 1)
            return replace(parity, batches=(replace(parity.batches[0], frame_flips=flips),))

    made = build_int8(single, CONTRACT, CALIBRATION, Flipping(passes=5, distances={1: 0.06, 4: 0.12}))
    assert made.details["calibration"]["method"] == "percentile 99.9"


def test_attempts_read_well() -> None:
    parity = Judge(passes=1)(b"")
    attempt = int8.Attempt("min-max", ("stem", "layer1.0.conv1"), parity)
    assert str(attempt) == "min-max, 2 layers in float: |dp| 0.010, 1 frame flips"
    assert attempt.to_dict() == {
        "method": "min-max",
        "float_layers": ["stem", "layer1.0.conv1"],
        "max_abs_dprobability": 0.01,
        "frame_flips": 1,
        "passed": True,
    }
    missed = replace(parity, batches=(BatchParity(1, 1.0, 0.3, 3, 2, 0.1),))
    assert int8.Attempt("min-max", (), missed).to_dict()["passed"] is False
