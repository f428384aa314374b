"""The job store against a simple model in memory, for random sequences of calls and restarts."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from echoquad_serve.config import StoreConfig
from echoquad_serve.queue import JobStore
from echoquad_serve.records import IncomingObject, Job, Result

DAY = 86400.0
DESTINATIONS = ("hook", "pacs")
PLACES = st.integers(0, 30)


class StoreModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="store"))
        self.jobs: list[Job] = []  # all that were accepted and not pruned
        self.waiting: list[Job] = []
        self.taken: list[Job] = []
        self.results: dict[str, Result] = {}
        self.keys: dict[str, Job] = {}
        self.outstanding: dict[tuple[str, str], tuple[bool, bool, int]] = {}  # postponed, refused, attempts
        self.numbers = 0
        self.pruned = 0
        self.open()

    def open(self) -> None:
        self.store = JobStore(StoreConfig(self.folder / "store", 6, 0, keep_days=1.0), DESTINATIONS)

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    @rule(key=st.sampled_from(["", "", "a", "b", "c"]), content=st.binary(max_size=3))
    def accept(self, key: str, content: bytes) -> None:
        path = self.store.incoming / "object.png"
        path.write_bytes(content)
        try:
            job = self.store.accept(IncomingObject(path, "http", "object", key))
        except Exception as error:
            assert type(error).__name__ == "QueueFullError"
            assert len(self.waiting) >= 6
            assert key not in self.keys
            return
        if key in self.keys:
            assert job == self.keys[key]
            return
        assert len(self.waiting) < 6
        assert job.path.read_bytes() == content
        self.jobs.append(job)
        self.waiting.append(job)
        if key:
            self.keys[key] = job

    @rule(count=st.integers(0, 4))
    def take(self, count: int) -> None:
        expected, self.waiting = self.waiting[:count], self.waiting[count:]
        assert self.store.take(count, 0) == expected
        self.taken += expected

    @precondition(lambda self: self.jobs)
    @rule(place=PLACES, value=st.floats(0, 1), status=st.sampled_from(["done", "failed", "expired"]))
    def finish(self, place: int, value: float, status: str) -> None:
        job = self.jobs[place % len(self.jobs)]
        offered = Result(job.id, status, "http", job.name, job.received, time.time(), rows=({"p": value},))
        result = self.store.finish(offered)
        if job.id in self.results:
            assert result == self.results[job.id]
            return
        self.numbers += 1
        assert result == dataclasses.replace(offered, number=self.numbers)
        self.results[job.id] = result
        self.waiting = [one for one in self.waiting if one is not job]
        self.taken = [one for one in self.taken if one.id != job.id]
        self.outstanding.update({(name, job.id): (False, False, 0) for name in DESTINATIONS})

    @precondition(lambda self: self.jobs)
    @rule(
        place=PLACES,
        destination=st.sampled_from([*DESTINATIONS, "other"]),
        act=st.sampled_from(["delivered", "delivered", "postpone", "refused"]),
    )
    def deliver(self, place: int, destination: str, act: str) -> None:
        pair = (destination, self.jobs[place % len(self.jobs)].id)
        attempts = self.outstanding.get(pair, (False, False, 0))[2]
        if act == "delivered":
            self.store.delivered(*pair)
            self.outstanding.pop(pair, None)
            return
        if act == "postpone":
            self.store.postpone(*pair, time.time() + 1000, "away")
        else:
            self.store.refused(*pair, "no")
        if pair in self.outstanding:
            self.outstanding[pair] = (act == "postpone", act == "refused", attempts + 1)

    @rule(destination=st.sampled_from(DESTINATIONS))
    def send_again(self, destination: str) -> None:
        changed = {
            pair: (False, False, attempts)
            for pair, (postponed, refused, attempts) in self.outstanding.items()
            if pair[0] == destination and (postponed or refused)
        }
        assert self.store.send_again(destination) == len(changed)
        self.outstanding.update(changed)

    @rule(days=st.sampled_from([0.0, 0.9, 1.1, 1000.0]))
    def prune(self, days: float) -> None:
        left = {identifier for _, identifier in self.outstanding}
        gone = [] if days < 1 else [identifier for identifier in self.results if identifier not in left]
        assert self.store.prune(time.time() + days * DAY) == len(gone)
        for identifier in gone:
            del self.results[identifier]
        self.jobs = [job for job in self.jobs if job.id not in gone]
        self.keys = {key: job for key, job in self.keys.items() if job.id not in gone}

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.open()
        self.waiting = [job for job in self.jobs if job.id not in self.results]
        self.taken = []
        for pair, (_, refused, attempts) in self.outstanding.items():
            self.outstanding[pair] = (False, refused, attempts)

    @invariant()
    def lists_agree(self) -> None:
        ordered = sorted(self.results.values(), key=lambda result: -result.number)
        assert self.store.results() == ordered
        assert (
            self.store.results(limit=2, before=self.numbers)
            == [one for one in ordered if one.number < self.numbers][:2]
        )
        for job in self.jobs:
            assert self.store.result(job.id) == self.results.get(job.id)
            assert self.store.source(job.id) == job.path
        assert {path.name for path in self.store._spool.accepted.iterdir()} == {job.path.name for job in self.jobs}
        assert not list(self.store.incoming.iterdir())

    @invariant()
    def outbox_agrees(self) -> None:
        for destination in DESTINATIONS:
            mine = {pair[1]: state for pair, state in self.outstanding.items() if pair[0] == destination}
            for later, expected in (
                (0.0, [one for one, (postponed, refused, _) in mine.items() if not (postponed or refused)]),
                (2000.0, [one for one, (_, refused, _) in mine.items() if not refused]),
            ):
                found = self.store.due(destination, time.time() + later, 100)
                order = sorted(expected, key=lambda identifier: self.results[identifier].number)
                assert [delivery.result.id for delivery in found] == order
                assert [delivery.attempts for delivery in found] == [mine[one][2] for one in order]

    @invariant()
    def status_agrees(self) -> None:
        status = self.store.status()
        assert (status["waiting"], status["in_progress"]) == (len(self.waiting), len(self.taken))
        assert status["results"] == len(self.results)
        for destination in DESTINATIONS:
            refused = [state[1] for pair, state in self.outstanding.items() if pair[0] == destination]
            found = status["destinations"][destination]
            assert (found["waiting"], found["refused"]) == (refused.count(False), refused.count(True))


TestStoreModel = StoreModel.TestCase
TestStoreModel.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
