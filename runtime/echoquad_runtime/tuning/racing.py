"""The search behind ``echoquad tune``: candidates timed in turns, the clearly dearer ones dropped, and the pick.

Nothing here knows what a candidate is. A race is run over numbers and a function that gives a number one turn, so
that its rules can be held against simulated machines, and so that an exhaustive search can replay, on the turns that
it measured itself, which of them the race would have seen.

A machine in use gets slower and quicker while it is measured. So candidates are compared by paired ratios: the cost
of one over that of the leader in the same round, where every candidate has its turn in a shuffled order.
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
    "ENOUGH_CALLS",
    "MIN_ROUNDS",
    "NEAR_TIE",
    "SLACK",
    "Round",
    "Standing",
    "Turn",
    "contenders",
    "costs",
    "eligible",
    "pick",
    "race",
    "replay",
    "stand",
]

MIN_ROUNDS: Final = 3
"""Rounds before a choice, however short the time."""

SLACK: Final = (1.5, 0.25, 0.10, 0.10, 0.10, 0.05)
"""How far above the leader a candidate may be and still run on, after its first turn, its second and so on."""

NEAR_TIE: Final = 0.02
"""Candidates this close to the best count as equal: the gentlest of them is taken."""

ENOUGH_CALLS: Final = 100
"""Calls that a 99th percentile asks for."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn of a candidate showed.

    Attributes
    ----------
    score
        What is to be small, in seconds a frame; positive.
    calls
        Seconds of each call, warm-up left out; at least one.
    frames
        Frames judged in them.
    cpu
        CPU-seconds of the process during the turn, the pauses of a paced one included.
    """

    score: float
    calls: tuple[float, ...]
    frames: int
    cpu: float


Round = Mapping[int, Turn]
"""The turns of a round by candidate; a candidate that did not run is not in it."""


@dataclass(frozen=True)
class Standing:
    """What all turns of a candidate so far come to; worked out when asked for, since a race asks for little of it."""

    turns: tuple[Turn, ...]

    @cached_property
    def score(self) -> float:
        """Median of the turns' scores."""
        return median(turn.score for turn in self.turns)

    @cached_property
    def p50(self) -> float:
        """Median of the turns' median seconds of a call."""
        return median(self._medians)

    @cached_property
    def p99(self) -> float:
        """99th percentile of the seconds of a call, over all calls."""
        return float(np.percentile(np.concatenate([turn.calls for turn in self.turns]), 99))

    @cached_property
    def quick_p50(self) -> float:
        """Lower quartile of the turns' median seconds of a call."""
        return _lower_quartile(self._medians)

    @property
    def _medians(self) -> list[float]:
        return [median(turn.calls) for turn in self.turns]

    def keeps(self, limit: float) -> bool:
        """Whether the p99 is within `limit` seconds."""
        return limit == np.inf or self.p99 <= limit


def stand(rounds: Sequence[Round]) -> dict[int, Standing]:
    """Sum up the turns of every candidate that had one."""
    turns: dict[int, list[Turn]] = {}
    for one in rounds:
        for index, turn in one.items():
            turns.setdefault(index, []).append(turn)
    return {index: Standing(tuple(had)) for index, had in turns.items()}


def contenders(rounds: Sequence[Round], limit: float = np.inf) -> set[int]:
    """Say who may still turn out the best: who has a turn in the next round, and who can be picked.

    A candidate is out when even the better quarter of its paired ratios is above the leader by more than `SLACK`, or
    its median call above `limit` by as much. The leader is, of those whose p99 keeps the limit, the one of lowest
    median score among those with most turns; where none keeps it, nobody is out for being dearer.

    Parameters
    ----------
    rounds
        What was measured so far.
    limit
        Seconds that the p99 of a call may take.
    """
    standings = stand(rounds)
    leader = _leader(standings, limit)
    ratios = {} if leader is None else _ratios(rounds, leader)
    found = set()
    for index, standing in standings.items():
        most = 1 + SLACK[min(len(standing.turns), len(SLACK)) - 1]
        dearer = index in ratios and _lower_quartile(ratios[index]) > most
        if not dearer and (limit == np.inf or standing.quick_p50 <= most * limit):
            found.add(index)
    return found


