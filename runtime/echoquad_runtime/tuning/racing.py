"""Successive elimination (racing): measure candidates round by round, drop the clearly slower ones, select the best.

This module does not know what a candidate is. It works on candidate numbers and on a function that measures one
candidate once. So tests can run the rules on simulated hosts, and an exhaustive search can replay the elimination on
the samples that it took.

A host that does other work gets slower and faster during the measurement. Candidates are therefore compared by paired
ratios: the score of one over the score of the leader in the same round. In a round, every remaining candidate is
measured once, in random order. See Maron and Moore, "Hoeffding races", 1994, for the method; the elimination rule
here is an empirical one (`ELIMINATION_MARGINS`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Final

import numpy as np

__all__ = [
    "ELIMINATION_MARGINS",
    "MIN_P99_CALLS",
    "MIN_ROUNDS",
    "TIE_TOLERANCE",
    "Round",
    "Sample",
    "Statistics",
    "contenders",
    "eligible",
    "relative_costs",
    "replay_elimination",
    "select",
    "successive_elimination",
    "summarize",
]

MIN_ROUNDS: Final = 3
"""Rounds before a choice, however short the time limit."""

ELIMINATION_MARGINS: Final = (1.5, 0.25, 0.10, 0.10, 0.10, 0.05)
"""Relative margin above the leader that keeps a candidate in the race, after its first sample, its second and so on."""

TIE_TOLERANCE: Final = 0.02
"""Candidates within this relative distance of the best count as tied; the tie-break then selects one."""

MIN_P99_CALLS: Final = 100
"""Number of calls below which a 99th percentile is unreliable."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of a candidate.

    Attributes
    ----------
    score
        The value to minimize, in seconds per frame; positive.
    call_seconds
        Duration of each call after warm-up, in seconds; at least one.
    frames
        Frames that these calls processed.
    cpu_seconds
        CPU time of the process, including the pauses of a paced measurement.
    """

    score: float
    call_seconds: tuple[float, ...]
    frames: int
    cpu_seconds: float


Round = Mapping[int, Sample]
"""The samples of one round by candidate; a candidate that was not measured is missing."""


@dataclass(frozen=True)
class Statistics:
    """Statistics of all samples of a candidate, computed on demand: an elimination step needs only a few of them."""

    samples: tuple[Sample, ...]

    @cached_property
    def score(self) -> float:
        """Median score of the samples."""
        return median(sample.score for sample in self.samples)

    @cached_property
    def p50(self) -> float:
        """Median over the samples of their median call, in seconds."""
        return median(self._medians)

    @cached_property
    def p99(self) -> float:
        """99th percentile of all calls, in seconds."""
        return float(np.percentile(np.concatenate([sample.call_seconds for sample in self.samples]), 99))

    @cached_property
    def lower_quartile_p50(self) -> float:
        """Lower quartile over the samples of their median call, in seconds."""
        return _lower_quartile(self._medians)

    @property
    def _medians(self) -> list[float]:
        return [median(sample.call_seconds) for sample in self.samples]

    def within(self, max_p99: float) -> bool:
        """Return whether the 99th percentile is at most `max_p99` seconds."""
        return max_p99 == np.inf or self.p99 <= max_p99


def summarize(rounds: Sequence[Round]) -> dict[int, Statistics]:
    """Return the statistics of every candidate that has a sample."""
    samples: dict[int, list[Sample]] = {}
    for one in rounds:
        for index, sample in one.items():
            samples.setdefault(index, []).append(sample)
    return {index: Statistics(tuple(found)) for index, found in samples.items()}


def contenders(rounds: Sequence[Round], max_p99: float = np.inf) -> set[int]:
    """Return the candidates that are still in the race: they are measured in the next round and can be selected.

    A candidate is eliminated if the lower quartile of its paired ratios to the leader exceeds its margin of
    `ELIMINATION_MARGINS`, or if its median call exceeds `max_p99` by that margin. The leader is the candidate with the
    lowest median score among those within `max_p99` that have the most samples. Without such a candidate, no score
    eliminates any.

    Parameters
    ----------
    rounds
        The rounds measured so far.
    max_p99
        Upper bound for the 99th percentile of a call, in seconds.
    """
    statistics = summarize(rounds)
    leader = _leader(statistics, max_p99)
    ratios = {} if leader is None else _paired_ratios(rounds, leader)
    remaining = set()
    for index, found in statistics.items():
        bound = 1 + ELIMINATION_MARGINS[min(len(found.samples), len(ELIMINATION_MARGINS)) - 1]
        slower = index in ratios and _lower_quartile(ratios[index]) > bound
        if not slower and (max_p99 == np.inf or found.lower_quartile_p50 <= bound * max_p99):
            remaining.add(index)
    return remaining


def select(rounds: Sequence[Round], tie_break: Sequence[tuple[int, ...]], max_p99: float = np.inf) -> int | None:
    """Select the best candidate: the first in tie-break order among those within `TIE_TOLERANCE` of the lowest cost.

    Parameters
    ----------
    rounds
        The measured rounds.
    tie_break
        A sort key for each candidate; of tied candidates the lowest key wins.
    max_p99
        Upper bound for the 99th percentile of a call, in seconds.

    Returns
    -------
    int or None
        None if no candidate is within `max_p99`.
    """
    allowed = eligible(rounds, max_p99)
    if not allowed:
        return None
    costs = relative_costs(rounds, max_p99)
    bound = (1 + TIE_TOLERANCE) * min(costs[index] for index in allowed)
    return min((index for index in allowed if costs[index] <= bound), key=lambda i: (tie_break[i], costs[i]))


def eligible(rounds: Sequence[Round], max_p99: float = np.inf) -> set[int]:
    """Return the contenders whose 99th percentile is at most `max_p99` seconds."""
    statistics, costs = summarize(rounds), relative_costs(rounds, max_p99)
    return {index for index in contenders(rounds, max_p99) if statistics[index].within(max_p99) and index in costs}


def relative_costs(rounds: Sequence[Round], max_p99: float = np.inf) -> dict[int, float]:
    """Return each candidate's cost relative to the leader: the median of its paired ratios.

    The result is empty if no candidate is within `max_p99` seconds. A candidate that was never measured in the same
    round as the leader is missing.
    """
    leader = _leader(summarize(rounds), max_p99)
    return {} if leader is None else {index: median(each) for index, each in _paired_ratios(rounds, leader).items()}


def successive_elimination(
    count: int,
    measure: Callable[[int], Sample | None],
    *,
    seconds: float,
    max_p99: float = np.inf,
    exhaustive: bool = False,
    seed: int = 0,
    before_round: Callable[[Collection[int]], None] = lambda _: None,
    progress: Callable[[float], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Round]:
    """Measure candidates round by round until the time is used, and eliminate the clearly slower ones.

    Parameters
    ----------
    count
        Number of candidates; they are numbered from 0.
    measure
        Measures a candidate once. None means that it failed: it is eliminated, and its samples are dropped.
    seconds
        Time limit. A round that would exceed it does not start, but `MIN_ROUNDS` rounds always run.
    max_p99
        Upper bound for the 99th percentile of a call, in seconds.
    exhaustive
        Whether to measure every candidate in every round.
    seed
        Seed for the order within each round.
    before_round
        Called with the candidates of a round before it starts.
    progress
        Called with the seconds used, after each measurement.
    clock
        Returns the time in seconds.

    Returns
    -------
    list of Round
        The measured rounds.
    """
    generator = random.Random(seed)
    rounds: list[MutableMapping[int, Sample]] = []
    durations: dict[int, float] = {}
    running = set(range(count))
    begin = clock()
    while running:
        if len(rounds) >= MIN_ROUNDS:
            expected = sum(durations[index] for index in running)
            if clock() - begin + expected >= seconds or _is_decided(rounds, running):
                break
        before_round(running)
        order = sorted(running)
        generator.shuffle(order)
        current: dict[int, Sample] = {}
        rounds.append(current)
        for index in order:
            started = clock()
            sample = measure(index)
            durations[index] = clock() - started
            progress(durations[index] + started - begin)
            if sample is not None:
                current[index] = sample
                continue
            running.discard(index)
            for one in rounds:
                one.pop(index, None)
        if not exhaustive:
            running = contenders(rounds, max_p99)
    return list(rounds)


def replay_elimination(full: Sequence[Round], max_p99: float = np.inf) -> list[Round]:
    """Return the rounds of an exhaustive search without the samples that elimination would have skipped."""
    seen: list[Round] = []
    for one in full:
        running = contenders(seen, max_p99) if seen else one.keys()
        seen.append({index: one[index] for index in running if index in one})
    return seen


def _leader(statistics: Mapping[int, Statistics], max_p99: float) -> int | None:
    allowed = [index for index, found in statistics.items() if found.within(max_p99)]
    # Scores from different rounds are not comparable: the host may have become slower in between.
    return min(allowed, key=lambda index: (-len(statistics[index].samples), statistics[index].score), default=None)


def _paired_ratios(rounds: Sequence[Round], leader: int) -> dict[int, list[float]]:
    """Return each candidate's scores over the leader's, of the rounds that measured both."""
    ratios: dict[int, list[float]] = {}
    for one in rounds:
        if leader in one:
            for index, sample in one.items():
                ratios.setdefault(index, []).append(sample.score / one[leader].score)
    return ratios


def _lower_quartile(values: Sequence[float]) -> float:
    """Return the lower quartile, not interpolated: the minimum of up to four values, since noise only adds time."""
    return sorted(values)[(len(values) - 1) // 4]  # np.percentile takes twenty times as long for so few values


def _is_decided(rounds: Sequence[Round], running: Collection[int]) -> bool:
    """Return whether one candidate is left and has enough calls for its 99th percentile."""
    if len(running) > 1:
        return False
    (only,) = running
    return sum(len(one[only].call_seconds) for one in rounds if only in one) >= MIN_P99_CALLS
