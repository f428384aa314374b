"""Lanes: a batch's memory, made once, and its way through an engine.

A worker writes quadrants into its lane and runs it, again and again; nothing is allocated or copied on the way. How
many frames a run takes is rounded up to one of a few buckets, so that no run has a shape that was never run before.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from echoquad_runtime.contract import Contract
from echoquad_runtime.onnx_scan import CAM, INPUT, OUTPUTS
from echoquad_runtime.providers import CUDA_PROVIDER
from echoquad_runtime.wheels import load_onnxruntime

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["BoundLane", "Floats", "Lane", "PlainLane", "buckets", "frames_maps", "replay"]

Floats = npt.NDArray[np.float32]

_GRAPH_ID: Final = "gpu_graph_id"


def buckets(frames: int) -> tuple[int, ...]:
    """Give the numbers of frames that are run: the powers of two below `frames`, and `frames` itself."""
    return (*(1 << exponent for exponent in range((frames - 1).bit_length())), frames)


class Lane(Protocol):
    """What a worker needs: room for a batch's quadrants, and a run over the first of them.

    Attributes
    ----------
    quadrants
        uint8 [B, 4, 1, S, S] to write into, grey levels 0 to 255.
    maps
        float32 [B * 4, C, h, w], class activation maps of the last run's quadrants; None where none are asked for.
    """

    quadrants: npt.NDArray[np.uint8]
    maps: Floats | None

    def run(self, frames: int) -> tuple[Floats, Floats]:
        """Give logits and probabilities, float32 [frames * 4, C], of the first frames; good until the next run."""
        ...


def frames_maps(maps: Floats, frames: int) -> Floats:
    """Copy a lane's maps of its first frames, float32 [frames, 4, C, h, w]: the lane's own are of its last run."""
    return maps[: frames * 4].reshape(frames, 4, *maps.shape[1:]).copy()


class PlainLane:
    """A lane of any engine: what it allocates itself is its own affair."""

    def __init__(
        self, infer: Callable[[npt.NDArray[np.uint8]], tuple[Floats, Floats]], contract: Contract, frames: int
    ) -> None:
        size = contract.input_size
        self.quadrants = np.zeros((frames, 4, 1, size, size), np.uint8)
        self.maps: Floats | None = None
        self._infer = infer

    def run(self, frames: int) -> tuple[Floats, Floats]:
        """Run the engine once; see `Lane`."""
        return self._infer(self.quadrants[:frames].reshape(-1, *self.quadrants.shape[2:]))


class BoundLane:
    """A lane of an onnxruntime session: input and outputs are bound to memory that is made once.

    On CUDA that memory is pinned where this onnxruntime can give such, so that it is copied without another copy.

    Parameters
    ----------
    session
        What runs. Several lanes may share one, and run at the same time.
    contract
        Gives the input size and the classes.
    frames
        Frames B that the lane has room for.
    fault
        Makes what a run raises, of how many quadrants it had and what onnxruntime raised.
    provider
        onnxruntime's name of what the session is on.
    cuda_graphs
        Whether the session captures CUDA graphs: they want memory of the device, at one address for good. Such a
        session has one lane.
    cam
        Height and width of the class activation maps to be given; None for none.

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
        cuda_graphs: bool = False,
        cam: tuple[int, int] | None = None,
    ) -> None:
        ort = load_onnxruntime()
        size, classes = contract.input_size, len(contract.classes)
        pinned = _pinned_memory(ort) if provider == CUDA_PROVIDER else None
        made = [_array((frames, 4, 1, size, size), np.uint8, ort, pinned)]
        made += [_array((frames * 4, classes), np.float32, ort, pinned) for _ in OUTPUTS]
        if cam is not None:
            made.append(_array((frames * 4, classes, *cam), np.float32, ort, pinned))
        (self.quadrants, *answers), self._owners = zip(*made, strict=True)
        self.maps = answers[-1] if cam is not None else None
        self._session, self._answers, self._fault = session, answers, fault
        self._buckets = buckets(frames)
        self._runs: dict[int, _Bound] = {}
        for index, count in enumerate(self._buckets):
            host = [self.quadrants[:count].reshape(-1, 1, size, size), *(array[: count * 4] for array in answers)]
            self._runs[count] = _Bound(ort, session, host, graph=index if cuda_graphs else None)

    def run(self, frames: int) -> tuple[Floats, Floats]:
        """Run the smallest bucket that holds `frames`; what is in the places behind them is computed and left out."""
        bucket = next(count for count in self._buckets if count >= frames)
        try:
            self._runs[bucket].run(self._session)
        except Exception as error:  # also an answer of another shape or type than is bound
            raise self._fault(4 * bucket, error) from error
        logits, probabilities = self._answers[:2]
        return logits[: frames * 4], probabilities[: frames * 4]


class _Bound:
    """One bucket's binding, over views of the lane's arrays: [input, logits, probabilities], and the maps if any."""

    def __init__(
        self,
        ort: ModuleType,
        session: onnxruntime.InferenceSession,
        host: Sequence[npt.NDArray[Any]],
        *,
        graph: int | None,
    ) -> None:
        self._binding, self._options, self._host = session.io_binding(), None, host
        self._device: list[Any] = []
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in host]
        if graph is not None:
            values = self._device = [ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0) for array in host]
            self._options = replay(ort, graph + 1)
        self._binding.bind_ortvalue_input(INPUT, values[0])
        for name, value in zip((*OUTPUTS, CAM), values[1:], strict=False):
            self._binding.bind_ortvalue_output(name, value)

    def run(self, session: onnxruntime.InferenceSession) -> None:
        if not self._device:
            session.run_with_iobinding(self._binding)
            return
        self._device[0].update_inplace(self._host[0])
        session.run_with_iobinding(self._binding, self._options)
        for value, array in zip(self._device[1:], self._host[1:], strict=True):
            array[:] = value.numpy()


def replay(ort: ModuleType, graph: int) -> onnxruntime.RunOptions:
    """Give the options of a run that captures the CUDA graph of this number, then replays it; -1 captures none."""
    options = ort.RunOptions()
    options.add_run_config_entry(_GRAPH_ID, str(graph))
    return options


def _pinned_memory(ort: ModuleType) -> Any:
    """Find the description of CUDA's pinned memory; None where this onnxruntime does not give it out."""
    kind = getattr(getattr(ort, "OrtDeviceMemoryType", None), "HOST_ACCESSIBLE", None)
    if kind is None:
        return None
    devices = [device for device in ort.get_ep_devices() if device.ep_name == CUDA_PROVIDER]
    return devices[0].memory_info(kind) if devices else None


def _array(shape: tuple[int, ...], kind: type, ort: ModuleType, pinned: Any) -> tuple[npt.NDArray[Any], Any]:
    """Make an array of zeros, in pinned memory where there is some; with what owns the memory."""
    if pinned is None:
        return np.zeros(shape, kind), None
    owner = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), kind, memory_info=pinned)
    memory = (ctypes.c_uint8 * (math.prod(shape) * np.dtype(kind).itemsize)).from_address(owner.data_ptr())
    array: npt.NDArray[Any] = np.ctypeslib.as_array(memory).view(kind).reshape(shape)
    array[:] = 0
    return array, owner
