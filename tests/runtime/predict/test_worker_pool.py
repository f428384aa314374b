"""Tests of the worker pool: order, parallelism, back-pressure, time limits and shutdown."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from echoquad_runtime.contract import Contract
from echoquad_runtime.engine.io_binding import InferenceOutput
from echoquad_runtime.engine.slot_pool import SlotPool
from echoquad_runtime.errors import BundleError, FrameError, FrameReadError
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.frames.isolation.reader_pool import ReaderPool
from echoquad_runtime.predict.worker_pool import FrameTask, WorkerPool

CONTRACT = Contract(classes=("dark", "light"), input_size=8)


def infer(quadrants: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    level = quadrants[:, 0, 0, 0].astype(np.float32)
    both = np.stack([level, -level], axis=1)
    return both, both


def postprocess(tasks: Sequence[FrameTask], flags: Sequence[tuple[str, ...]], answers: InferenceOutput) -> list[Any]:
    assert answers.maps is None
    p = answers.probabilities
    assert len(tasks) == len(flags) == len(p)
    return [(task.name, int(row[0, 0]), flag) for task, flag, row in zip(tasks, flags, p, strict=True)]


def make_pool(
    workers: int = 3,
    frames: int = 2,
    *,
    concurrent: int = 99,
    time_limit: float = 30.0,
    infer: Callable[..., Any] = infer,
    postprocess: Callable[..., Any] = postprocess,
    add_worker: bool = False,
) -> WorkerPool[Any]:
    engine: Any = SimpleNamespace(contract=CONTRACT, infer=infer, run_limit=threading.Semaphore(concurrent))
    slots = SlotPool(engine, frames)
    return WorkerPool(slots, postprocess, workers=workers, time_limit=time_limit, add_worker=add_worker)


def task(number: int, load: Callable[[], object] = lambda: None) -> FrameTask:
    def into(slot: np.ndarray) -> tuple[str, ...]:
        load()
        slot[:] = number % 256
        return (f"flag-{number}",)

    return FrameTask(str(number), into)


def refuse() -> None:
    raise FrameError("no good")


def workers_alive() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "echoquad-worker"]


@pytest.fixture(autouse=True)
def _every_worker_ends() -> Iterator[None]:
    yield
    assert workers_alive() == []


@pytest.mark.parametrize(("workers", "frames"), [(1, 1), (1, 4), (3, 1), (4, 3), (8, 16)])
def test_results_keep_input_order(workers: int, frames: int) -> None:
    rng = random.Random(workers)
    items: list[FrameTask | Failure] = []
    expected: list[object] = []
    for number in range(120):
        pause = rng.choice([0, 0, 0, 0.001, 0.01])
        kind = rng.random()
        if kind < 0.1:
            failure = Failure(str(number), FrameError("found no good"))
            items.append(failure)
            expected.append(failure)
        elif kind < 0.2:
            items.append(task(number, refuse))
            expected.append(str(number))
        else:
            items.append(task(number, lambda pause=pause: time.sleep(pause)))
            expected.append((str(number), number, (f"flag-{number}",)))
    found = list(make_pool(workers, frames).run(items))
    names = [one.file if isinstance(one, Failure) and one not in items else one for one in found]
    assert names == expected


def test_workers_load_in_parallel() -> None:
    barrier = threading.Barrier(3, timeout=10)  # breaks if fewer than three load at a time
    assert len(list(make_pool(3, 1).run(task(number, barrier.wait) for number in range(9)))) == 9


@pytest.mark.parametrize(("workers", "frames"), [(1, 1), (2, 3), (4, 2)])
def test_back_pressure_bounds_items_in_flight(workers: int, frames: int) -> None:
    taken = 0

    def endless() -> Iterator[FrameTask]:
        nonlocal taken
        while True:
            taken += 1
            yield task(taken)

    results = make_pool(workers, frames).run(endless())
    assert taken == 0
    for given in range(1, 40):
        next(results)
        assert taken <= given + 2 * workers * frames
    results.close()


def test_engine_bounds_concurrent_inferences() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def counted(quadrants: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1
        return infer(quadrants)

    assert len(list(make_pool(6, 1, concurrent=2, infer=counted).run(map(task, range(60))))) == 60
    assert most == 2


# ---------------------------------------------------------------------------------------------- files that hang


@pytest.mark.parametrize(
    ("workers", "frames", "hanging"), [(1, 1, {3}), (1, 4, {0}), (2, 3, {1, 2, 8}), (2, 2, {0, 3, 4})]
)
def test_hanging_file_becomes_failure_and_others_finish(workers: int, frames: int, hanging: set[int]) -> None:
    release = threading.Event()
    items = [task(number, release.wait if number in hanging else lambda: None) for number in range(20)]
    begin = time.monotonic()
    found = list(make_pool(workers, frames, time_limit=0.15).run(items))
    assert time.monotonic() - begin < 0.15 * (len(hanging) + 1) + 3
    for number, one in enumerate(found):
        if number in hanging:
            assert isinstance(one, Failure)
            assert one.file == str(number)
            assert isinstance(one.error, FrameReadError)
            assert "longer than 0.15 seconds" in str(one.error)
        else:
            assert one == (str(number), number, (f"flag-{number}",))
    assert len(found) == 20
    assert len(workers_alive()) == len(hanging)  # still waiting, without effect on others
    release.set()
    for thread in workers_alive():
        thread.join(5)


def test_abandoned_worker_that_returns_changes_nothing() -> None:
    release = threading.Event()

    def items() -> Iterator[FrameTask]:
        yield task(0, lambda: release.wait(10))
        for number in range(1, 200):
            if number == 100:
                release.set()
            yield task(number, lambda: time.sleep(0.001))

    found = list(make_pool(2, 4, time_limit=0.1).run(items()))
    assert isinstance(found[0], Failure)
    assert found[1:] == [(str(number), number % 256, (f"flag-{number}",)) for number in range(1, 200)]


def test_time_limit_is_per_file() -> None:
    slow = [task(number, lambda: time.sleep(0.1)) for number in range(6)]  # their sum exceeds the limit
    assert not any(isinstance(one, Failure) for one in make_pool(1, 6, time_limit=0.4).run(slow))


# ---------------------------------------------------------------------------------------------- shutdown


def test_engine_error_is_raised_to_the_consumer() -> None:
    def broken(quadrants: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if (quadrants == 13).any():
            raise BundleError("out of memory")
        return infer(quadrants)

    found = []
    with pytest.raises(BundleError, match="out of memory"):
        for one in make_pool(2, 1, infer=broken).run(map(task, range(40))):
            found.append(one[1])  # noqa: PERF401 - keeps the results before the error
    assert found == list(range(13))


@pytest.mark.parametrize("error", [RuntimeError("the camera is gone"), KeyboardInterrupt()])
def test_input_error_is_raised_to_the_consumer(error: BaseException) -> None:
    def items() -> Iterator[FrameTask]:
        yield task(1)
        raise error

    with pytest.raises(type(error)):
        list(make_pool().run(items()))


def test_closing_the_iterator_ends_all_workers() -> None:
    results = make_pool(4, 2).run(map(task, range(10_000)))
    for _ in range(5):
        next(results)
    assert workers_alive()
    results.close()
    assert workers_alive() == []


def test_empty_input_starts_no_worker() -> None:
    assert list(make_pool().run([])) == []


def test_starts_at_most_one_worker_per_chunk() -> None:
    names: set[int] = set()
    list(make_pool(16, 4).run(task(number, lambda: names.add(threading.get_ident())) for number in range(5)))
    assert len(names) <= 2


@pytest.mark.parametrize(("workers", "reading", "threads"), [(1, True, 1), (2, False, 2), (2, True, 3), (4, True, 5)])
def test_one_more_worker_starts_while_reader_processes_decode(
    workers: int, reading: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReaderPool, "is_reading", lambda pool, thread: reading)
    alive: list[int] = []

    def load() -> None:
        time.sleep(0.002)
        alive.append(len(workers_alive()))

    results = list(make_pool(workers, 1, add_worker=True).run(task(number, load) for number in range(60)))
    assert [name for name, _, _ in results] == [str(number) for number in range(60)]
    assert max(alive) == threads
