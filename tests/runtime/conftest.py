"""A stand-in for CUDA: a CPU session with the semantics of onnxruntime's CUDA provider, for machines without a GPU."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from echoquad_runtime.devices import session_factory as devices
from echoquad_runtime.devices.execution_providers import CPU_PROVIDER, CUDA_PROVIDER, create_session
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime

CAPTURING = "cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing"


class CudaStandIn:
    """A simulated CUDA device; each difference from the CPU can be switched off.

    - `copies_at_bind`: a host input is copied to the device when it is bound, and not read again.
    - `late_outputs`: the outputs of a run are in host memory only after they are synchronized.
    - `exclusive_first_run`: during the first run of a shape, the device refuses every other call.

    A captured CUDA graph always reads and writes the memory that it was captured with, whatever is bound later.

    Attributes
    ----------
    refused
        Number of calls that were refused because another thread was capturing.
    runs
        Input shapes of the runs, in order.
    options
        Provider options of each session.
    """

    def __init__(self) -> None:
        self.copies_at_bind = self.late_outputs = self.exclusive_first_run = True
        self.refused = 0
        self.runs: list[tuple[int, ...]] = []
        self.options: list[dict[str, str]] = []
        self._lock = threading.Lock()
        self._calls = 0
        self._capturing = False

    def call(self, *, capturing: bool = False) -> _Call:
        return _Call(self, capturing and self.exclusive_first_run)

    def enter(self, capturing: bool) -> None:
        with self._lock:
            if self._capturing or (capturing and self._calls):
                self.refused += 1
                raise RuntimeError(CAPTURING)
            self._calls += 1
            self._capturing = capturing
        if capturing:
            time.sleep(0.01)  # kernel selection takes time, in which another thread may call

    def leave(self) -> None:
        with self._lock:
            self._calls -= 1
            self._capturing = False


class _Call:
    def __init__(self, device: CudaStandIn, capturing: bool) -> None:
        self._device, self._wants = device, capturing

    def __enter__(self) -> None:
        self._device.enter(self._wants)

    def __exit__(self, *what: object) -> None:
        self._device.leave()


class StandInValue:
    """An OrtValue: a reference to host memory, or a copy in device memory."""

    def __init__(self, array: np.ndarray, device: CudaStandIn | None) -> None:
        self.device = device
        self.array = array if device is None else array.copy()

    def update_inplace(self, array: np.ndarray) -> None:
        assert self.device is not None
        with self.device.call():
            self.array[:] = array

    def numpy(self) -> np.ndarray:
        if self.device is None:
            return self.array
        with self.device.call():
            return self.array.copy()


class StandInBinding:
    def __init__(self, session: StandInSession) -> None:
        self.session = session
        self.inputs: dict[str, np.ndarray] = {}
        self.outputs: dict[str, StandInValue] = {}
        self.pending: dict[str, np.ndarray] = {}

    def bind_ortvalue_input(self, name: str, value: StandInValue) -> None:
        device = self.session.device
        if value.device is None and device.copies_at_bind:
            with device.call():
                self.inputs[name] = value.array.copy()
        else:
            self.inputs[name] = value.array

    def bind_ortvalue_output(self, name: str, value: StandInValue) -> None:
        self.outputs[name] = value

    def synchronize_outputs(self) -> None:
        for name, array in self.pending.items():
            self.outputs[name].array[:] = array
        self.pending = {}


class StandInSession:
    """A CPU session with the semantics of a session on `device`."""

    def __init__(self, session: Any, device: CudaStandIn, provider: str) -> None:
        self._session, self.device, self._provider = session, device, provider
        self._known: set[object] = set()
        self._graphs: dict[str, StandInBinding] = {}

    def get_providers(self) -> list[str]:
        return [self._provider]

    def io_binding(self) -> StandInBinding:
        return StandInBinding(self)

    def run(self, names: Sequence[str] | None, feed: dict[str, np.ndarray], options: object = None) -> list[Any]:
        shape = next(iter(feed.values())).shape
        with self.device.call(capturing=shape not in self._known):
            self._known.add(shape)
            return list(self._session.run(names, feed))

    def run_with_iobinding(self, binding: StandInBinding, options: StandInOptions | None = None) -> None:
        graph = options.entries.get("gpu_graph_id") if options is not None else None
        shape = next(iter(binding.inputs.values())).shape
        key = graph or shape
        with self.device.call(capturing=key not in self._known):
            self._known.add(key)
            self.device.runs.append(shape)
            if graph is not None:
                binding = self._graphs.setdefault(graph, binding)
            outputs = self._session.run(list(binding.outputs), binding.inputs)
            for (name, value), output in zip(binding.outputs.items(), outputs, strict=True):
                if value.device is None and self.device.late_outputs:
                    binding.pending[name] = output
                else:
                    value.array[:] = output


class StandInOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, name: str, value: str) -> None:
        self.entries[name] = value


class StandInOnnxruntime(ModuleType):
    """The onnxruntime package with the CUDA provider."""

    def __init__(self, device: CudaStandIn) -> None:
        super().__init__("onnxruntime")
        self._real = load_onnxruntime()
        values = type("OrtValue", (), {})
        values.ortvalue_from_numpy = staticmethod(  # type: ignore[attr-defined]
            lambda array, kind="cpu", number=0: StandInValue(array, None if kind == "cpu" else device)
        )
        self.OrtValue, self.RunOptions = values, StandInOptions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_available_providers(self) -> list[str]:
        return [CUDA_PROVIDER, CPU_PROVIDER]

    def get_ep_devices(self) -> list[Any]:
        return []


@pytest.fixture
def cuda_stand_in(monkeypatch: pytest.MonkeyPatch) -> CudaStandIn:
    """Replace the device ``cuda`` by a working stand-in and return it."""
    device, cpu = CudaStandIn(), CudaStandIn()
    cpu.copies_at_bind = cpu.late_outputs = cpu.exclusive_first_run = False
    ort = StandInOnnxruntime(device)

    def create(ort: Any, model: bytes, provider: str, **options: Any) -> Any:
        session = create_session(load_onnxruntime(), model, CPU_PROVIDER, threads=options["threads"])
        if provider == CUDA_PROVIDER:
            device.options.append(options["cuda_options"])
        return StandInSession(session, device if provider == CUDA_PROVIDER else cpu, provider)

    monkeypatch.setattr(devices, "cuda_unavailable_reason", lambda: None)
    monkeypatch.setattr(devices, "create_session", create)
    for name in ("echoquad_runtime.devices.session_factory", "echoquad_runtime.engine.io_binding"):
        monkeypatch.setattr(importlib.import_module(name), "load_onnxruntime", lambda: ort)
    return device
