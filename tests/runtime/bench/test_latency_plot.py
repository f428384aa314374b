"""Tests of the latency histogram: bins, bars and marks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echoquad_runtime.bench.latency_plot import HEIGHT, WIDTH, count_latencies, draw_histogram

LATENCIES = st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=200)
BAR = (0x9D, 0xB7, 0xCF)
COLOURS = {"p50": (0x00, 0x9E, 0x73), "p95": (0x00, 0x72, 0xB2), "p99": (0xCC, 0x79, 0xA7), "max": (0xD5, 0x5E, 0x00)}


def marks(values: list[float]) -> dict[str, float]:
    return {name: float(np.percentile(values, q)) for name, q in zip(COLOURS, (50, 95, 99, 100), strict=True)}


def drawn(values: list[float], above: dict[str, float] | None = None) -> np.ndarray:
    picture = draw_histogram(values, above or marks(values), "title", "detail")
    assert (picture.size, picture.mode) == ((WIDTH, HEIGHT), "RGB")
    return np.asarray(picture)


def columns(picture: np.ndarray, colour: tuple[int, int, int], row: int) -> np.ndarray:
    return np.flatnonzero((picture[row] == colour).all(axis=1))


@given(LATENCIES)
def test_every_latency_is_counted_once(values: list[float]) -> None:
    found = count_latencies(values)
    assert sum(found.counts) + found.above == len(values)
    assert found.from_ms >= 0 and found.bin_ms > 0 and 12 <= len(found.counts) <= 100
    assert found.from_ms <= min(values) + 1e-9
    assert found.above <= max(1, len(values) // 50)  # at most the 1% above p99, and rounding
    # The width is a round number.
    mantissa = found.bin_ms / 10 ** np.floor(np.log10(found.bin_ms) + 1e-9)
    assert min(abs(mantissa - one) for one in (1, 2, 5)) < 1e-6


def test_counts_by_bin() -> None:
    found = count_latencies([10.0] * 5 + [12.0] * 3 + [17.9])
    assert found.bin_ms == pytest.approx(0.1)
    assert found.from_ms == pytest.approx(10)
    assert {index: count for index, count in enumerate(found.counts) if count} == {0: 5, 20: 3, 78: 1}
    assert found.above == 0


def test_outlier_does_not_squeeze_other_latencies() -> None:
    found = count_latencies([*np.linspace(9, 12, 500), 900.0])
    assert found.above == 1 and found.to_ms < 30


def test_bar_height_follows_count() -> None:
    picture = drawn([10.0] * 40 + [12.0] * 20 + [14.0] * 10, {})
    height = (picture == BAR).all(axis=2).sum(axis=0)
    found = sorted({int(h) for h in height if h > 2}, reverse=True)
    assert len(found) == 3
    assert found[1] / found[0] == pytest.approx(0.5, abs=0.02)
    assert found[2] / found[0] == pytest.approx(0.25, abs=0.02)


def test_single_frame_is_visible() -> None:
    picture = drawn([10.0] * 999 + [18.0], {})
    height = (picture == BAR).all(axis=2).sum(axis=0)
    assert (height > 0).sum() > (height > 100).sum() > 0


def test_marks_are_lines_at_their_latency() -> None:
    values = list(np.linspace(10, 30, 400))
    picture = drawn(values)
    row = HEIGHT - 100
    places = {name: columns(picture, colour, row) for name, colour in COLOURS.items()}
    assert all(0 < len(found) <= 4 for found in places.values()), places
    x = {name: float(found.mean()) for name, found in places.items()}
    assert x["p50"] < x["p95"] < x["p99"] < x["max"]
    # Linear in milliseconds.
    of = marks(values)
    a, b = (x["p95"] - x["p50"]) / (of["p95"] - of["p50"]), (x["max"] - x["p50"]) / (of["max"] - of["p50"])
    assert a == pytest.approx(b, rel=0.02)


def test_mark_above_the_scale_is_at_its_end() -> None:
    picture = drawn([*np.linspace(9, 12, 500), 900.0])
    (found,) = {int(x) // 10 for x in columns(picture, COLOURS["max"], HEIGHT - 100)}
    assert found == (WIDTH - 40) // 10


@pytest.mark.parametrize("values", [[5.0], [0.0], [1e-6, 1e-6], [1e7, 1.0], list(range(1, 5000))])
def test_any_latencies_can_be_drawn(values: list[float]) -> None:
    picture = drawn([float(value) for value in values])
    assert (picture == BAR).all(axis=2).any()
