"""Tests of the live source on a simulated clock: due times, delays and the cost of waiting."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echoquad_runtime.bench.live_source import Clock, count_missed, run_live


@dataclass
class Time:
    """A clock that only advances by sleep and work; work also counts CPU time."""

    now: float = 100.0
    cpu: float = 7.0
    spin: float = 0.0  # fraction of a sleep in which a thread keeps a core busy

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        self.cpu += seconds * self.spin

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.cpu += seconds

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.now, lambda: self.cpu, self.sleep)


def test_frames_start_when_due() -> None:
    time = Time()
    began: list[float] = []

    def call(index: int) -> None:
        assert index == len(began)
        began.append(time.now)
        time.work(0.02)

    found = run_live(call, 25, 4, time.clock)
    assert began == pytest.approx([100, 100.04, 100.08, 100.12])
    assert found.latencies == pytest.approx((0.02,) * 4)
    assert (found.fps, found.missed) == (25, 0)
    assert found.cpu_cores == pytest.approx(0.08 / 0.14)
    assert found.idle_cpu == pytest.approx(0)


def test_busy_waiting_is_measured() -> None:
    time = Time(spin=0.75)
    found = run_live(lambda _: time.work(0.01), 50, 10, time.clock)
    assert found.idle_cpu == pytest.approx(0.75)
    assert found.cpu_cores == pytest.approx((10 * 0.01 + 9 * 0.75 * 0.01) / 0.19)


def test_late_frame_delays_next_ones_and_none_is_dropped() -> None:
    time = Time()
    work = iter([0.025, 0.001, 0.001, 0.001, 0.001])
    found = run_live(lambda _: time.work(next(work)), 100, 5, time.clock)
    # Due at 0, 10, 20, 30, 40 ms; done at 25, 26, 27, 31, 41.
    assert found.latencies == pytest.approx((0.025, 0.016, 0.007, 0.001, 0.001))
    assert found.missed == 2


def test_source_faster_than_predictions() -> None:
    time = Time()
    found = run_live(lambda _: time.work(0.02), 100, 4, time.clock)
    assert found.latencies == pytest.approx((0.02, 0.03, 0.04, 0.05))
    assert found.missed == 4
    assert found.idle_cpu is None  # there was no wait
    assert found.cpu_cores == pytest.approx(1)


@given(st.lists(st.floats(0, 0.1), min_size=1, max_size=30), st.floats(1, 200))
def test_latency_includes_wait_for_previous_frame(work: list[float], fps: float) -> None:
    time = Time()
    todo = iter(work)
    found = run_live(lambda _: time.work(next(todo)), fps, len(work), time.clock)
    done, expected = 0.0, []
    for index, seconds in enumerate(work):
        done = max(done, index / fps) + seconds
        expected.append(done - index / fps)
    assert found.latencies == pytest.approx(expected, abs=2e-4 + 1e-4 * len(work))


def test_decision_at_the_deadline_is_not_missed() -> None:
    assert count_missed([0.25, 0.249, 0.251], 4) == 1


def test_real_clock() -> None:
    found = run_live(lambda _: None, 200, 5)
    assert len(found.latencies) == 5 and min(found.latencies) >= -1e-3
    assert found.idle_cpu is not None
