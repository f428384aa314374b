"""The pipeline: frames are read, cut and judged by several threads, and come out in the order they went in.

Each worker takes a few frames through all of it: bytes, grey levels, quadrants, inference, vote. Pillow, zlib and
onnxruntime let go of Python's lock, so that workers run beside one another; while one waits for the disk another
computes, and no core waits for a hand-over. Measured with a ResNet-18 at 224 pixels on two cores: two workers with an
inference of one thread each take 0.93 of the time of one inference on two threads, decoding left out.

What is under way is bounded: two chunks a worker. A file that will not come to an end, on a dead network disk say,
cannot be stopped from here; its worker is given up with it after a while, another takes its place, and the file is a
failure.
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
from echoquad_runtime.errors import FrameError, FrameReadError
from echoquad_runtime.frames.formats import VIDEO_EXTENSIONS
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.predict.frame_reader import Flags, FrameReader

__all__ = ["Pipeline", "Source"]

_Result = TypeVar("_Result")

_AHEAD: Final = 2  # chunks a worker may be ahead of what was taken out: one under way, one waiting
_MOST_FAILURES: Final = 64  # items in a chunk, should inputs fail one after the other
_PATIENCE: Final = 5.0  # seconds for workers to end their inference when all is over


@dataclass(frozen=True, slots=True)
class Source:
    """A frame to be read.

    Attributes
    ----------
    name
        What it is called in results.
    load
        Reads it and writes its quadrants into uint8 [4, 1, S, S]; gives its flags, raises a FrameError if it cannot.
    on_decision
        What to call with what was decided of it.
    file
        The file that `load` reads, which a reader process may read in its place; None where there is no such file.
    """

    name: str
    load: Callable[[npt.NDArray[np.uint8]], Flags]
    on_decision: Callable[[Any], object] | None = None
    file: FrameFile | None = None


@dataclass(eq=False)
class _Chunk(Generic[_Result]):
    items: Sequence[Source | Failure]
    results: list[_Result | Failure] = field(default_factory=list)
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    worker: threading.Thread = field(default_factory=threading.current_thread)
    reader: FrameReader | None = None
    loading: tuple[int, float] | None = None  # which item, and since when
    given_up: bool = False


class Pipeline(Generic[_Result]):
    """Workers that take frames to results.

    Parameters
    ----------
    slots
        Run the network. A chunk has as many sources as a batch of theirs has places, across files and folders alike.
    judge
        Makes results of sources, their flags and their answers: one each, in order.
    workers
        Threads.
    time_limit
        Seconds for reading and decoding one file.
    frames
        Sources of a chunk, at most the places of a batch; None is all of these.
    open_reader
        Makes a worker's reader, with memory for a batch of `slots`; None has each worker read in its thread.
    """

    def __init__(
        self,
        slots: SlotPool,
        judge: Callable[[Sequence[Source], Sequence[Flags], InferenceOutput], Sequence[_Result | Failure]],
        *,
        workers: int,
        time_limit: float,
        frames: int | None = None,
        open_reader: Callable[[], FrameReader] | None = None,
    ) -> None:
        self._slots, self._judge, self._open_reader = slots, judge, open_reader
        self._workers, self._frames, self._time_limit = workers, frames or slots.frames, time_limit

    def run(self, items: Iterable[Source | Failure]) -> Iterator[_Result | Failure]:
        """Give a result for every source, and the failures among `items` as they are, in order.

        `items` are taken in the caller's thread, no more than a few chunks ahead of what is given.

        Raises
        ------
        BundleError
            If the engine fails.
        """
        queue: SimpleQueue[_Chunk[_Result] | None] = SimpleQueue()
        closing = threading.Event()
        workers: list[threading.Thread] = []
        readers: list[FrameReader] = []
        chunks: deque[_Chunk[_Result]] = deque()
        items = iter(items)

        def start_worker() -> None:
            # Daemons: one that hangs on a dead disk must not keep the process from ending.
            reader = self._open_reader() if self._open_reader else None
            if reader is not None:
                reader.start()
                readers.append(reader)
            arguments = (queue, closing, reader)
            worker = threading.Thread(target=self._work, args=arguments, name="echoquad-worker", daemon=True)
            worker.start()
            workers.append(worker)

        try:
            while True:
                while len(chunks) < _AHEAD * self._workers and (cut := self._cut(items)):
                    chunks.append(_Chunk(cut))
                    queue.put(chunks[-1])
                    if len(workers) < self._workers:
                        start_worker()
                if not chunks:
                    return
                while not chunks[0].done.wait(self._until_late(chunks)):
                    for index, chunk in enumerate(chunks):
                        if self._gives_up(chunk):
                            workers.remove(chunk.worker)  # never to be waited for
                            chunks[index] = self._without_late(chunk)
                            queue.put(chunks[index])
                            start_worker()
                if (error := chunks[0].error) is not None:
                    raise error
                yield from chunks.popleft().results
        finally:
            closing.set()
            for _ in workers:
                queue.put(None)
            for reader in readers:
                reader.kill()  # nobody waits for what it reads
            deadline = time.monotonic() + _PATIENCE
            for worker in workers:
                worker.join(max(0.0, deadline - time.monotonic()))

    def _cut(self, items: Iterator[Source | Failure]) -> list[Source | Failure]:
        """Take the next items, with as many sources among them as a batch has places."""
        cut: list[Source | Failure] = []
        room = self._frames
        while room and len(cut) < _MOST_FAILURES + self._frames:
            item = next(items, None)
            if item is None:
                break
            cut.append(item)
            room -= isinstance(item, Source)
        return cut

    def _until_late(self, chunks: Iterable[_Chunk[_Result]]) -> float:
        """Give the seconds until a file that is being read now is late; none is before."""
        begun = [loading[1] for chunk in chunks if (loading := chunk.loading) is not None]
        now = time.monotonic()
        return max(0.0, min(begun, default=now) + self._time_limit - now)

    def _gives_up(self, chunk: _Chunk[_Result]) -> bool:
        with chunk.lock:
            late = chunk.loading is not None and time.monotonic() - chunk.loading[1] >= self._time_limit
            chunk.given_up = late
            if late and chunk.reader is not None:
                chunk.reader.kill()
        return late

    def _without_late(self, chunk: _Chunk[_Result]) -> _Chunk[_Result]:
        """Give the same items again, but for the one that a chunk was given up with."""
        assert chunk.loading is not None
        items, late = list(chunk.items), chunk.loading[0]
        error = FrameReadError(
            f"reading and decoding it takes longer than {self._time_limit:g} seconds; check the disk it lies on"
        )
        items[late] = Failure(_name(items[late]), error)
        return _Chunk(items)

    def _work(
        self, queue: SimpleQueue[_Chunk[_Result] | None], closing: threading.Event, reader: FrameReader | None
    ) -> None:
        batch = self._slots.new_batch() if reader is None else reader.quadrants
        try:
            while (chunk := queue.get()) is not None and not closing.is_set():
                try:
                    self._take(chunk, batch, closing, reader)
                except BaseException as error:  # whatever it is, it is raised where the results are awaited
                    chunk.error = error
                if chunk.given_up:  # another worker is in this one's place
                    return
                chunk.done.set()
        finally:
            if reader is not None:
                reader.close()

    def _take(
        self,
        chunk: _Chunk[_Result],
        batch: npt.NDArray[np.uint8],
        closing: threading.Event,
        reader: FrameReader | None,
    ) -> None:
        """Take a chunk through, unless that is of no use any more."""
        loaded: list[Source] = []
        flags: list[Flags] = []
        results: list[_Result | Failure | None] = []  # None is the next of those that were judged
        for index, item in enumerate(chunk.items):
            if isinstance(item, Failure):
                results.append(item)
                continue
            with chunk.lock:
                chunk.worker, chunk.loading = threading.current_thread(), (index, time.monotonic())
                chunk.reader = reader if _is_for_a_process(item) else None
            try:
                flags.append(
                    item.load(batch[len(loaded)])
                    if chunk.reader is None or item.file is None
                    else chunk.reader.read(item.file, len(loaded))
                )
                loaded.append(item)
                results.append(None)
            except FrameError as error:
                # Its traceback would keep the file's bytes, and all of this chunk, for as long as it is kept itself.
                error.__cause__ = error.__context__ = None
                results.append(Failure(item.name, error.with_traceback(None)))
            with chunk.lock:
                if chunk.given_up or closing.is_set():
                    return
                chunk.loading = None
        if loaded:
            judged = iter(self._judge(loaded, flags, self._slots.run(batch, len(loaded))))
            chunk.results = [next(judged) if result is None else result for result in results]
        else:
            chunk.results = [result for result in results if result is not None]


def _is_for_a_process(source: Source) -> bool:
    """Return whether a reader process reads a source: a file, and no clip.

    A clip's frames are decoded one after the other, once for all threads of this process. Each reader process that gets
    some of them would decode the clip up to the last of these.
    """
    return source.file is not None and source.file.path.suffix.lower() not in VIDEO_EXTENSIONS


def _name(item: Source | Failure) -> str:
    return item.name if isinstance(item, Source) else item.file
