from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echoquad_runtime.bundle import Bundle, model_file
from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import BundleError, BundleTamperedError, UsageError
from echoquad_runtime.session import OnnxEngine

Make = Callable[..., Path]


def open_engine(folder: Path, **options: Any) -> OnnxEngine:
    return OnnxEngine(Bundle(folder), device="cpu", **options)


def test_it_says_what_it_is(tiny_bundle: Path) -> None:
    engine = open_engine(tiny_bundle)
    assert (engine.device, engine.precision, engine.note) == ("cpu", "fp32", "")
    assert engine.contract == Bundle(tiny_bundle).contract


def test_it_computes_the_golden_answers(tiny_bundle: Path) -> None:
    from echoquad_runtime.quadrants import frame_quadrants

    golden, engine = Bundle(tiny_bundle).read_golden(), open_engine(tiny_bundle)
    for frame, expected, probabilities in zip(golden.frames, golden.logits, golden.probabilities, strict=True):
        found = engine.infer(frame_quadrants(frame, engine.contract))
        np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-4)
        np.testing.assert_allclose(found[1], probabilities, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 17])
def test_shapes_types_and_sums(tiny_bundle: Path, count: int) -> None:
    quadrants = np.random.default_rng(0).integers(0, 256, (count, 1, 32, 32), np.uint8)
    logits, probabilities = open_engine(tiny_bundle).infer(quadrants)
    assert logits.shape == probabilities.shape == (count, 2)
    assert logits.dtype == probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=0, atol=1e-6)


def test_more_classes_and_a_temperature(tmp_path: Path, make_tiny_bundle: Make) -> None:
    engine = open_engine(make_tiny_bundle(tmp_path, classes=("A", "B", "C", "D"), temperature=2.5))
    quadrants = np.random.default_rng(0).integers(0, 256, (5, 1, 32, 32), np.uint8)
    logits, probabilities = engine.infer(quadrants)
    exponentials = np.exp(logits / 2.5)
    np.testing.assert_allclose(probabilities, exponentials / exponentials.sum(axis=1, keepdims=True), atol=1e-6)


def test_the_precision_that_is_asked_for_runs(tmp_path: Path, make_tiny_bundle: Make) -> None:
    folder = make_tiny_bundle(tmp_path, precisions=("fp32", "int8"))
    assert open_engine(folder, precision="int8").precision == "int8"
    assert open_engine(folder).precision == "fp32"
    with pytest.raises(BundleError, match="it holds no fp16 graph"):
        open_engine(folder, precision="fp16")


OTHER = Contract(classes=("ASD", "NORM"), input_size=32, keep=0.8)


@pytest.mark.parametrize(
    "carried",
    ["", OTHER.to_json(), "not json", "[" * 100_000, Contract(classes=("A", "B"), input_size=32).to_json()],
    ids=["none", "other", "garbage", "deep", "classes"],
)
def test_a_graph_of_another_contract_is_refused(tmp_path: Path, make_tiny_bundle: Make, carried: str) -> None:
    folder = make_tiny_bundle(tmp_path, graph={"carried": carried})
    with pytest.raises(BundleError, match="they do not belong together; export it again") as caught:
        open_engine(folder)
    assert "\n" not in str(caught.value)
    assert Bundle(folder).contract.sha256[:12] in str(caught.value)


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
def test_a_graph_of_another_shape_is_refused(tmp_path: Path, make_tiny_bundle: Make, graph: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"the fp32 graph takes and gives .*; expected ") as caught:
        open_engine(make_tiny_bundle(tmp_path, graph=graph))
    assert "\n" not in str(caught.value)


def test_a_graph_with_other_classes_is_refused(
    tmp_path: Path, make_tiny_bundle: Make, make_tiny_graph: Callable[..., bytes]
) -> None:
    three, two = Contract(classes=("A", "B", "C"), input_size=32), Contract(classes=("A", "B"), input_size=32)
    model = make_tiny_graph(three, carried=two.to_json())
    with pytest.raises(BundleError, match="takes and gives"):
        open_engine(make_tiny_bundle(tmp_path, contract=two, graphs={"fp32": model}))


@pytest.mark.parametrize("model", [b"", b"garbage", bytes(1000)], ids=["empty", "text", "zeros"])
def test_a_model_that_is_none_though_its_hash_is_right(tmp_path: Path, make_tiny_bundle: Make, model: bytes) -> None:
    with pytest.raises(BundleError, match=f"refuses the model of {len(model)} bytes") as caught:
        open_engine(make_tiny_bundle(tmp_path, graphs={"fp32": model}))
    assert not isinstance(caught.value, BundleTamperedError)
    assert "\n" not in str(caught.value)


def test_a_changed_model_is_not_loaded(tmp_path: Path, make_tiny_bundle: Make) -> None:
    folder = make_tiny_bundle(tmp_path)
    path = folder / model_file("fp32")
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleTamperedError):
        open_engine(folder)


def test_what_was_hashed_is_what_is_loaded(
    tmp_path: Path, make_tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_bundle(tmp_path)
    path, read = folder / model_file("fp32"), Path.read_bytes

    def swap(self: Path) -> bytes:
        data = read(self)
        if self == path:
            path.write_bytes(b"swapped after it was read")
        return data

    monkeypatch.setattr(Path, "read_bytes", swap)
    assert open_engine(folder).infer(np.zeros((1, 1, 32, 32), np.uint8))[0].shape == (1, 2)


def test_values_that_cannot_be(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError):
        open_engine(tiny_bundle, threads=0)
