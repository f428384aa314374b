"""Streaming: a data set larger than memory and disk, decoded by worker processes a batch at a time.

What to decode is said by the main process, which alone makes draws: so the batches are those of the decoded path, to
the last bit, whatever the workers' number and speed. Workers are spawned on every system, as Windows does: a fork of a
process with running threads may stand still.
"""

from __future__ import annotations

import shutil
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
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
from echoquad_train.data.dataset import LabelledFrame, Split, Store, decode, decode_split, load_quadrants, stored_bytes

__all__ = ["Storage", "Stream", "StreamedStore", "stream_quadrants"]

Stream = Literal["auto", "on", "off"]

_AHEAD: Final = 4  # batches that each worker decodes ahead
_DISK_SHARE: Final = 0.9  # of what is free, at most taken for decoded quadrants

Wanted = tuple[LabelledFrame, int | None]
"""A frame, and which of its quadrants; None is all four."""


class _Decoder:
    """What a worker has: no list of frames, however many there are, but the contract to decode each by."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract

    def __getitems__(self, wanted: list[Wanted]) -> npt.NDArray[np.uint8] | str:
        """Give a batch's quadrants, uint8 [B, 1, S, S] or [B, 4, S, S], each frame decoded once; or what is wrong."""
        known: dict[LabelledFrame, npt.NDArray[np.uint8]] = {}
        for frame, _ in wanted:
            if frame not in known:
                outcome = decode(frame, self.contract)
                if isinstance(outcome, EchoQuadError):
                    return f"{frame.name}: could be read when training began and cannot be now ({outcome})"
                known[frame] = outcome
        size = self.contract.input_size
        count = 4 if any(corner is None for _, corner in wanted) else 1
        chosen = [known[frame] if corner is None else known[frame][corner] for frame, corner in wanted]
        return np.array(chosen, np.uint8).reshape(-1, count, size, size)


def _as_it_is(batch: npt.NDArray[np.uint8] | str) -> npt.NDArray[np.uint8] | str:
    return batch  # no tensor, which would go through shared memory: containers have little of it


@dataclass(slots=True)
class _Sampler:
    """Batches to come, put in place before each pass."""

    batches: Iterator[list[Wanted]] = field(default_factory=lambda: iter(()))

    def __iter__(self) -> Iterator[list[Wanted]]:
        return self.batches


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Have processes that are started now ignore Ctrl-C, which reaches all of a terminal's: the main one ends them."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not in the main thread, which alone may say so
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


class StreamedStore:
    """Frames that are decoded again whenever they are wanted.

    Parameters
    ----------
    frames
        Those that can be read.
    failures
        Those that cannot, and why.
    contract
        Gives the crop and the input size S.
    workers
        Processes that decode; they start with the first batch and live until `close`.
    """

    def __init__(
        self, frames: list[LabelledFrame], failures: tuple[Failure, ...], contract: Contract, workers: int
    ) -> None:
        self._frames, self.failures, self.size = frames, failures, contract.input_size
        self.labels: npt.NDArray[np.int64] = np.array([frame.label for frame in frames], np.int64)
        self._sampler = _Sampler()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than CPUs: as was asked for
            self._loader: Any = DataLoader(
                _Decoder(contract),  # type: ignore[arg-type]
                batch_sampler=self._sampler,
                num_workers=workers,
                collate_fn=_as_it_is,  # type: ignore[arg-type]
                multiprocessing_context="spawn",
                prefetch_factor=_AHEAD,
                persistent_workers=True,
                generator=Generator(),  # it draws seeds for its workers, and must not from dropout's generator
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Give the frames' names."""
        return tuple(frame.name for frame in self._frames)

    def feed(self, batches: Iterable[npt.NDArray[np.int64]], *, whole: bool = False) -> Iterator[npt.NDArray[np.uint8]]:
        """Give the quadrants, uint8 [B, 1, S, S], of each batch of indices into [F * 4], decoded ahead.

        With `whole`, all four of each one's frame, [B, 4, S, S].

        Raises
        ------
        DatasetError
            If a frame cannot be read any more.
        RunError
            If a worker has ended.
        """
        self._sampler.batches = (
            [(self._frames[i // 4], None if whole else int(i % 4)) for i in chosen] for chosen in batches
        )
        nothing = np.empty((0, 4 if whole else 1, self.size, self.size), np.uint8)
        nothing = np.empty((0, 4 if whole else 1, self.size, self.size), np.uint8)
        try:
            with _deaf_to_interrupts():
                batches_decoded = iter(self._loader)
            for batch in batches_decoded:
                if isinstance(batch, str):
                    raise DatasetError(f"{batch}; bring it back, and go on by `echoquad train --resume`")
                yield batch if len(batch) else nothing
        except RuntimeError as error:
            if "worker" not in str(error):
                raise
            raise RunError(
                f"a process that decodes frames has ended ({str(error).partition(chr(10))[0]}); "
                "if memory is short, give fewer --workers; go on by `echoquad train --resume`"
            ) from error

    def close(self) -> None:
        """End the workers."""
        # Left to the garbage collector they would live as long as the traceback of whatever ended the run.
        if (running := getattr(self._loader, "_iterator", None)) is not None:
            running._shutdown_workers()
        self._loader = None


def stream_quadrants(
    split: Split, contract: Contract, workers: int, progress: Callable[[int, int], None] | None = None
) -> StreamedStore:
    """Look through a split for frames that cannot be read, keeping none, and make ready to stream the others.

    Raises
    ------
    DatasetError
        If of some class no frame can be read.
    """
    return StreamedStore(*decode_split(split, contract, lambda index, quadrants: None, progress), contract, workers)


class Storage:
    """Decides where quadrants are kept: decoded once where memory or the disk has room for them, else streamed.

    Parameters
    ----------
    folder
        Whose disk takes decoded quadrants that memory has no room for; see
        `echoquad_train.data.dataset.load_quadrants`.
    stream
        ``on`` streams in any case, ``off`` never, ``auto`` where neither has room.
    workers
        Processes that decode for each store that is streamed; None is as many as there are CPUs to use, 8 at most.
    """

    def __init__(self, folder: Path, stream: Stream = "auto", workers: int | None = None) -> None:
        self._folder, self._stream = folder, stream
        self._workers = workers or min(8, available_cpus())
        self._opened: list[StreamedStore] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for store in self._opened:
            store.close()

    def open(self, split: Split, contract: Contract, progress: Callable[[int, int], None] | None = None) -> Store:
        """Decode a split, or make ready to stream it.

        Raises
        ------
        DatasetError
            If of some class no frame can be read.
        OutputError
            If the disk is full or cannot be written to.
        """
        if not self._streams(stored_bytes(split, contract)):
            return load_quadrants(split, contract, overflow=self._folder, progress=progress)
        store = stream_quadrants(split, contract, self._workers, progress)
        self._opened.append(store)
        return store

    def _streams(self, size: int) -> bool:
        if self._stream != "auto":
            return self._stream == "on"
        return size > dataset.MEMORY_BYTES and size > _DISK_SHARE * shutil.disk_usage(self._folder).free
