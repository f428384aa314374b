"""CUDA without a GPU: on a device with CUDA's semantics, decisions equal the CPU's or an error is raised."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.engine import io_binding
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.engine.slot_pool import SlotPool, infer_in_batches
from echoquad_runtime.errors import BundleError, DeviceUnavailableError, UsageError, VerificationError
from echoquad_runtime.predict.predictor import Prediction, Predictor
from echoquad_runtime.tuning import saved_settings
from echoquad_runtime.tuning.tune import tune
from echoquad_runtime.verify.verify import verify

Make = Callable[..., Path]


def rows(predictor: Predictor, frames: list[np.ndarray]) -> list[tuple[str, tuple[float, ...]]]:
    found = list(predictor.predict_frames(frames))
    assert all(isinstance(one, Prediction) for one in found), found
    return [(one.label, one.probabilities) for one in found if isinstance(one, Prediction)]


@pytest.fixture
def frames(make_frame: Callable[..., np.ndarray]) -> list[np.ndarray]:
    return [make_frame(seed) for seed in range(70)]


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("threads", [1, 6])
def test_predictions_on_cuda_equal_those_on_the_cpu(
    cuda_stand_in: Any, tiny_bundle: Path, frames: list[np.ndarray], threads: int, cuda_graphs: bool
) -> None:
    expected = rows(Predictor(tiny_bundle, device="cpu"), frames)
    assert len({label for label, _ in expected}) == 2
    predictor = Predictor(tiny_bundle, device="cuda", threads=threads, cuda_graphs=cuda_graphs)
    assert (predictor.engine.device, predictor.self_test) == ("cuda", "passed")
    assert rows(predictor, frames) == expected
    assert [(one.label, one.probabilities) for one in map(predictor, frames[:5])] == expected[:5]
    assert predictor.self_test == "passed"
    assert cuda_stand_in.refused == 0


def test_verify_on_cuda_passes(cuda_stand_in: Any, tiny_bundle: Path) -> None:
    found = verify(tiny_bundle, device="cuda", threads=4)
    assert (found.passed, found.device, found.provider) == (True, "cuda", "CUDAExecutionProvider")
    sizes = {shape[0] // 4 for shape in cuda_stand_in.runs}
    assert sizes == {1, 2, 4, 8, 16}  # all buckets of `predict`


# ---------------------------------------------------------------------------------------------- injected faults


def bind_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inject a fault that a GPU once showed: the input is bound only once, before it holds a frame."""
    run = io_binding._HostBinding.run

    def stale(self: Any, quadrants: np.ndarray) -> None:
        if not self._binding.inputs:
            self._binding.bind_ortvalue_input(io_binding.INPUT, self._value(np.zeros_like(quadrants)))
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()

    assert run is not stale
    monkeypatch.setattr(io_binding._HostBinding, "run", stale)


def lag_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inject a fault: each run returns the output of the previous run."""
    run = io_binding._HostBinding.run

    def late(self: Any, quadrants: np.ndarray) -> None:
        kept = {name: value.array.copy() for name, value in self._binding.outputs.items()}
        run(self, quadrants)
        computed = {name: value.array.copy() for name, value in self._binding.outputs.items()}
        for name, value in self._binding.outputs.items():
            value.array[:] = getattr(self, "last", kept)[name]
        self.last = computed

    monkeypatch.setattr(io_binding._HostBinding, "run", late)


def forget_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inject a fault: outputs are read before they are synchronized."""

    def early(self: Any, quadrants: np.ndarray) -> None:
        self._binding.bind_ortvalue_input(io_binding.INPUT, self._value(quadrants))
        self._session.run_with_iobinding(self._binding)

    monkeypatch.setattr(io_binding._HostBinding, "run", early)


