"""IO binding: inference slots that run a batch of quadrants in their caller's memory.

A slot rounds the number of frames up to one of a few buckets, so that a session sees few input shapes. It binds the
input again before each run: onnxruntime copies a bound host input to the GPU when it is *bound*, so a binding that is
made only once would return the result of the first batch for ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from echoquad_runtime.bundle.onnx_header import CAM, INPUT, OUTPUTS, TYPICALITY
from echoquad_runtime.contract import QUADRANTS, Contract
from echoquad_runtime.devices.device_lock import CUDA_LOCK
from echoquad_runtime.devices.execution_providers import CUDA_PROVIDER, quiet_logger
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "BufferBinding",
    "FirstRunLock",
    "FloatArray",
    "InferenceOutput",
    "InferenceSlot",
    "IoBinding",
    "buckets",
    "join_outputs",
    "new_batch",
    "own_position",
]

FloatArray = npt.NDArray[np.float32]

_GRAPH_ID: Final = "gpu_graph_id"


class InferenceOutput(NamedTuple):
    """An engine's output for N frames and C classes.

    Attributes
    ----------
    logits, probabilities
        float32 [N, 4, C], quadrants LA, RA, LV, RV; each row of probabilities sums to 1.
    maps
        float32 [N, 4, C, h, w], class activation maps; None unless requested.
    typicality
        float32 [N, 4], the typicality of each quadrant at its own position, higher is more typical; None if the model
        has no such score.
    """

    logits: FloatArray
    probabilities: FloatArray
    maps: FloatArray | None = None
    typicality: FloatArray | None = None


def join_outputs(outputs: Sequence[InferenceOutput]) -> InferenceOutput:
    """Return the outputs of several runs of one engine as one, frame after frame; without activation maps."""
    scores = [output.typicality for output in outputs if output.typicality is not None]
    return InferenceOutput(
        np.concatenate([output.logits for output in outputs]),
        np.concatenate([output.probabilities for output in outputs]),
        typicality=np.concatenate(scores) if scores else None,
    )


def own_position(scores: FloatArray) -> FloatArray:
    """Return scores of the quadrants of N frames at every position, [4 N, 4], at their own position, [N, 4]."""
    count = len(QUADRANTS)
    return np.ascontiguousarray(scores.reshape(-1, count, count).diagonal(axis1=1, axis2=2))


def buckets(frames: int) -> tuple[int, ...]:
    """Return the batch sizes that a slot runs: the powers of two below `frames`, and `frames` itself."""
    return (*(1 << exponent for exponent in range((frames - 1).bit_length())), frames)


def new_batch(contract: Contract, frames: int) -> npt.NDArray[np.uint8]:
    """Return a zeroed batch for the quadrants of `frames` frames, uint8 [frames, 4, 1, S, S]."""
    return np.zeros((frames, 4, 1, contract.input_size, contract.input_size), np.uint8)


class InferenceSlot(Protocol):
    """Runs one batch at a time."""

    def run(self, batch: npt.NDArray[np.uint8], frames: int) -> InferenceOutput:
        """Run the first `frames` frames of a batch, uint8 [B, 4, 1, S, S], C-contiguous, grey levels 0 to 255.

        The caller owns the output; the next run does not change it.
        """
        ...


class BufferBinding:
    """An inference slot for an engine without IO binding, such as PyTorch.

    Parameters
    ----------
    infer
        Returns logits and probabilities, float32 [N, C], of quadrants, uint8 [N, 1, S, S].
    """

    def __init__(self, infer: Callable[[npt.NDArray[np.uint8]], tuple[FloatArray, FloatArray]]) -> None:
        self._infer = infer

    def run(self, batch: npt.NDArray[np.uint8], frames: int) -> InferenceOutput:
        """Run the engine once; see `InferenceSlot`."""
        logits, probabilities = self._infer(batch[:frames].reshape(-1, *batch.shape[2:]))
        return InferenceOutput(logits.reshape(frames, 4, -1), probabilities.reshape(frames, 4, -1))


class FirstRunLock:
    """Holds the CUDA lock around a session's runs: exclusively for the first run of a shape, otherwise shared.

    It also silences onnxruntime's logger during a first run, in which cuDNN logs every kernel that it rejects as an
    error. Other providers need neither.

    Parameters
    ----------
    provider
        onnxruntime's name of the session's execution provider.
    """

    def __init__(self, provider: str) -> None:
        self._on_cuda = provider == CUDA_PROVIDER
        self._known: set[object] = set()

    @contextlib.contextmanager
    def run(self, shape: object) -> Iterator[None]:
        """Hold the lock for a run; `shape` is any hashable value that identifies the input shape."""
        if not self._on_cuda:
            yield
        elif shape in self._known:
            with CUDA_LOCK.shared():
                yield
        else:
            with CUDA_LOCK.exclusive(), quiet_logger(load_onnxruntime()):
                yield
            self._known.add(shape)

    def allocation(self) -> AbstractContextManager[None]:
        """Hold the lock for an allocation of device or pinned memory."""
        return CUDA_LOCK.exclusive() if self._on_cuda else contextlib.nullcontext()


class IoBinding:
    """An inference slot of an onnxruntime session: it binds outputs once, and inputs before each run.

    On CUDA the outputs are in pinned memory if this onnxruntime can allocate it, so that the device writes to them
    without another copy.

    Parameters
    ----------
    session
        The inference session. Several slots may share one and run concurrently.
    contract
        Defines the input size and the classes.
    frames
        Maximal number of frames B of a run.
    make_error
        Builds the exception for a failed run from its number of quadrants and onnxruntime's exception.
    provider
        onnxruntime's name of the session's execution provider.
    first_runs
        The session's lock for first runs.
    graph_ids
        Generates identifiers of CUDA graphs that are unique in the session; None captures no CUDA graph. A captured
        graph reads and writes device memory at fixed addresses, so each slot needs its own graphs.
    cam
        Height and width of the class activation maps to return; None for none.
    typicality
        Whether the graph computes the typicality score.

    Raises
    ------
    Exception
        Any exception of onnxruntime if memory runs out; its exceptions share no base class.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        contract: Contract,
        frames: int,
        *,
        make_error: Callable[[int, Exception], Exception],
        provider: str,
        first_runs: FirstRunLock,
        graph_ids: itertools.count[int] | None = None,
        cam: tuple[int, int] | None = None,
        typicality: bool = False,
    ) -> None:
        ort = load_onnxruntime()
        size, classes = contract.input_size, len(contract.classes)
        pinned = _pinned_memory(ort) if provider == CUDA_PROVIDER else None
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(OUTPUTS, (frames * 4, classes))
        if typicality:
            shapes[TYPICALITY] = (frames * 4, len(QUADRANTS))
        if cam is not None:
            shapes[CAM] = (frames * 4, classes, *cam)
        self._make_error, self._first_runs, self._buckets = make_error, first_runs, buckets(frames)
        with first_runs.allocation():
            allocated = {name: _allocate(shape, ort, pinned) for name, shape in shapes.items()}
            self._outputs = {name: array for name, (array, _) in allocated.items()}
            self._owners = [owner for _, owner in allocated.values()]
            self._bindings: dict[int, _HostBinding | _CudaGraphBinding] = {}
            for bucket in self._buckets:
                outputs = {name: array[: bucket * 4] for name, array in self._outputs.items()}
                self._bindings[bucket] = (
                    _HostBinding(ort, session, outputs)
                    if graph_ids is None
                    else _CudaGraphBinding(ort, session, (bucket * 4, 1, size, size), outputs, next(graph_ids))
                )

    def run(self, batch: npt.NDArray[np.uint8], frames: int) -> InferenceOutput:
        """Run the smallest bucket that holds `frames` frames, and discard the output of the frames behind them.

        Raises
        ------
        Exception
            The result of `make_error` for onnxruntime's exception, also if an output has another shape or type than
            the bound memory.
        """
        bucket = next(size for size in self._buckets if size >= frames)
        binding = self._bindings[bucket]
        try:
            with self._first_runs.run(bucket if isinstance(binding, _HostBinding) else binding):
                binding.run(batch[:bucket].reshape(-1, *batch.shape[2:]))
        except Exception as error:
            raise self._make_error(4 * bucket, error) from error
        found = {
            name: array[: frames * 4].reshape(frames, 4, *array.shape[1:]).copy()
            for name, array in self._outputs.items()
        }
        logits, probabilities = (found[name] for name in OUTPUTS)
        typicality = own_position(found[TYPICALITY]) if TYPICALITY in found else None
        return InferenceOutput(logits, probabilities, found.get(CAM), typicality)


