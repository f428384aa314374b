"""A job may be taken before its acceptance is on the disk, and has no result before that."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from echoquad_serve.errors import IntakeError
from echoquad_serve.queue import spool as spool_module


class SlowDisk:
    """A disk whose flush of an accepted file takes until `release`, and then may fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.release, self.fails = threading.Event(), False
        sync = spool_module._sync

        def wait_and_sync(path) -> None:
            assert self.release.wait(10)
            if self.fails:
                raise OSError(5, "Input/output error")
            sync(path)

        self.begin = lambda: monkeypatch.setattr(spool_module, "_sync", wait_and_sync)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    return SlowDisk(monkeypatch)


def test_a_job_is_taken_during_its_acceptance_and_finished_after_it(open_store, offer, finish, disk) -> None:
    store = open_store()
    told = []
    store.on_result.append(told.append)
    disk.begin()
    with ThreadPoolExecutor() as pool:
        accepted = pool.submit(offer, store, b"frame")
        (job,) = store.take(1, 10)
        assert job.path.read_bytes() == b"frame"
        recorded = pool.submit(finish, store, job)
        with pytest.raises(TimeoutError):
            recorded.result(0.1)
        assert not accepted.done()
        assert not told
        disk.release.set()
        assert accepted.result(10) == job
        assert recorded.result(10) == store.result(job.id) == told[0]
    assert (store.status()["waiting"], store.status()["in_progress"], store.status()["results"]) == (0, 0, 1)


@pytest.mark.parametrize("taken", [True, False])
def test_a_job_whose_acceptance_fails_has_no_result(open_store, offer, finish, disk, taken) -> None:
    store = open_store()
    told = []
    store.on_result.append(told.append)
    disk.begin()
    disk.fails = True
    with ThreadPoolExecutor() as pool:
        accepted = pool.submit(offer, store, key="one")
        recorded = pool.submit(finish, store, store.take(1, 10)[0]) if taken else None
        disk.release.set()
        with pytest.raises(IntakeError):
            accepted.result(10)
        if recorded is not None:
            with pytest.raises(KeyError):
                recorded.result(10)
    assert not told
    assert store.take(1, 0) == []
    assert (store.status()["waiting"], store.status()["in_progress"], store.status()["results"]) == (0, 0, 0)
    disk.fails = False
    again = offer(store, key="one")
    assert store.take(1, 0) == [again]
    assert finish(store, again).number == 1
    assert [path.name for path in (store.incoming.parent / "spool").iterdir()] == [again.path.name]


def test_one_of_two_objects_with_one_key_is_withdrawn(open_store, offer, finish, disk) -> None:
    store = open_store()
    disk.begin()
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(offer, store, key="one") for _ in range(2)]
        jobs = store.take(1, 10) + store.take(1, 10)
        assert len({job.id for job in jobs}) == 2
        disk.release.set()
        (kept,) = {one.result(10).id for one in both}
        for job in jobs:
            if job.id == kept:
                assert finish(store, job).number == 1
            else:
                with pytest.raises(KeyError):
                    finish(store, job)
    assert (store.status()["waiting"], store.status()["in_progress"], store.status()["results"]) == (0, 0, 1)
    store.close()
    assert open_store().take(9, 0) == []


def test_a_store_that_closes_during_an_acceptance_has_not_accepted_it(open_store, offer, finish, disk) -> None:
    store = open_store()
    disk.begin()
    with ThreadPoolExecutor() as pool:
        accepted = pool.submit(offer, store)
        (job,) = store.take(1, 10)
        recorded = pool.submit(finish, store, job)
        store.close()
        disk.release.set()
        for future, error in ((accepted, IntakeError), (recorded, KeyError)):
            with pytest.raises(error):
                future.result(10)
    assert open_store().take(9, 0) == []
