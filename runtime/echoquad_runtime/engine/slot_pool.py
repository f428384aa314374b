"""The slot pool: the single code path from quadrants to probabilities.

The export's parity measurement, the golden frames, `verify`, `bench`, `tune` and `predict` all call `SlotPool.run`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from echoquad_runtime.contract import Contract
from echoquad_runtime.engine.io_binding import (
    BufferBinding,
    FloatArray,
    InferenceOutput,
    InferenceSlot,
    join_outputs,
    new_batch,
)

__all__ = ["Engine", "SlotPool", "flatten", "infer_in_batches", "run_in_batches"]


class Engine(Protocol):
    """A model that a predictor can run, on any framework.

    Attributes
    ----------
    contract
        The contract that the model was trained with.
    device
        The device that runs it: ``cpu``, ``cuda``, ``openvino``.
    precision
        The precision that it computes in, such as ``fp32`` or ``bf16``.
    note
        One line that says why ``auto`` chose the device; empty if there is nothing to report.
    """

    contract: Contract
    device: str
    precision: str
    note: str

    def infer(self, quadrants: npt.NDArray[np.uint8]) -> tuple[FloatArray, FloatArray]:
        """Return logits and probabilities, float32 [N, C], of quadrants, uint8 [N, 1, S, S]."""
        ...


class SlotPool:
    """A pool of inference slots for the threads that share an engine.

    The pool opens a slot when a thread needs one and none is idle, and keeps it for later runs. The engine limits the
    number of concurrent runs; further threads wait.

    Parameters
    ----------
    engine
        An engine. With `open_slot` and `run_limit`, as `OnnxEngine` has them, it may have several slots; otherwise the
        pool has one slot that calls ``infer``.
    frames
        Maximal number of frames of a run.
    on_open
        Called with each slot before its first use, in the thread that opened it. If it raises, `run` raises the same
        exception and the slot is not used.
    """

    def __init__(self, engine: Engine, frames: int, on_open: Callable[[InferenceSlot], object] | None = None) -> None:
        self.engine, self.frames = engine, frames
        self._on_open = on_open
        self._run_limit: threading.Semaphore = getattr(engine, "run_limit", None) or threading.Semaphore(1)
        self._idle: list[InferenceSlot] = []

    def new_batch(self) -> npt.NDArray[np.uint8]:
        """Return a zeroed batch for `run`, uint8 [frames, 4, 1, S, S]."""
        return new_batch(self.engine.contract, self.frames)

    def run(self, batch: npt.NDArray[np.uint8], frames: int) -> InferenceOutput:
        """Run the first `frames` frames of a batch.

        Parameters
        ----------
        batch
            uint8 [B, 4, 1, S, S], C-contiguous, grey levels 0 to 255; B is the pool's `frames`.
        frames
            1 to B.

        Returns
        -------
        InferenceOutput
            The output for `frames` frames, owned by the caller.

        Raises
        ------
        BundleError
            If the engine fails.
        """
        with self._run_limit:
            try:  # pop is atomic; testing the length before it would be a race
                slot = self._idle.pop()
            except IndexError:
                slot = self._open()
            try:
                return slot.run(batch, frames)
            finally:
                self._idle.append(slot)

    def _open(self) -> InferenceSlot:
        open_slot = getattr(self.engine, "open_slot", None)
        slot: InferenceSlot = BufferBinding(self.engine.infer) if open_slot is None else open_slot(self.frames)
        if self._on_open is not None:
            self._on_open(slot)
        return slot


def infer_in_batches(
    engine: Engine, quadrants: npt.NDArray[np.uint8], batch_size: int
) -> tuple[FloatArray, FloatArray]:
    """Run frames as `run_in_batches` and return logits and probabilities, float32 [F * 4, C] each."""
    return flatten(run_in_batches(engine, quadrants, batch_size))


def run_in_batches(engine: Engine, quadrants: npt.NDArray[np.uint8], batch_size: int) -> InferenceOutput:
    """Run the quadrants of F frames, uint8 [F, 4, S, S] or [F, 4, 1, S, S], `batch_size` frames at a time."""
    pool = SlotPool(engine, batch_size)
    batch, size = pool.new_batch(), quadrants.shape[-1]
    outputs = []
    for start in range(0, len(quadrants), batch_size):
        part = quadrants[start : start + batch_size]
        batch[: len(part)] = part.reshape(-1, 4, 1, size, size)
        outputs.append(pool.run(batch, len(part)))
    return join_outputs(outputs)


def flatten(output: InferenceOutput) -> tuple[FloatArray, FloatArray]:
    """Return the logits and probabilities of F frames, float32 [F * 4, C] each."""
    classes = output.logits.shape[2]
    return output.logits.reshape(-1, classes), output.probabilities.reshape(-1, classes)
