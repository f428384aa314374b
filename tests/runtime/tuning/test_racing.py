"""Tests of successive elimination on simulated hosts with known costs, noise and a simulated clock."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echoquad_runtime.tuning.racing import (
    ELIMINATION_MARGINS,
    MIN_ROUNDS,
    TIE_TOLERANCE,
    Round,
    Sample,
    contenders,
    eligible,
    relative_costs,
    replay_elimination,
    select,
    successive_elimination,
    summarize,
)


def sample(score: float, *calls: float) -> Sample:
    return Sample(score, calls or (score,) * 20, len(calls) or 20, score)


def rounds_of(table: Sequence[Sequence[float]]) -> list[Round]:
    """Return rounds that measure every candidate, from a table of scores [rounds][candidates]."""
    return [{index: sample(score) for index, score in enumerate(row)} for row in table]


def by_number(count: int) -> list[tuple[int, ...]]:
    return [(index,) for index in range(count)]


class SimulatedHost:
    """A host with candidates of known cost, whose clock only advances during a measurement.

    Its speed drifts slowly. In addition each sample has noise, and sometimes another process interferes.
    """

    def __init__(self, seed: int, seconds: float = 60.0, noise: float = 0.05, busy: float = 0.1, drift: float = 0.2):
        self.chance = np.random.default_rng(seed)
        count = int(self.chance.integers(4, 50))
        self.costs = 0.007 * np.exp(self.chance.uniform(0, 2, count))
        if seed % 2:  # many are close to the best, like thread counts and batch sizes of one graph
            close = max(2, count // 4)
            self.costs[:close] = self.costs.min() * self.chance.uniform(1, 1.1, close)
        self.time = 0.0
        self.length = min(0.5, max(0.05, seconds / (8 * count)))
        self._noise, self._busy, self._drift, self._speed = noise, busy, drift, 0.0

    def measure(self, index: int) -> Sample:
        self._speed = 0.97 * self._speed + self._drift * np.sqrt(1 - 0.97**2) * self.chance.normal()
        score = self.costs[index] * np.exp(self._noise * self.chance.normal() + self._speed)
        if self.chance.random() < self._busy:
            score *= self.chance.uniform(1.2, 2.5)
        calls = score * np.exp(0.02 * self.chance.normal(size=max(1, int(self.length / score))))
        self.time += calls.sum() + 0.08
        return Sample(float(np.median(calls)), tuple(calls.tolist()), len(calls), float(calls.sum()))

    def search(self, **options: object) -> list[Round]:
        return successive_elimination(len(self.costs), self.measure, clock=lambda: self.time, **options)  # type: ignore[arg-type]


def test_selection_is_within_5_percent_of_best_on_200_noisy_hosts() -> None:
    """Compare the known cost of the selection with the lowest known cost, with strong noise."""
    found = []
    for seed in range(200):
        host = SimulatedHost(seed)
        best = select(host.search(seconds=60.0, seed=seed), by_number(len(host.costs)))
        assert host.time < 61.0
        found.append(host.costs[best] / host.costs.min())
    assert np.mean(np.array(found) <= 1.05) >= 0.95
    assert max(found) < 1.15


def test_selection_is_within_5_percent_of_best_on_quiet_hosts() -> None:
    found = []
    for seed in range(60):
        host = SimulatedHost(seed, noise=0.02, busy=0.02, drift=0.05)
        best = select(host.search(seconds=60.0, seed=seed), by_number(len(host.costs)))
        found.append(host.costs[best] / host.costs.min())
    assert np.mean(np.array(found) <= 1.05) >= 0.98
    assert max(found) < 1.07


def test_elimination_needs_fewer_samples_than_exhaustive_search() -> None:
    ratios, shares = [], []
    for seed in range(40):
        host = SimulatedHost(seed)
        full = host.search(seconds=120.0, seed=seed, exhaustive=True)
        assert all(len(one) == len(host.costs) for one in full)
        seen = replay_elimination(full)
        cost = relative_costs(full)
        raced = select(seen, by_number(len(host.costs)))
        assert raced is not None
        ratios.append(cost[raced] / min(cost[index] for index in eligible(full)))
        shares.append(sum(map(len, seen)) / sum(map(len, full)))
    assert np.mean(np.array(ratios) <= 1.05) >= 0.95
    assert np.median(shares) < 0.4


@st.composite
def tables(draw: st.DrawFn) -> list[list[float]]:
    """Draw scores [rounds][candidates]."""
    row = st.lists(st.floats(0.001, 1.0), min_size=(width := draw(st.integers(1, 8))), max_size=width)
    return draw(st.lists(row, min_size=MIN_ROUNDS, max_size=9))


limits = st.sampled_from([np.inf, 0.5, 0.05])


@given(tables(), limits, st.integers(0, 3))
def test_replay_equals_elimination_on_same_samples(table: list[list[float]], limit: float, seed: int) -> None:
    """The report of ``--exhaustive`` on elimination equals what elimination does."""
    full, begun = rounds_of(table), []
    rounds = successive_elimination(
        len(table[0]),
        lambda index: full[len(begun) - 1][index],
        seconds=len(table) - 0.5,
        max_p99=limit,
        seed=seed,
        before_round=lambda running: begun.append(set(running)),
        clock=lambda: len(begun),  # one second per round
    )
    assert [set(one) for one in rounds] == begun
    assert rounds == replay_elimination(full, limit)[: len(rounds)]
    assert len(rounds) == len(table) or len(contenders(rounds, limit)) <= 1


@given(tables(), limits)
def test_selection_is_within_limit_and_tolerance_of_best(table: list[list[float]], limit: float) -> None:
    rounds = rounds_of(table)
    standings, cost, within = summarize(rounds), relative_costs(rounds, limit), eligible(rounds, limit)
    best = select(rounds, by_number(len(table[0])), limit)
    assert (best is None) == (min(standing.p99 for standing in standings.values()) > limit) == (not within)
    if best is not None:
        assert standings[best].p99 <= limit
        assert cost[best] <= (1 + TIE_TOLERANCE) * min(cost[index] for index in within)
        assert not [index for index in within if index < best and cost[index] <= min(cost[i] for i in within)]


@given(tables())
def test_fastest_in_every_round_is_selected(table: list[list[float]]) -> None:
    rows = [[0.9 * min(row), *row] for row in table]
    for count in range(1, len(rows) + 1):
        assert 0 in contenders(rounds_of(rows[:count]))
    assert select(rounds_of(rows), by_number(len(rows[0]))) == 0


@given(tables(), st.lists(st.floats(0.1, 10), min_size=9, max_size=9))
def test_slow_round_does_not_change_selection(table: list[list[float]], speeds: list[float]) -> None:
    slowed = [[score * speed for score in row] for row, speed in zip(table, speeds, strict=False)]
    leader = min(range(len(table[0])), key=lambda index: np.median([row[index] for row in table]))
    ahead = [[min(row) / 2 if index == leader else score for index, score in enumerate(row)] for row in table]
    slowed_ahead = [[min(row) / 2 if index == leader else score for index, score in enumerate(row)] for row in slowed]
    gentle = by_number(len(table[0]))
    assert contenders(rounds_of(ahead)) == contenders(rounds_of(slowed_ahead))
    assert select(rounds_of(ahead), gentle) == select(rounds_of(slowed_ahead), gentle)


@pytest.mark.parametrize(
    ("second", "samples", "stays"),
    [
        *[(2.4, 1, True), (2.6, 1, False), (1.2, 2, True), (1.3, 2, False)],
        *[(1.09, 5, True), (1.11, 5, False), (1.04, 6, True), (1.06, 6, False), (1.06, 30, False)],
    ],
)
def test_elimination_margins(second: float, samples: int, stays: bool) -> None:
    assert ELIMINATION_MARGINS == (1.5, 0.25, 0.10, 0.10, 0.10, 0.05)
    assert contenders(rounds_of([[1.0, second]] * samples)) == ({0, 1} if stays else {0})


def test_noise_in_most_rounds_does_not_eliminate() -> None:
    """A candidate that is best in its good rounds stays in the race."""
    rounds = rounds_of([[0.9, 1.0], [2.0, 1.0], [3.0, 1.0], [0.9, 1.0]])
    assert contenders(rounds) == {0, 1}


def test_tie_break_selects_among_tied() -> None:
    rounds = rounds_of([[1.0, 1.019, 1.021]] * 5)
    assert select(rounds, [(2,), (1,), (0,)]) == 1
    assert select(rounds, [(0,), (1,), (2,)]) == 0
    assert select(rounds, [(1, 1), (1, 0), (0, 0)]) == 1


def test_p99_limit() -> None:
    quick_but_uneven, slower, too_slow = sample(1.0, *[1.0] * 90, *[9.0] * 10), sample(1.3), sample(6.0)
    rounds: list[Round] = [{0: quick_but_uneven, 1: slower, 2: too_slow}] * 5
    assert select(rounds, by_number(3)) == 0
    assert select(rounds, by_number(3), max_p99=5.0) == 1
    assert select(rounds, by_number(3), max_p99=1.0) is None
    # A candidate within the limit is not eliminated by a faster one above it; one far above the limit is eliminated.
    assert contenders(rounds, max_p99=5.0) == {0, 1}
    assert contenders(rounds, max_p99=0.1) == set()
    assert eligible(rounds, max_p99=5.0) == {1}


def test_eliminated_candidate_returns_if_leader_exceeds_limit() -> None:
    calm, hiccups, dropped = sample(1.0, *[1.0] * 50), sample(1.0, *[1.0] * 40, *[9.0] * 10), sample(1.5, *[1.5] * 50)
    rounds: list[Round] = [{0: calm, 1: dropped}, {0: calm, 1: dropped}, {0: calm}]
    assert contenders(rounds, max_p99=5.0) == {0}
    assert contenders([*rounds, {0: hiccups}], max_p99=5.0) == {0, 1}
    assert select([*rounds, {0: hiccups}], by_number(2), max_p99=5.0) == 1


def test_failed_candidate_loses_its_samples() -> None:
    had = [0, 0, 0]

    def measure(index: int) -> Sample | None:
        had[index] += 1
        return None if index == 0 and had[0] == 3 else sample(0.5 if index == 0 else 1.0, *[1.0] * 10)

    begun: list[set[int]] = []
    rounds = successive_elimination(
        3,
        measure,
        seconds=4.5,
        clock=lambda: len(begun),
        before_round=lambda running: begun.append(set(running)),
    )
    assert begun == [{0, 1, 2}, {0, 1, 2}, {0}, {1, 2}, {1, 2}]
    assert [set(one) for one in rounds] == [{1, 2}, {1, 2}, set(), {1, 2}, {1, 2}]
    assert select(rounds, by_number(3)) == 1


def test_no_candidates() -> None:
    assert successive_elimination(0, lambda _: pytest.fail(), seconds=9) == []
    assert [dict(one) for one in successive_elimination(2, lambda _: None, seconds=9)] == [{}]
    assert select([], []) is None
    assert relative_costs([{}]) == {}


def test_min_rounds_and_time_limit() -> None:
    host = SimulatedHost(0)
    assert len(host.search(seconds=0.0)) == MIN_ROUNDS
    host = SimulatedHost(0)
    spent: list[float] = []
    host.search(seconds=20.0, progress=spent.append)
    assert host.time <= 20.0
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(host.time)


def test_ends_when_one_candidate_has_enough_calls() -> None:
    rounds = successive_elimination(2, lambda index: sample(1.0 + 9 * index, *[1.0] * 30), seconds=60, clock=lambda: 0)
    assert [set(one) for one in rounds] == [{0, 1}, {0}, {0}, {0}]


def test_order_is_shuffled_and_depends_on_seed() -> None:
    def order(seed: int) -> list[int]:
        had: list[int] = []
        successive_elimination(9, lambda index: had.append(index) or sample(1.0), seconds=0, seed=seed, clock=lambda: 0)
        return had

    first = order(1)
    assert len(first) == 27
    assert [sorted(first[begin : begin + 9]) for begin in (0, 9, 18)] == [list(range(9))] * 3
    assert first[:9] != first[9:18] != list(range(9))
    assert first == order(1) != order(2)


def test_statistics_of_samples() -> None:
    chance = np.random.default_rng(3)
    rounds = [{0: sample(score, *chance.uniform(0, 1, count))} for score, count in [(3.0, 30), (1.0, 7), (2.0, 110)]]
    (standing,) = summarize(rounds).values()
    calls = [one[0].call_seconds for one in rounds]
    assert standing.score == 2.0
    assert standing.p50 == np.median([np.median(each) for each in calls])
    assert standing.p99 == pytest.approx(np.percentile(np.concatenate(calls), 99))
    assert standing.lower_quartile_p50 == min(np.median(each) for each in calls)
