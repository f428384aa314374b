"""kill -9 of a process that accepts, decides and delivers: what it acknowledged ends in one result, in order."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from echoquad_serve.config import StoreConfig
from echoquad_serve.queue import JobStore

SERVICE = """
import itertools, os, sys, threading, time
from pathlib import Path
from echoquad_serve.config import StoreConfig
from echoquad_serve.queue import JobStore
from echoquad_serve.records import IncomingObject, Result

folder, run = Path(sys.argv[1]), sys.argv[2]
store = JobStore(StoreConfig(folder=folder, max_waiting=100, min_free_mb=0), ["pacs", "hook"])
done = threading.Event()

def say(*words):  # the acknowledgement, which a kill cannot take back
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def accept(thread):
    for number in itertools.count():
        name = f"{run}-{thread}-{number}"
        path = store.incoming / f"{name}.png"
        path.write_bytes(name.encode())
        while True:
            try:
                say("try", name)
                job = store.accept(IncomingObject(path, "http", name, key=name if number % 2 else ""))
                break
            except Exception:
                time.sleep(0.01)
                path.write_bytes(name.encode())
        say("accepted", job.id, name, job.path.name)

def decide():
    while True:
        for job in store.take(4, 1):
            assert job.path.read_bytes() == job.name.encode()
            say("taken", job.id)
            result = store.finish(Result(job.id, "done", "http", job.name, 0, time.time(), rows=({"file": job.name},)))
            say("finished", result.id, result.number)

def send(destination):
    while True:
        store.wait_due(destination, 1)
        for delivery in store.due(destination, time.time(), 3):
            say("sent", destination, delivery.result.id)
            store.delivered(destination, delivery.result.id)
            say("delivered", destination, delivery.result.id)

threads = [threading.Thread(target=accept, args=[n]) for n in range(2)] + [threading.Thread(target=decide)]
threads += [threading.Thread(target=send, args=[d]) for d in ("pacs", "hook")]
for thread in threads:
    thread.daemon = True
    thread.start()
say("started")
for thread in threads:
    thread.join()
"""


def run_until_killed(folder: Path, run: int, seconds: float) -> list[list[str]]:
    """Run the service, kill it some seconds after its start, and return what it has said."""
    command = [sys.executable, "-c", SERVICE, str(folder), str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        said: list[bytes] = []
        errors: list[bytes] = []
        started = threading.Event()

        def listen() -> None:
            for line in process.stdout:
                said.append(line)
                started.set()
            started.set()

        readers = [
            threading.Thread(target=listen),
            threading.Thread(target=lambda: errors.append(process.stderr.read())),
        ]
        for reader in readers:
            reader.start()
        assert started.wait(60)
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGKILL)
        for reader in readers:
            reader.join()
    assert all("moved to 'unclaimed'" in line for line in errors[0].decode().splitlines()), errors[0].decode()
    return [line.decode().split() for line in said if line.endswith(b"\n")]


def check(folder: Path, kills: int, seconds: float) -> None:
    chance = random.Random(15)
    said: list[list[str]] = []
    taken_by_run: list[list[str]] = []
    for run in range(kills):
        one = run_until_killed(folder, run, chance.uniform(0, seconds))
        said += one
        taken_by_run.append([words[1] for words in one if words[0] == "taken"])

    accepted = [words[1] for words in said if words[0] == "accepted"]
    finished = dict(words[1:] for words in said if words[0] == "finished")
    assert len(accepted) > kills
    assert len(finished) > kills

    store = JobStore(StoreConfig(folder=folder, min_free_mb=0), ["pacs", "hook"])
    try:
        assert not list(store.incoming.iterdir())
        results = store.results(limit=1 << 40)
        by_id = {result.id: result for result in results}
        opened = [row[0] for row in store._database.read("SELECT id FROM jobs WHERE done = 0 ORDER BY seq")]
        waiting = []
        while jobs := store.take(1 << 30, 0):  # one during which the service was killed is taken alone
            waiting += jobs
        assert [job.id for job in waiting] == opened
        # What was acknowledged has one result, or waits for it; each is there once.
        assert len(by_id) == len(results)
        assert len({job.id for job in waiting} | set(by_id)) == len(waiting) + len(results)
        assert set(accepted) <= {job.id for job in waiting} | set(by_id)
        # A result that was announced is the recorded one.
        assert finished.items() <= {result.id: str(result.number) for result in results}.items()
        # First in, first out: results and jobs are in the order of acceptance, across all processes.
        order = [result.id for result in reversed(results)] + [job.id for job in waiting]
        assert order == [row[0] for row in store._database.read("SELECT id FROM jobs ORDER BY seq")]
        names = [one.name.split("-") for one in [*reversed(results), *waiting]]
        places = [(int(run), thread, int(number)) for run, thread, number in names]
        assert [place[0] for place in places] == sorted(place[0] for place in places)
        for thread in "01":
            own = [place for place in places if place[1] == thread]
            assert own == sorted(set(own))
        for taken in taken_by_run:
            assert len(set(taken)) == len(taken)
            known = [one for one in taken if one in order]
            assert known == sorted(known, key=order.index)
            assert set(taken[:-1]) <= set(order)  # the acceptance of the last one may not be on the disk
        # Every destination has each result, or it is outstanding there; none that was recorded is sent again.
        for destination in ("pacs", "hook"):
            recorded = {words[2] for words in said if words[:2] == ["delivered", destination]}
            sent = {words[2] for words in said if words[:2] == ["sent", destination]}
            outstanding = {delivery.result.id for delivery in store.due(destination, time.time(), 1 << 40)}
            assert not recorded & outstanding
            assert set(by_id) <= sent | outstanding
            assert set(by_id) - outstanding <= sent
        # A file for each job, with its content, and no other.
        kept = {path.stem: path.read_bytes() for path in store._spool.accepted.iterdir()}
        assert kept == {one.id: one.name.encode() for one in [*results, *waiting]}
        unclaimed = folder / "unclaimed"
        unacknowledged = [path.stem for path in unclaimed.iterdir()] if unclaimed.exists() else []
        assert not set(unacknowledged) & set(accepted)
        assert len(unacknowledged) <= 2 * kills  # two threads accept
    finally:
        store.close()


def test_ten_kills_lose_nothing(tmp_path: Path) -> None:
    check(tmp_path / "store", 10, 0.15)


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing(tmp_path: Path) -> None:
    check(tmp_path / "store", 100, 0.4)
