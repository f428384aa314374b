"""Failures of the disk: at each single step by injection, and a really full file system where one can be mounted."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from echoquad_serve.config import StoreConfig
from echoquad_serve.errors import IntakeError, StorageFullError, StoreError
from echoquad_serve.queue import JobStore
from echoquad_serve.records import IncomingObject, Job


class Faults:
    """Raise an error at the n-th step from now at which the disk could fail, and count the steps.

    How an error comes: "once", "lasting" (every later step fails too), or "done" (the step succeeds nevertheless).
    """

    def __init__(self) -> None:
        self.left: int | None = None
        self.steps = 0
        self.full = True
        self.how = "once"

    def arm(self, step: int, *, full: bool, how: str) -> None:
        self.left, self.full, self.how, self.steps = step, full, how, 0

    def wrap(self, function: Callable[..., Any], *, sqlite: bool = False) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if self.left is None:
                return function(*arguments, **options)
            self.steps += 1
            self.left -= 1
            if self.left >= 0 or (self.left < -1 and self.how != "lasting"):
                return function(*arguments, **options)
            if self.how == "done":
                function(*arguments, **options)
            if not sqlite:
                raise OSError(errno.ENOSPC if self.full else errno.EIO, "injected")
            error = sqlite3.OperationalError("database or disk is full" if self.full else "disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL if self.full else sqlite3.SQLITE_IOERR_FSYNC
            raise error

        return wrapped


class FaultyConnection:
    """A connection whose statements fail by `Faults`."""

    def __init__(self, connection: sqlite3.Connection, faults: Faults) -> None:
        self._connection = connection
        self.execute = faults.wrap(connection.execute, sqlite=True)
        self.executemany = faults.wrap(connection.executemany, sqlite=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


@pytest.fixture
def faults(monkeypatch) -> Faults:
    made = Faults()
    monkeypatch.setattr(os, "fsync", made.wrap(os.fsync))
    monkeypatch.setattr(Path, "replace", made.wrap(Path.replace))
    monkeypatch.setattr(shutil, "disk_usage", made.wrap(shutil.disk_usage))
    return made


def spooled(store: JobStore) -> set[str]:
    assert not list(store.incoming.iterdir())
    return {path.name for path in store._spool.accepted.iterdir()}


def each_step(store: JobStore, faults: Faults, *, full: bool, how: str) -> Iterator[int]:
    """Arm the faults for the first step, the second, and so on, until a run has fewer steps."""
    store._database._connection = FaultyConnection(store._database._connection, faults)
    step = 0
    while True:
        faults.arm(step, full=full, how=how)
        yield step
        faults.left = None
        if faults.steps <= step:
            return
        step += 1


@pytest.mark.parametrize("how", ["once", "lasting", "done"])
@pytest.mark.parametrize("full", [True, False], ids=["full", "io-error"])
def test_accept_is_whole_or_nothing_whichever_step_fails(open_store, offer, faults, full, how) -> None:
    store = open_store()
    accepted: list[Job] = []
    refused = 0
    for step in each_step(store, faults, full=full, how=how):
        try:
            accepted.append(offer(store, key=f"k{step}"))
        except IntakeError as error:
            refused += 1
            assert isinstance(error, StorageFullError) == full
            assert "\n" not in str(error)
        faults.left = None
        assert spooled(store) == {job.path.name for job in accepted}
        assert store.status()["waiting"] == len(accepted)
    assert refused >= 9  # checks, syncs, the move, and the statements of the transaction
    accepted.append(offer(store, key="k3"))  # a refused object may be offered again
    store.close()
    store = open_store()
    assert store.take(99, 0) == accepted
    assert not (store.incoming.parent / "unclaimed").exists()


@pytest.mark.parametrize("how", ["once", "lasting", "done"])
@pytest.mark.parametrize("full", [True, False], ids=["full", "io-error"])
def test_finish_may_be_repeated_whichever_step_fails(open_store, offer, finish, faults, full, how) -> None:
    store = open_store("pacs", "hook")
    jobs = [offer(store) for _ in range(30)]
    store.take(30, 0)
    told: list[int] = []
    store.on_result.append(lambda result: told.append(result.number))
    refused = 0
    for step in each_step(store, faults, full=full, how=how):
        try:
            finish(store, jobs[step])
        except (StorageFullError, StoreError) as error:
            refused += 1
            assert isinstance(error, StorageFullError) == full
            faults.left = None
            assert finish(store, jobs[step]).number == step + 1
        faults.left = None
        assert told == list(range(1, step + 2))
        assert store.status()["in_progress"] == 30 - len(told)
    assert refused >= 6
    for destination in ("pacs", "hook"):
        assert [delivery.result.number for delivery in store.due(destination, time.time(), 99)] == told
        assert store.status()["destinations"][destination]["waiting"] == len(told)
    store.close()
    store = open_store("pacs", "hook")
    assert store.take(99, 0) == jobs[len(told) :]
    assert [result.id for result in store.results(after=0)][::-1] == [job.id for job in jobs[: len(told)]]


@pytest.mark.parametrize("full", [True, False], ids=["full", "io-error"])
def test_records_of_deliveries_fail_whole(open_store, offer, finish, faults, full) -> None:
    store = open_store("pacs")
    results = [finish(store, offer(store)) for _ in range(30)]
    refused = 0
    for step in each_step(store, faults, full=full, how="once"):
        identifier = results[step].id
        try:
            store.postpone("pacs", identifier, 0.0, "away")
            store.delivered("pacs", identifier)
        except (StorageFullError, StoreError) as error:
            assert isinstance(error, StorageFullError) == full
            refused += 1
            faults.left = None
            assert len(store.due("pacs", time.time(), 99)) == 30 - step
            store.delivered("pacs", identifier)
        faults.left = None
        assert store.status()["destinations"]["pacs"]["waiting"] == 29 - step
        assert len(store.due("pacs", time.time(), 99)) == 29 - step
    assert refused >= 8


def test_prune_removes_no_row_whose_removal_fails(open_store, offer, finish, faults) -> None:
    store = open_store(keep_days=0.0)
    for _ in range(3):
        finish(store, offer(store))
    refused = 0
    for _ in each_step(store, faults, full=False, how="once"):
        try:
            store.prune(time.time() + 1)
        except StoreError:
            refused += 1
            faults.left = None
            assert len(store.results()) == store.status()["results"]
    assert refused >= 5
    faults.left = None
    store.prune(time.time() + 1)
    assert (store.results(), spooled(store)) == ([], set())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount a tmpfs")
    except FileNotFoundError:
        pytest.skip("needs mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_refuses_objects_and_keeps_every_accepted_one(small_disk: Path, offer, finish) -> None:
    store = JobStore(StoreConfig(folder=small_disk / "store", min_free_mb=0), ["pacs"])
    filler = small_disk / "filler"

    def fill(size: int) -> None:
        with suppress(OSError), filler.open("ab", buffering=0) as stream:
            while stream.write(b"x" * size) == size:
                pass

    try:
        for _ in range(3):  # full, empty, full, ...
            ready = [store.incoming / f"{number}" for number in range(60)]  # received before the disk is full
            for path in ready:
                path.write_bytes(b"x" * 100)
            jobs = [store.accept(IncomingObject(ready.pop(), "http", "first")) for _ in range(30)]
            fill(4096)
            refused = 0
            for path in ready:
                try:
                    jobs.append(store.accept(IncomingObject(path, "http", "x" * 3000)))
                except StorageFullError:
                    refused += 1
            assert refused > 0
            assert spooled(store) == {job.path.name for job in jobs}
            fill(4096)
            assert store.take(99, 0) == jobs
            failed = []
            for job in jobs:
                try:
                    finish(store, job, rows=({"file": "a", "text": "x" * 20_000},))
                except StorageFullError:
                    failed.append(job)
            assert failed
            assert store.status()["in_progress"] == len(failed)
            filler.unlink()
            assert [finish(store, job).id for job in failed] == [job.id for job in failed]
            for job in jobs:
                store.delivered("pacs", job.id)
            assert store.prune(time.time() + 1e9) == len(jobs)
        job = offer(store)
        store.close()
        store = JobStore(StoreConfig(folder=small_disk / "store", min_free_mb=0), ["pacs"])
        assert store.take(9, 0) == [job]
    finally:
        store.close()


def test_the_watermark_of_a_small_disk_stops_intake_before_it_is_full(small_disk: Path, offer, finish) -> None:
    store = JobStore(StoreConfig(folder=small_disk / "store", min_free_mb=2), ["pacs"])
    try:
        jobs = []
        with pytest.raises(StorageFullError, match="intake needs 2 MiB"):
            while True:
                jobs.append(offer(store, b"x" * 50_000))
        assert len(jobs) > 5
        for job in store.take(99, 0):
            finish(store, job, rows=({"file": "a", "text": "x" * 1000},))
            store.delivered("pacs", job.id)
    finally:
        store.close()
