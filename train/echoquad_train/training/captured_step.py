"""Captured steps: an optimizer step recorded once as a CUDA graph and replayed, which spares launching its kernels.

With small batches a step's hundreds of kernels take longer to launch than to compute. See
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs

A graph reads and writes fixed addresses, and whatever was a Python number when it was recorded stays that number. So a
recording is proved before it is used: the same batch goes from the same state through the step itself and through the
recording, and both must leave the same weights. While it is recorded, all inputs are zero: one that the replay does not
bring up to date leaves other weights.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from echoquad_train.training.batches import TrainingBatch

State = Mapping[str, Sequence[Tensor]]
"""The tensors that a step changes, by their role."""

__all__ = ["SWITCH", "CapturedStep", "CudaGraphRecorder", "Recorder", "capture", "graphs_wanted"]

SWITCH: Final = "ECHOQUAD_CUDA_GRAPHS"
"""The environment variable that switches captured steps off, as 0."""

TOLERANCE: Final = 0.01
"""By how much a recording may differ from the step: of the norm of what the step changes, for each role of the state.
With the same kernels it is 0; a stale input, or a learning rate that the recording keeps, makes it about 1."""

_WARM_UP: Final = 3  # steps before recording, in which libraries allocate what they cannot allocate while recording

_log = logging.getLogger(__name__)


class Recorder(Protocol):
    """Records the work of a function on a device, and replays it on the same memory."""

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run the function as recording will."""

    def record(self, function: Callable[[], None]) -> None:
        """Record the function; what it computes is undefined."""

    def replay(self) -> None:
        """Do the recorded work."""

    def random_state(self) -> Tensor:
        """Return the state of the device's default generator."""

    def set_random_state(self, state: Tensor) -> None:
        """Set the state of the device's default generator."""


class CudaGraphRecorder:
    """Records CUDA graphs on a device."""

    def __init__(self, where: torch.device) -> None:
        self._where = where
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run the function on a stream of its own, as recording will."""
        stream = torch.cuda.Stream(self._where)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._where))
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream(self._where).wait_stream(stream)

    def record(self, function: Callable[[], None]) -> None:
        """Record the function, which computes nothing."""
        stream = torch.cuda.current_stream(self._where)
        try:
            with torch.cuda.graph(self._graph):
                function()
        except Exception:
            # torch leaves its stream current when a capture fails, and the default generator in capture mode, in which
            # it refuses to draw outside of one. A new state takes that one's place.
            torch.cuda.set_stream(stream)
            index = torch.cuda.current_device() if self._where.index is None else self._where.index
            torch.cuda.default_generators[index].graphsafe_set_state(torch.Generator(self._where))
            raise

    def replay(self) -> None:
        """Launch the graph; returns before it is done."""
        self._graph.replay()

    def random_state(self) -> Tensor:
        """Return the state of the device's default generator, from which dropout draws."""
        return torch.cuda.get_rng_state(self._where)

    def set_random_state(self, state: Tensor) -> None:
        """Set the state of the device's default generator."""
        torch.cuda.set_rng_state(state, self._where)


class CapturedStep:
    """A recorded step.

    Parameters
    ----------
    recorder
        Holds the recording.
    inputs
        The batch that the recording reads.
    """

    def __init__(self, recorder: Recorder, inputs: TrainingBatch) -> None:
        self._recorder = recorder
        self._inputs = inputs.tensors()

    def __call__(self, batch: TrainingBatch) -> None:
        """Take the step with a batch of the recorded shapes."""
        torch._foreach_copy_(self._inputs, batch.tensors())
        self._recorder.replay()


def graphs_wanted() -> bool:
    """Whether steps may be captured: unless ``ECHOQUAD_CUDA_GRAPHS`` is 0."""
    return os.environ.get(SWITCH, "1") != "0"


def capture(
    step: Callable[[TrainingBatch], None],
    batch: TrainingBatch,
    state: Callable[[], State],
    scalars: Callable[[], Sequence[Tensor]],
    make_recorder: Callable[[], Recorder],
) -> CapturedStep | None:
    """Record a step and prove the recording. The state and the default generator are left as they were.

    Parameters
    ----------
    step
        Takes a step with a batch. All that differs between calls must be in the batch, the state or the scalars.
    batch
        Gives the shapes; the recording is proved with it.
    state
        Returns what a step changes. Tensors that the first step makes come last in their role, and are zero before it.
    scalars
        Returns what a step reads beside the batch and is set before each, such as learning rates.
    make_recorder
        Makes a recorder on the batch's device.

    Returns
    -------
    CapturedStep or None
        None, with a warning in the log, where the step cannot be recorded, or the recording does not do what it does.
    """
    try:
        return _proved(step, batch, state, scalars, make_recorder())
    except Exception as error:  # whatever CUDA, a library or an operator refuses: the step works without a graph
        first: BaseException = error
        while first.__context__ is not None:  # CUDA says of everything that follows an error that the capture failed
            first = first.__context__
        reason = str(first).strip().partition("\n")[0] or type(first).__name__
        _log.warning("training steps are not captured in a CUDA graph: %s; training goes on without, slower", reason)
        return None


def _proved(
    step: Callable[[TrainingBatch], None],
    batch: TrainingBatch,
    state: Callable[[], State],
    scalars: Callable[[], Sequence[Tensor]],
    recorder: Recorder,
) -> CapturedStep:
    before, random_state = _copied(state()), recorder.random_state()

    def restore() -> None:
        for role, tensors in state().items():
            known = before.get(role, [])
            for tensor, value in zip(tensors, known, strict=False):
                tensor.copy_(value)
            for tensor in tensors[len(known) :]:
                tensor.zero_()
        recorder.set_random_state(random_state)

    inputs = batch.zeros()
    captured = CapturedStep(recorder, inputs)
    set_before_each = list(scalars())
    values = [value.clone() for value in set_before_each]
    try:
        for value in set_before_each:
            value.zero_()
        for _ in range(_WARM_UP):
            recorder.warm_up(lambda: step(inputs))
        recorder.record(lambda: step(inputs))
        for tensor, value in zip(set_before_each, values, strict=True):
            tensor.copy_(value)
        restore()
        step(batch)
        expected = _copied(state())
        restore()
        captured(batch)
        for role, tensors in state().items():
            changed = _distance(expected[role], before.get(role, []))
            difference = _distance(tensors, expected[role])
            if not difference <= TOLERANCE * changed:  # nor NaN
                raise RuntimeError(f"replayed, it changes the {role} otherwise, by {difference:.3g} of {changed:.3g}")
    finally:
        for tensor, value in zip(set_before_each, values, strict=True):
            tensor.copy_(value)
        restore()
    return captured


def _copied(state: State) -> dict[str, list[Tensor]]:
    return {role: [tensor.detach().clone() for tensor in tensors] for role, tensors in state.items()}


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return the Euclidean distance of two lists of tensors, in float64; what `b` lacks at its end is zero."""
    squares = [(x.double() - y.double()).square().sum() for x, y in zip(a, b, strict=False)]
    squares += [x.double().square().sum() for x in a[len(b) :]]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
