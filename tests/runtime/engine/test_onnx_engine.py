"""The onnxruntime engine: outputs, precisions, and graphs that it refuses."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echoquad_runtime.bundle import bundle
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.manifest import REDUCED_GATE, model_file
from echoquad_runtime.contract import Contract
from echoquad_runtime.devices import execution_providers as providers
from echoquad_runtime.devices.execution_providers import integers_overflow
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime
from echoquad_runtime.devices.session_factory import OpenedSession, open_session
from echoquad_runtime.engine import onnx_engine as session
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.errors import BundleError, BundleTamperedError, UsageError
from echoquad_runtime.verify.verify import verify

Make = Callable[..., Path]


def open_engine(folder: Path, **options: Any) -> OnnxEngine:
    return OnnxEngine(Bundle(folder), device="cpu", **options)


def test_engine_reports_device_precision_and_contract(tiny_bundle: Path) -> None:
    engine = open_engine(tiny_bundle)
    assert (engine.device, engine.precision, engine.note) == ("cpu", "fp32", "")
    assert engine.contract == Bundle(tiny_bundle).contract


def test_engine_reproduces_the_golden_frames(tiny_bundle: Path) -> None:
    from echoquad_runtime.quadrants import frame_quadrants

    golden, engine = Bundle(tiny_bundle).read_golden(), open_engine(tiny_bundle)
    for frame, expected, probabilities in zip(golden.frames, golden.logits, golden.probabilities, strict=True):
        found = engine.infer(frame_quadrants(frame, engine.contract))
        np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-4)
        np.testing.assert_allclose(found[1], probabilities, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 17])
def test_output_shapes_types_and_sums(tiny_bundle: Path, count: int) -> None:
    quadrants = np.random.default_rng(0).integers(0, 256, (count, 1, 32, 32), np.uint8)
    logits, probabilities = open_engine(tiny_bundle).infer(quadrants)
    assert logits.shape == probabilities.shape == (count, 2)
    assert logits.dtype == probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=0, atol=1e-6)


def test_several_classes_and_a_temperature(tmp_path: Path, make_tiny_bundle: Make) -> None:
    engine = open_engine(make_tiny_bundle(tmp_path, classes=("A", "B", "C", "D"), temperature=2.5))
    quadrants = np.random.default_rng(0).integers(0, 256, (5, 1, 32, 32), np.uint8)
    logits, probabilities = engine.infer(quadrants)
    exponentials = np.exp(logits / 2.5)
    np.testing.assert_allclose(probabilities, exponentials / exponentials.sum(axis=1, keepdims=True), atol=1e-6)


def test_requested_precision_runs(tmp_path: Path, make_tiny_bundle: Make) -> None:
    folder = make_tiny_bundle(tmp_path, precisions=("fp32", "int8"))
    assert open_engine(folder, precision="int8").precision == "int8"
    assert open_engine(folder).precision == "fp32"
    with pytest.raises(BundleError, match="it holds no fp16 graph"):
        open_engine(folder, precision="fp16")


def test_threads_and_spinning_are_kept(tiny_bundle: Path) -> None:
    engine = open_engine(tiny_bundle, threads=2, spinning=False)
    assert (engine.threads, engine.spinning) == (2, False)
    assert open_engine(tiny_bundle).spinning is True


@pytest.mark.parametrize("overflow", [False, True])
def test_int8_uses_exact_products_if_fast_ones_overflow(
    tmp_path: Path, tiny_bundle: Path, make_tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch, overflow: bool
) -> None:
    tried: list[bool] = []
    monkeypatch.setattr(providers, "integers_overflow", lambda: tried.append(overflow) or overflow)
    onnx = pytest.importorskip("onnx")
    graph = onnx.load_from_string((tiny_bundle / model_file("fp32")).read_bytes())
    graph.graph.node[0].name = "QuantizeLinear"  # occurs in the bytes of every int8 graph
    folder = make_tiny_bundle(tmp_path, precisions=("fp32", "int8"), graphs={"int8": graph.SerializeToString()})
    key, requested = "session.x64quantprecision", {}
    for precision in ("fp32", "int8"):
        options = open_engine(folder, precision=precision)._session.get_session_options()
        try:
            requested[precision] = options.get_session_config_entry(key)
        except RuntimeError:  # onnxruntime raises this for a missing entry
            requested[precision] = None
    assert requested == {"fp32": None, "int8": "1" if overflow else None}
    assert len(tried) == 1  # a float graph does not run the measurement


def test_integer_overflow_is_measured_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "vnni" in flags or platform.machine().lower() in ("arm64", "aarch64"):
        assert integers_overflow() is False
    saturated = np.full((1, 4), 4 * 32767, np.int32)  # the sum of pairs that saturate in 16 bits
    ort = load_onnxruntime()
    opened = ort.InferenceSession

    class Saturating:
        def __init__(self, *given: Any, **options: Any) -> None:
            assert [item.shape for item in opened(*given, **options).run(None, {"x": np.zeros((1, 8), np.uint8)})] == [
                (1, 4)
            ]

        def run(self, *_: Any) -> list[np.ndarray]:
            return [saturated]

    monkeypatch.setattr(ort, "InferenceSession", Saturating)
    integers_overflow.cache_clear()
    try:
        assert integers_overflow() is True
    finally:
        integers_overflow.cache_clear()


@pytest.fixture
def computes_in(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Simulate OpenVINO with bfloat16 on the CPU; return whether each opened session requested bfloat16."""
    requested: list[bool] = []

    def opens(model: bytes, *, device: str, bfloat16: bool, **options: Any) -> OpenedSession:
        requested.append(bfloat16)
        return open_session(model, device="cpu", **options)

    monkeypatch.setattr(session, "open_session", opens)
    return requested


