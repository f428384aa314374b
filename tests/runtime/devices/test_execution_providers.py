"""Execution providers: the probe model, and the nodes that fall back to the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from echoquad_runtime.devices import execution_providers as providers
from echoquad_runtime.devices import onnxruntime_loader as wheels
from echoquad_runtime.devices.execution_providers import CPU_PROVIDER, CUDA_PROVIDER, PROBE_MODEL, probe_provider

if not wheels.installed_wheels():
    pytest.skip("onnxruntime is not installed", allow_module_level=True)

FRAME = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)


def test_probe_model_computes_a_convolution() -> None:
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info
    tensor, kind = onnx.helper.make_tensor, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "w", "b"], ["y"])],
        "probe",
        [value("x", kind, [1, 1, 2, 2])],
        [value("y", kind, [1, 1, 2, 2])],
        [tensor("w", kind, [1, 1, 1, 1], [2.0]), tensor("b", kind, [1], [1.0])],
    )
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8, producer_name="echoquad")
    assert onnx.load_model_from_string(PROBE_MODEL) == model
    onnx.checker.check_model(model)
    assert len(PROBE_MODEL) < 400


def test_probe_passes_on_the_cpu() -> None:
    assert probe_provider(CPU_PROVIDER) is None


def test_probe_fails_if_the_session_is_on_another_provider(no_cuda: str) -> None:
    failure = probe_provider(CUDA_PROVIDER)
    assert failure is not None
    assert "\n" not in failure


@pytest.mark.parametrize("answer", [FRAME, np.zeros((1, 1, 3, 3), dtype=np.float32)])
def test_probe_fails_on_wrong_numbers(monkeypatch: pytest.MonkeyPatch, answer: np.ndarray) -> None:
    session = SimpleNamespace(run=lambda *_: [answer])
    monkeypatch.setattr(providers, "create_session", lambda *_, **__: session)
    failure = probe_provider(CPU_PROVIDER)
    assert failure is not None
    assert "expected" in failure


def test_fallback_nodes_lists_operators_on_the_cpu() -> None:
    ort = wheels.load_onnxruntime()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(PROBE_MODEL, options, providers=[CPU_PROVIDER])
    if not hasattr(session, "get_provider_graph_assignment_info"):
        pytest.skip("this onnxruntime does not tell where nodes run")
    message = providers.fallback_nodes(session, CUDA_PROVIDER)
    assert message == "1 of the model's 1 nodes (Conv)"


@pytest.mark.parametrize(("on_cuda", "on_cpu", "is_cuda"), [(3, 0, True), (3, 2, True), (2, 3, False)])
def test_fallback_of_a_minority_of_nodes_is_accepted(on_cuda: int, on_cpu: int, is_cuda: bool) -> None:
    def part(provider: str) -> SimpleNamespace:
        return SimpleNamespace(ep_name=provider, get_nodes=lambda: [SimpleNamespace(op_type="Conv")])

    parts = [part(CUDA_PROVIDER)] * on_cuda + [part(CPU_PROVIDER)] * on_cpu
    session = SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)
    assert (providers.fallback_nodes(session, CUDA_PROVIDER) is None) is is_cuda  # type: ignore[arg-type]
