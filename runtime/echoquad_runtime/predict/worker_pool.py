"""The worker pool: threads that take frames from file to prediction, with results in input order.

Each worker takes a chunk of frames through all stages: read, decode, quadrants, inference, vote. Pillow, zlib and
onnxruntime release Python's interpreter lock, so workers run in parallel: while one waits for the disk another
computes, and no core waits for a hand-over between stages. Measured with a ResNet-18 at 224 pixels on two cores, two
workers with single-threaded inference take 0.93 of the time of one inference on two threads, without decoding.

Back-pressure: at most two chunks per worker are in flight. A worker may read in its own thread or wait for a reader
process, which has a time limit of its own. A read that hangs in the thread, on a dead network disk for example, cannot
be interrupted from Python. After the time limit its worker is abandoned, another worker takes its place, and the frame
becomes a failure.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from echoquad_runtime.engine.io_binding import InferenceOutput
from echoquad_runtime.engine.slot_pool import SlotPool
from echoquad_runtime.errors import FrameError
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.frames.isolation.limits import timeout_error
from echoquad_runtime.frames.isolation.reader_pool import reader_pool
from echoquad_runtime.frames.sources import Flags

__all__ = ["FrameTask", "WorkerPool"]

_Result = TypeVar("_Result")

_CHUNKS_PER_WORKER: Final = 2  # in flight: one that is processed, one that waits
_MAX_FAILURES: Final = 64  # in a chunk, if input after input fails
_JOIN_SECONDS: Final = 5.0  # time for workers to finish their inference at the end
_STOP_SECONDS: Final = 0.2  # between two attempts to end what they read


@dataclass(frozen=True, slots=True)
class FrameTask:
    """A frame to process.

    Attributes
    ----------
    name
        The frame's name in the results.
    load
        Writes the frame's quadrants to uint8 [4, 1, S, S] and returns its flags; raises a FrameError if it cannot.
    on_decision
        Called with the frame's prediction.
    """

    name: str
    load: Callable[[npt.NDArray[np.uint8]], Flags]
    on_decision: Callable[[Any], object] | None = None


@dataclass(eq=False)
class _Chunk(Generic[_Result]):
    items: Sequence[FrameTask | Failure]
    results: list[_Result | Failure] = field(default_factory=list)
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    worker: threading.Thread = field(default_factory=threading.current_thread)
    loading: tuple[int, float] | None = None  # index of the item that is read, and since when
    abandoned: bool = False


class WorkerPool(Generic[_Result]):
    """Threads that turn frames into results.

    Parameters
    ----------
    slots
        Run the network. A chunk has as many frames as a batch of theirs, from any files and folders.
    postprocess
        Returns the results of tasks, given their flags and the network's answers: one each, in order.
    workers
        Number of threads.
    add_worker
        Whether several threads become one more while reader processes decode.
    time_limit
        Seconds for reading and decoding one file.
    frames
        Frames per chunk, at most the batch size of `slots`; None is that batch size.
    """

    def __init__(
        self,
        slots: SlotPool,
        postprocess: Callable[[Sequence[FrameTask], Sequence[Flags], InferenceOutput], Sequence[_Result | Failure]],
        *,
        workers: int,
        time_limit: float,
        frames: int | None = None,
        add_worker: bool = False,
    ) -> None:
        self._slots, self._postprocess = slots, postprocess
        self._add_worker = add_worker and workers > 1
        self._workers, self._frames, self._time_limit = workers, frames or slots.frames, time_limit

    def run(self, items: Iterable[FrameTask | Failure]) -> Iterator[_Result | Failure]:
        """Yield a result for every task, and the failures among `items` unchanged, in order.

        `items` is consumed in the caller's thread, at most a few chunks ahead of the results.

        Raises
        ------
        BundleError
            If the engine fails.
        """
        queue: SimpleQueue[_Chunk[_Result] | None] = SimpleQueue()
        closing = threading.Event()
        workers: list[threading.Thread] = []
        chunks: deque[_Chunk[_Result]] = deque()
        items = iter(items)

        def start_worker() -> None:
            # A daemon thread: a worker that hangs on a dead disk must not keep the process from exiting.
            worker = threading.Thread(target=self._work, args=(queue, closing), name="echoquad-worker", daemon=True)
            worker.start()
            workers.append(worker)

        try:
            while True:
                while len(chunks) < _CHUNKS_PER_WORKER * self._workers and (taken := self._next_items(items)):
                    chunks.append(_Chunk(taken))
                    queue.put(chunks[-1])
                    if len(workers) < self._workers or self._one_more_helps(workers):
                        start_worker()
                if not chunks:
                    return
                while not chunks[0].done.wait(self._seconds_until_timeout(chunks)):
                    for index, chunk in enumerate(chunks):
                        if self._abandon_if_late(chunk):
                            workers.remove(chunk.worker)  # never join it
                            chunks[index] = self._without_late_item(chunk)
                            queue.put(chunks[index])
                            start_worker()
                if (error := chunks[0].error) is not None:
                    raise error
                yield from chunks.popleft().results
        finally:
            closing.set()
            for _ in workers:
                queue.put(None)
            deadline = time.monotonic() + _JOIN_SECONDS
            for worker in workers:
                while worker.is_alive() and (left := deadline - time.monotonic()) > 0:
                    reader_pool().stop(workers)  # nobody needs what they read, or begin to read when another one stops
                    worker.join(min(left, _STOP_SECONDS))

    def _one_more_helps(self, workers: Sequence[threading.Thread]) -> bool:
        """Return whether to exceed the number of workers by one, since one of them waits for a reader process.

        Waking a process and a thread up takes time, in which a core would do nothing: 12 % of the frames per second of
        a ResNet-18 in int8 on two cores were lost, and 4 % are with one more worker.
        """
        return self._add_worker and len(workers) == self._workers and any(map(reader_pool().is_reading, workers))

    def _next_items(self, items: Iterator[FrameTask | Failure]) -> list[FrameTask | Failure]:
        """Take the next items, with as many tasks among them as a chunk has frames."""
        taken: list[FrameTask | Failure] = []
        room = self._frames
        while room and len(taken) < _MAX_FAILURES + self._frames and (item := next(items, None)) is not None:
            taken.append(item)
            room -= isinstance(item, FrameTask)
        return taken

    def _seconds_until_timeout(self, chunks: Iterable[_Chunk[_Result]]) -> float:
        """Return the seconds until the first of the current reads can exceed the time limit."""
        started = [loading[1] for chunk in chunks if (loading := chunk.loading) is not None]
        now = time.monotonic()
        return max(0.0, min(started, default=now) + self._time_limit - now)

    def _abandon_if_late(self, chunk: _Chunk[_Result]) -> bool:
        with chunk.lock:
            if chunk.loading is None or time.monotonic() - chunk.loading[1] < self._time_limit:
                return False
            if reader_pool().is_reading(chunk.worker):  # it will return: look again after another time limit
                chunk.loading = chunk.loading[0], time.monotonic()
                return False
            chunk.abandoned = True
        return True

    def _without_late_item(self, chunk: _Chunk[_Result]) -> _Chunk[_Result]:
        """Return a chunk of the same items, with a failure for the one that exceeded the time limit."""
        assert chunk.loading is not None
        items, late = list(chunk.items), chunk.loading[0]
        item = items[late]
        items[late] = Failure(item.name if isinstance(item, FrameTask) else item.file, timeout_error(self._time_limit))
        return _Chunk(items)

    def _work(self, queue: SimpleQueue[_Chunk[_Result] | None], closing: threading.Event) -> None:
        batch = self._slots.new_batch()
        while (chunk := queue.get()) is not None and not closing.is_set():
            try:
                self._process(chunk, batch, closing)
            except BaseException as error:  # raised again in the thread that waits for the results
                chunk.error = error
            if chunk.abandoned:  # another worker has replaced this one
                return
            chunk.done.set()

    def _process(self, chunk: _Chunk[_Result], batch: npt.NDArray[np.uint8], closing: threading.Event) -> None:
        """Process a chunk, unless it is abandoned or the pool closes meanwhile."""
        loaded: list[FrameTask] = []
        flags: list[Flags] = []
        results: list[_Result | Failure | None] = []  # None: the next result of the network
        for index, item in enumerate(chunk.items):
            if isinstance(item, Failure):
                results.append(item)
                continue
            with chunk.lock:
                chunk.worker, chunk.loading = threading.current_thread(), (index, time.monotonic())
            try:
                flags.append(item.load(batch[len(loaded)]))
                loaded.append(item)
                results.append(None)
            except FrameError as error:
                # The traceback would keep the file's bytes and this whole chunk alive as long as the error.
                error.__cause__ = error.__context__ = None
                results.append(Failure(item.name, error.with_traceback(None)))
            with chunk.lock:
                if chunk.abandoned or closing.is_set():
                    return
                chunk.loading = None
        predicted = iter(self._postprocess(loaded, flags, self._slots.run(batch, len(loaded))) if loaded else ())
        chunk.results = [next(predicted) if result is None else result for result in results]
