"""The job store in one process: acceptance, order, results, keys, deadlines, pruning, and the end."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import pytest

from echoquad_serve.errors import IntakeError, QueueFullError, StorageFullError, StoreError
from echoquad_serve.records import IncomingObject

DAY = 86400.0


def test_an_accepted_object_is_in_the_spool_and_not_in_incoming_any_more(open_store, offer) -> None:
    store = open_store()
    job = offer(store, b"\x00\x01", ".DCM", origin="dicom", sender="ECHO1", sop_class_uid="1.2", sop_instance_uid="1.3")
    assert job.path.read_bytes() == b"\x00\x01"
    assert job.path.name == f"{job.id}.dcm"  # readers know some formats by their suffix
    assert not list(store.incoming.iterdir())
    assert (job.origin, job.sender, job.sop_class_uid, job.sop_instance_uid) == ("dicom", "ECHO1", "1.2", "1.3")
    assert store.take(9, 0) == [job]


@pytest.mark.parametrize("suffix", ["", ".DOE^JANE", ".toolongtobeasuffix", ".é"])
def test_nothing_but_a_plain_suffix_of_the_received_file_gets_into_the_spools_names(open_store, offer, suffix) -> None:
    job = offer(open_store(), suffix=suffix)
    assert job.path.name == job.id


def test_a_file_outside_incoming_is_not_touched(open_store, tmp_path: Path) -> None:
    store = open_store()
    mine = tmp_path / "mine.png"
    mine.write_bytes(b"x")
    for path in (mine, store.incoming / ".." / ".." / "mine.png"):
        with pytest.raises(ValueError, match="incoming"):
            store.accept(IncomingObject(path, "http", "mine"))
    assert mine.exists()


def test_a_missing_file_is_an_intake_error_and_leaves_nothing(open_store) -> None:
    store = open_store()
    with pytest.raises(IntakeError) as caught:
        store.accept(IncomingObject(store.incoming / "gone.png", "http", "gone"))
    assert "\n" not in str(caught.value)
    assert store.take(1, 0) == []


def test_jobs_are_taken_first_in_first_out_and_once(open_store, offer) -> None:
    store = open_store()
    jobs = [offer(store) for _ in range(5)]
    assert store.take(2, 0) == jobs[:2]
    assert store.take(9, 0) == jobs[2:]
    assert store.take(9, 0) == []
    assert store.status()["in_progress"] == 5


def test_take_waits_for_the_first_job(open_store, offer) -> None:
    store = open_store()
    threading.Timer(0.05, offer, [store]).start()
    assert len(store.take(1, 10)) == 1
    start = time.monotonic()
    assert store.take(1, 0.05) == []
    assert time.monotonic() - start >= 0.05


def test_finish_numbers_results_and_keeps_the_first_of_a_job(open_store, offer, finish) -> None:
    store = open_store()
    first, second = offer(store), offer(store)
    store.take(2, 0)
    calls = []
    store.on_result.append(calls.append)
    result = finish(store, second, failures=({"file": "a", "code": "E_X", "message": "m"},), timings_ms={"queue": 1.5})
    assert result.number == 1
    assert finish(store, second, status="failed", rows=()) == result  # every job has exactly one
    assert finish(store, first).number == 2
    assert store.result(second.id) == result
    assert [one.number for one in calls] == [1, 2]
    assert store.status()["in_progress"] == 0


def test_a_result_carries_what_is_known_of_its_job(open_store, offer, finish) -> None:
    store = open_store()
    job = offer(store, origin="folder", sender="share", name="a/b.png")
    result = finish(store, job, origin="http", name="other", received=0.0)
    assert (result.origin, result.sender, result.name, result.received) == ("folder", "share", "a/b.png", job.received)
    assert store.result(job.id) == result


def test_names_that_are_not_utf8_survive(open_store, offer, finish) -> None:
    store = open_store()
    job = offer(store, name="caf\udce9.png", key="caf\udce9")
    result = finish(store, job, rows=({"file": "caf\udce9.png"},))
    store.close()
    assert open_store().result(job.id) == result


def test_a_job_may_be_finished_without_having_been_taken(open_store, offer, finish) -> None:
    store = open_store()
    job, other = offer(store), offer(store)
    finish(store, job)
    assert store.take(9, 0) == [other]


def test_finish_refuses_an_unknown_job_and_a_row_that_is_not_json(open_store, offer, finish) -> None:
    store = open_store()
    job = offer(store)
    with pytest.raises(KeyError):
        finish(store, job, id="0" * 32)
    with pytest.raises(TypeError):
        finish(store, job, rows=({"file": object()},))
    assert finish(store, job).number == 1


def test_a_faulty_listener_does_not_disturb_the_result(open_store, offer, finish, caplog) -> None:
    store = open_store()
    calls = []
    store.on_result += [lambda _: 1 / 0, calls.append]
    finish(store, offer(store))
    assert len(calls) == 1
    assert "listener" in caplog.text


def test_future_has_the_result_and_a_cancelled_one_is_forgotten(open_store, offer, finish) -> None:
    store = open_store()
    job = offer(store)
    with pytest.raises(KeyError):
        store.future("0" * 32)
    futures = [store.future(job.id) for _ in range(4)]
    assert futures[3].cancel()
    assert len(store._futures[job.id]) == 3
    with pytest.raises(TimeoutError):
        futures[0].result(0.01)
    threading.Timer(0.05, finish, [store, job]).start()
    results = [future.result(10) for future in futures[:3]]
    assert results == [store.future(job.id).result(0)] * 3
    assert not store._futures
    other = offer(store)
    store.future(other.id).cancel()
    assert not store._futures


def test_results_are_paged_in_both_directions(open_store, offer, finish) -> None:
    store = open_store()
    for _ in range(7):
        finish(store, offer(store))

    def numbers(**arguments: int) -> list[int]:
        return [result.number for result in store.results(**arguments)]

    assert numbers() == [7, 6, 5, 4, 3, 2, 1]
    assert numbers(limit=2) == [7, 6]
    assert numbers(before=6, limit=2) == [5, 4]
    assert numbers(after=5) == [6, 7]
    assert numbers(after=2, limit=2) == [3, 4]
    assert numbers(after=7) == []
    assert numbers(before=1) == []


def test_a_repeated_key_is_the_same_job_even_when_it_is_finished_or_there_is_no_room(open_store, offer, finish) -> None:
    store = open_store(max_waiting=1)
    job = offer(store, key="k")
    assert offer(store, b"other", key="k") == job
    assert not list(store.incoming.iterdir())
    assert [path.name for path in job.path.parent.iterdir()] == [job.path.name]
    result = finish(store, job)
    store.close()
    store = open_store(min_free_mb=1 << 30)
    assert offer(store, key="k") == job
    assert store.future(job.id).result(0) == result
    assert store.take(1, 0) == []


def test_keys_of_different_origins_and_objects_without_a_key_are_different(open_store, offer) -> None:
    store = open_store()
    jobs = [offer(store, key="k"), offer(store, key="k", origin="dicom"), offer(store), offer(store)]
    assert len({job.id for job in jobs}) == 4


def test_a_full_queue_refuses_and_keeps_nothing(open_store, offer) -> None:
    store = open_store(max_waiting=2)
    offer(store), offer(store)
    for attempt in (lambda: offer(store), store.check_room):
        with pytest.raises(QueueFullError) as caught:
            attempt()
        assert caught.value.retry_after > 0
    assert not list(store.incoming.iterdir())
    store.take(1, 0)  # one that is being decided does not wait
    store.check_room()
    offer(store)


def test_intake_stops_at_the_watermark_and_results_are_still_recorded(open_store, offer, finish, monkeypatch) -> None:
    store = open_store("pacs", min_free_mb=100)
    free = 100 << 20
    monkeypatch.setattr(type(store._spool), "free_bytes", lambda _: free)
    job, other = offer(store), offer(store)
    store.check_room()
    with pytest.raises(StorageFullError):
        store.check_room(1)
    free -= 1
    for attempt in (lambda: offer(store), store.check_room):
        with pytest.raises(StorageFullError) as caught:
            attempt()
        assert caught.value.retry_after > 0
    assert store.status()["full"] is True
    assert not list(store.incoming.iterdir())
    assert len(list(job.path.parent.iterdir())) == 2
    assert store.take(9, 0) == [job, other]
    finish(store, job)
    store.delivered("pacs", job.id)


def test_the_disk_may_fill_up_while_an_object_is_moved(open_store, offer, monkeypatch) -> None:
    store = open_store(min_free_mb=100)
    answers = iter([200 << 20, 99 << 20])
    monkeypatch.setattr(type(store._spool), "free_bytes", lambda _: next(answers))
    with pytest.raises(StorageFullError):
        offer(store)
    assert not list(store._spool.accepted.iterdir())
    assert store.take(1, 0) == []


def test_the_earlier_deadline_counts_and_an_expired_job_is_still_taken(open_store, offer, finish) -> None:
    store = open_store(deadline_s=60.0)
    now = time.time()
    jobs = [offer(store), offer(store, deadline=now - 1), offer(store, deadline=now + 3600)]
    assert [job.expired(time.time()) for job in jobs] == [False, True, False]
    assert [job.expired(now + 61) for job in jobs] == [True, True, True]
    store.close()
    store = open_store()
    assert store.take(9, 0) == jobs  # in their order, with their deadlines
    assert finish(store, jobs[1], status="expired", rows=()).status == "expired"
    assert offer(store).deadline is None


def test_prune_removes_what_everybody_has_and_nothing_else(open_store, offer, finish) -> None:
    store = open_store("pacs", "hook", keep_days=2.0)
    everywhere, half, refused, waiting = jobs = [offer(store, key=f"k{index}") for index in range(4)]
    for job in (everywhere, half, refused):
        finish(store, job)
        store.delivered("pacs", job.id)
    store.delivered("hook", everywhere.id)
    store.postpone("hook", half.id, 0.0, "away")
    store.refused("hook", refused.id, "never")
    now = time.time()
    assert store.prune(now + 1.9 * DAY) == 0
    assert store.prune(now + 2.1 * DAY) == 1
    assert store.prune(now + 1000 * DAY) == 0
    assert store.result(everywhere.id) is None
    assert store.source(everywhere.id) is None
    assert [job.path.exists() for job in jobs] == [False, True, True, True]
    assert store.status()["results"] == 2
    assert offer(store, key="k0").id != everywhere.id  # the key is free again
    store.delivered("hook", half.id)
    store.close()
    store = open_store("pacs", "hook", keep_days=2.0)
    assert store.prune(time.time() + 2.1 * DAY) == 1
    assert store.take(1, 0) == [waiting]
    assert finish(store, waiting).number == 4  # numbers are never used again


def test_prune_goes_through_many_results(open_store, offer, finish) -> None:
    store = open_store(keep_days=0.0)
    for _ in range(230):
        finish(store, offer(store))
    assert store.prune(time.time() + 1) == 230
    assert not list(store._spool.accepted.iterdir())


def test_source_is_the_file_as_long_as_it_is_kept(open_store, offer, finish) -> None:
    store = open_store()
    job = offer(store)
    finish(store, job)
    assert store.source(job.id) == job.path
    job.path.unlink()
    assert store.source(job.id) is None
    assert store.source("0" * 32) is None


def test_status_counts(open_store, offer, finish) -> None:
    store = open_store("pacs")
    assert store.status() == {
        "waiting": 0,
        "oldest_waiting_s": 0.0,
        "in_progress": 0,
        "results": 0,
        "free_mb": store.status()["free_mb"],
        "full": False,
        "destinations": {"pacs": {"waiting": 0, "refused": 0, "oldest_s": 0.0, "last_error": ""}},
    }
    for _ in range(3):
        offer(store)
    [job] = store.take(1, 0)
    assert (store.status()["waiting"], store.status()["in_progress"]) == (2, 1)
    assert 0 <= store.status()["oldest_waiting_s"] < 60
    finish(store, job)
    assert (store.status()["in_progress"], store.status()["results"]) == (0, 1)


def test_close_ends_every_wait_and_later_calls_are_one_clear_error(open_store, offer, finish) -> None:
    store = open_store("pacs")
    job = offer(store)
    store.take(1, 0)
    ended = []

    def waiting() -> None:
        with pytest.raises(TimeoutError):
            store.future(job.id).result(60)
        ended.append("wait")

    threads = [
        threading.Thread(target=waiting),
        threading.Thread(target=lambda: ended.append(store.take(1, 60))),
        threading.Thread(target=lambda: ended.append(store.wait_due("pacs", 60))),
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    incoming = store.incoming
    store.close()
    store.close()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert len(ended) == 3
    assert store.take(1, 0) == []
    with pytest.raises(StoreError, match="closed"):
        finish(store, job)
    with pytest.raises(IntakeError):
        offer(store)
    assert not list(incoming.iterdir())
    assert open_store().take(1, 0) == [job]


def test_eight_threads_lose_nothing_and_share_keys(open_store, offer, finish) -> None:
    store = open_store("pacs", max_waiting=10_000)
    accepted, finished, delivered, stop = [], [], [], threading.Event()
    start = threading.Barrier(4)

    def accepting(thread: int) -> None:
        start.wait()
        for number in range(25):
            accepted.append(offer(store))
            accepted.append(offer(store, key=f"shared {number}"))

    def deciding() -> None:
        while jobs := store.take(3, 0 if stop.is_set() else 0.2):
            for job in jobs:
                with contextlib.suppress(KeyError):  # taken before another thread was faster with its key
                    finished.append(finish(store, job))

    def sending() -> None:
        while not stop.is_set() or store.status()["destinations"]["pacs"]["waiting"]:
            store.wait_due("pacs", 0.05)
            for delivery in store.due("pacs", time.time(), 5):
                store.delivered("pacs", delivery.result.id)
                delivered.append(delivery.result.id)

    threads = [threading.Thread(target=accepting, args=[number]) for number in range(4)]
    others = [threading.Thread(target=deciding) for _ in range(3)] + [threading.Thread(target=sending)]
    for thread in threads + others:
        thread.start()
    for thread in threads + others[:3]:
        thread.join(60)
    deciding()  # what came after the last thread has ended
    stop.set()
    others[3].join(60)
    identifiers = {job.id for job in accepted}
    assert len(accepted) == 200
    assert len(identifiers) == 125
    assert sorted(result.id for result in finished) == sorted(identifiers)
    assert sorted(result.number for result in finished) == list(range(1, 126))
    assert sorted(delivered) == sorted(identifiers)
    assert {path.stem for path in store._spool.accepted.iterdir()} == identifiers
