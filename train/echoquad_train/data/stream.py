"""Streaming: decode a data set that exceeds memory and disk in worker processes, one batch at a time.

The main process alone draws random numbers and tells the workers what to decode. The batches therefore equal those of
the decoded path bit for bit, whatever the number and speed of the workers. Workers are spawned on every system, as on
Windows: forking a process with running threads may deadlock.
"""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt
from torch import Generator
from torch.utils.data import DataLoader

from echoquad_runtime.contract import Contract
from echoquad_runtime.devices.cpu_info import available_cpus
from echoquad_runtime.errors import DatasetError, EchoQuadError, RunError
from echoquad_runtime.frames.frame_file import Failure
from echoquad_train.data import dataset
from echoquad_train.data.dataset import (
    LabelledFrame,
    Progress,
    Split,
    Store,
    decode,
    decode_split,
    load_quadrants,
    stored_bytes,
)

__all__ = ["Storage", "Stream", "StreamedStore", "stream_quadrants"]

Stream = Literal["auto", "on", "off"]

_PREFETCHED_BATCHES: Final = 4  # per worker
_DISK_SHARE: Final = 0.9  # of the free disk space that decoded quadrants may take

_Request = tuple[LabelledFrame, int | None]
"""A frame and the index of one of its quadrants; None requests all four."""