def swap_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inject a fault: the outputs of a batch are in reverse order."""
    run = io_binding.IoBinding.run

    def reversed_output(self: Any, batch: np.ndarray, frames: int) -> Any:
        logits, probabilities, maps, _ = run(self, batch, frames)
        return io_binding.InferenceOutput(logits[::-1], probabilities[::-1], maps)

    monkeypatch.setattr(io_binding.IoBinding, "run", reversed_output)


@pytest.mark.parametrize("fault", [bind_once, lag_behind, forget_to_wait, swap_frames], ids=lambda one: one.__name__)
def test_faulty_binding_never_yields_a_prediction(
    cuda_stand_in: Any,
    tiny_bundle: Path,
    frames: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
) -> None:
    fault(monkeypatch)
    assert not verify(tiny_bundle, device="cuda", threads=2).passed
    given: list[object] = []
    with pytest.raises(VerificationError, match="the self-test failed on cuda in fp32"):
        given.extend(Predictor(tiny_bundle, device="cuda", threads=2, concurrent=True).predict_frames(frames))
    assert given == []


@pytest.mark.parametrize("fault", [bind_once, lag_behind, forget_to_wait])
def test_predictor_with_a_faulty_binding_does_not_open(
    cuda_stand_in: Any, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    fault(monkeypatch)
    with pytest.raises(VerificationError, match="the self-test failed on cuda") as caught:
        Predictor(tiny_bundle, device="cuda")
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_stale_input_is_found_even_with_an_unlimited_gate(
    cuda_stand_in: Any, tmp_path: Path, make_tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = {"max_abs_dprobability": 1.0, "max_frame_flip_fraction": 1.0}
    folder = make_tiny_bundle(tmp_path, manifest={"parity": {"fp32": {"gate": gate}}})
    Predictor(folder, device="cuda")
    bind_once(monkeypatch)
    with pytest.raises(VerificationError, match="bitwise equal outputs"):
        Predictor(folder, device="cuda")


def test_slots_of_one_session_capture_separate_cuda_graphs(cuda_stand_in: Any, tiny_bundle: Path) -> None:
    """A CUDA graph replays fixed addresses: with a shared identifier, a slot would return another slot's output."""
    engine = OnnxEngine(Bundle(tiny_bundle), device="cuda", cuda_graphs=True)
    quadrants = np.random.default_rng(5).integers(0, 256, (2, 4, 1, 32, 32), np.uint8)
    expected = OnnxEngine(Bundle(tiny_bundle), device="cpu").infer(quadrants.reshape(-1, 1, 32, 32))[0].reshape(2, 4, 2)
    first, second = engine.open_slot(1), engine.open_slot(1)
    for _ in range(2):
        np.testing.assert_array_equal(first.run(quadrants[:1], 1).logits, expected[:1])
        np.testing.assert_array_equal(second.run(quadrants[1:], 1).logits, expected[1:])


# ---------------------------------------------------------------------------------------------- first runs


def run_concurrently(engine: OnnxEngine, threads: int) -> None:
    pool = SlotPool(engine, 8)
    start = threading.Barrier(threads, timeout=10)

    def work(number: int) -> None:
        batch = pool.new_batch()
        start.wait()
        for count in (1 + number % 8, 8, 3, 1):
            pool.run(batch, count)

    with ThreadPoolExecutor(threads) as workers:
        list(workers.map(work, range(threads)))