def pick(rounds: Sequence[Round], gentleness: Sequence[tuple[int, ...]], limit: float = np.inf) -> int | None:
    """Choose: of the contenders within the limit and within `NEAR_TIE` of the best of them, the gentlest.

    Parameters
    ----------
    rounds
        What was measured.
    gentleness
        What orders candidates of equal cost, the lowest first; one for each candidate.
    limit
        Seconds that the p99 of a call may take.

    Returns
    -------
    int or None
        None where no candidate keeps the limit.
    """
    found = eligible(rounds, limit)
    if not found:
        return None
    cost = costs(rounds, limit)
    most = (1 + NEAR_TIE) * min(cost[index] for index in found)
    return min((index for index in found if cost[index] <= most), key=lambda i: (gentleness[i], cost[i]))


def eligible(rounds: Sequence[Round], limit: float = np.inf) -> set[int]:
    """Give the contenders whose p99 keeps the limit."""
    standings, cost = stand(rounds), costs(rounds, limit)
    return {index for index in contenders(rounds, limit) if standings[index].keeps(limit) and index in cost}


def costs(rounds: Sequence[Round], limit: float = np.inf) -> dict[int, float]:
    """Give each candidate's cost over the leader's: the median of its paired ratios.

    Empty where none keeps the limit; a candidate that never ran beside the leader is not in it.
    """
    leader = _leader(stand(rounds), limit)
    return {} if leader is None else {index: median(each) for index, each in _ratios(rounds, leader).items()}


def race(
    count: int,
    give_turn: Callable[[int], Turn | None],
    *,
    seconds: float,
    limit: float = np.inf,
    exhaustive: bool = False,
    seed: int = 0,
    before_round: Callable[[Collection[int]], None] = lambda _: None,
    progress: Callable[[float], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Round]:
    """Give the candidates their turns, round by round, until the time is used.

    Parameters
    ----------
    count
        How many candidates there are; they are the numbers from 0.
    give_turn
        Measures a candidate once. None is a candidate that failed: it is out, with the turns that it had.
    seconds
        Time for all of it. A round that would not fit is not begun, but `MIN_ROUNDS` are run in any case.
    limit
        As in `contenders`.
    exhaustive
        Whether every candidate runs in every round.
    seed
        Of the order within each round.
    before_round
        Told who runs in it.
    progress
        Told the seconds used, after each turn.
    clock
        Gives the time, in seconds.

    Returns
    -------
    list of Round
        What was measured.
    """
    chance = random.Random(seed)
    rounds: list[MutableMapping[int, Turn]] = []
    lengths: dict[int, float] = {}
    running = set(range(count))
    begin = clock()
    while running:
        if len(rounds) >= MIN_ROUNDS:
            expected = sum(lengths[index] for index in running)
            if clock() - begin + expected >= seconds or _settled(rounds, running):
                break
        before_round(running)
        order = sorted(running)
        chance.shuffle(order)
        current: dict[int, Turn] = {}
        rounds.append(current)
        for index in order:
            started = clock()
            turn = give_turn(index)
            lengths[index] = clock() - started
            progress(lengths[index] + started - begin)
            if turn is not None:
                current[index] = turn
                continue
            running.discard(index)
            for one in rounds:
                one.pop(index, None)
        if not exhaustive:
            running = contenders(rounds, limit)
    return list(rounds)


def replay(full: Sequence[Round], limit: float = np.inf) -> list[Round]:
    """Give what the race would have seen of an exhaustive search: the same turns, without those of dropped ones."""
    seen: list[Round] = []
    for one in full:
        running = contenders(seen, limit) if seen else one.keys()
        seen.append({index: one[index] for index in running if index in one})
    return seen


def _leader(standings: Mapping[int, Standing], limit: float) -> int | None:
    within = [index for index, standing in standings.items() if standing.keeps(limit)]
    # Scores of candidates that ran in other rounds are not comparable: the machine has changed since.
    return min(within, key=lambda index: (-len(standings[index].turns), standings[index].score), default=None)


def _ratios(rounds: Sequence[Round], leader: int) -> dict[int, list[float]]:
    """Give each candidate's scores over the leader's, in the rounds that both ran in."""
    found: dict[int, list[float]] = {}
    for one in rounds:
        if leader in one:
            for index, turn in one.items():
                found.setdefault(index, []).append(turn.score / one[leader].score)
    return found


def _lower_quartile(values: Sequence[float]) -> float:
    """Give the value that a quarter is at or below: of up to four the lowest, since noise only ever adds."""
    return sorted(values)[(len(values) - 1) // 4]


def _settled(rounds: Sequence[Round], running: Collection[int]) -> bool:
    """Whether one contender is left, and known well enough."""
    if len(running) > 1:
        return False
    (only,) = running
    return sum(len(one[only].calls) for one in rounds if only in one) >= ENOUGH_CALLS