class _Decoder:
    """The dataset of a worker: it holds the contract only, because each request carries its frame."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract

    def __getitems__(self, requests: list[_Request]) -> npt.NDArray[np.uint8] | str:
        """Return a batch, uint8 [B, 1, S, S] or [B, 4, S, S], or an error message; decode each frame once."""
        decoded: dict[LabelledFrame, npt.NDArray[np.uint8]] = {}
        for frame, _ in requests:
            if frame not in decoded:
                outcome = decode(frame, self.contract)
                if isinstance(outcome, EchoQuadError):
                    return f"{frame.name}: could be read when training began and cannot be now ({outcome})"
                decoded[frame] = outcome
        size = self.contract.input_size
        count = 4 if any(quadrant is None for _, quadrant in requests) else 1
        chosen = [decoded[frame] if quadrant is None else decoded[frame][quadrant] for frame, quadrant in requests]
        return np.array(chosen, np.uint8).reshape(-1, count, size, size)


def _identity(batch: npt.NDArray[np.uint8] | str) -> npt.NDArray[np.uint8] | str:
    return batch  # a tensor would pass through shared memory, which is small in containers


@dataclass(slots=True)
class _Sampler:
    """The batches of the next pass; replaced before each pass."""

    batches: Iterator[list[_Request]] = field(default_factory=lambda: iter(()))

    def __iter__(self) -> Iterator[list[_Request]]:
        return self.batches


@contextmanager
def _ignore_interrupts() -> Iterator[None]:
    """Make processes started in this block ignore Ctrl-C, which a terminal sends to all; the main process ends them."""
    try:
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # signal handlers can be set in the main thread only
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous or signal.SIG_DFL)


def _check_shared_memory(workers: int) -> None:
    """Check that the system has room for the semaphores of the decoding processes.

    Linux keeps semaphores in ``/dev/shm``, which containers may lack, limit or share. DataLoader fails halfway through
    its constructor without them, after all frames were decoded.

    Raises
    ------
    RunError
        If the system refuses.
    """
    context = multiprocessing.get_context("spawn")
    try:
        # As many as DataLoader opens: a queue to and from the workers, for training and validation each.
        queues, _events = [context.Queue() for _ in range(2 * (workers + 1))], [context.Event() for _ in range(2)]
        for queue in queues:
            queue.close()
    except (OSError, ImportError) as error:  # ImportError: a system without semaphores
        raise _shared_memory_error(workers, error) from error


def _shared_memory_error(workers: int, error: Exception) -> RunError:
    reason = getattr(error, "strerror", None) or str(error)
    return RunError(
        f"streaming cannot start {workers} decoding processes, which need shared memory, /dev/shm on Linux ({reason}); "
        "make it larger or writable (docker run --shm-size=1g), use fewer --workers, or train with --stream off"
    )


class StreamedStore:
    """A `Store` that decodes frames whenever they are needed.

    Parameters
    ----------
    frames
        The readable frames.
    failures
        The unreadable frames.
    contract
        Defines the crop and the input size S.
    workers
        Number of decoding processes. They start with the first batch and live until `close`.
    """

    def __init__(
        self, frames: list[LabelledFrame], failures: tuple[Failure, ...], contract: Contract, workers: int
    ) -> None:
        self._frames, self.failures, self.size = frames, failures, contract.input_size
        self.labels: npt.NDArray[np.int64] = np.array([frame.label for frame in frames], np.int64)
        self._sampler = _Sampler()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # the user asked for more than the CPUs
            self._loader: Any = DataLoader(
                _Decoder(contract),  # type: ignore[arg-type]
                batch_sampler=self._sampler,
                num_workers=workers,
                collate_fn=_identity,  # type: ignore[arg-type]
                multiprocessing_context="spawn",
                prefetch_factor=_PREFETCHED_BATCHES,
                persistent_workers=True,
                generator=Generator(),  # worker seeds must not come from the global generator, which dropout uses
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the readable frames."""
        return tuple(frame.name for frame in self._frames)

    def feed(self, batches: Iterable[npt.NDArray[np.int64]], *, whole: bool = False) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the quadrants of each batch, decoded in advance; see `Store.feed`.

        Raises
        ------
        DatasetError
            If a frame has become unreadable.
        RunError
            If a worker cannot start or has ended.
        """
        self._sampler.batches = (
            [(self._frames[i // 4], None if whole else int(i % 4)) for i in chosen] for chosen in batches
        )
        empty = np.empty((0, 4 if whole else 1, self.size, self.size), np.uint8)
        try:
            try:
                with _ignore_interrupts():
                    decoded = iter(self._loader)
            except OSError as error:
                raise _shared_memory_error(self._loader.num_workers, error) from error
            for batch in decoded:
                if isinstance(batch, str):
                    raise DatasetError(f"{batch}; restore the file and continue with `echoquad train --resume`")
                yield batch if len(batch) else empty
        except RuntimeError as error:
            if "worker" not in str(error):
                raise
            raise RunError(
                f"a decoding process has ended ({str(error).partition(chr(10))[0]}); "
                "if memory is short, use fewer --workers; continue with `echoquad train --resume`"
            ) from error

    def close(self) -> None:
        """End the workers."""
        # The garbage collector would end them only when the traceback that ended the run is released.
        if (running := getattr(self._loader, "_iterator", None)) is not None:
            running._shutdown_workers()
        self._loader = None


def stream_quadrants(split: Split, contract: Contract, workers: int, progress: Progress | None = None) -> StreamedStore:
    """Decode each frame of a split once to find the unreadable ones, and return a store that streams the others.

    Raises
    ------
    DatasetError
        If no frame of some class can be read.
    """
    return StreamedStore(*decode_split(split, contract, lambda index, quadrants: None, progress), contract, workers)


class Storage:
    """Chooses where quadrants are kept: decoded once in memory or on disk, or streamed if neither has room.

    Parameters
    ----------
    folder
        See `overflow` of `echoquad_train.data.dataset.load_quadrants`.
    stream
        ``on`` always streams, ``off`` never, ``auto`` if neither memory nor disk has room.
    workers
        Number of decoding processes per streamed store; None is the number of available CPUs, at most 8.

    Raises
    ------
    RunError
        If `stream` is ``on`` and the system lacks the shared memory that decoding processes need.
    """

    def __init__(self, folder: Path, stream: Stream = "auto", workers: int | None = None) -> None:
        self._folder, self._stream = folder, stream
        self._workers = workers or min(8, available_cpus())
        self._opened: list[StreamedStore] = []
        if stream == "on":  # before anything is written
            _check_shared_memory(self._workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for store in self._opened:
            store.close()

    def open(self, split: Split, contract: Contract, progress: Progress | None = None) -> Store:
        """Decode a split, or prepare to stream it.

        Raises
        ------
        DatasetError
            If no frame of some class can be read.
        OutputError
            If the disk is full or not writable.
        RunError
            If the split must be streamed, and the system lacks shared memory.
        """
        if not self._must_stream(stored_bytes(split, contract)):
            return load_quadrants(split, contract, overflow=self._folder, progress=progress)
        _check_shared_memory(self._workers)
        store = stream_quadrants(split, contract, self._workers, progress)
        self._opened.append(store)
        return store

    def _must_stream(self, size: int) -> bool:
        if self._stream != "auto":
            return self._stream == "on"
        return size > dataset.MEMORY_BYTES and size > _DISK_SHARE * shutil.disk_usage(self._folder).free