def test_bf16_runs_the_fp32_graph_in_bfloat16(tmp_path: Path, make_tiny_bundle: Make, computes_in: list[bool]) -> None:
    folder = make_tiny_bundle(tmp_path, precisions=("int8", "fp32"), graphs={"int8": b"never read"})
    engine = OnnxEngine(Bundle(folder), precision="bf16", device="openvino")
    assert engine.precision == "bf16"  # as result rows report it
    assert OnnxEngine(Bundle(folder), precision="fp32", device="openvino").precision == "fp32"
    assert computes_in == [True, False]
    assert Bundle(folder).default_precision == "int8"  # bf16 is never the default


def test_bf16_on_another_device_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"bf16 .*openvino; found device cpu"):
        open_engine(tiny_bundle, precision="bf16")


def test_bf16_needs_the_fp32_graph(tmp_path: Path, make_tiny_bundle: Make) -> None:
    folder = make_tiny_bundle(tmp_path, precisions=("int8",))
    with pytest.raises(BundleError, match="it holds no fp32 graph, only int8"):
        OnnxEngine(Bundle(folder), precision="bf16", device="openvino")


def test_bf16_has_the_gate_of_reduced_precisions(tiny_bundle: Path) -> None:
    from echoquad_export.parity.parity import GATES

    assert Bundle(tiny_bundle).gate("bf16") == REDUCED_GATE
    assert GATES["fp16"].to_dict() == GATES["int8"].to_dict() == REDUCED_GATE


@pytest.mark.usefixtures("computes_in")
def test_verify_applies_the_bf16_gate(tmp_path: Path, make_tiny_bundle: Make) -> None:
    good = verify(make_tiny_bundle(tmp_path / "good"), precision="bf16", device="openvino")
    assert (good.passed, good.precision, good.gate) == (True, "bf16", REDUCED_GATE)
    # Changed decisions are beyond the gate of any precision.
    assert not verify(
        make_tiny_bundle(tmp_path / "bad", graph={"logit_scale": -1.0}), precision="bf16", device="openvino"
    ).passed


OTHER = Contract(classes=("ASD", "NORM"), input_size=32, keep=0.8)


@pytest.mark.parametrize("carried", [OTHER.to_json(), Contract(classes=("A", "B"), input_size=32).to_json()])
def test_graph_with_another_contract_is_refused(tmp_path: Path, make_tiny_bundle: Make, carried: str) -> None:
    folder = make_tiny_bundle(tmp_path, graph={"carried": carried})
    with pytest.raises(BundleError, match="export it again") as caught:
        open_engine(folder)
    assert "\n" not in str(caught.value)
    assert Bundle(folder).contract.sha256[:12] in str(caught.value)
    assert Contract.from_json(carried).sha256[:12] in str(caught.value)


@pytest.mark.parametrize(
    "graph",
    [
        {"input_name": "image"},
        {"output_names": ("scores", "probabilities")},
        {"output_names": ("logits", "softmax")},
        {"input_shape": ["N", 1, 64, 64]},
        {"input_shape": ["N", 1, "H", "W"]},
        {"input_shape": [1, 1, 32, 32]},
        {"input_shape": [4, 1, 32, 32]},
    ],
    ids=["input", "logits", "probabilities", "size", "any size", "one only", "four only"],
)
def test_graph_with_other_inputs_or_outputs_is_refused(
    tmp_path: Path, make_tiny_bundle: Make, graph: dict[str, Any]
) -> None:
    with pytest.raises(BundleError, match=r"the fp32 graph has the inputs and outputs .*; expected ") as caught:
        open_engine(make_tiny_bundle(tmp_path, graph=graph))
    assert "\n" not in str(caught.value)


def test_graph_with_other_classes_is_refused(
    tmp_path: Path, make_tiny_bundle: Make, make_tiny_graph: Callable[..., bytes]
) -> None:
    three, two = Contract(classes=("A", "B", "C"), input_size=32), Contract(classes=("A", "B"), input_size=32)
    model = make_tiny_graph(three, carried=two.to_json())
    with pytest.raises(BundleError, match="inputs and outputs"):
        open_engine(make_tiny_bundle(tmp_path, contract=two, graphs={"fp32": model}))


@pytest.mark.parametrize("model", [b"", b"garbage", bytes(1000)], ids=["empty", "text", "zeros"])
def test_invalid_model_with_a_correct_hash_is_refused(tmp_path: Path, make_tiny_bundle: Make, model: bytes) -> None:
    with pytest.raises(BundleError, match="the fp32 graph is not an ONNX file") as caught:
        open_engine(make_tiny_bundle(tmp_path, graphs={"fp32": model}))
    assert not isinstance(caught.value, BundleTamperedError)
    assert "\n" not in str(caught.value)


def test_changed_model_is_not_loaded(tmp_path: Path, make_tiny_bundle: Make) -> None:
    folder = make_tiny_bundle(tmp_path)
    path = folder / model_file("fp32")
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleTamperedError):
        open_engine(folder)


def test_hashed_bytes_are_the_loaded_bytes(
    tmp_path: Path, make_tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_bundle(tmp_path)
    path, read, swapped = folder / model_file("fp32"), bundle.read_regular, []

    def swap(file: Path, limit: int) -> bytes:
        data = read(file, limit)
        if file == path:
            swapped.append(path.write_bytes(b"swapped after it was read"))
        return data

    monkeypatch.setattr(bundle, "read_regular", swap)
    assert open_engine(folder).infer(np.zeros((1, 1, 32, 32), np.uint8))[0].shape == (1, 2)
    assert len(swapped) == 1


def test_invalid_threads_are_refused(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError):
        open_engine(tiny_bundle, threads=0)