def test_first_run_of_a_shape_is_exclusive(cuda_stand_in: Any, tiny_bundle: Path) -> None:
    run_concurrently(OnnxEngine(Bundle(tiny_bundle), device="cuda"), 8)
    assert cuda_stand_in.refused == 0
    assert {shape[0] // 4 for shape in cuda_stand_in.runs} == {1, 2, 4, 8}


def test_stand_in_refuses_calls_during_stream_capture(
    cuda_stand_in: Any, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io_binding.FirstRunLock, "run", lambda self, shape: contextlib.nullcontext())
    with pytest.raises(BundleError, match="not permitted when stream is capturing"):
        run_concurrently(OnnxEngine(Bundle(tiny_bundle), device="cuda"), 8)


# ---------------------------------------------------------------------------------------------- precisions


def test_int8_on_cuda_is_refused_with_a_better_precision(
    cuda_stand_in: Any, tmp_path: Path, make_tiny_bundle: Make
) -> None:
    folder = make_tiny_bundle(tmp_path, precisions=("int8", "fp32", "fp16"))
    with pytest.raises(DeviceUnavailableError, match="int8 is slower there than fp32; do: choose precision fp16"):
        Predictor(folder, device="cuda")
    engine = Predictor(folder, device="auto").engine
    assert (engine.device, engine.precision) == ("cpu", "int8")
    assert engine.note.startswith("on the CPU: CUDA has no integer convolutions")


def test_tf32_runs_the_fp32_graph_on_cuda_only(cuda_stand_in: Any, tmp_path: Path, make_tiny_bundle: Make) -> None:
    folder = make_tiny_bundle(tmp_path, precisions=("fp32", "int8"))
    found = verify(folder, device="cuda", precision="tf32")
    assert (found.passed, found.precision, found.gate["max_abs_dprobability"]) == (True, "tf32", 0.05)
    assert Predictor(folder, device="cuda", precision="tf32").engine.precision == "tf32"
    for device in ("cpu", "auto", "openvino"):
        with pytest.raises(UsageError, match=f"tf32 .*cuda; found device {device}"):
            Predictor(folder, device=device, precision="tf32")  # type: ignore[arg-type]
    assert Bundle(folder).precisions_on("cuda") == ("fp32", "tf32")
    lacking = make_tiny_bundle(tmp_path / "int8", precisions=("int8",))
    with pytest.raises(BundleError, match="it holds no fp32 graph"):
        Predictor(lacking, device="cuda", precision="tf32")


@pytest.mark.parametrize(
    ("wanted", "options"),
    [
        ({}, {"use_tf32": "0"}),
        ({"precision": "tf32"}, {"use_tf32": "1"}),
        ({"nhwc": True}, {"use_tf32": "0", "prefer_nhwc": "1"}),
        ({"cuda_graphs": True}, {"use_tf32": "0", "enable_cuda_graph": "1"}),
    ],
)
def test_cuda_options_reach_the_provider(
    cuda_stand_in: Any, tiny_bundle: Path, wanted: dict[str, Any], options: dict[str, str]
) -> None:
    Predictor(tiny_bundle, device="cuda", **wanted)
    assert cuda_stand_in.options == [options]


def test_tuned_cuda_settings_are_used_by_predict(
    cuda_stand_in: Any, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ECHOQUAD_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(saved_settings, "probe_devices", lambda: {"cpu": None, "cuda": None})
    found = tune(tiny_bundle, device="cuda", seconds=0.1, threads=1)
    assert found.choice is not None
    tried = {(row.config.precision, row.config.cuda_graphs, row.config.nhwc) for row in found.candidates}
    assert tried == {(name, graphs, nhwc) for name in ("fp32", "tf32") for graphs in (0, 1) for nhwc in (0, 1)}
    best = dataclasses.replace(found.choice, cuda_graphs=True, nhwc=True)
    saved_settings.save(Bundle(tiny_bundle), best, goal="latency")
    settings = saved_settings.resolve_settings(Bundle(tiny_bundle))
    assert (settings.tuned, settings.cuda_graphs, settings.nhwc) == (True, True, True)
    assert "on cuda, NHWC, CUDA graphs, 1 thread, one frame at a time" in settings.note


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_parity_on_cuda_equals_the_cpu(cuda_stand_in: Any, tiny_bundle: Path, batch_size: int) -> None:
    quadrants = np.random.default_rng(1).integers(0, 256, (20, 4, 1, 32, 32), np.uint8)
    bundle = Bundle(tiny_bundle)
    expected = infer_in_batches(OnnxEngine(bundle, device="cpu"), quadrants, batch_size)
    found = infer_in_batches(OnnxEngine(bundle, device="cuda"), quadrants, batch_size)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
