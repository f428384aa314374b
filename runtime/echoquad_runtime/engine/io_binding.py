"""IO binding: how a batch of quadrants goes through an engine, and what it answers.

An inference slot runs a batch that lies in memory of its caller. How many frames a run takes is rounded up to one of a
few buckets, so that few shapes are ever run. The input is bound anew before each run: onnxruntime copies a bound host
input to a GPU when it is *bound*, so a binding that is made once answers for the first batch for ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from echoquad_runtime.bundle.onnx_header import CAM, INPUT, OUTPUTS
from echoquad_runtime.contract import Contract
from echoquad_runtime.devices.device_lock import CUDA_LOCK
from echoquad_runtime.devices.execution_providers import CUDA_PROVIDER, quiet_logger
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["Answers", "BufferBinding", "FirstRuns", "FloatArray", "InferenceSlot", "IoBinding", "buckets", "new_batch"]

FloatArray = npt.NDArray[np.float32]

_GRAPH_ID: Final = "gpu_graph_id"


class Answers(NamedTuple):
    """What an engine answers for N frames of C classes.

    Attributes
    ----------
    logits, probabilities
        float32 [N, 4, C], quadrants in the contract's order; a row of probabilities sums to 1.
    maps
        float32 [N, 4, C, h, w], class activation maps; None where none are asked for.
    """

    logits: FloatArray
    probabilities: FloatArray
    maps: FloatArray | None = None


def buckets(frames: int) -> tuple[int, ...]:
    """Return the numbers of frames that are run: the powers of two below `frames`, and `frames` itself."""
    return (*(1 << exponent for exponent in range((frames - 1).bit_length())), frames)


def new_batch(contract: Contract, frames: int) -> npt.NDArray[np.uint8]:
    """Return memory for the quadrants of `frames` frames, uint8 [frames, 4, 1, S, S], all zero."""
    return np.zeros((frames, 4, 1, contract.input_size, contract.input_size), np.uint8)


class InferenceSlot(Protocol):
    """Runs one batch at a time."""

    def run(self, batch: npt.NDArray[np.uint8], frames: int) -> Answers:
        """Run the first `frames` frames of a batch, uint8 [B, 4, 1, S, S], C-contiguous, grey levels 0 to 255.

        The answers are the caller's: the next run does not change them.
        """
        ...


class BufferBinding:
    """An inference slot of any engine, by its function on arrays.

    Parameters
    ----------
    infer
        Returns logits and probabilities, float32 [N, C], of quadrants, uint8 [N, 1, S, S].
    """

    def __init__(self, infer: Callable[[npt.NDArray[np.uint8]], tuple[FloatArray, FloatArray]]) -> None:
        self._infer = infer

    def run(self, batch: npt.NDArray[np.uint8], frames: int) -> Answers:
        """Run the engine once; see `InferenceSlot`."""
        logits, probabilities = self._infer(batch[:frames].reshape(-1, *batch.shape[2:]))
        return Answers(logits.reshape(frames, 4, -1), probabilities.reshape(frames, 4, -1))


class FirstRuns:
    """Keeps the first run of each shape of a session alone on its device, and onnxruntime's logger silent in it.

    On CUDA, cuDNN tries kernels in that run and logs those that do not apply as errors, although the answer is right.
    Other providers need neither.

    Parameters
    ----------
    provider
        onnxruntime's name of what the session is on.
    """

    def __init__(self, provider: str) -> None:
        self._on_cuda = provider == CUDA_PROVIDER
        self._known: set[object] = set()

    @contextlib.contextmanager
    def run(self, shape: object) -> Iterator[None]:
        """Hold the device as a run of this shape must; `shape` is anything hashable that tells shapes apart."""
        if not self._on_cuda:
            yield
        elif shape in self._known:
            with CUDA_LOCK.shared():
                yield
        else:
            with CUDA_LOCK.alone(), quiet_logger(load_onnxruntime()):
                yield
            self._known.add(shape)

    def allocation(self) -> AbstractContextManager[None]:
        """Hold the device as an allocation must."""
        return CUDA_LOCK.alone() if self._on_cuda else contextlib.nullcontext()


class IoBinding:
    """An inference slot of an onnxruntime session: outputs are bound to memory that is made once, inputs at each run.

    On CUDA the outputs' memory is pinned where this onnxruntime can allocate such memory, so that the device writes it
    without another copy.

    Parameters
    ----------
    session
        What runs. Several slots may share one, and run at the same time.
    contract
        Gives the input size and the classes.
    frames
        Frames B that a run takes at most.
    fault
        Makes the exception for a failed run from its number of quadrants and from what onnxruntime raised.
    provider
        onnxruntime's name of what the session is on.
    first_runs
        Of the session.
    graph_ids
        Numbers for CUDA graphs that no other slot of the session has; None captures none. A captured graph reads and
        writes device memory at the addresses that it was captured with, so each slot needs graphs of its own.
    cam
        Height and width of the class activation maps to be returned; None for none.

    Raises
    ------
    Exception
        Whatever onnxruntime raises where there is no memory; its exceptions share no base.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        contract: Contract,
        frames: int,
        *,
        fault: Callable[[int, Exception], Exception],
        provider: str,
        first_runs: FirstRuns,
        graph_ids: itertools.count[int] | None = None,
        cam: tuple[int, int] | None = None,
    ) -> None:
        ort = load_onnxruntime()
        size, classes = contract.input_size, len(contract.classes)
        pinned = _pinned_memory(ort) if provider == CUDA_PROVIDER else None
        shapes: list[tuple[int, ...]] = [(frames * 4, classes) for _ in OUTPUTS]
        if cam is not None:
            shapes.append((frames * 4, classes, *cam))
        self._fault, self._first_runs, self._buckets = fault, first_runs, buckets(frames)
        with first_runs.allocation():
            self._outputs, self._owners = zip(*(_array(shape, ort, pinned) for shape in shapes), strict=True)
            self._runs: dict[int, _HostBinding | _GraphBinding] = {}
            for count in self._buckets:
                outputs = [array[: count * 4] for array in self._outputs]
                self._runs[count] = (
                    _HostBinding(ort, session, outputs)
                    if graph_ids is None
                    else _GraphBinding(ort, session, (count * 4, 1, size, size), outputs, next(graph_ids))
                )

    def run(self, batch: npt.NDArray[np.uint8], frames: int) -> Answers:
        """Run the smallest bucket that holds `frames`; frames of the batch behind them are computed and left out.

        Raises
        ------
        Exception
            What `fault` makes of onnxruntime's exception, also of an answer of another shape or type than is bound.
        """
        bucket = next(count for count in self._buckets if count >= frames)
        bound = self._runs[bucket]
        try:
            with self._first_runs.run(bucket if isinstance(bound, _HostBinding) else bound):
                bound.run(batch[:bucket].reshape(-1, *batch.shape[2:]))
        except Exception as error:
            raise self._fault(4 * bucket, error) from error
        logits, probabilities, *maps = (
            array[: frames * 4].reshape(frames, 4, *array.shape[1:]).copy() for array in self._outputs
        )
        return Answers(logits, probabilities, maps[0] if maps else None)


