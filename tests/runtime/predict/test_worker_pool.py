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
from echoquad_runtime.predict.worker_pool import Pipeline, Source

CONTRACT = Contract(classes=("dark", "light"), input_size=8)


def infer(quadrants: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    level = quadrants[:, 0, 0, 0].astype(np.float32)
    both = np.stack([level, -level], axis=1)
    return both, both


def judge(sources: Sequence[Source], flags: Sequence[tuple[str, ...]], found: InferenceOutput) -> list[Any]:
    assert found.maps is None  # none were asked for
    answers = found.probabilities
    assert len(sources) == len(flags) == len(answers)
    return [(one.name, int(answer[0, 0]), flag) for one, flag, answer in zip(sources, flags, answers, strict=True)]


def pipeline(
    workers: int = 3,
    frames: int = 2,
    *,
    at_once: int = 99,
    time_limit: float = 30.0,
    infer: Callable[..., Any] = infer,
    judge: Callable[..., Any] = judge,
) -> Pipeline[Any]:
    engine: Any = SimpleNamespace(contract=CONTRACT, infer=infer, run_limit=threading.Semaphore(at_once))
    return Pipeline(SlotPool(engine, frames), judge, workers=workers, time_limit=time_limit)


def source(number: int, load: Callable[[], object] = lambda: None) -> Source:
    def into(slot: np.ndarray) -> tuple[str, ...]:
        load()
        slot[:] = number % 256
        return (f"flag-{number}",)

    return Source(str(number), into)


def refuse() -> None:
    raise FrameError("no good")


def workers_alive() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "echoquad-worker"]


@pytest.fixture(autouse=True)
def _no_worker_outlives_a_test() -> Iterator[None]:
    yield
    assert workers_alive() == []


@pytest.mark.parametrize(("workers", "frames"), [(1, 1), (1, 4), (3, 1), (4, 3), (8, 16)])
def test_order_is_kept_however_long_each_takes(workers: int, frames: int) -> None:
    rng = random.Random(workers)
    items: list[Source | Failure] = []
    expected: list[object] = []
    for number in range(120):
        pause = rng.choice([0, 0, 0, 0.001, 0.01])
        kind = rng.random()
        if kind < 0.1:
            failure = Failure(str(number), FrameError("found no good"))
            items.append(failure)
            expected.append(failure)
        elif kind < 0.2:
            items.append(source(number, refuse))
            expected.append(str(number))
        else:
            items.append(source(number, lambda pause=pause: time.sleep(pause)))
            expected.append((str(number), number, (f"flag-{number}",)))
    found = list(pipeline(workers, frames).run(items))
    names = [one.file if isinstance(one, Failure) and one not in items else one for one in found]
    assert names == expected


def test_work_is_done_side_by_side() -> None:
    together = threading.Barrier(3, timeout=10)  # broken, should fewer than three load at a time
    assert len(list(pipeline(3, 1).run(source(number, together.wait) for number in range(9)))) == 9


@pytest.mark.parametrize(("workers", "frames"), [(1, 1), (2, 3), (4, 2)])
def test_what_is_taken_ahead_is_bounded(workers: int, frames: int) -> None:
    taken = 0

    def endless() -> Iterator[Source]:
        nonlocal taken
        while True:
            taken += 1
            yield source(taken)

    results = pipeline(workers, frames).run(endless())
    assert taken == 0
    for given in range(1, 40):
        next(results)
        assert taken <= given + 2 * workers * frames
    results.close()


def test_no_more_than_allowed_run_the_network_at_once() -> None:
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

    assert len(list(pipeline(6, 1, at_once=2, infer=counted).run(map(source, range(60))))) == 60
    assert most == 2


# ---------------------------------------------------------------------------------------------- what hangs


@pytest.mark.parametrize(
    ("workers", "frames", "hanging"), [(1, 1, {3}), (1, 4, {0}), (2, 3, {1, 2, 8}), (2, 2, {0, 3, 4})]
)
def test_a_file_that_hangs_is_given_up_and_nothing_else(workers: int, frames: int, hanging: set[int]) -> None:
    release = threading.Event()
    items = [source(number, release.wait if number in hanging else lambda: None) for number in range(20)]
    begin = time.monotonic()
    found = list(pipeline(workers, frames, time_limit=0.15).run(items))
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
    assert len(workers_alive()) == len(hanging)  # still waiting, and in nobody's way
    release.set()
    for thread in workers_alive():
        thread.join(5)


def test_a_worker_that_was_given_up_spoils_nothing_when_it_comes_back() -> None:
    release = threading.Event()

    def items() -> Iterator[Source]:
        yield source(0, lambda: release.wait(10))
        for number in range(1, 200):
            if number == 100:
                release.set()
            yield source(number, lambda: time.sleep(0.001))

    found = list(pipeline(2, 4, time_limit=0.1).run(items()))
    assert isinstance(found[0], Failure)
    assert found[1:] == [(str(number), number % 256, (f"flag-{number}",)) for number in range(1, 200)]


def test_slow_files_within_the_limit_are_no_failures() -> None:
    slow = [source(number, lambda: time.sleep(0.1)) for number in range(6)]  # together above the limit
    assert not any(isinstance(one, Failure) for one in pipeline(1, 6, time_limit=0.4).run(slow))


# ---------------------------------------------------------------------------------------------- ends


def test_an_engine_that_fails_is_told_where_its_results_are_awaited() -> None:
    def broken(quadrants: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if (quadrants == 13).any():
            raise BundleError("out of memory")
        return infer(quadrants)

    found = []
    with pytest.raises(BundleError, match="out of memory"):
        for one in pipeline(2, 1, infer=broken).run(map(source, range(40))):
            found.append(one[1])  # noqa: PERF401 - what came before it was raised
    assert found == list(range(13))


@pytest.mark.parametrize("error", [RuntimeError("the camera is gone"), KeyboardInterrupt()])
def test_an_input_that_fails(error: BaseException) -> None:
    def items() -> Iterator[Source]:
        yield source(1)
        raise error

    with pytest.raises(type(error)):
        list(pipeline().run(items()))


def test_whoever_stops_early_leaves_no_worker() -> None:
    results = pipeline(4, 2).run(map(source, range(10_000)))
    for _ in range(5):
        next(results)
    assert workers_alive()
    results.close()
    assert workers_alive() == []


def test_nothing_to_do_starts_no_worker() -> None:
    assert list(pipeline().run([])) == []


def test_no_more_workers_are_started_than_there_are_chunks() -> None:
    names: set[int] = set()
    list(pipeline(16, 4).run(source(number, lambda: names.add(threading.get_ident())) for number in range(5)))
    assert len(names) <= 2