class _HostBinding:
    """The IO binding of one bucket: the input in the caller's memory, the outputs [N, ...] in host memory."""

    def __init__(
        self, ort: ModuleType, session: onnxruntime.InferenceSession, outputs: dict[str, npt.NDArray[Any]]
    ) -> None:
        self._value, self._session, self._binding = ort.OrtValue.ortvalue_from_numpy, session, session.io_binding()
        for name, array in outputs.items():
            self._binding.bind_ortvalue_output(name, self._value(array))

    def run(self, quadrants: npt.NDArray[np.uint8]) -> None:
        self._binding.bind_ortvalue_input(INPUT, self._value(quadrants))
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()


class _CudaGraphBinding:
    """The IO binding of one bucket for a captured CUDA graph: input and outputs at fixed addresses in device memory."""

    def __init__(
        self,
        ort: ModuleType,
        session: onnxruntime.InferenceSession,
        shape: tuple[int, ...],
        outputs: dict[str, npt.NDArray[Any]],
        graph_id: int,
    ) -> None:
        self._session, self._binding, self._outputs = session, session.io_binding(), outputs
        self._options = ort.RunOptions()
        self._options.add_run_config_entry(_GRAPH_ID, str(graph_id))
        to_device = ort.OrtValue.ortvalue_from_numpy
        self._input = to_device(np.zeros(shape, np.uint8), "cuda", 0)
        self._device_outputs = {name: to_device(array, "cuda", 0) for name, array in outputs.items()}
        self._binding.bind_ortvalue_input(INPUT, self._input)
        for name, value in self._device_outputs.items():
            self._binding.bind_ortvalue_output(name, value)

    def run(self, quadrants: npt.NDArray[np.uint8]) -> None:
        self._input.update_inplace(quadrants)
        self._session.run_with_iobinding(self._binding, self._options)
        self._binding.synchronize_outputs()
        for name, value in self._device_outputs.items():
            self._outputs[name][:] = value.numpy()


def _pinned_memory(ort: ModuleType) -> Any:
    """Return the description of CUDA's pinned memory; None if this onnxruntime does not provide it."""
    memory_type = getattr(getattr(ort, "OrtDeviceMemoryType", None), "HOST_ACCESSIBLE", None)
    if memory_type is None:
        return None
    devices = [device for device in ort.get_ep_devices() if device.ep_name == CUDA_PROVIDER]
    return devices[0].memory_info(memory_type) if devices else None


def _allocate(shape: tuple[int, ...], ort: ModuleType, pinned: Any) -> tuple[FloatArray, Any]:
    """Allocate float32 zeros, in pinned memory if available; return the array and the owner of its memory."""
    if pinned is None:
        return np.zeros(shape, np.float32), None
    owner = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.float32, memory_info=pinned)
    memory = (ctypes.c_float * math.prod(shape)).from_address(owner.data_ptr())
    array: FloatArray = np.ctypeslib.as_array(memory).reshape(shape)
    array[:] = 0
    return array, owner
