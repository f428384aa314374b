"""Deliveries: what is due, in which order, what a restart changes, and what is outstanding."""

from __future__ import annotations

import threading
import time

import pytest


@pytest.fixture
def three(open_store, offer, finish):
    """A store of two destinations with three results."""
    store = open_store("pacs", "hook")
    jobs = [offer(store) for _ in range(3)]
    return store, [finish(store, job) for job in jobs]


def due(store, destination: str = "pacs", now: float | None = None, limit: int = 10) -> list[int]:
    return [delivery.result.number for delivery in store.due(destination, now or time.time(), limit)]


def test_each_destination_gets_each_result_oldest_first(three) -> None:
    store, results = three
    assert due(store) == due(store, "hook") == [1, 2, 3]
    assert due(store, limit=2) == [1, 2]
    first = store.due("pacs", time.time(), 1)[0]
    assert first.result == results[0]
    assert first.source == store.source(results[0].id)
    assert first.attempts == 0
    store.delivered("pacs", results[0].id)
    store.delivered("pacs", results[0].id)  # a repeat has no effect
    assert due(store) == [2, 3]
    assert due(store, "hook") == [1, 2, 3]
    assert due(store, "unknown") == []


def test_a_delivery_without_its_file_has_no_source(three) -> None:
    store, results = three
    store.source(results[0].id).unlink()
    assert store.due("pacs", time.time(), 1)[0].source is None


def test_a_postponed_delivery_is_due_at_its_time_and_keeps_its_place(three) -> None:
    store, results = three
    later = time.time() + 1000
    store.postpone("pacs", results[0].id, later, "no answer")
    assert due(store) == [2, 3]
    assert due(store, now=later) == [1, 2, 3]
    assert store.due("pacs", later, 1)[0].attempts == 1
    status = store.status()["destinations"]
    assert (status["pacs"]["waiting"], status["pacs"]["last_error"]) == (3, "no answer")
    assert status["hook"]["last_error"] == ""
    store.delivered("pacs", results[1].id)
    assert store.status()["destinations"]["pacs"] == {
        "waiting": 2,
        "refused": 0,
        "oldest_s": pytest.approx(0, abs=30),
        "last_error": "",
    }


def test_a_refused_delivery_is_kept_until_it_is_sent_again(three, open_store) -> None:
    store, results = three
    store.refused("pacs", results[1].id, "SOP class not supported")
    assert due(store) == [1, 3]
    store.close()
    store = open_store("pacs", "hook")
    assert due(store, now=time.time() + 1e9) == [1, 3]
    expected = {"waiting": 2, "refused": 1, "last_error": "SOP class not supported"}
    assert expected.items() <= store.status()["destinations"]["pacs"].items()
    store.delivered("pacs", results[0].id)  # a success of another does not hide it
    assert store.status()["destinations"]["pacs"]["last_error"]
    assert store.send_again("pacs") == 1
    assert due(store) == [2, 3]
    assert store.status()["destinations"]["pacs"]["refused"] == 0


def test_a_refused_delivery_may_succeed_or_be_postponed_after_all(three) -> None:
    store, results = three
    for result in results[:2]:
        store.refused("pacs", result.id, "no")
    store.delivered("pacs", results[0].id)
    store.postpone("pacs", results[1].id, 0.0, "away")
    status = store.status()["destinations"]["pacs"]
    assert (status["waiting"], status["refused"]) == (2, 0)


def test_a_restart_makes_postponed_deliveries_due_and_keeps_their_attempts(three, open_store) -> None:
    store, results = three
    store.postpone("pacs", results[0].id, time.time() + 1e9, "the clock was wrong")
    store.close()
    store = open_store("pacs", "hook")
    assert due(store) == [1, 2, 3]
    assert store.due("pacs", time.time(), 1)[0].attempts == 1


def test_a_destination_that_is_not_configured_any_more_stays_outstanding(three, open_store, offer, finish) -> None:
    store, results = three
    store.close()
    store = open_store("new", keep_days=0.0)
    finish(store, offer(store))
    status = store.status()["destinations"]
    assert {name: one["waiting"] for name, one in status.items()} == {"new": 1, "pacs": 3, "hook": 3}
    assert due(store, "new") == [4]  # results from before are not sent to it
    assert store.prune(time.time() + 1) == 0
    for name in ("pacs", "hook"):
        store.delivered(name, results[0].id)
    assert store.prune(time.time() + 1) == 1


def test_errors_are_cut_and_plain(three) -> None:
    store, results = three
    store.postpone("pacs", results[0].id, 0.0, "é\udce9" + "x" * 10_000)
    error = store.status()["destinations"]["pacs"]["last_error"]
    assert error.startswith("\\xe9\\udce9xxx")
    assert len(error) < 600


def test_wait_due_returns_for_a_result_and_for_a_postponed_delivery(open_store, offer, finish) -> None:
    store = open_store("pacs")
    start = time.monotonic()
    store.wait_due("pacs", 0.05)
    assert time.monotonic() - start >= 0.05
    job = offer(store)
    threading.Timer(0.05, finish, [store, job]).start()
    store.wait_due("pacs", 10)
    assert due(store) == [1]
    store.wait_due("pacs", 10)  # at once
    store.postpone("pacs", job.id, time.time() + 0.15, "away")
    store.wait_due("pacs", 10)
    assert due(store) == [1]
    store.postpone("pacs", job.id, time.time() + 1000, "away")
    threading.Timer(0.05, store.send_again, ["pacs"]).start()
    store.wait_due("pacs", 10)
    assert due(store) == [1]
    assert time.monotonic() - start < 5
