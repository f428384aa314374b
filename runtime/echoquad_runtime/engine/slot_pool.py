"""The slot pool: the one way from quadrants to probabilities.

Export's parity, the golden frames, `verify`, `bench`, `tune` and `predict` all call `SlotPool.run`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import numpy as np
import numpy.typing as npt

from echoquad_runtime.contract import Contract
from echoquad_runtime.engine.io_binding import Answers, BufferBinding, FloatArray, InferenceSlot, new_batch

__all__ = ["Engine", "SlotPool", "infer_all"]


class Engine(Protocol):
    """What a predictor needs of a model, whatever runs it.

    Attributes
    ----------
    contract
        What the model was trained under.
    device
        What it really runs on: ``cpu``, ``cuda``, ``openvino``.
    precision
        What it really computes in: ``fp32``, ``bf16``.
    note
        One line saying why ``auto`` settled for that device; empty where there is nothing to say.
    """

    contract: Contract
    device: str
    precision: str
    note: str

    def infer(self, quadrants: npt.NDArray[np.uint8]) -> tuple[FloatArray, FloatArray]:
        """Return logits and probabilities, float32 [N, C], of quadrants, uint8 [N, 1, S, S]."""
        ...


class SlotPool:
    """Inference slots of an engine, for the threads that share it.

    A slot is opened when a thread needs one and none is idle. No more run at once than the engine allows; the other
    threads wait. Slots stay open for the next run.

    Parameters
    ----------
    engine
        What runs; with `open_slot` and `turns` as `OnnxEngine` has them, else one slot that calls ``infer``.
    frames
        Frames that a run takes at most.
    on_open
        Called with each slot before it is used, in the thread that opened it. What it raises is raised from `run`, and
        the slot is not used.
    """

    def __init__(self, engine: Engine, frames: int, on_open: Callable[[InferenceSlot], object] | None = None) -> None:
        self.engine, self.frames = engine, frames
        self._on_open = on_open
        self._turns: threading.Semaphore = getattr(engine, "turns", None) or threading.Semaphore(1)
        self._idle: list[InferenceSlot] = []

    def new_batch(self) -> npt.NDArray[np.uint8]:
        """Return memory for a batch, uint8 [frames, 4, 1, S, S]; see `run`."""
        return new_batch(self.engine.contract, self.frames)

    def run(self, batch: npt.NDArray[np.uint8], frames: int) -> Answers:
        """Run the first `frames` frames of a batch.

        Parameters
        ----------
        batch
            uint8 [B, 4, 1, S, S], C-contiguous, grey levels 0 to 255, B the pool's `frames`.
        frames
            1 to B.

        Returns
        -------
        Answers
            Of `frames` frames; the caller's own.

        Raises
        ------
        BundleError
            If the engine fails.
        """
        with self._slot() as slot:
            return slot.run(batch, frames)

    @contextmanager
    def _slot(self) -> Iterator[InferenceSlot]:
        with self._turns:
            slot = self._take_idle() or self._open()
            try:
                yield slot
            finally:
                self._idle.append(slot)

    def _take_idle(self) -> InferenceSlot | None:
        with suppress(IndexError):  # popping is atomic; to look first and pop then would not be
            return self._idle.pop()
        return None

    def _open(self) -> InferenceSlot:
        open_slot = getattr(self.engine, "open_slot", None)
        slot: InferenceSlot = BufferBinding(self.engine.infer) if open_slot is None else open_slot(self.frames)
        if self._on_open is not None:
            self._on_open(slot)
        return slot


def infer_all(engine: Engine, quadrants: npt.NDArray[np.uint8], batch_size: int) -> tuple[FloatArray, FloatArray]:
    """Run frames' quadrants, uint8 [F, 4, S, S] or [F, 4, 1, S, S], through an engine, `batch_size` frames at a time.

    Returns
    -------
    logits, probabilities
        float32 [F * 4, C] each.
    """
    pool = SlotPool(engine, batch_size)
    batch, size = pool.new_batch(), quadrants.shape[-1]
    logits, probabilities = [], []
    for start in range(0, len(quadrants), batch_size):
        part = quadrants[start : start + batch_size]
        batch[: len(part)] = part.reshape(-1, 4, 1, size, size)
        answers = pool.run(batch, len(part))
        logits.append(answers.logits)
        probabilities.append(answers.probabilities)
    classes = len(engine.contract.classes)
    return np.concatenate(logits).reshape(-1, classes), np.concatenate(probabilities).reshape(-1, classes)
