"""Times of capture: the kernel's, those of a network, and those of a source that plays at its own rate."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echoquad_serve.live.capture_main import ArrivalClock, Decimator, Pacer, kernel_time


@pytest.mark.parametrize(
    ("stamp", "expected"),
    [(99.98, 99.98), (None, 100.0), (1795755589.5, 100.0), (0.5, 100.0), (100.2, 100.0)],
    ids=["kernel", "none", "unix time", "time of the stream", "future"],
)
def test_kernel_time_counts_if_it_is_of_the_same_clock(stamp: float | None, expected: float) -> None:
    assert kernel_time(stamp, 100.0) == expected


def test_frame_that_waited_in_a_buffer_is_older_than_its_arrival() -> None:
    clock = ArrivalClock()
    assert clock.captured(0.0, 1000.0) == 1000.0
    assert clock.captured(0.1, 1000.1) == pytest.approx(1000.1)
    assert clock.captured(0.2, 1000.9) == pytest.approx(1000.2)  # 0.7 s late
    assert clock.captured(0.3, 1000.95) == pytest.approx(1000.3)


def test_burst_at_the_start_does_not_make_later_frames_old() -> None:
    """Frames that were buffered while the stream was opened arrive at once; the first one that did not wait counts."""
    clock = ArrivalClock()
    for index in range(10):
        clock.captured(index / 30, 1000.0)
    assert clock.captured(0.5, 1000.2) == pytest.approx(1000.2)


def test_drift_of_the_clocks_does_not_add_up() -> None:
    clock = ArrivalClock()
    ages = []
    for index in range(30 * 600):
        stamp = index / 30
        arrived = 1000 + stamp * (1 + 1e-4)  # 0.36 s in an hour
        ages.append(arrived - clock.captured(stamp, arrived))
    assert max(ages) < 0.003


def test_jump_of_the_presentation_time_begins_anew() -> None:
    clock = ArrivalClock()
    clock.captured(0.0, 1000.0)
    assert clock.captured(5000.0, 1000.1) == pytest.approx(1000.1)
    assert clock.captured(0.0, 1000.2) == pytest.approx(1000.2)
    assert clock.captured(None, 1000.3) == 1000.3


@given(st.lists(st.tuples(st.floats(0, 0.2), st.floats(0, 3)), min_size=1, max_size=50))
def test_capture_is_never_after_arrival(steps: list[tuple[float, float]]) -> None:
    clock, stamp, arrived = ArrivalClock(), 0.0, 50.0
    for step, delay in steps:
        stamp += step
        arrived = max(arrived, 50 + stamp + delay)
        assert clock.captured(stamp, arrived) <= arrived + 1e-9


class FakeTime:
    def __init__(self) -> None:
        self.now = 50.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_pacer_plays_at_the_rate_of_the_source() -> None:
    clock = FakeTime()
    pacer = Pacer(lambda: clock.now, clock.sleep)
    pacer.begin(0.04)
    assert [pacer.wait(0.04 * index) for index in range(5)] == pytest.approx([50, 50.04, 50.08, 50.12, 50.16])
    assert clock.now == pytest.approx(50.16)


def test_pacer_goes_on_at_the_next_beginning_also_for_a_single_frame() -> None:
    clock = FakeTime()
    pacer = Pacer(lambda: clock.now, clock.sleep)
    due = []
    for _ in range(4):
        pacer.begin(0.04)
        due.append(pacer.wait(7.0))
    assert due == pytest.approx([50, 50.04, 50.08, 50.12])


def test_pacer_counts_the_delay_of_a_slow_decoder_and_does_not_rush_after_a_long_one() -> None:
    clock = FakeTime()
    pacer = Pacer(lambda: clock.now, clock.sleep)
    pacer.begin(0.1)
    pacer.wait(0.0)
    clock.now = 50.3
    assert pacer.wait(0.1) == pytest.approx(50.1)  # 0.2 s late
    clock.now = 58.0
    assert pacer.wait(0.2) == pytest.approx(58.0)
    assert pacer.wait(0.3) == pytest.approx(58.1)


def test_pacer_does_not_wait_for_a_damaged_time() -> None:
    clock = FakeTime()
    pacer = Pacer(lambda: clock.now, clock.sleep)
    pacer.begin(0.1)
    pacer.wait(0.0)
    assert pacer.wait(1e9) <= 51
    assert pacer.wait(None) <= 51


@pytest.mark.parametrize(("rate", "taken"), [(30, 300), (60, 300), (29.97, 300), (25, 250), (45, 300), (200, 300)])
def test_decimator_takes_at_most_its_rate_from_irregular_sources(rate: float, taken: int) -> None:
    rng = np.random.default_rng(0)
    decimator = Decimator(30)
    times = 100 + np.arange(round(10 * rate)) / rate + rng.normal(0, 0.001, round(10 * rate))
    assert sum(decimator.takes(time) for time in times) == pytest.approx(taken, rel=0.02)


def test_decimator_takes_every_frame_of_a_source_of_its_rate() -> None:
    rng = np.random.default_rng(0)
    decimator = Decimator(30)
    assert all(decimator.takes(index / 30 + rng.uniform(-0.004, 0.004)) for index in range(1000))
