"""A device for tests without one: a CPU session behind the semantics of onnxruntime's CUDA provider."""

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
    """What a CUDA device does otherwise than the CPU, each semantic to be switched off alone.

    - `copies_at_bind`: a host input is copied to the device when it is bound, and not looked at again.
    - `late_outputs`: what a run answers is in host memory only once the outputs are synchronised.
    - `first_run_alone`: while a shape runs for the first time, every other call to the device is refused.

    A captured CUDA graph always reads and writes the memory that it was captured with, whatever is bound by then.

    Attributes
    ----------
    refused
        How many calls came while another thread was capturing.
    runs
        Input shapes of the runs, in order.
    options
        Of the provider, for each session.
    """

    def __init__(self) -> None:
        self.copies_at_bind = self.late_outputs = self.first_run_alone = True
        self.refused = 0
        self.runs: list[tuple[int, ...]] = []
        self.options: list[dict[str, str]] = []
        self._lock = threading.Lock()
        self._calls = 0
        self._capturing = False

    def call(self, *, capturing: bool = False) -> _Call:
        return _Call(self, capturing and self.first_run_alone)

    def enter(self, capturing: bool) -> None:
        with self._lock:
            if self._capturing or (capturing and self._calls):
                self.refused += 1
                raise RuntimeError(CAPTURING)
            self._calls += 1
            self._capturing = capturing
        if capturing:
            time.sleep(0.01)  # as cuDNN takes its time to choose: another thread has one to call in

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
    """An OrtValue: host memory by reference, or device memory, which is copied to and from."""

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
    """A CPU session that answers as one on `device` does."""

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
            answers = self._session.run(list(binding.outputs), binding.inputs)
            for (name, value), answer in zip(binding.outputs.items(), answers, strict=True):
                if value.device is None and self.device.late_outputs:
                    binding.pending[name] = answer
                else:
                    value.array[:] = answer


class StandInOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, name: str, value: str) -> None:
        self.entries[name] = value


class StandInOnnxruntime(ModuleType):
    """The onnxruntime package, with CUDA among its providers."""

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
    """Make ``cuda`` a stand-in that works, and return it."""
    device, cpu = CudaStandIn(), CudaStandIn()
    cpu.copies_at_bind = cpu.late_outputs = cpu.first_run_alone = False
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
