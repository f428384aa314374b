"""Captured steps: record an optimizer step once as a CUDA graph and replay it without launching each kernel.

With small batches a step's hundreds of kernels take longer to launch than to compute. See
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs

A graph reads and writes fixed addresses, and Python numbers are constants in it. A recording is therefore verified
before it is used: the same batch goes from the same state through the eager step and through the replay, and both must
change the state equally. All inputs are zero during recording, so an input that the replay does not update is noticed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from echoquad_train.training.batches import TrainingBatch

State = Mapping[str, Sequence[Tensor]]
"""The tensors that a step changes, by role."""

__all__ = [
    "CUDA_GRAPHS_VARIABLE",
    "CapturedStep",
    "CudaGraphRecorder",
    "capture",
    "cuda_graphs_enabled",
]

CUDA_GRAPHS_VARIABLE: Final = "ECHOQUAD_CUDA_GRAPHS"
"""Environment variable whose value 0 disables captured steps."""

TOLERANCE: Final = 0.01
"""Largest difference between replay and eager step, relative to the norm of the step's change, for each role.
It is 0 with the same kernels, and about 1 with a stale input or a learning rate that is constant in the graph."""

_WARM_UP: Final = 3  # steps before recording, in which libraries allocate memory that they cannot allocate later

_log = logging.getLogger(__name__)


class CudaGraphRecorder:
    """Records the kernels of a function as a CUDA graph, and replays them on the same memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run the function on a separate stream, as during recording."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream(self._device).wait_stream(stream)

    def record(self, function: Callable[[], None]) -> None:
        """Record the function; its kernels do not run."""
        stream = torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.graph(self._graph):
                function()
        except Exception:
            # After a failed capture torch leaves its stream current, and the default generator in capture mode, in
            # which it refuses to draw. Restore the stream and give the generator a new state.
            torch.cuda.set_stream(stream)
            index = torch.cuda.current_device() if self._device.index is None else self._device.index
            torch.cuda.default_generators[index].graphsafe_set_state(torch.Generator(self._device))
            raise

    def replay(self) -> None:
        """Launch the graph without waiting for it."""
        self._graph.replay()

    def random_state(self) -> Tensor:
        """Return the state of the device's default random generator, which dropout uses."""
        return torch.cuda.get_rng_state(self._device)

    def set_random_state(self, state: Tensor) -> None:
        """Set the state of the device's default random generator."""
        torch.cuda.set_rng_state(state, self._device)


class CapturedStep:
    """A step that was recorded and verified.

    Parameters
    ----------
    recorder
        Holds the recording.
    inputs
        The batch whose memory the recording reads.
    """

    def __init__(self, recorder: CudaGraphRecorder, inputs: TrainingBatch) -> None:
        self._recorder = recorder
        self._inputs = inputs.tensors()

    def __call__(self, batch: TrainingBatch) -> None:
        """Replay the step on a batch of the recorded shapes."""
        torch._foreach_copy_(self._inputs, batch.tensors())
        self._recorder.replay()


def cuda_graphs_enabled() -> bool:
    """Return whether steps may be captured: unless ``ECHOQUAD_CUDA_GRAPHS`` is 0."""
    return os.environ.get(CUDA_GRAPHS_VARIABLE, "1") != "0"


def capture(
    step: Callable[[TrainingBatch], None],
    batch: TrainingBatch,
    state: Callable[[], State],
    scalars: Callable[[], Sequence[Tensor]],
    make_recorder: Callable[[], CudaGraphRecorder],
) -> CapturedStep | None:
    """Record a step and verify the recording. The state and the default generator are unchanged afterwards.

    Parameters
    ----------
    step
        Trains on a batch. Everything that differs between calls must be in the batch, the state or the scalars.
    batch
        Defines the shapes and verifies the recording.
    state
        Returns what a step changes. Tensors that the first step creates come last in their role; they start at zero.
    scalars
        Returns the inputs that are set before each step besides the batch, such as learning rates.
    make_recorder
        Creates a recorder on the batch's device.

    Returns
    -------
    CapturedStep or None
        None, with a logged warning, if the step cannot be recorded or the replay differs from it.
    """
    try:
        return _record_and_verify(step, batch, state, scalars, make_recorder())
    except Exception as error:  # whatever CUDA, a library or an operator raises, the eager step still works
        first: BaseException = error
        while first.__context__ is not None:  # the last error only says that the capture failed
            first = first.__context__
        reason = str(first).strip().partition("\n")[0] or type(first).__name__
        _log.warning(
            "training steps are not captured in a CUDA graph: %s; training continues without it, slower", reason
        )
        return None


def _record_and_verify(
    step: Callable[[TrainingBatch], None],
    batch: TrainingBatch,
    state: Callable[[], State],
    scalars: Callable[[], Sequence[Tensor]],
    recorder: CudaGraphRecorder,
) -> CapturedStep:
    before, random_state = _clone(state()), recorder.random_state()

    def restore() -> None:
        for role, tensors in state().items():
            saved = before.get(role, [])
            for tensor, value in zip(tensors, saved, strict=False):
                tensor.copy_(value)
            for tensor in tensors[len(saved) :]:
                tensor.zero_()
        recorder.set_random_state(random_state)

    inputs = batch.zeros()
    captured = CapturedStep(recorder, inputs)
    settings = list(scalars())
    values = [value.clone() for value in settings]
    try:
        for value in settings:
            value.zero_()
        for _ in range(_WARM_UP):
            recorder.warm_up(lambda: step(inputs))
        recorder.record(lambda: step(inputs))
        for tensor, value in zip(settings, values, strict=True):
            tensor.copy_(value)
        restore()
        step(batch)
        expected = _clone(state())
        restore()
        captured(batch)
        for role, tensors in state().items():
            changed = _distance(expected[role], before.get(role, []))
            difference = _distance(tensors, expected[role])
            if not difference <= TOLERANCE * changed:  # also true for NaN
                raise RuntimeError(f"its replay changes the {role} differently, by {difference:.3g} of {changed:.3g}")
    finally:
        for tensor, value in zip(settings, values, strict=True):
            tensor.copy_(value)
        restore()
    return captured


def _clone(state: State) -> dict[str, list[Tensor]]:
    return {role: [tensor.detach().clone() for tensor in tensors] for role, tensors in state.items()}


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return the Euclidean distance of two lists of tensors, in float64; `b` is padded with zeros."""
    squares = [(x.double() - y.double()).square().sum() for x, y in zip(a, b, strict=False)]
    squares += [x.double().square().sum() for x in a[len(b) :]]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