class _HostBinding:
    """One bucket's binding: the input wherever the caller has it, the outputs in host memory, [N, ...] each."""

    def __init__(self, ort: ModuleType, session: onnxruntime.InferenceSession, outputs: list[npt.NDArray[Any]]) -> None:
        self._value, self._session, self._binding = ort.OrtValue.ortvalue_from_numpy, session, session.io_binding()
        for name, array in zip((*OUTPUTS, CAM), outputs, strict=False):
            self._binding.bind_ortvalue_output(name, self._value(array))

    def run(self, quadrants: npt.NDArray[np.uint8]) -> None:
        self._binding.bind_ortvalue_input(INPUT, self._value(quadrants))
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()


class _GraphBinding:
    """One bucket's binding for a captured CUDA graph: input and outputs at fixed addresses in device memory."""

    def __init__(
        self,
        ort: ModuleType,
        session: onnxruntime.InferenceSession,
        shape: tuple[int, ...],
        outputs: list[npt.NDArray[Any]],
        graph: int,
    ) -> None:
        self._session, self._binding, self._outputs = session, session.io_binding(), outputs
        self._options = ort.RunOptions()
        self._options.add_run_config_entry(_GRAPH_ID, str(graph))
        on_device = ort.OrtValue.ortvalue_from_numpy
        self._input = on_device(np.zeros(shape, np.uint8), "cuda", 0)
        self._answers = [on_device(array, "cuda", 0) for array in outputs]
        self._binding.bind_ortvalue_input(INPUT, self._input)
        for name, value in zip((*OUTPUTS, CAM), self._answers, strict=False):
            self._binding.bind_ortvalue_output(name, value)

    def run(self, quadrants: npt.NDArray[np.uint8]) -> None:
        self._input.update_inplace(quadrants)
        self._session.run_with_iobinding(self._binding, self._options)
        self._binding.synchronize_outputs()
        for value, array in zip(self._answers, self._outputs, strict=True):
            array[:] = value.numpy()


def _pinned_memory(ort: ModuleType) -> Any:
    """Find the description of CUDA's pinned memory; None where this onnxruntime does not give it out."""
    kind = getattr(getattr(ort, "OrtDeviceMemoryType", None), "HOST_ACCESSIBLE", None)
    if kind is None:
        return None
    devices = [device for device in ort.get_ep_devices() if device.ep_name == CUDA_PROVIDER]
    return devices[0].memory_info(kind) if devices else None


def _array(shape: tuple[int, ...], ort: ModuleType, pinned: Any) -> tuple[FloatArray, Any]:
    """Allocate float32 zeros, in pinned memory where there is some; return them with what owns the memory."""
    if pinned is None:
        return np.zeros(shape, np.float32), None
    owner = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.float32, memory_info=pinned)
    memory = (ctypes.c_float * math.prod(shape)).from_address(owner.data_ptr())
    array: FloatArray = np.ctypeslib.as_array(memory).reshape(shape)
    array[:] = 0
    return array, owner
